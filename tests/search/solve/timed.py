"""Times of blocks in which 8 bits are quick and every other type is slow."""

from __future__ import annotations

from autodistill.estimates.block_times import PARTS, BlockTimes, Pass, Time, key_of, part_weights
from autodistill.hardware.machine import cores
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import TYPES


def quick_in_8_bits(device: str, spec: ModelSpec, context: int) -> BlockTimes:
    """Return times of a device where each part of a layer, and the head, take a millisecond in 8 bits."""
    nothing = Time(seconds=0.0, spread=0.0)
    parts = {kind: Time(seconds=1e-3 if kind == "q8_0" else 1.0, spread=0.0) for kind in TYPES}
    caches = dict.fromkeys(("f16", "q8_0", "q4_0"), nothing)
    one = Pass(tokens=context, constant=nothing, parts=dict.fromkeys(PARTS, parts), cache=caches, each=caches, slow=1.0)
    return BlockTimes(
        key=key_of(device, spec, context, cores()),
        weights=part_weights(spec),
        decode=one,
        prompt=one,
        widths=(),
        layers=2,
        doubts=(),
        time="2026-11-29T10:00:00+00:00",
    )

"""Times of blocks: sums against sums by hand, what they do not cover, and damaged or foreign tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.advisor.describe import deployment_named, shape
from autodistill.errors import InputError
from autodistill.estimates.block_times import (
    ATTENTION,
    FFN_IN,
    FFN_OUT,
    HEAD,
    BlockTimes,
    Pass,
    Time,
    Width,
    keep_times,
    kept_times,
    key_of,
    liked_multiple,
    part_weights,
    times_file,
)
from autodistill.estimates.fit import latencies
from autodistill.estimates.speed import limit_seconds
from autodistill.hardware.budget import DeviceBudget, LatencyLimit
from autodistill.hardware.catalog import listed
from autodistill.hardware.machine import cores
from autodistill.models.config import resized
from autodistill.strategy.deployment import Deployment

SPEC = shape({"layers": 3, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 128, "vocab": 500}, tied=True).spec
CONTEXT = 1000
Q8 = deployment_named("gguf-q8_0")
TPOT = LatencyLimit(quantity="tpot", percentile=50, seconds=1.0, streams=1)


def one_pass(tokens: int = 512, **more: Any) -> Pass:
    """Return a pass in round seconds: 1 for attention, 10 and 20 for the FFN, 100 for the head; half in 4 bits."""

    def both(seconds: float) -> dict[str, Time]:
        return {kind: Time(seconds=share * seconds, spread=0.1) for kind, share in (("q8_0", 1.0), ("q4_0", 0.5))}

    fields: dict[str, Any] = {
        "tokens": tokens,
        "constant": Time(seconds=7.0, spread=0.0),
        "parts": {ATTENTION: both(1.0), FFN_IN: both(10.0), FFN_OUT: both(20.0), HEAD: both(100.0)},
        "cache": {"f16": Time(seconds=0.0, spread=0.0), "q8_0": Time(seconds=0.5, spread=0.0)},
        "each": {"f16": Time(seconds=1e-3, spread=0.0), "q8_0": Time(seconds=3e-3, spread=0.0)},
        "slow": 1.25,
    }
    return Pass(**(fields | more))


def table(device: str = "a box", **more: Any) -> BlockTimes:
    fields: dict[str, Any] = {
        "key": key_of(device, SPEC, CONTEXT, cores()),
        "weights": part_weights(SPEC),
        "decode": one_pass(),
        "prompt": one_pass(each={kind: Time(seconds=0.0, spread=0.0) for kind in ("f16", "q8_0")}),
        "widths": (Width(neurons=96, kind="q8_0", decode=0.2, decode_spread=0.01, prompt=0.0, prompt_spread=0.0),),
        "layers": 3,
        "doubts": (),
        "time": "2026-11-29T10:00:00+00:00",
    }
    return BlockTimes(**(fields | more))


def test_a_model_takes_the_sum_of_its_blocks() -> None:
    times = table()
    far = CONTEXT - 512
    assert times.seconds(SPEC, Q8, times.decode, 512) == pytest.approx(7 + 3 * (1 + 10 + 20) + 100)
    assert times.seconds(SPEC, Q8, times.decode, CONTEXT) == pytest.approx(7 + 3 * 31 + 100 + 3 * far * 1e-3)
    # A gate (128 x 64) is half of the matrices that read the FFN's inputs. Queries (64 x 64) are a third of attention,
    # which has 64 x 64 twice and 32 x 64 twice.
    types = {"layers.0.mlp.gate_proj": "q4_0", "layers.1.self_attn.q_proj": "q4_0", "embeddings": "q4_0"}
    mixed = replace(Q8, types=tuple(sorted(types.items())), cache_type_k="q8_0")
    saved = 10 / 2 / 2 + 1 / 3 / 2 + 100 / 2
    cache = 3 * (0.5 / 2 + far * (1e-3 + 3e-3) / 2)
    assert times.seconds(SPEC, mixed, times.decode, CONTEXT) == pytest.approx(7 + 3 * 31 + 100 - saved + cache)
    # Half of the FFN takes half of its time, and a layer less saves a layer's time.
    narrow = resized(SPEC, range(2), ffn_width=64)
    assert times.seconds(narrow, Q8, times.decode, 512) == pytest.approx(7 + 2 * (1 + 15) + 100)


def test_an_untied_head_alone_is_multiplied_by() -> None:
    untied = shape({"layers": 3, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 128, "vocab": 500}).spec
    assert (
        part_weights(untied)
        == part_weights(SPEC)
        == {
            ATTENTION: 64 * (64 + 32 + 32 + 64),
            FFN_IN: 2 * 128 * 64,
            FFN_OUT: 64 * 128,
            HEAD: 500 * 64,
        }
    )


def test_limits_are_compared_with_the_table_where_it_speaks_of_them_and_with_the_roofline_elsewhere() -> None:
    device = next(one for one in listed() if not one.discrete and "llama.cpp" in one.runtimes)
    times = table(device.name)
    late, many = replace(TPOT, percentile=95), replace(TPOT, streams=2)
    first = replace(TPOT, quantity="ttft")
    budget = DeviceBudget(memory_bytes=10**9, context=CONTEXT, device=device, latency=(TPOT, late, first, many))
    found = latencies(SPEC, Q8, budget, times)
    token = 7 + 3 * 31 + 100 + 3 * (CONTEXT - 512) * 1e-3
    assert [found[one] for one in (TPOT, late, first)] == pytest.approx([token, 1.25 * token, 7 + 3 * 31 + 100])
    assert found[many] == limit_seconds(SPEC, Q8, device, many, context=CONTEXT)
    # Types that were not timed, another context, and no table.
    other = deployment_named("gguf-q5_1")
    for deployment, context, given in ((other, CONTEXT, times), (Q8, 900, times), (Q8, CONTEXT, None)):
        placed = replace(budget, context=context, latency=(TPOT,))
        (seconds,) = latencies(SPEC, deployment, placed, given).values()
        assert seconds == limit_seconds(SPEC, deployment, device, TPOT, context=context)


def test_what_was_kept_is_read_and_found_by_its_dimensions_alone(tmp_path: Path) -> None:
    path = keep_times(tmp_path, table())
    assert path.parent == tmp_path / "devices"
    assert kept_times(tmp_path, "a box", SPEC, CONTEXT) == table()
    shallow = resized(SPEC, range(2), ffn_width=64)
    assert kept_times(tmp_path, "a box", shallow, CONTEXT) == table()
    wider = resized(SPEC, width=96)
    for device, spec, context in (("b box", SPEC, CONTEXT), ("a box", SPEC, 900), ("a box", wider, CONTEXT)):
        assert kept_times(tmp_path, device, spec, context) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("decode", "slow"), None),
        (("decode", "slow"), "fast"),
        (("prompt", "head", "q8_0", "seconds"), True),
        (("prompt", "head"), {"q8_0": 1.0}),
        (("decode", "tokens"), 0),
        (("weights", "attention"), -1),
        (("widths",), [{"neurons": 3}]),
        (("widths", 0, "neurons"), "many"),
        (("decode",), []),
        ((), {}),
    ],
)
def test_a_damaged_table_is_refused_in_a_line(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    path = keep_times(tmp_path, table())
    data = json.loads(path.read_text())
    inner = data
    for name in place[:-1]:
        inner = inner[name]
    if place:
        inner[place[-1]] = value
    path.write_text(json.dumps(data if place else value))
    with pytest.raises(
        InputError, match=r"holds no whole times of blocks .*: remove it, and .* MODEL --blocks"
    ) as said:
        kept_times(tmp_path, "a box", SPEC, CONTEXT)
    assert "\n" not in str(said.value)


def test_a_cut_off_or_foreign_table_is_refused_in_a_line(tmp_path: Path) -> None:
    path = keep_times(tmp_path, table())
    other = times_file(tmp_path, key_of("b box", SPEC, CONTEXT, cores()))
    other.write_text(path.read_text())
    with pytest.raises(InputError, match=r"holds times of other blocks \(another device\): remove it"):
        kept_times(tmp_path, "b box", SPEC, CONTEXT)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="holds no whole times of blocks"):
        kept_times(tmp_path, "a box", SPEC, CONTEXT)


def width(neurons: int, decode: float = 0.0, prompt: float = 0.0, spread: float = 0.0) -> Width:
    return Width(neurons=neurons, kind="q8_0", decode=decode, decode_spread=spread, prompt=prompt, prompt_spread=spread)


def test_the_liked_multiple_is_the_least_from_which_on_nothing_is_slow() -> None:
    assert liked_multiple(()) is None
    assert liked_multiple((width(1056), width(1088), width(1152))) == 32
    assert liked_multiple((width(1056, prompt=0.2), width(1088), width(1152))) == 64
    assert liked_multiple((width(1056), width(1088, decode=0.2), width(1152))) == 128
    # Differences within the noise of rounds do not count as slow.
    assert liked_multiple((width(1056, decode=0.2, spread=0.3), width(1088))) == 32


def test_a_deployment_of_another_runtime_is_not_spoken_of() -> None:
    times = table()
    plain = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
    graph = replace(Q8, runtime="onnxruntime")
    assert [times.limit_seconds(SPEC, one, TPOT, context=CONTEXT) for one in (plain, graph)] == [None, None]


def test_a_student_with_fewer_heads_is_not_spoken_of() -> None:
    """Its cache takes less time than that of the model that was timed."""
    spec = shape({"layers": 3, "width": 64, "heads": 2, "kv_heads": 2, "ffn": 128, "vocab": 500}, tied=True).spec
    times = table(key=key_of("a box", spec, CONTEXT, cores()), weights=part_weights(spec))
    half = resized(spec, heads=1, kv_heads=1)
    assert times.limit_seconds(spec, Q8, TPOT, context=CONTEXT) is not None
    assert times.limit_seconds(half, Q8, TPOT, context=CONTEXT) is None

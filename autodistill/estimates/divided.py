"""The part of a model that each of several devices holds if its matrices are divided over them."""

from __future__ import annotations

import math
from collections.abc import Callable

from autodistill.models.families import FAMILIES, Axis, get_family
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.quantization.grids import Grid
from autodistill.quantization.scheme import QuantizationScheme

_DIVIDED = frozenset({Axis.VOCABULARY, Axis.QUERIES, Axis.KEYS, Axis.FUSED, Axis.FFN})


def indivisible(spec: ModelSpec, processes: int) -> str:
    """Return why a model's matrices cannot be divided over `processes` processes, or "" if they can."""
    if spec.experts or spec.architecture not in FAMILIES:
        return f"models of {spec.architecture} are not divided"
    for what, count in (("attention heads", spec.heads), ("key-value heads", spec.kv_heads)):
        if count % processes:
            return f"its {count} {what} do not divide over {processes}"
    return ""


def part_weights(spec: ModelSpec, tensor: TensorSpec, processes: int) -> int:
    """Return how many weights of a tensor the first of several processes holds: one more if they do not divide evenly.

    Args:
        spec: A model that can be divided.
        tensor: One of its tensors. Every process holds norms whole, and biases that are added to sums.
        processes: Number of processes.
    """
    axes = get_family(spec.architecture).axes(tensor.name)
    sizes = (-(-size // processes) if axis in _DIVIDED else size for axis, size in zip(axes, tensor.shape, strict=True))
    return math.prod(sizes)


def part_bytes(spec: ModelSpec, processes: int, width: Callable[[TensorSpec], int]) -> int:
    """Return the memory of one process's weights, where `width` gives the bytes of each weight of a tensor."""
    return sum(width(tensor) * part_weights(spec, tensor, processes) for tensor in spec.tensors)


def splits(spec: ModelSpec, scheme: QuantizationScheme, processes: int) -> bool:
    """Return whether a division cuts through weights that share a scale: then no process could find that scale."""

    def cut(tensor: TensorSpec) -> bool:
        """Return whether one process's part of a tensor ends within a group."""
        grid, last = scheme.storage(tensor), get_family(spec.architecture).axes(tensor.name)[-1]
        if last not in _DIVIDED or not isinstance(grid, Grid):
            return False
        together = grid.block_size or grid.group(tensor.shape[-1])
        return -(-tensor.shape[-1] // processes) % together != 0

    return processes > 1 and any(map(cut, spec.tensors))

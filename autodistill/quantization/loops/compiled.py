"""Shared parts of the loops over groups: compilation, access to the memory of tensors, and threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodistill.quantization.grids import Grid

Array: TypeAlias = npt.NDArray[Any]

SIDE_BY_SIDE = 64
"""Groups that are searched at the same time, each in a column of a table in the nearest cache."""
# For the bits of a float32: the shift to its upper half, which is a bfloat16; what is added to round to it, and the
# last bit of that half; all bits except the sign; and infinity. The last is a bfloat16 that is NaN.
_UPPER, _HALF_ULP, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_SIZE, _INFINITY, _NAN = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC0)
_ZERO, _TWICE = np.float32(0.0), np.float32(2.0)
# Smallest number of weights for which another thread is worth waking.
_LEAST_PART = 2**16


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function on its first call, and keep the machine code on disk if possible."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile one function, without a cache if no folder can hold one."""
        # With this error model, divisions by 0 follow IEEE 754.
        settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"} | options
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:
            return numba.njit(**settings)(function)

    return made


@compiled()
def upper_half(bits: np.uint32) -> np.uint32:
    """Return the bfloat16 part of a float32, rounded to nearest with ties to even."""
    if (bits & _SIZE) > _INFINITY:
        return _NAN
    return (bits + _HALF_ULP + ((bits >> _UPPER) & _ONE)) >> _UPPER


@compiled()
def code_near(step: np.float32, table: Array, low: np.float32) -> np.float32:
    """Return the code nearest to a step, as `k_quants.nearest_codes` does, except that NaN gets the first code."""
    place = (step - low) * _TWICE
    place = place if place > _ZERO else _ZERO
    last = np.float32(len(table) - 1)
    return table[np.int64(last if place > last else place)]


@compiled()
def bounds(columns: Array, lowest: Array, highest: Array) -> None:
    """Write the smallest and the largest weight of each column."""
    lowest[:] = columns[0]
    highest[:] = columns[0]
    for i in range(1, len(columns)):
        for j in range(SIDE_BY_SIDE):
            weight = columns[i, j]
            lowest[j] = weight if weight < lowest[j] else lowest[j]
            highest[j] = weight if weight > highest[j] else highest[j]


def table_of(grid: Grid) -> Array | None:
    """Return the table of a grid's codebook that `code_near` reads, or None if the grid has no codebook."""
    return grid.nearest if grid.codebook else None


class _Memory:
    """A tensor's own memory, in the form that numpy expects."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # keeps the memory alive as long as an array uses it
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": kind.str,
            "shape": tuple(tensor.shape),
            "strides": tuple(kind.itemsize * step for step in tensor.stride()),
        }


def array_of(tensor: Tensor) -> Array:
    """Return an array that shares a tensor's memory. After `Tensor.numpy` that memory could never be freed."""
    return np.asarray(_Memory(tensor))


def groups_of(tensor: Tensor, size: int) -> Array:
    """Return a tensor's groups as an array, [groups, size]."""
    return array_of(tensor.detach().view(-1, size))


def flat(tensor: Tensor | None) -> Array | None:
    """Return a tensor as an array in one dimension, or None for None."""
    return None if tensor is None else array_of(tensor.detach().reshape(-1))


def by_type(tensor: Tensor, size: int) -> tuple[Array | None, Array | None]:
    """Return a tensor's groups, first as float32 or second as the 16 bits of bfloat16. The other one is None."""
    if tensor.dtype == torch.bfloat16:
        return None, groups_of(tensor.view(torch.uint16), size)
    return groups_of(tensor, size), None


def over_threads(loop: Callable[..., None], *arrays: Array | None, constants: tuple[Any, ...] = ()) -> None:
    """Run a loop over groups, the first dimension of all arrays, in as many threads as torch uses."""
    count = max(len(array) for array in arrays if array is not None)
    weights = max(array.size for array in arrays if array is not None)
    parts = min(torch.get_num_threads(), count, max(1, weights // _LEAST_PART))
    if parts < 2:
        loop(*arrays, *constants)
        return
    length = math.ceil(count / parts)
    running = [
        _threads(parts).submit(
            loop, *(None if array is None else array[start : start + length] for array in arrays), *constants
        )
        for start in range(0, count, length)
    ]
    for part in running:
        part.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="grid-loops")

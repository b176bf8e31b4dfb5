"""Scales by importance on a CPU, in loops compiled by numba: all tries of a group run while it is in the cache.

They do what `weighted_scales` does operation by operation. They add sums in another order, so if two tries are equally
good, either may win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autodistill.quantization.grids import Grid
from autodistill.quantization.k_quants import LEAST_POWER
from autodistill.quantization.loops.compiled import (
    SIDE_BY_SIDE,
    Array,
    array_of,
    bounds,
    compiled,
    over_threads,
    upper_half,
)
from autodistill.quantization.packing import BF16_EPSILON

# What is stored in addition to a code, as a number, because compiled loops have no names.
_NOTHING, _MINIMUM, _ZERO_POINT = range(3)
_OFFSETS = {"none": _NOTHING, "minimum": _MINIMUM, "zero_point": _ZERO_POINT}
# What a scale is rounded to: nothing, because the block's grid comes later, or the type in which it is stored.
_FREE, _HALF, _BRAIN, _POWER = range(4)
_TYPES = {"f16": _HALF, "bf16": _BRAIN, "e8m0": _POWER}
_ZERO, _ONE, _ENDLESS = np.float32(0.0), np.float32(1.0), np.float32(math.inf)
# For float16: the smallest number with all its digits, the spacing of numbers below it, the inverse of that spacing,
# and the smallest number that is rounded to infinity. For the bits of a float32: how many are rounded away, just less
# than half of the last kept one, the mask of the kept ones, the value 1, the shift to bfloat16, and infinity.
_NORMAL, _UNIT, _UNITS, _TOO_LARGE = (
    np.float32(2.0**-14),
    np.float32(2.0**-24),
    np.float32(2.0**24),
    np.float32(65520),
)
_LOST, _BELOW_HALF, _BITS, _FIRST = np.uint32(13), np.uint32(0xFFF), np.uint32(0xFFFFE000), np.uint32(1)
_UPPER, _INFINITY = np.uint32(16), np.uint32(0x7F800000)
_EPSILON, _LEAST = np.float32(BF16_EPSILON), np.float32(LEAST_POWER)


@compiled()
def _as_half(value: np.float32) -> np.float32:
    """Round a float32 to a value of float16, with ties to even."""
    size = value if value > _ZERO else -value
    bits = np.float32(value).view(np.uint32)
    large = np.uint32((bits + _BELOW_HALF + ((bits >> _LOST) & _FIRST)) & _BITS).view(np.float32)
    large = large if size < _TOO_LARGE else value * _ENDLESS
    return np.rint(value * _UNITS) * _UNIT if size < _NORMAL else large


@compiled()
def _as_brain(value: np.float32) -> np.float32:
    """Round a float32 to a value of bfloat16, with ties to even. 0 becomes the smallest scale of compressed-tensors."""
    found = np.uint32(upper_half(np.float32(value).view(np.uint32)) << _UPPER).view(np.float32)
    return _EPSILON if found == _ZERO else found


@compiled()
def _round_scales(scales: Array, offsets: Array, stored: int, beside: int, low: np.float32, high: np.float32) -> None:
    """Round scales and offsets to what a file stores one by one, as `weighted_scales._stored` does."""
    if stored == _HALF:
        for j in range(SIDE_BY_SIDE):
            scales[j] = _as_half(scales[j])
        if beside == _MINIMUM:
            for j in range(SIDE_BY_SIDE):
                offsets[j] = _as_half(offsets[j])
    elif stored == _BRAIN:
        for j in range(SIDE_BY_SIDE):
            scales[j] = _as_brain(scales[j])
    elif stored == _POWER:
        for j in range(SIDE_BY_SIDE):
            scales[j] = scales[j] if scales[j] > _LEAST else _LEAST
    if beside == _ZERO_POINT:
        for j in range(SIDE_BY_SIDE):
            offset = offsets[j] if offsets[j] > low else low
            offsets[j] = offset if offset < high else high


@compiled()
def _inverted(scales: Array, factor: np.float32, inverses: Array) -> None:
    for j in range(SIDE_BY_SIDE):
        scale = scales[j] * factor
        inverses[j] = _ZERO if scale == _ZERO else _ONE / scale


@compiled()
def _code(step: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Round a step to a code; NaN stays NaN."""
    code = np.rint(step)
    code = low if code < low else code
    return high if code > high else code


@compiled()
def _on_codebook(columns: Array, i: int, inverses: Array, middles: Array, steps: Array, codes: Array) -> None:
    """Write the nearest codes of a codebook, as `k_quants.nearest_codes` does, except that NaN gets the first code.

    Each middle lies between two codes and has the step from the lower code to the higher one. The first entry holds the
    smallest code instead.
    """
    for j in range(SIDE_BY_SIDE):
        steps[j] = columns[i, j] * inverses[j]
        codes[j] = middles[0, 1]
    for k in range(1, len(middles)):
        middle, rise = middles[k, 0], middles[k, 1]
        for j in range(SIDE_BY_SIDE):
            codes[j] += rise if steps[j] >= middle else _ZERO


# A product and a sum may be one operation.
@compiled(fastmath={"contract"})
def _write_errors(
    columns: Array,
    counts: Array,
    scales: Array,
    offsets: Array,
    inverses: Array,
    beside: int,
    low: np.float32,
    high: np.float32,
    middles: Array,
    left: Array,
) -> None:
    """Write the weighted squared error under scales and offsets; NaN becomes infinity."""
    steps, codes = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    _inverted(scales, _ONE, inverses)
    left[:] = _ZERO
    for i in range(len(columns)):
        count = counts[i]
        if len(middles):
            _on_codebook(columns, i, inverses, middles, steps, codes)
            for j in range(SIDE_BY_SIDE):
                error = codes[j] * scales[j] - columns[i, j]
                left[j] += error * error * count
        elif beside == _NOTHING:
            for j in range(SIDE_BY_SIDE):
                error = _code(columns[i, j] * inverses[j], low, high) * scales[j] - columns[i, j]
                left[j] += error * error * count
        elif beside == _MINIMUM:
            for j in range(SIDE_BY_SIDE):
                above = columns[i, j] - offsets[j]
                error = _code(above * inverses[j], low, high) * scales[j] - above
                left[j] += error * error * count
        else:
            for j in range(SIDE_BY_SIDE):
                code = _code(columns[i, j] * inverses[j] + offsets[j], low, high)
                error = (code - offsets[j]) * scales[j] - columns[i, j]
                left[j] += error * error * count
    for j in range(SIDE_BY_SIDE):
        left[j] = left[j] if left[j] == left[j] else _ENDLESS


@compiled(fastmath={"contract"})
def _refit(
    columns: Array,
    counts: Array,
    scales: Array,
    offsets: Array,
    inverses: Array,
    beside: int,
    low: np.float32,
    high: np.float32,
    middles: Array,
    factor: np.float32,
    bounded: bool,
    sums: Array,
    fitted: Array,
    moved: Array,
) -> None:
    """Do `weighted_scales._refitted` for the codes under scales times a factor."""
    steps, codes = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    _inverted(scales, factor, inverses)
    sums[:] = _ZERO
    total = _ZERO
    for i in range(len(columns)):
        count = counts[i]
        total += count
        if len(middles):
            _on_codebook(columns, i, inverses, middles, steps, codes)
            for j in range(SIDE_BY_SIDE):
                sums[0, j] += codes[j] * codes[j] * count
                sums[1, j] += codes[j] * columns[i, j] * count
        elif beside == _NOTHING:
            for j in range(SIDE_BY_SIDE):
                weight = columns[i, j]
                code = _code(weight * inverses[j], low, high)
                sums[0, j] += code * code * count
                sums[1, j] += code * weight * count
        elif beside == _MINIMUM:
            for j in range(SIDE_BY_SIDE):
                weight = columns[i, j]
                code = _code((weight - offsets[j]) * inverses[j], low, high)
                sums[0, j] += code * code * count
                sums[1, j] += code * weight * count
                sums[2, j] += code * count
                sums[3, j] += weight * count
        else:
            for j in range(SIDE_BY_SIDE):
                weight = columns[i, j]
                code = _code(weight * inverses[j] + offsets[j], low, high) - offsets[j]
                sums[0, j] += code * code * count
                sums[1, j] += code * weight * count
    for j in range(SIDE_BY_SIDE):
        squares, products = sums[0, j], sums[1, j]
        scale, offset = products / (squares if squares > _ZERO else _ONE), offsets[j]
        if beside == _MINIMUM:
            of_codes, weights = sums[2, j], sums[3, j]
            spread = squares * total - of_codes * of_codes
            slope = (products * total - of_codes * weights) / (spread if spread > _ZERO else _ONE)
            offset = (weights - slope * of_codes) / total
            scale = scale if bounded and offset > _ZERO else slope
            offset = _ZERO if bounded and offset > _ZERO else offset
        fitted[j] = scale
        moved[j] = offset


@compiled()
def _better(
    scales: Array, offsets: Array, left: Array, best_scales: Array, best_offsets: Array, best_left: Array
) -> None:
    for j in range(SIDE_BY_SIDE):
        better = left[j] < best_left[j]
        best_scales[j] = scales[j] if better else best_scales[j]
        best_offsets[j] = offsets[j] if better else best_offsets[j]
        best_left[j] = left[j] if better else best_left[j]


@compiled()
def _try(
    number: int,
    tries: Array,
    lowest: Array,
    highest: Array,
    beside: int,
    stored: int,
    bounded: bool,
    low: np.float32,
    levels: np.float32,
    scales: Array,
    offsets: Array,
) -> None:
    """Do one of the tries of `weighted_scales._tries`."""
    first, second = tries[number, 0], tries[number, 1]
    if beside == _NOTHING:
        for j in range(SIDE_BY_SIDE):
            largest = highest[j] if highest[j] > -lowest[j] else lowest[j]
            scales[j] = largest * first if stored == _POWER else largest / first
        return
    for j in range(SIDE_BY_SIDE):
        step = (highest[j] - lowest[j]) / levels
        least = lowest[j] + first * step
        scale = (highest[j] - second * step - least) / levels
        scales[j] = scale
        if beside == _MINIMUM:
            offsets[j] = _ZERO if bounded and least > _ZERO else least
        else:
            offset = low - least / scale
            offsets[j] = np.rint(offset) if offset == offset else _ZERO


@compiled()
def _in_columns(weights: Array, start: int, place: int, columns: Array) -> None:
    """Copy one group of several rows into columns. Columns beyond the last row repeat the first of these rows."""
    rows, _, size = weights.shape
    for j in range(SIDE_BY_SIDE):
        row = start + j if start + j < rows else start
        for i in range(size):
            columns[i, j] = weights[row, place, i]


@compiled()
def _ends(columns: Array, beside: int, bounded: bool, power: bool, lowest: Array, highest: Array) -> None:
    """Write the smallest and the largest weight of groups, with which the tries begin."""
    bounds(columns, lowest, highest)
    for j in range(SIDE_BY_SIDE):
        if beside == _ZERO_POINT or bounded:
            lowest[j] = _ZERO if lowest[j] > _ZERO else lowest[j]
        if beside == _ZERO_POINT:
            highest[j] = _ZERO if highest[j] < _ZERO else highest[j]
    if power:
        # The largest power of two within the larger magnitude.
        bits = highest.view(np.uint32)
        for j in range(SIDE_BY_SIDE):
            highest[j] = highest[j] if highest[j] > -lowest[j] else -lowest[j]
            bits[j] = bits[j] & _INFINITY
        lowest[:] = _ZERO


@compiled()
def _search(
    weights: Array,
    scales: Array,
    offsets: Array,
    counts: Array,
    tries: Array,
    moves: Array,
    beside: int,
    stored: int,
    bounded: bool,
    low: np.float32,
    high: np.float32,
    levels: np.float32,
    middles: Array,
) -> None:
    rows, places, size = weights.shape
    columns = np.empty((size, SIDE_BY_SIDE), np.float32)
    scale, offset = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    left, inverse = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    lowest, highest = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    best_scale, best_offset = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    best_left, sums = np.empty(SIDE_BY_SIDE, np.float32), np.empty((4, SIDE_BY_SIDE), np.float32)
    for start in range(0, rows, SIDE_BY_SIDE):
        for place in range(places):
            _in_columns(weights, start, place, columns)
            count = counts[place]
            for j in range(SIDE_BY_SIDE):
                row = start + j if start + j < rows else start
                best_scale[j], best_offset[j] = scales[row, place], offsets[row, place]
            _write_errors(columns, count, best_scale, best_offset, inverse, beside, low, high, middles, best_left)
            _ends(columns, beside, bounded, stored == _POWER, lowest, highest)
            for number in range(len(tries)):
                _try(number, tries, lowest, highest, beside, stored, bounded, low, levels, scale, offset)
                _round_scales(scale, offset, stored, beside, low, high)
                _write_errors(columns, count, scale, offset, inverse, beside, low, high, middles, left)
                _better(scale, offset, left, best_scale, best_offset, best_left)
            for number in range(len(moves)):
                _refit(
                    *(columns, count, best_scale, best_offset, inverse, beside, low, high, middles, moves[number]),
                    *(bounded, sums, scale, offset),
                )
                _round_scales(scale, offset, stored, beside, low, high)
                _write_errors(columns, count, scale, offset, inverse, beside, low, high, middles, left)
                _better(scale, offset, left, best_scale, best_offset, best_left)
            for j in range(min(SIDE_BY_SIDE, rows - start)):
                scales[start + j, place], offsets[start + j, place] = best_scale[j], best_offset[j]


@compiled()
def _errors(
    weights: Array,
    scales: Array,
    offsets: Array,
    found: Array,
    counts: Array,
    beside: int,
    low: np.float32,
    high: np.float32,
    middles: Array,
) -> None:
    rows, places, size = weights.shape
    columns, inverse = np.empty((size, SIDE_BY_SIDE), np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    scale, offset = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    left = np.empty(SIDE_BY_SIDE, np.float32)
    for start in range(0, rows, SIDE_BY_SIDE):
        for place in range(places):
            _in_columns(weights, start, place, columns)
            for j in range(SIDE_BY_SIDE):
                row = start + j if start + j < rows else start
                scale[j], offset[j] = scales[row, place], offsets[row, place]
            _write_errors(columns, counts[place], scale, offset, inverse, beside, low, high, middles, left)
            for j in range(min(SIDE_BY_SIDE, rows - start)):
                found[start + j, place] = left[j]


def search(
    groups: Tensor,
    counts: Tensor,
    grid: Grid,
    scales: Tensor,
    offsets: Tensor | None,
    tries: Sequence[tuple[float, float]],
    moves: Sequence[float],
    *,
    stored: bool,
) -> None:
    """Replace scales and offsets with the best ones found; the given ones are among the tries.

    Args:
        groups: float32 [out, groups, size].
        counts: float32 [groups, size], the weight of each column's squared error.
        grid: The grid.
        scales, offsets: float32 [out, groups]; offsets are None on a symmetric grid.
        tries, moves: As in `weighted_scales`.
        stored: Whether scales are rounded to what a file stores one by one; otherwise they stay unrounded.
    """
    over_threads(
        _search,
        array_of(groups),
        array_of(scales),
        array_of(torch.zeros_like(scales) if offsets is None else offsets),
        constants=(
            array_of(counts),
            np.array(tries, dtype=np.float32),
            np.array(moves, dtype=np.float32),
            *(_OFFSETS[grid.offset], _TYPES[grid.scale_dtype] if stored else _FREE),
            bool(grid.block_size) and grid.offset == "minimum",
            *(np.float32(bound) for bound in (grid.qmin, grid.qmax, grid.levels)),
            _middles(grid),
        ),
    )


def errors(groups: Tensor, counts: Tensor, grid: Grid, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Return each group's weighted squared error under scales and offsets, float32 [out, groups].

    Args:
        groups, counts, grid, scales, offsets: As for `search`.
    """
    found = torch.empty_like(scales)
    over_threads(
        _errors,
        array_of(groups),
        array_of(scales),
        array_of(torch.zeros_like(scales) if offsets is None else offsets),
        array_of(found),
        constants=(
            array_of(counts),
            _OFFSETS[grid.offset],
            *(np.float32(bound) for bound in (grid.qmin, grid.qmax)),
            _middles(grid),
        ),
    )
    return found


def _middles(grid: Grid) -> Array:
    """Return the middles between a codebook's codes, for `_on_codebook`; empty if the grid has no codebook."""
    held = np.unique(np.array(grid.codebook, dtype=np.float32))
    lower = np.concatenate([held[:1] - held[:1], held[:-1]])
    return np.stack([(held + lower) / 2, held - lower], axis=1)

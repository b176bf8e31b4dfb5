"""Scales and minima of super-blocks and codebooks on a CPU: all tries of a group run while it is in the nearest cache.

The loops do the arithmetic of `k_quants`. That module works operation by operation if this one cannot be imported.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from autodistill.quantization.grids import Grid
from autodistill.quantization.k_quants import tries
from autodistill.quantization.loops.compiled import (
    SIDE_BY_SIDE,
    Array,
    array_of,
    bounds,
    code_near,
    compiled,
    groups_of,
    over_threads,
    table_of,
)

_INFINITY = np.uint32(0x7F800000)  # the bits of an infinite float32
_ZERO, _WHOLE, _ENDLESS = np.float32(0.0), np.float32(1.0), np.float32(math.inf)


@compiled()
def _in_columns(weights: Array, start: int, columns: Array) -> None:
    """Copy some groups into columns. Columns beyond the last group repeat the first of these groups."""
    count, size = weights.shape
    for j in range(SIDE_BY_SIDE):
        group = start + j if start + j < count else start
        for i in range(size):
            columns[i, j] = weights[group, i]


@compiled()
def _add_halves(rows: Array) -> None:
    """Add the halves of the rows, then halves of these, until the first row is the total: the order of `k_quants`."""
    half = len(rows) // 2
    while half > 0:
        for i in range(half):
            for j in range(SIDE_BY_SIDE):
                rows[i, j] = rows[i, j] + rows[i + half, j]
        half //= 2


@compiled()
def _code_sums(
    columns: Array,
    scales: Array,
    minima: Array,
    low: np.float32,
    high: np.float32,
    table: Array | None,
    codes: Array,
    squares: Array,
    products: Array,
) -> None:
    """Write the sums of the codes, of their squares and of their products with the weights into the first rows."""
    for i in range(len(columns)):
        for j in range(SIDE_BY_SIDE):
            weight = columns[i, j]
            code = (weight - minima[j]) / scales[j]
            if table is None:
                code = np.rint(code)
                code = low if code < low else code
                code = high if code > high else code
            else:
                code = code_near(code, table, low)
            codes[i, j] = code
            squares[i, j] = code * code
            products[i, j] = code * weight
    _add_halves(codes)
    _add_halves(squares)
    _add_halves(products)


@compiled()
def _nearest_minimum(
    weights: Array,
    minima: Array,
    codes_sums: Array,
    squares_sums: Array,
    products_sums: Array,
    factors: Array,
    shifts: Array,
    per_step: np.float32,
    low: np.float32,
    high: np.float32,
) -> None:
    """Do `k_quants._search_minimum`, operation by operation."""
    count, size = weights.shape
    columns, codes = np.empty((size, SIDE_BY_SIDE), np.float32), np.empty((size, SIDE_BY_SIDE), np.float32)
    squares, products = np.empty_like(columns), np.empty_like(columns)
    total, squared = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    lowest, step = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    bases, divisors = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    best = np.empty((5, SIDE_BY_SIDE), np.float32)
    number, share = np.float32(size), np.float32(1.0) / np.float32(size)
    for start in range(0, count, SIDE_BY_SIDE):
        _in_columns(weights, start, columns)
        for i in range(size):
            for j in range(SIDE_BY_SIDE):
                codes[i, j] = columns[i, j]
                squares[i, j] = columns[i, j] * columns[i, j]
        _add_halves(codes)
        _add_halves(squares)
        total[:] = codes[0]
        squared[:] = squares[0]
        bounds(columns, lowest, step)
        for j in range(SIDE_BY_SIDE):
            lowest[j] = _ZERO if lowest[j] > _ZERO else lowest[j]
            step[j] = (step[j] - lowest[j]) * per_step
        for cut in range(len(factors)):
            for j in range(SIDE_BY_SIDE):
                scale = step[j] * factors[cut]
                divisors[j] = _ENDLESS if scale == _ZERO else scale
                bases[j] = lowest[j] + step[j] * shifts[cut]
            _code_sums(columns, divisors, bases, low, high, None, codes, squares, products)
            for j in range(SIDE_BY_SIDE):
                of_codes, of_squares, of_products = codes[0, j], squares[0, j], products[0, j]
                spread = of_squares * number - of_codes * of_codes
                scale = (of_products * number - of_codes * total[j]) / (spread if spread > _ZERO else _WHOLE)
                minimum = (total[j] - scale * of_codes) * share
                if minimum > _ZERO:
                    scale = of_products / (of_squares if of_squares > _ZERO else _WHOLE)
                    minimum = _ZERO
                left = squared[j] - scale * of_products - minimum * total[j]
                if cut == 0 or left < best[0, j]:
                    best[0, j] = left
                    best[1, j] = minimum
                    best[2, j] = of_codes
                    best[3, j] = of_squares
                    best[4, j] = of_products
        for j in range(min(SIDE_BY_SIDE, count - start)):
            minima[start + j] = best[1, j]
            codes_sums[start + j] = best[2, j]
            squares_sums[start + j] = best[3, j]
            products_sums[start + j] = best[4, j]


@compiled()
def _nearest_symmetric(
    weights: Array,
    scales: Array,
    factors: Array,
    per_step: np.float32,
    low: np.float32,
    high: np.float32,
    table: Array | None,
    power: bool,
) -> None:
    """Do `k_quants._search_symmetric`, operation by operation."""
    count, size = weights.shape
    columns, codes = np.empty((size, SIDE_BY_SIDE), np.float32), np.empty((size, SIDE_BY_SIDE), np.float32)
    squares, products = np.empty_like(columns), np.empty_like(columns)
    lowest, step = np.empty(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    zeros, divisors = np.zeros(SIDE_BY_SIDE, np.float32), np.empty(SIDE_BY_SIDE, np.float32)
    bits = step.view(np.uint32)
    best = np.empty((2, SIDE_BY_SIDE), np.float32)
    for start in range(0, count, SIDE_BY_SIDE):
        _in_columns(weights, start, columns)
        bounds(columns, lowest, step)
        for j in range(SIDE_BY_SIDE):
            step[j] = step[j] if step[j] > -lowest[j] else lowest[j]
        if power:
            for j in range(SIDE_BY_SIDE):
                bits[j] = bits[j] & _INFINITY
        for j in range(SIDE_BY_SIDE):
            step[j] = step[j] * per_step
        for cut in range(len(factors)):
            for j in range(SIDE_BY_SIDE):
                scale = step[j] * factors[cut]
                divisors[j] = _ENDLESS if scale == _ZERO else scale
            _code_sums(columns, divisors, zeros, low, high, table, codes, squares, products)
            for j in range(SIDE_BY_SIDE):
                of_squares, of_products = squares[0, j], products[0, j]
                if power:
                    scale = step[j] * factors[cut]
                    gain = scale * of_products
                    gain = gain + gain - scale * scale * of_squares
                else:
                    scale = of_products / (of_squares if of_squares > _ZERO else _WHOLE)
                    gain = scale * of_products
                left = -gain
                if cut == 0 or left < best[0, j]:
                    best[0, j] = left
                    best[1, j] = scale
        for j in range(min(SIDE_BY_SIDE, count - start)):
            scales[start + j] = best[1, j]


def nearest(groups: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Return the nearest codes' scales, or minima and sums, as `k_quants.fitted` expects them: float32 [groups] each.

    Args:
        groups: float32 [groups, group].
        grid: A grid of super-blocks or with a codebook.
    """
    found = torch.empty((1 if grid.symmetric else 4, len(groups)))
    factors, shifts = np.array(tries(grid), dtype=np.float32).T.copy()
    over_threads(
        _nearest_symmetric if grid.symmetric else _nearest_minimum,
        groups_of(groups, grid.group_size),
        *array_of(found),
        constants=(
            *((factors,) if grid.symmetric else (factors, shifts)),
            np.float32(1 / grid.divisor),
            np.float32(grid.qmin),
            np.float32(grid.qmax),
            *((table_of(grid), grid.scale_dtype == "e8m0") if grid.symmetric else ()),
        ),
    )
    return found.unbind()

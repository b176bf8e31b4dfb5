"""Fake quantisation of a matrix on a CPU in one pass over memory: loops compiled by numba.

They do the arithmetic of `rounding` and `fake_quantize`, which do it operation by operation wherever this cannot be
imported or the weights are not on a CPU. Every loop is over the weights of one group, which stay in the nearest cache.
"""

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
from autodistill.quantization.group_scales import Steps
from autodistill.quantization.k_quants import tries

Array: TypeAlias = npt.NDArray[Any]

# The ways of rounding, as numbers: within compiled loops there are no names.
_HALF_UP, _HALF_AWAY, _HALF_EVEN = range(3)
_ROUNDINGS = {"half_up": _HALF_UP, "half_away": _HALF_AWAY, "half_even": _HALF_EVEN}
# Of a float32's bits: the upper half, which is a bfloat16; what is added to round them; all but the sign; those of
# infinity; and of a bfloat16 that is no number.
_UPPER, _HALF_ULP, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_SIZE, _INFINITY, _NAN = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC0)
# The largest number of 32 bits, and where its sign lies.
_MOST, _SIGN = np.int32(0x7FFFFFFF), np.int32(31)
_ZERO, _HALF, _WHOLE, _ENDLESS = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(math.inf)
_TWICE = np.float32(2.0)
_BELOW_HALF = np.float32(0.5 - 2.0**-25)
# Groups of a super-block's grid that are searched side by side, each in a column of a table in the nearest cache.
_SIDE_BY_SIDE = 64
# Weights below which further threads are not worth waking.
_LEAST_PART = 2**16


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function on its first call, and keep the machine code on disk if possible."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile one function; without a cache where no folder can hold it."""
        # Divisions by 0 give what IEEE 754 says.
        settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"} | options
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError:
            return numba.njit(**settings)(function)

    return made


@compiled()
def _extremes(weights: Array, lowest: Array, highest: Array) -> None:
    for group in range(len(weights)):
        # As integers of the same order, of which the extremes are found several at once: below 0 that of floats is the
        # other way round.
        least, most = _MOST, -_MOST
        for i in range(weights.shape[1]):
            number = weights[group, i]
            number = number ^ ((number >> _SIGN) & _MOST)
            least = min(least, number)
            most = max(most, number)
        lowest[group] = least ^ ((least >> _SIGN) & _MOST)
        highest[group] = most ^ ((most >> _SIGN) & _MOST)


@compiled()
def upper_half(bits: np.uint32) -> np.uint32:
    """Return the bfloat16 part of a float32, rounded to nearest with ties to even."""
    if (bits & _SIZE) > _INFINITY:
        return _NAN
    return (bits + _HALF_ULP + ((bits >> _UPPER) & _ONE)) >> _UPPER


@compiled()
def code_near(step: np.float32, table: Array, low: np.float32) -> np.float32:
    """As `k_quants.nearest_codes`; what is no number has the first code."""
    place = (step - low) * _TWICE
    place = place if place > _ZERO else _ZERO
    last = np.float32(len(table) - 1)
    return table[np.int64(last if place > last else place)]


@compiled()
def _values(
    weights: Array,
    factors: Array,
    scales: Array,
    minima: Array | None,
    zero_points: Array | None,
    bases: Array | None,
    inside: Array | None,
    out: Array | None,
    short: Array | None,
    inverse: bool,
    rounding: int,
    low: np.float32,
    high: np.float32,
    reach_low: np.float32,
    reach_high: np.float32,
    table: Array | None,
    rounded: bool,
) -> None:
    count, size = weights.shape
    steps = np.empty(size, np.float32)
    bits = steps.view(np.uint32)
    for group in range(count):
        factor, scale = factors[group], scales[group]
        if minima is None:
            for i in range(size):
                steps[i] = weights[group, i]
        else:
            for i in range(size):
                steps[i] = weights[group, i] - minima[group]
        if inverse:
            for i in range(size):
                steps[i] = steps[i] * factor
        else:
            for i in range(size):
                steps[i] = steps[i] / factor
        if zero_points is not None:
            for i in range(size):
                steps[i] = steps[i] + zero_points[group]
        if inside is not None:
            for i in range(size):
                inside[group, i] = (steps[i] >= reach_low) & (steps[i] <= reach_high)
        # Comparisons are such that what is no number stays none.
        if table is not None:
            for i in range(size):
                steps[i] = code_near(steps[i], table, low) if steps[i] == steps[i] else steps[i]
        elif rounding == _HALF_UP:
            span = high - low
            for i in range(size):
                code = np.floor(steps[i] + (_HALF - low))
                code = _ZERO if code < _ZERO else code
                steps[i] = (span if code > span else code) + low
        elif rounding == _HALF_AWAY:
            for i in range(size):
                code = steps[i] + (_BELOW_HALF if steps[i] > _ZERO else -_BELOW_HALF)
                code = -high if code < -high else code
                steps[i] = np.trunc(high if code > high else code)
        else:
            for i in range(size):
                code = low if steps[i] < low else steps[i]
                steps[i] = np.rint(high if code > high else code)
        if zero_points is not None:
            for i in range(size):
                steps[i] = steps[i] - zero_points[group]
        for i in range(size):
            # A code of 0 is never -0.
            steps[i] = (steps[i] + _ZERO) * scale
        if bases is not None:
            for i in range(size):
                steps[i] = steps[i] + bases[group]
        if short is not None:
            for i in range(size):
                short[group, i] = np.uint16(upper_half(bits[i]))
        if out is not None:
            if rounded:
                for i in range(size):
                    bits[i] = upper_half(bits[i]) << _UPPER
            for i in range(size):
                out[group, i] = steps[i]


# The order of a sum is free.
@compiled(fastmath={"reassoc", "nsz"})
def _learned_gradients(
    weights: Array,
    incoming: Array | None,
    short: Array | None,
    divisors: Array,
    minima: Array | None,
    zero_points: Array | None,
    out: Array,
    sums: Array,
    low: np.float32,
    high: np.float32,
) -> None:
    count, size = weights.shape
    arriving, steps = np.empty(size, np.float32), np.empty(size, np.float32)
    bits = arriving.view(np.uint32)
    for group in range(count):
        divisor = divisors[group]
        zero_point = _ZERO if zero_points is None else zero_points[group]
        # `out` may be what arrives.
        if incoming is not None:
            for i in range(size):
                arriving[i] = incoming[group, i]
        if short is not None:
            for i in range(size):
                bits[i] = np.uint32(short[group, i]) << _UPPER
        if minima is None:
            for i in range(size):
                steps[i] = weights[group, i] / divisor
        else:
            for i in range(size):
                steps[i] = (weights[group, i] - minima[group]) / divisor
        total = _ZERO
        for i in range(size):
            step = steps[i] + zero_point
            passed = _ZERO if (step < low) | (step > high) else arriving[i]
            code = low if step < low else step
            code = np.rint(high if code > high else code) - zero_point
            out[group, i] = passed
            total += code * arriving[i] - passed * (step - zero_point)
        sums[group] = total


@compiled()
def _stop_clipped(incoming: Array | None, short: Array | None, inside: Array, out: Array) -> None:
    count, size = out.shape
    arriving = np.empty(size, np.float32)
    bits = arriving.view(np.uint32)
    for group in range(count):
        if incoming is not None:
            for i in range(size):
                arriving[i] = incoming[group, i]
        if short is not None:
            for i in range(size):
                bits[i] = np.uint32(short[group, i]) << _UPPER
        for i in range(size):
            out[group, i] = arriving[i] * np.float32(inside[group, i])


@compiled()
def _scaled_codes(
    codes: Array, scales: Array, minima: Array | None, zero_points: Array | None, out: Array | None, short: Array | None
) -> None:
    count, size = codes.shape
    shown = np.empty(size, np.float32)
    bits = shown.view(np.uint32)
    for group in range(count):
        scale = scales[group]
        zero_point = _ZERO if zero_points is None else zero_points[group]
        for i in range(size):
            shown[i] = (np.float32(codes[group, i]) - zero_point) * scale
        if minima is not None:
            for i in range(size):
                shown[i] = shown[i] + minima[group]
        if short is not None:
            for i in range(size):
                short[group, i] = np.uint16(upper_half(bits[i]))
        if out is not None:
            for i in range(size):
                out[group, i] = shown[i]


# The order of a sum is free.
@compiled(fastmath={"reassoc", "nsz"})
def _scale_gradients(
    incoming: Array | None,
    short: Array | None,
    codes: Array,
    zero_points: Array | None,
    of_scales: Array,
    of_minima: Array | None,
) -> None:
    count, size = codes.shape
    arriving = np.empty(size, np.float32)
    bits = arriving.view(np.uint32)
    for group in range(count):
        if incoming is not None:
            for i in range(size):
                arriving[i] = incoming[group, i]
        if short is not None:
            for i in range(size):
                bits[i] = np.uint32(short[group, i]) << _UPPER
        zero_point = _ZERO if zero_points is None else zero_points[group]
        products, total = _ZERO, _ZERO
        for i in range(size):
            products += (np.float32(codes[group, i]) - zero_point) * arriving[i]
            total += arriving[i]
        of_scales[group] = products
        if of_minima is not None:
            of_minima[group] = total


@compiled()
def _in_columns(weights: Array, start: int, columns: Array) -> None:
    """Copy some groups into columns; those beyond the last group have the first of them."""
    count, size = weights.shape
    for j in range(_SIDE_BY_SIDE):
        group = start + j if start + j < count else start
        for i in range(size):
            columns[i, j] = weights[group, i]


@compiled()
def _add_halves(rows: Array) -> None:
    """Add the rows' halves, and halves of these, until the first row is the sum of all: the order of `k_quants`."""
    half = len(rows) // 2
    while half > 0:
        for i in range(half):
            for j in range(_SIDE_BY_SIDE):
                rows[i, j] = rows[i, j] + rows[i + half, j]
        half //= 2


@compiled()
def _bounds(columns: Array, lowest: Array, highest: Array) -> None:
    lowest[:] = columns[0]
    highest[:] = columns[0]
    for i in range(1, len(columns)):
        for j in range(_SIDE_BY_SIDE):
            weight = columns[i, j]
            lowest[j] = weight if weight < lowest[j] else lowest[j]
            highest[j] = weight if weight > highest[j] else highest[j]


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
    """Write the sums over codes, their squares and their products with the weights into the first rows."""
    for i in range(len(columns)):
        for j in range(_SIDE_BY_SIDE):
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
    """As `k_quants._search_minimum`, operation by operation."""
    count, size = weights.shape
    columns, codes = np.empty((size, _SIDE_BY_SIDE), np.float32), np.empty((size, _SIDE_BY_SIDE), np.float32)
    squares, products = np.empty_like(columns), np.empty_like(columns)
    total, squared = np.empty(_SIDE_BY_SIDE, np.float32), np.empty(_SIDE_BY_SIDE, np.float32)
    lowest, step = np.empty(_SIDE_BY_SIDE, np.float32), np.empty(_SIDE_BY_SIDE, np.float32)
    bases, divisors = np.empty(_SIDE_BY_SIDE, np.float32), np.empty(_SIDE_BY_SIDE, np.float32)
    best = np.empty((5, _SIDE_BY_SIDE), np.float32)
    number, share = np.float32(size), np.float32(1.0) / np.float32(size)
    for start in range(0, count, _SIDE_BY_SIDE):
        _in_columns(weights, start, columns)
        for i in range(size):
            for j in range(_SIDE_BY_SIDE):
                codes[i, j] = columns[i, j]
                squares[i, j] = columns[i, j] * columns[i, j]
        _add_halves(codes)
        _add_halves(squares)
        total[:] = codes[0]
        squared[:] = squares[0]
        _bounds(columns, lowest, step)
        for j in range(_SIDE_BY_SIDE):
            lowest[j] = _ZERO if lowest[j] > _ZERO else lowest[j]
            step[j] = (step[j] - lowest[j]) * per_step
        for cut in range(len(factors)):
            for j in range(_SIDE_BY_SIDE):
                scale = step[j] * factors[cut]
                divisors[j] = _ENDLESS if scale == _ZERO else scale
                bases[j] = lowest[j] + step[j] * shifts[cut]
            _code_sums(columns, divisors, bases, low, high, None, codes, squares, products)
            for j in range(_SIDE_BY_SIDE):
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
        for j in range(min(_SIDE_BY_SIDE, count - start)):
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
    """As `k_quants._search_symmetric`, operation by operation."""
    count, size = weights.shape
    columns, codes = np.empty((size, _SIDE_BY_SIDE), np.float32), np.empty((size, _SIDE_BY_SIDE), np.float32)
    squares, products = np.empty_like(columns), np.empty_like(columns)
    lowest, step = np.empty(_SIDE_BY_SIDE, np.float32), np.empty(_SIDE_BY_SIDE, np.float32)
    zeros, divisors = np.zeros(_SIDE_BY_SIDE, np.float32), np.empty(_SIDE_BY_SIDE, np.float32)
    bits = step.view(np.uint32)
    best = np.empty((2, _SIDE_BY_SIDE), np.float32)
    for start in range(0, count, _SIDE_BY_SIDE):
        _in_columns(weights, start, columns)
        _bounds(columns, lowest, step)
        for j in range(_SIDE_BY_SIDE):
            step[j] = step[j] if step[j] > -lowest[j] else lowest[j]
        if power:
            for j in range(_SIDE_BY_SIDE):
                bits[j] = bits[j] & _INFINITY
        for j in range(_SIDE_BY_SIDE):
            step[j] = step[j] * per_step
        for cut in range(len(factors)):
            for j in range(_SIDE_BY_SIDE):
                scale = step[j] * factors[cut]
                divisors[j] = _ENDLESS if scale == _ZERO else scale
            _code_sums(columns, divisors, zeros, low, high, table, codes, squares, products)
            for j in range(_SIDE_BY_SIDE):
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
        for j in range(min(_SIDE_BY_SIDE, count - start)):
            scales[start + j] = best[1, j]


def fits(*tensors: Tensor | None) -> bool:
    """Return whether the loops can handle these tensors: on a CPU, float32, bfloat16, codes or masks, contiguous."""
    return all(
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool)
        for tensor in tensors
        if tensor is not None
    )


def extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, [groups, 1], of float32 [groups, size]."""
    found = torch.empty((2, len(groups), 1))
    lowest, highest = array_of(found.view(torch.int32))[..., 0]
    over_threads(_extremes, _groups(groups, groups.shape[1]).view(np.int32), lowest, highest)
    return found[0], found[1]


def values(weight: Tensor, steps: Steps, grid: Grid, *, rounded: bool, out: Tensor, inside: Tensor | None) -> None:
    """Write into `out` the values that are read from the codes of `weight`.

    Args:
        weight: float32 [out, in].
        steps: Of all its groups.
        grid: The grid.
        rounded: Whether values in float32 are those of bfloat16.
        out: float32 or bfloat16 [out, in].
        inside: bool [out, in], which is filled with whether each weight was not clipped; or None.
    """
    size = grid.group(weight.shape[1])
    over_threads(
        _values,
        _groups(weight, size),
        _flat(steps.factors),
        _flat(steps.scales),
        _flat(steps.minima),
        _flat(steps.zero_points),
        _flat(steps.bases),
        None if inside is None else _groups(inside.view(torch.uint8), size),
        *_by_type(out, size),
        constants=(
            *(steps.inverse, _ROUNDINGS[steps.rounding]),
            *(np.float32(bound) for bound in (grid.qmin, grid.qmax, *grid.reach)),
            *(_table(grid), rounded),
        ),
    )


def nearest(groups: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Return what the nearest codes of each group have, as `k_quants.fitted` asks for it: float32 [groups] each.

    Args:
        groups: float32 [groups, group].
        grid: One of super-blocks, or with a codebook.
    """
    found = torch.empty((1 if grid.symmetric else 4, len(groups)))
    factors, shifts = np.array(tries(grid), dtype=np.float32).T.copy()
    over_threads(
        _nearest_symmetric if grid.symmetric else _nearest_minimum,
        _groups(groups, grid.group_size),
        *array_of(found),
        constants=(
            *((factors,) if grid.symmetric else (factors, shifts)),
            np.float32(1 / grid.divisor),
            np.float32(grid.qmin),
            np.float32(grid.qmax),
            *((_table(grid), grid.scale_dtype == "e8m0") if grid.symmetric else ()),
        ),
    )
    return found.unbind()


def learned_gradients(weight: Tensor, gradient: Tensor, steps: Steps, grid: Grid, out: Tensor) -> Tensor:
    """Write the gradient of a weight into `out` (it may be the incoming one), and return the sum of each group.

    Args:
        weight: float32 [out, in].
        gradient: What arrives, float32 or bfloat16 [out, in].
        steps: Of all groups, whose factors are divisors.
        grid: The grid.
        out: float32 [out, in].

    Returns:
        float32 [groups]: of what arrives times the code less the zero point, less what passes times the weight in
        steps.
    """
    size = grid.group(weight.shape[1])
    sums = torch.empty(steps.factors.numel())
    over_threads(
        _learned_gradients,
        _groups(weight, size),
        *_by_type(gradient, size),
        _flat(steps.factors),
        _flat(steps.minima),
        _flat(steps.zero_points),
        _groups(out, size),
        array_of(sums),
        constants=(np.float32(grid.qmin), np.float32(grid.qmax)),
    )
    return sums


def scaled_codes(
    codes: Tensor, scales: Tensor, minima: Tensor | None, zero_points: Tensor | None, *, out: Tensor
) -> None:
    """Write into `out` the values of codes under their scales.

    Args:
        codes: int8 [groups, size].
        scales: float32, one a group.
        minima: float32, one a group, that are added; or None.
        zero_points: float32, one a group, that codes are less first; or None.
        out: float32 or bfloat16 [groups, size].
    """
    of_groups = (_flat(scales), _flat(minima), _flat(zero_points))
    size = codes.shape[1]
    over_threads(_scaled_codes, _groups(codes, size), *of_groups, *_by_type(out, size))


def scale_gradients(
    gradient: Tensor, codes: Tensor, zero_points: Tensor | None, *, of_scales: Tensor, of_minima: Tensor | None
) -> None:
    """Write the sums over each group of what arrives times the code less the zero point, and of what arrives.

    Args:
        gradient: What arrives, float32 or bfloat16 [groups, size].
        codes: int8 [groups, size].
        zero_points: float32, one a group; or None.
        of_scales: float32 [groups].
        of_minima: float32 [groups], or None.
    """
    size = codes.shape[1]
    sums = (array_of(of_scales), None if of_minima is None else array_of(of_minima))
    over_threads(_scale_gradients, *_by_type(gradient, size), _groups(codes, size), _flat(zero_points), *sums)


def stop_clipped(gradient: Tensor, inside: Tensor, out: Tensor) -> None:
    """Write the incoming gradient (float32 or bfloat16) into `out`, float32, with 0 where a weight is not `inside`.

    All are [out, in]; `out` may be what arrives.
    """
    size = gradient.shape[-1]
    over_threads(_stop_clipped, *_by_type(gradient, size), _groups(inside.view(torch.uint8), size), _groups(out, size))


def _table(grid: Grid) -> Array | None:
    return grid.nearest if grid.codebook else None


class _Memory:
    """A tensor's own memory, in the form that numpy asks for."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # which lives as long as what is made of it
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": kind.str,
            "shape": tuple(tensor.shape),
            "strides": tuple(kind.itemsize * step for step in tensor.stride()),
        }


def array_of(tensor: Tensor) -> Array:
    """Return a tensor as an array that shares its memory; after `Tensor.numpy` the memory could never be freed."""
    return np.asarray(_Memory(tensor))


def _groups(tensor: Tensor, size: int) -> Array:
    return array_of(tensor.detach().view(-1, size))


def _flat(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else array_of(tensor.detach().reshape(-1))


def _by_type(tensor: Tensor, size: int) -> tuple[Array | None, Array | None]:
    """Return the groups of a tensor as float32, or bfloat16 ones as their 16 bits."""
    if tensor.dtype == torch.bfloat16:
        return None, _groups(tensor.view(torch.uint16), size)
    return _groups(tensor, size), None


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

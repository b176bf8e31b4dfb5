"""Fake quantisation of a matrix on a CPU in one pass over memory, its gradients, and the scaling of codes.

The loops do the arithmetic of `rounding`, `fake_quantize` and `trained_scales`. These modules work operation by
operation if this one cannot be imported or the weights are not on a CPU. Each loop works on the weights of one group at
a time, which stay in the nearest cache. Each loop contains its own code that reads the incoming gradient: in a separate
function that code would not be vectorised.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autodistill.quantization.grids import Grid
from autodistill.quantization.group_scales import Steps
from autodistill.quantization.loops.compiled import (
    Array,
    array_of,
    by_type,
    code_near,
    compiled,
    flat,
    groups_of,
    over_threads,
    table_of,
    upper_half,
)

# The ways of rounding as numbers, because compiled loops have no names.
_HALF_UP, _HALF_AWAY, _HALF_EVEN = range(3)
_ROUNDINGS = {"half_up": _HALF_UP, "half_away": _HALF_AWAY, "half_even": _HALF_EVEN}
_UPPER = np.uint32(16)  # shift from a float32's bits to those of bfloat16
# The largest signed integer of 32 bits, and the place of its sign bit.
_MOST, _SIGN = np.int32(0x7FFFFFFF), np.int32(31)
_ZERO, _HALF = np.float32(0.0), np.float32(0.5)
_BELOW_HALF = np.float32(0.5 - 2.0**-25)


@compiled()
def _extremes(weights: Array, lowest: Array, highest: Array) -> None:
    for group in range(len(weights)):
        # Compare the bits as integers, of which several are compared at once. Floats below 0 have the reverse order as
        # integers, so their bits are flipped first.
        least, most = _MOST, -_MOST
        for i in range(weights.shape[1]):
            number = weights[group, i]
            number = number ^ ((number >> _SIGN) & _MOST)
            least = min(least, number)
            most = max(most, number)
        lowest[group] = least ^ ((least >> _SIGN) & _MOST)
        highest[group] = most ^ ((most >> _SIGN) & _MOST)


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
        # The comparisons are written so that NaN stays NaN.
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


# The sum may be computed in any order.
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
        # Copied, because `out` may be the incoming gradient itself.
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


# The sum may be computed in any order.
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


def extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, [groups, 1], from float32 [groups, size]."""
    found = torch.empty((2, len(groups), 1))
    lowest, highest = array_of(found.view(torch.int32))[..., 0]
    over_threads(_extremes, groups_of(groups, groups.shape[1]).view(np.int32), lowest, highest)
    return found[0], found[1]


def values(weight: Tensor, steps: Steps, grid: Grid, *, rounded: bool, out: Tensor, inside: Tensor | None) -> None:
    """Write the values that a runtime reads from the codes of `weight` into `out`.

    Args:
        weight: float32 [out, in].
        steps: Scaling of all its groups.
        grid: The grid.
        rounded: Whether float32 values are rounded to bfloat16.
        out: float32 or bfloat16 [out, in].
        inside: bool [out, in], filled with whether each weight was not clipped; or None.
    """
    size = grid.group(weight.shape[1])
    over_threads(
        _values,
        groups_of(weight, size),
        flat(steps.factors),
        flat(steps.scales),
        flat(steps.minima),
        flat(steps.zero_points),
        flat(steps.bases),
        None if inside is None else groups_of(inside.view(torch.uint8), size),
        *by_type(out, size),
        constants=(
            *(steps.inverse, _ROUNDINGS[steps.rounding]),
            *(np.float32(bound) for bound in (grid.qmin, grid.qmax, *grid.reach)),
            *(table_of(grid), rounded),
        ),
    )


def learned_gradients(weight: Tensor, gradient: Tensor, steps: Steps, grid: Grid, out: Tensor) -> Tensor:
    """Write a weight's gradient into `out`, which may be the incoming gradient, and return the sum of each group.

    Args:
        weight: float32 [out, in].
        gradient: The incoming gradient, float32 or bfloat16 [out, in].
        steps: Scaling of all groups; its factors must be divisors.
        grid: The grid.
        out: float32 [out, in].

    Returns:
        float32 [groups], the sums of g * (code - zero point) - p * s. Here g is the incoming gradient, p is the part of
        it that passes, and s is the weight in steps, without the zero point.
    """
    size = grid.group(weight.shape[1])
    sums = torch.empty(steps.factors.numel())
    over_threads(
        _learned_gradients,
        groups_of(weight, size),
        *by_type(gradient, size),
        flat(steps.factors),
        flat(steps.minima),
        flat(steps.zero_points),
        groups_of(out, size),
        array_of(sums),
        constants=(np.float32(grid.qmin), np.float32(grid.qmax)),
    )
    return sums


def scaled_codes(
    codes: Tensor, scales: Tensor, minima: Tensor | None, zero_points: Tensor | None, *, out: Tensor
) -> None:
    """Write the values of codes under their scales into `out`.

    Args:
        codes: int8 [groups, size].
        scales: float32, one a group.
        minima: float32, one a group, to add; or None.
        zero_points: float32, one a group, to subtract from the codes first; or None.
        out: float32 or bfloat16 [groups, size].
    """
    of_groups = (flat(scales), flat(minima), flat(zero_points))
    size = codes.shape[1]
    over_threads(_scaled_codes, groups_of(codes, size), *of_groups, *by_type(out, size))


def scale_gradients(
    gradient: Tensor, codes: Tensor, zero_points: Tensor | None, *, of_scales: Tensor, of_minima: Tensor | None
) -> None:
    """Write two sums over each group: of the gradient times (code - zero point), and of the gradient alone.

    Args:
        gradient: The incoming gradient, float32 or bfloat16 [groups, size].
        codes: int8 [groups, size].
        zero_points: float32, one a group; or None.
        of_scales: float32 [groups], receives the first sum.
        of_minima: float32 [groups], receives the second sum; or None.
    """
    size = codes.shape[1]
    sums = (array_of(of_scales), None if of_minima is None else array_of(of_minima))
    over_threads(_scale_gradients, *by_type(gradient, size), groups_of(codes, size), flat(zero_points), *sums)


def stop_clipped(gradient: Tensor, inside: Tensor, out: Tensor) -> None:
    """Write the incoming gradient (float32 or bfloat16) into `out`, float32, with 0 if a weight is not `inside`.

    All are [out, in]; `out` may be the incoming gradient.
    """
    size = gradient.shape[-1]
    over_threads(
        _stop_clipped, *by_type(gradient, size), groups_of(inside.view(torch.uint8), size), groups_of(out, size)
    )

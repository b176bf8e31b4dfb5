"""Detects whether weights lie on a grid already, and finds the scales of that grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.quantization.grids import Floats, Grid, Scales, Storage
from autodistill.quantization.packing import (
    deployed,
    dequantize,
    from_bf16_bits,
    pack,
    quantize,
    round_to,
    to_bf16_bits,
    unpack,
)

_ON_GRID = 0.01
"""Weights lie on a grid already if rounding moves them by less than this share of normal weights' squared error. The
error of a later rounding to 16 bits, if it can be seen, is added to this limit."""
_CLEARLY_OFF = 0.25
# Number of codes, from the largest down, that are tried for a group's largest weight. With 8 bits, weights nearly
# always follow the rule.
_TRIES, _TRIES_OF_8_BITS = 32, 16
_AT_ONCE = 2**22  # number of weights whose grid values are in memory at a time


def lies_on(weights: Floats, grid: Grid) -> bool:
    """Return whether rounding to a grid changes the weights far less than it would change normal weights.

    Args:
        weights: float32 [rows, in].
        grid: A grid whose groups divide the rows.
    """
    # One row with a coarse search is enough to recognise normal weights.
    row = weights[:1]
    if not stays(row, grid, own_scales(row, grid, thorough=False), _CLEARLY_OFF):
        return False
    return stays(weights, grid, own_scales(weights, grid))


def stays(weights: Floats, grid: Grid, scales: Scales | None = None, share: float = _ON_GRID) -> bool:
    """Return whether weights move by less than a share of normal weights' error, with given or with fitted scales."""
    _, rule = quantize(weights, grid)
    size = grid.group(weights.shape[1])
    # For a weight at a random place between two codes, the mean squared move is a twelfth of a squared step.
    steps = np.where(np.abs(weights.reshape(-1, size)).max(axis=1) > 0, np.abs(rule.scales.reshape(-1)), 0)
    normal = float(np.square(steps, dtype=np.float64).sum()) * size / 12
    moved = float(np.square(deployed(weights, grid, scales) - weights, dtype=np.float64).sum())
    if normal == 0:  # zeros lie on every grid
        return True
    return bool(np.isfinite(normal) and moved < share * normal + 2 * _rounded_since(weights))


def _rounded_since(weights: Floats) -> float:
    """Return the squared error of the weights' earlier rounding to 16 bits, or 0 if they were not rounded."""
    if np.array_equal(round_to(weights, "bf16"), weights):
        digits = 8
    elif np.array_equal(round_to(weights, "f16"), weights):
        digits = 11
    else:
        return 0.0
    _, exponents = np.frexp(weights)
    return float(np.square(np.where(weights == 0, 0.0, np.ldexp(1.0, exponents - digits))).sum()) / 12


def own_scales(weights: Floats, grid: Grid, *, thorough: bool = True) -> Scales:
    """Return the scales with which weights on a grid change least, or the default scales if none are better.

    The default rule assumes that a group's largest weight has the largest code, which may be wrong. So other codes are
    tried. For super-blocks and codebooks, only the rule is used, which fits scales by least squares.

    Args:
        weights: float32 [out, in].
        grid: A grid whose groups divide the rows.
        thorough: Whether scales are searched to the last digit, even if bfloat16 weights hide that digit.
    """
    _, rule = quantize(weights, grid)
    if grid.searched:
        return rule
    groups = weights.reshape(-1, grid.group(weights.shape[1]))
    best = [None if part is None else part.reshape(-1, 1).copy() for part in rule]
    error = _moved(groups, Scales(*best), grid)  # type: ignore[arg-type]
    most = max(abs(grid.qmin), grid.qmax) if grid.symmetric else grid.qmax - grid.qmin
    tries = _TRIES_OF_8_BITS if grid.bits == 8 else _TRIES
    near = (0, 1, -1) if grid.scale_dtype == "bf16" and (thorough or grid.bits == 8) else (0,)
    for code in range(most, max(0, most - tries), -1):
        left = np.flatnonzero(error > 0)
        if not len(left):
            break
        for tried in _tried(groups[left], code, grid, near):
            found = _moved(groups[left], tried, grid)
            better = found < error[left]
            error[left[better]] = found[better]
            for part, values in zip(best, tried, strict=True):
                if part is not None and values is not None:
                    part[left[better]] = values[better]
    shape = (len(weights), -1)
    return Scales(*(None if part is None else part.reshape(shape) for part in best))  # type: ignore[arg-type]


def _moved(groups: Floats, scales: Scales, grid: Grid) -> npt.NDArray[np.float64]:
    """Return the squared error of each group, [groups, group], with scales [groups, 1]."""
    with np.errstate(all="ignore"):
        values = dequantize(*quantize(groups, grid, scales), grid)
        return np.nan_to_num(np.square(values - groups, dtype=np.float64).sum(axis=1), nan=np.inf)


def _tried(groups: Floats, code: int, grid: Grid, near: Sequence[int]) -> Iterator[Scales]:
    """Yield scales that give a group's largest weight this code, or its range this many steps.

    Scales and zero points at the distances `near` are yielded too, because the weights' own rounding may have moved
    both.
    """
    with np.errstate(all="ignore"):
        if grid.symmetric:
            largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
            of_code = -largest if grid.scale_rule == "signed_absmax" else np.abs(largest)
            yield from (Scales(one) for one in _stored(of_code, code, grid, near))
            return
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        if grid.offset == "minimum":
            yield from (Scales(one, round_to(low, "f16")) for one in _stored(high - low, code, grid, near))
            return
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        for scales in _stored(high - low, code, grid, near):
            zero_points = np.rint(np.nan_to_num(grid.qmin - low / scales))
            for step in near:
                yield Scales(scales, (zero_points + step).clip(grid.qmin, grid.qmax).astype(np.float32))


def _stored(extents: Floats, code: int, grid: Grid, near: Sequence[int]) -> Iterator[Floats]:
    """Yield scales that divide an extent into `code` steps, as a grid stores them, and their neighbours."""
    scales: Floats = (extents / np.float32(code)).astype(np.float32)
    if grid.scale_dtype == "f16":
        yield round_to(scales, "f16")
        return
    bits = to_bf16_bits(scales)
    for step in near:
        yield from_bf16_bits((bits.astype(np.int32) + step).clip(0).astype(np.uint16))


def worth_trying(weights: Floats, grid: Grid) -> bool:
    """Return whether non-default scales are worth trying: they restore the weights, or only they fit the weights.

    For weights that were rounded later, neither is true. A search for each group's scales would then waste time.
    """
    scales = own_scales(weights, grid)
    return returns(weights, grid, scales) or (stays(weights, grid, scales) and not stays(weights, grid))


def returns(values: Floats, storage: Storage, scales: Scales | None = None) -> bool:
    """Return whether weights are the same after they are quantised and read back."""
    try:
        for rows in parts_of(values):
            given = scales and Scales(*(None if part is None else part[rows] for part in scales))  # type: ignore[arg-type]
            part = values[rows]
            if not np.array_equal(unpack(pack(part, storage, given), storage, part.shape), part):
                return False
    except InputError:  # a value is outside the range of float16
        return False
    return True


def parts_of(values: Floats) -> Iterator[slice]:
    """Yield slices of rows, each with about as many weights as are compared at a time."""
    rows = max(1, _AT_ONCE // (values.shape[1] if values.ndim == 2 else 1))
    return (slice(start, start + rows) for start in range(0, len(values), rows))

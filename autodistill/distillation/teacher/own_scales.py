"""Whether weights lie on a grid already, and the scales with which they do."""

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
"""Share of the squared error of rounding normal weights below which weights lie on a grid already; what they moved by
when they were rounded to 16 bits since, as far as that is seen, is added."""
_CLEARLY_OFF = 0.25
# Codes that a group's largest weight may have, from the largest down. What has 8 bits is made by the rule, or nearly.
_TRIES, _TRIES_OF_8_BITS = 32, 16
_AT_ONCE = 2**22  # weights of which a grid's values are in memory at once


def lies_on(weights: Floats, grid: Grid) -> bool:
    """Return whether weights change far less than normal weights would when they are put on a grid.

    Args:
        weights: float32 [rows, in].
        grid: One that divides the rows.
    """
    # One row, read coarsely, tells normal weights.
    row = weights[:1]
    if not stays(row, grid, own_scales(row, grid, thorough=False), _CLEARLY_OFF):
        return False
    return stays(weights, grid, own_scales(weights, grid))


def stays(weights: Floats, grid: Grid, scales: Scales | None = None, share: float = _ON_GRID) -> bool:
    """Return the same for given scales, or for scales from the weights, relative to the error of normal weights."""
    _, rule = quantize(weights, grid)
    size = grid.group(weights.shape[1])
    # A weight that lies anywhere between two codes moves by a twelfth of a step squared.
    steps = np.where(np.abs(weights.reshape(-1, size)).max(axis=1) > 0, np.abs(rule.scales.reshape(-1)), 0)
    normal = float(np.square(steps, dtype=np.float64).sum()) * size / 12
    moved = float(np.square(deployed(weights, grid, scales) - weights, dtype=np.float64).sum())
    if normal == 0:  # zeros lie on every grid
        return True
    return bool(np.isfinite(normal) and moved < share * normal + 2 * _rounded_since(weights))


def _rounded_since(weights: Floats) -> float:
    """Return the squared error of rounding weights to the 16 bits that hold them; 0 if they were not rounded."""
    if np.array_equal(round_to(weights, "bf16"), weights):
        digits = 8
    elif np.array_equal(round_to(weights, "f16"), weights):
        digits = 11
    else:
        return 0.0
    _, exponents = np.frexp(weights)
    return float(np.square(np.where(weights == 0, 0.0, np.ldexp(1.0, exponents - digits))).sum()) / 12


def own_scales(weights: Floats, grid: Grid, *, thorough: bool = True) -> Scales:
    """Return the scales under which weights on a grid change least; the default ones if none is better.

    The rule takes a group's largest weight for one of the largest code, which it need not have; of super-blocks and
    codebooks there is the rule alone, which fits them by least squares.

    Args:
        weights: float32 [out, in].
        grid: One that divides the rows.
        thorough: Whether scales are found to the last digit also where weights are read in bfloat16, which hides it.
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
    """Return the squared error of each group, [groups, group], under scales [groups, 1]."""
    with np.errstate(all="ignore"):
        values = dequantize(*quantize(groups, grid, scales), grid)
        return np.nan_to_num(np.square(values - groups, dtype=np.float64).sum(axis=1), nan=np.inf)


def _tried(groups: Floats, code: int, grid: Grid, near: Sequence[int]) -> Iterator[Scales]:
    """Yield scales that give a group's largest weight this code, or its range so many steps.

    Scales that lie so many places from these too, and zero points: the weights' own rounding may have moved both.
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
    """Yield scales of so many steps in an extent, as a grid stores them, and their neighbours."""
    scales: Floats = (extents / np.float32(code)).astype(np.float32)
    if grid.scale_dtype == "f16":
        yield round_to(scales, "f16")
        return
    bits = to_bf16_bits(scales)
    for step in near:
        yield from_bf16_bits((bits.astype(np.int32) + step).clip(0).astype(np.uint16))


def worth_trying(weights: Floats, grid: Grid) -> bool:
    """Return whether other scales than the default are worth trying: they restore the weights, or fit them alone.

    Of weights that were rounded since neither is so, and to try each group's scales would take long for nothing.
    """
    scales = own_scales(weights, grid)
    return returns(weights, grid, scales) or (stays(weights, grid, scales) and not stays(weights, grid))


def returns(values: Floats, storage: Storage, scales: Scales | None = None) -> bool:
    """Return whether weights that are quantised and read again stay the same."""
    try:
        for rows in parts_of(values):
            given = scales and Scales(*(None if part is None else part[rows] for part in scales))  # type: ignore[arg-type]
            part = values[rows]
            if not np.array_equal(unpack(pack(part, storage, given), storage, part.shape), part):
                return False
    except InputError:  # what float16 does not hold
        return False
    return True


def parts_of(values: Floats) -> Iterator[slice]:
    """Yield slices of rows, of about as many weights as are compared at once."""
    rows = max(1, _AT_ONCE // (values.shape[1] if values.ndim == 2 else 1))
    return (slice(start, start + rows) for start in range(0, len(values), rows))

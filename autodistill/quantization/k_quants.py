"""Search for scales in numpy and torch: those of super-blocks, rounded to their grid, and those of codebooks.

Each function receives the module whose arrays it works on. It uses only what numpy and torch do alike: single
elementwise operations on float32 in a fixed order. Sums add halves, and then halves of these. So both give the same
bits on any device, and a student is trained with the scales that its file will have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from autodistill.quantization.grids import Grid

# Weights handled at once: the smallest power of two at which starting an operation costs little compared with its work.
AT_ONCE = 2**18


class _Sums(NamedTuple):
    """Sums over codes q and weights x of groups, [groups] each, for a least-squares fit."""

    codes: Any
    squares: Any
    products: Any


def on_block_grid(values: Any, grid: Grid, xp: ModuleType) -> tuple[Any, Any]:
    """Round scales, or minima without their sign, to their super-blocks: each block has a unit and small multiples.

    The value of largest magnitude has the largest multiplier. So values that were read from such a block are stored
    unchanged. If multipliers have no sign, a value below 0 becomes 0.

    Args:
        values: float32, one value a group, row after row.
        grid: A grid of super-blocks.
        xp: numpy or torch.

    Returns:
        Units, float16 values in float32 [blocks, 1], and multipliers, whole numbers in float32 [blocks, groups of a
        block]. Their products are exact in float32.
    """
    blocks = values.reshape(-1, grid.groups_per_block)
    if not grid.symmetric:
        blocks = xp.clip(blocks, 0, None)
    largest = xp.amax(xp.abs(blocks), -1, keepdims=True)
    shares = blocks / xp.where(largest == 0, 1.0, largest)
    # A product, because CUDA turns division by a number into one. Its error is lost in the rounding to float16.
    units = xp.asarray(xp.asarray(largest * (1 / grid.largest_multiplier), dtype=xp.float16), dtype=xp.float32)
    return units, xp.round(shares * grid.largest_multiplier)


def held_on_block_grid(values: Any, grid: Grid, xp: ModuleType) -> tuple[Any, Any]:
    """Put scales, or minima without their sign, on their super-blocks without a change if a file can hold them so.

    Values that come from `on_block_grid` give the same units and multipliers again. Other tools choose units
    differently. llama.cpp gives the largest of signed scales the multiplier -32 or -128, and searches for units by the
    importance of the weights. So if a block would change, this function searches for a unit of which all its values are
    multiples. If there is none, the block is rounded.

    Args:
        values, grid, xp: As for `on_block_grid`.

    Returns:
        As for `on_block_grid`, except that units may be below 0.
    """
    units, multipliers = on_block_grid(values, grid, xp)
    blocks, most = values.reshape(-1, grid.groups_per_block), grid.largest_multiplier
    (left,) = xp.where((units * multipliers != blocks).any(-1))
    for size in range(most + grid.symmetric, 0, -1):
        for multiplier in (-size, size) if grid.symmetric else (size,):
            if multiplier > most or not len(left):
                continue
            rest = blocks[left]
            high, low = xp.amax(rest, -1, keepdims=True), xp.amin(rest, -1, keepdims=True)
            largest = xp.where(high > -low, high, low)
            tried = xp.clip(largest / multiplier, -_LARGEST_HALF, _LARGEST_HALF)
            tried = xp.asarray(xp.asarray(tried, dtype=xp.float16), dtype=xp.float32)
            whole = xp.round(rest / xp.where(tried == 0, 1.0, tried))
            inside = (whole >= (-most - 1 if grid.symmetric else 0)) & (whole <= most)
            found = ((tried * whole == rest) & inside).all(-1)
            units[left[found]], multipliers[left[found]] = tried[found], whole[found]
            left = left[~found]
    return units, multipliers


_LARGEST_HALF = 65504.0


def stored(values: Any, grid: Grid, xp: ModuleType) -> Any:
    """Return scales, or minima without their sign, as a runtime reads them, in the shape of `values`."""
    units, multipliers = on_block_grid(values, grid, xp)
    # A file does not keep the sign of a multiplier of 0.
    return (units * multipliers + 0.0).reshape(values.shape)


def fitted(
    groups: Any,
    grid: Grid,
    xp: ModuleType,
    at_once: int = AT_ONCE,
    search: Callable[[Any, Grid], tuple[Any, ...]] | None = None,
) -> tuple[Any, Any]:
    """Return the scales and minima whose codes are nearest to the weights, among those that are tried.

    Each of the grid's `cuts` gives codes. Least squares gives the best scale and minimum for these codes, and the try
    with the smallest error wins. The minima are rounded to their blocks' grid. The scales are fitted once more to these
    minima and rounded to the grid as well. Powers of two are tried without a fit.

    Args:
        groups: float32 [groups, group], in whole super-blocks.
        grid: A grid of super-blocks or with a codebook.
        xp: numpy or torch.
        at_once: Number of weights to handle at once.
        search: Finds the nearest codes in one pass over memory, with the same bits as single operations, and returns
            the same as `_search_minimum` or `_search_symmetric`. If None, these two are used.

    Returns:
        Scales and minima as stored, float32 [groups] each; minima are None on a symmetric grid.
    """
    if search is None:
        rows = max(1, at_once // (grid.block_size or grid.group_size)) * grid.groups_per_block
        by_operations = _search_symmetric if grid.symmetric else _search_minimum
        starts = range(0, len(groups), rows)
        parts = [by_operations(_columns(groups[start : start + rows], xp), grid, xp) for start in starts]
        found = tuple(xp.concatenate(column) for column in zip(*parts, strict=True))
    else:
        found = search(groups, grid)
    if grid.codebook:
        return _single(found[0], grid, xp), None
    if grid.symmetric:
        return stored(found[0], grid, xp), None
    minima, *kept = found
    sums = _Sums(*kept)
    minima = 0.0 - stored(-minima, grid, xp)
    scales = (sums.products - minima * sums.codes) / _safe_divisors(sums.squares, xp)
    return stored(scales, grid, xp), minima


def _single(scales: Any, grid: Grid, xp: ModuleType) -> Any:
    """Return scales as a file stores them one by one."""
    if grid.scale_dtype == "e8m0":
        # No scale is 0: under the least power a group of zeros is still read as zeros.
        return xp.clip(scales, LEAST_POWER, None)
    return xp.asarray(xp.asarray(scales, dtype=xp.float16), dtype=xp.float32) + 0.0


LEAST_POWER = 2.0**-126
"""The smallest power of two that is used as a scale: below it float32 has fewer digits."""


def powers_of_two(values: Any, xp: ModuleType) -> Any:
    """Return the largest power of two within each float32's magnitude, by its bits; 0 for subnormal numbers."""
    return (values.view(xp.int32) & 0x7F800000).view(xp.float32)


def nearest_codes(steps: Any, grid: Grid, xp: ModuleType) -> Any:
    """Return the codes of a codebook that are nearest to `steps`, float32 in the same shape; NaN stays NaN."""
    table = xp.asarray(grid.nearest, device=steps.device)
    places = xp.clip((xp.nan_to_num(steps) - float(grid.qmin)) * 2.0, 0, len(table) - 1)
    return xp.where(xp.isnan(steps), steps, xp.take(table, xp.asarray(places, dtype=xp.int64)))


def tries(grid: Grid) -> list[tuple[float, float]]:
    """Return, for each try, the factor of the step between codes, and by how many steps the minimum moves."""
    if grid.symmetric:
        return [(grid.divisor / (grid.divisor + above), 0.0) for (above,) in grid.cuts]
    return [(1 - (below + above) / grid.divisor, below) for below, above in grid.cuts]


def _columns(groups: Any, xp: ModuleType) -> Any:
    """Transpose groups [groups, group] to [group, groups], so that operations over all groups run along memory."""
    columns = xp.empty_like(groups).reshape(groups.shape[1], groups.shape[0])
    columns[:] = groups.T
    return columns


def _search_minimum(weights: Any, grid: Grid, xp: ModuleType) -> tuple[Any, ...]:
    """Return the minima of the nearest codes for columns of weights, and the `_Sums` of these codes."""
    codes, buffer = xp.empty_like(weights), xp.empty_like(weights)
    count = float(len(weights))
    total = _reduce_by_halves(weights, xp.add, buffer)
    squared = _reduce_by_halves(xp.multiply(weights, weights, out=codes), xp.add, codes)
    # 0 must lie within the range: a minimum is stored without a sign and is subtracted.
    low = xp.clip(_reduce_by_halves(weights, xp.minimum, buffer), None, 0)
    step = (_reduce_by_halves(weights, xp.maximum, buffer) - low) * (1 / grid.divisor)
    best: tuple[Any, ...] | None = None
    for factor, shift in tries(grid):
        _codes(weights, step * factor, low + step * shift, grid, xp, codes)
        tried = _sums(weights, codes, xp, buffer)
        spread = tried.squares * count - tried.codes * tried.codes
        scale = (tried.products * count - tried.codes * total) / _safe_divisors(spread, xp)
        minimum = (total - scale * tried.codes) * (1 / count)
        bounded = minimum > 0
        scale = xp.where(bounded, tried.products / _safe_divisors(tried.squares, xp), scale)
        minimum = xp.where(bounded, 0.0, minimum)
        # The sum of squared errors that remains, by the normal equations.
        left = squared - scale * tried.products - minimum * total
        best = _nearer((left, minimum, *tried), best, xp)
    assert best is not None
    return best[1:]


def _search_symmetric(weights: Any, grid: Grid, xp: ModuleType) -> tuple[Any, ...]:
    """Return the scale with the nearest codes for columns of weights."""
    codes, buffer = xp.empty_like(weights), xp.empty_like(weights)
    high, low = _reduce_by_halves(weights, xp.maximum, buffer), _reduce_by_halves(weights, xp.minimum, buffer)
    largest = xp.where(high > -low, high, low)
    power = grid.scale_dtype == "e8m0"
    # A product, for the reason given in `on_block_grid`.
    step = (powers_of_two(largest, xp) if power else largest) * (1 / grid.divisor)
    best: tuple[Any, ...] | None = None
    for factor, _ in tries(grid):
        _codes(weights, step * factor, None, grid, xp, codes)
        tried = _sums(weights, codes, xp, buffer)
        scale = step * factor if power else tried.products / _safe_divisors(tried.squares, xp)
        # By how much the fit reduces the sum of squares.
        gain = scale * tried.products
        gain = gain + gain - scale * scale * tried.squares if power else gain
        best = _nearer((-gain, scale), best, xp)
    assert best is not None
    return best[1:]


def _nearer(tried: tuple[Any, ...], best: tuple[Any, ...] | None, xp: ModuleType) -> tuple[Any, ...]:
    """Return the better of two fits for each group, by their errors, which come first."""
    if best is None:
        return tried
    better = tried[0] < best[0]
    return tuple(xp.where(better, new, old) for new, old in zip(tried, best, strict=True))


def _codes(weights: Any, scales: Any, minima: Any, grid: Grid, xp: ModuleType, out: Any) -> None:
    """Write the codes of columns of weights, for given scales and minima, into `out`."""
    divisors = xp.where(scales == 0, math.inf, scales)
    if minima is None:
        xp.divide(weights, divisors, out=out)
    else:
        xp.subtract(weights, minima, out=out)
        xp.divide(out, divisors, out=out)
    if grid.codebook:
        out[:] = nearest_codes(out, grid, xp)
        return
    xp.round(out, out=out)
    xp.clip(out, grid.qmin, grid.qmax, out=out)


def _sums(weights: Any, codes: Any, xp: ModuleType, buffer: Any) -> _Sums:
    products = _reduce_by_halves(xp.multiply(codes, weights, out=buffer), xp.add, buffer)
    sums = _reduce_by_halves(codes, xp.add, buffer)
    # The codes are no longer needed, so their memory holds the squares.
    return _Sums(sums, _reduce_by_halves(xp.multiply(codes, codes, out=codes), xp.add, codes), products)


def _reduce_by_halves(columns: Any, join: Any, buffer: Any) -> Any:
    """Combine each column's halves with `join` until one row is left.

    Args:
        columns: [count, groups], where the count is a power of two.
        join: Function of two arrays that takes `out`.
        buffer: Working memory of the same size; it may be the columns.
    """
    while len(columns) > 1:
        half = len(columns) // 2
        columns = join(columns[:half], columns[half:], out=buffer[:half])
    return columns[0] + 0.0


def _safe_divisors(values: Any, xp: ModuleType) -> Any:
    """Return divisors in which values of 0 or below become 1; their dividends are 0 as well."""
    return xp.where(values > 0, values, 1.0)

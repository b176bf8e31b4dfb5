"""Search for scales in which each column of a matrix counts by its importance, as an importance matrix states it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from autodistill.quantization import k_quants as super_blocks
from autodistill.quantization.grids import Grid
from autodistill.quantization.loops import loops
from autodistill.quantization.packing import BF16_EPSILON
from autodistill.quantization.rounding import fitted_scales

# How many codes beyond the scale rule's code a group's largest weight would lie. It is clipped if that reduces the
# error.
_BEYOND = (-1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.5, 6.5)
# The same for a group's smallest and largest weight, on grids with an offset.
_ENDS = (
    *((both, both) for both in (-0.4, 0.0, 0.3, 0.6, 1.0, 1.5, 2.5)),
    *((0.0, above) for above in (0.6, 1.2, 2.5)),
    *((below, 0.0) for below in (0.6, 1.2, 2.5)),
)
# Factors on the best scale, to look further. After each of them the scale is fitted to the codes that it gives.
_MOVES = (1.0, 1.0, 0.97, 1.03, 0.985, 1.015, 1.0)
# Weights handled at once. On a CPU they and their buffers stay in its cache.
_CPU_CHUNK, _CHUNK = 2**17, 2**24


@torch.no_grad()
def weighted_scales(weight: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the scales and offsets under which a matrix's outputs change least, if its inputs are independent.

    The squared error of each weight is multiplied by the importance of its column, the mean square of that input. For
    each group several scales are tried, fitted to their codes by weighted least squares, and rounded as a file stores
    them. The scales that follow from the weights alone are among the tries, so the weighted error is never above
    theirs.

    Args:
        weight: float32 [out, in], where `in` is a multiple of the grid's groups.
        grid: The grid.
        importance: float32 [in], not negative.

    Returns:
        Scales and offsets as stored, float32 [out, groups] each; offsets are None on a symmetric grid.

    Raises:
        ValueError: The importance has another size, is negative, or is not finite.
    """
    rows, columns = weight.shape
    if importance.shape != (columns,) or not torch.isfinite(importance).all() or (importance < 0).any():
        raise ValueError(f"importance of {columns} columns is as many finite numbers of 0 or more")
    scales, offsets = fitted_scales(weight, grid)
    size = grid.group(columns)
    # A small share of the mean keeps columns without importance from leaving a group without a scale.
    counts = (importance.float() + 1e-4 * importance.float().mean() + 1e-30).view(1, -1, size)
    at_once = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _CHUNK) // columns)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        groups = weight[part].reshape(-1, columns // size, size)
        first = _Fit.of(groups, counts, grid, scales[part], None if offsets is None else offsets[part])
        found = _in_blocks(first, groups, counts, grid) if grid.block_size else _searched(first, groups, counts, grid)
        scales[part] = found.scales
        if offsets is not None and found.offsets is not None:
            offsets[part] = found.offsets
    return scales, offsets


class _Fit:
    """Scales and offsets of groups, [out, groups] each, and the weighted squared error under them."""

    def __init__(self, scales: Tensor, offsets: Tensor | None, error: Tensor) -> None:
        self.scales, self.offsets, self.error = scales, offsets, error

    @classmethod
    def of(cls, groups: Tensor, counts: Tensor, grid: Grid, scales: Tensor, offsets: Tensor | None) -> _Fit:
        """Round groups, [out, groups, size], under scales and offsets, and compute the error."""
        if (compiled := loops("weighted_scales", groups)) is not None:
            return cls(scales, offsets, compiled.errors(groups, counts[0], grid, scales, offsets))
        codes, step = _codes(groups, grid, scales, offsets), scales.unsqueeze(-1)
        if offsets is None:
            values = codes * step
        elif grid.offset == "minimum":
            values = codes * step + offsets.unsqueeze(-1)
        else:
            values = (codes - offsets.unsqueeze(-1)) * step
        error = values.sub_(groups).square_().mul_(counts).sum(-1)
        return cls(scales, offsets, error.nan_to_num_(nan=math.inf))

    def or_better(self, other: _Fit) -> _Fit:
        """Take for each group the fit with the smaller error, or this one on a tie."""
        better = other.error < self.error
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = torch.where(better, other.offsets, self.offsets)
        return _Fit(
            torch.where(better, other.scales, self.scales), offsets, torch.where(better, other.error, self.error)
        )


def _codes(groups: Tensor, grid: Grid, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the codes of groups, [out, groups, size], under scales and offsets."""
    step = scales.unsqueeze(-1)
    divisor = step.masked_fill(step == 0, math.inf)
    if offsets is None:
        steps = groups / divisor
    elif grid.offset == "minimum":
        steps = (groups - offsets.unsqueeze(-1)) / divisor
    else:
        steps = groups / divisor + offsets.unsqueeze(-1)
    if grid.codebook:
        found: Tensor = super_blocks.nearest_codes(steps, grid, torch)
        return found
    return steps.round_().clamp_(grid.qmin, grid.qmax)


def _searched(best: _Fit, groups: Tensor, counts: Tensor, grid: Grid) -> _Fit:
    """Return the best fit of all tries and moves. Scales are rounded as stored, except for those of super-blocks."""
    stored = not grid.block_size
    if (compiled := loops("weighted_scales", groups)) is not None:
        scales, offsets = best.scales.clone(), None if best.offsets is None else best.offsets.clone()
        compiled.search(groups, counts[0], grid, scales, offsets, _tried(grid), _moves(grid), stored=stored)
        return _Fit(scales, offsets, best.error)
    for scales, offsets in _tries(groups, grid):
        given = _stored(scales, offsets, grid) if stored else (scales, offsets)
        best = best.or_better(_Fit.of(groups, counts, grid, *given))
    for move in _moves(grid):
        codes = _codes(groups, grid, best.scales * move, best.offsets)
        scales, offsets = _refitted(codes, best.offsets, groups, counts, grid)
        given = _stored(scales, offsets, grid) if stored else (scales, offsets)
        best = best.or_better(_Fit.of(groups, counts, grid, *given))
    return best


def _tried(grid: Grid) -> list[tuple[float, float]]:
    """Return the numbers from which `_tries` makes the scales that are tried."""
    if not grid.symmetric:
        return list(_ENDS)
    if grid.scale_dtype == "e8m0":
        return [(factor / grid.divisor, 0.0) for factor in (0.5, 1.0, 2.0)]
    unit = abs(grid.divisor) / 8 if grid.codebook else 1.0
    divisors = [abs(grid.divisor) + unit * beyond for beyond in _BEYOND]
    return [(side * divisor, 0.0) for divisor in divisors for side in (1, -1)]


def _moves(grid: Grid) -> tuple[float, ...]:
    """Return the moves for a grid: none for powers of two, because the tries cover all that come into question."""
    return () if grid.scale_dtype == "e8m0" else _MOVES


def _tries(groups: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield scales and offsets before they are rounded: some reach the ends of a group, others stop short of them."""
    low, high = groups.amin(-1), groups.amax(-1)
    if grid.symmetric:
        largest = torch.where(high > -low, high, low)
        if grid.scale_dtype == "e8m0":
            power = super_blocks.powers_of_two(largest.contiguous(), torch)
            yield from ((power * factor, None) for factor, _ in _tried(grid))
        else:
            yield from ((largest / divisor, None) for divisor, _ in _tried(grid))
        return
    if grid.offset == "zero_point":
        low, high = low.clamp(max=0), high.clamp(min=0)
    elif grid.block_size:
        low = low.clamp(max=0)  # super-blocks store the minimum without its sign and subtract it
    step = (high - low) / grid.levels
    for below, above in _tried(grid):
        least = low + below * step
        scales = (high - above * step - least) / grid.levels
        if grid.offset == "minimum":
            yield scales, least.clamp(max=0) if grid.block_size else least
        else:
            yield scales, (grid.qmin - least / scales).nan_to_num().round()


def _stored(scales: Tensor, offsets: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Round scales and offsets to the values that a file stores one by one."""
    if grid.scale_dtype == "e8m0":
        return scales.clamp(min=super_blocks.LEAST_POWER), offsets
    scales = (scales.half() if grid.scale_dtype == "f16" else scales.bfloat16()).float()
    if grid.container == "compressed-tensors":
        scales = scales.masked_fill(scales == 0, BF16_EPSILON)
    if offsets is None:
        return scales, None
    if grid.offset == "minimum":
        return scales, offsets.half().float()
    return scales, offsets.clamp(grid.qmin, grid.qmax)


def _refitted(
    codes: Tensor, offsets: Tensor | None, groups: Tensor, counts: Tensor, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """Return the scales and minima with the least weighted squared error for given codes; zero points stay."""
    if grid.offset == "minimum":
        total, of_codes = counts.sum(-1), (codes * counts).sum(-1)
        of_groups, squares = (groups * counts).sum(-1), (codes.square() * counts).sum(-1)
        products = (codes * groups * counts).sum(-1)
        spread = squares * total - of_codes.square()
        scales = (products * total - of_codes * of_groups) / _safe_divisors(spread)
        minima = (of_groups - scales * of_codes) / total
        if grid.block_size:
            bounded = minima > 0
            scales = torch.where(bounded, products / _safe_divisors(squares), scales)
            minima = minima.clamp(max=0)
        return scales, minima
    held = codes if offsets is None else codes - offsets.unsqueeze(-1)
    scales = (held * groups * counts).sum(-1) / _safe_divisors((held.square() * counts).sum(-1))
    return scales, offsets


def _in_blocks(best: _Fit, groups: Tensor, counts: Tensor, grid: Grid) -> _Fit:
    """Return the better of the given and the searched scales for each super-block, with scales on the block's grid."""
    free = _searched(best, groups, counts, grid)
    minima, scales = free.offsets, free.scales
    if minima is not None:
        minima = 0.0 - super_blocks.stored(-minima, grid, torch)
        codes, held = _codes(groups, grid, free.scales, free.offsets), groups - minima.unsqueeze(-1)
        scales = (codes * held * counts).sum(-1) / _safe_divisors((codes.square() * counts).sum(-1))
    found = _Fit.of(groups, counts, grid, super_blocks.stored(scales, grid, torch), minima)
    found = _nudged(found, groups, counts, grid)
    shape = (-1, grid.groups_per_block)
    better = found.error.reshape(shape).sum(-1) < best.error.reshape(shape).sum(-1)
    chosen = better.unsqueeze(-1).expand(-1, grid.groups_per_block).reshape(best.error.shape)
    best.scales = torch.where(chosen, found.scales, best.scales)
    if best.offsets is not None and found.offsets is not None:
        best.offsets = torch.where(chosen, found.offsets, best.offsets)
    return best


def _nudged(best: _Fit, groups: Tensor, counts: Tensor, grid: Grid) -> _Fit:
    """Move each scale by one unit of its block if that is better. The block's largest scale sets the unit and stays."""
    units, multipliers = super_blocks.on_block_grid(best.scales, grid, torch)
    fixed = multipliers.abs() == multipliers.abs().amax(-1, keepdim=True)
    for step in (-1.0, 1.0):
        tried = torch.where(fixed, multipliers, multipliers + step)
        bound = multipliers.abs().amax(-1, keepdim=True) - 1
        tried = torch.where(
            fixed, tried, torch.maximum(torch.minimum(tried, bound), -bound if grid.symmetric else 0 * bound)
        )
        scales = (units * tried + 0.0).reshape(best.scales.shape)
        best = best.or_better(_Fit.of(groups, counts, grid, scales, best.offsets))
    return best


def _safe_divisors(values: Tensor) -> Tensor:
    """Return divisors in which values of 0 or below become 1; their dividends are 0 as well."""
    return torch.where(values > 0, values, 1.0)

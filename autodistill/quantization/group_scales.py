"""Scaling of weight groups to grid steps, in torch: with scales that follow from the weights, or with given scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from autodistill.quantization import k_quants as super_blocks
from autodistill.quantization.grids import Grid
from autodistill.quantization.packing import BF16_EPSILON

ExtremesOf: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class Steps(NamedTuple):
    """The scaling of groups to grid steps and back: float32 [groups, 1] each.

    The step of a weight is (weight - minimum) times or divided by the factor, plus the zero point. The step is rounded
    to a code. The value is (code - zero point) * scale + base.

    Attributes:
        factors: Factors to multiply by if `inverse`, or to divide by otherwise.
        inverse: Whether the factors are inverses of the scales before these were rounded to their stored type.
        scales: The scales as stored.
        minima: Minima, before or after the same rounding, or None on a grid without minima.
        zero_points: Zero points, or None on a grid without them.
        bases: The minima as stored.
        rounding: Where a tie goes, as in `Grid.rounding`.
    """

    factors: Tensor
    inverse: bool
    scales: Tensor
    minima: Tensor | None
    zero_points: Tensor | None
    bases: Tensor | None
    rounding: Literal["half_up", "half_away", "half_even"]

    def part(self, part: slice) -> Steps:
        """Return the scaling of some groups."""
        return Steps(*(field[part] if isinstance(field, Tensor) else field for field in self))  # type: ignore[arg-type]


def given_steps(scales: Tensor, offsets: Tensor | None, grid: Grid) -> Steps:
    """Return the scaling for scales and offsets, [out, groups] each; the scales may lie between storable values."""
    if grid.block_size:
        return stored_steps(super_blocks.stored(scales, grid, torch), offsets, grid)
    if grid.scale_dtype == "e8m0":
        return stored_steps(scales, offsets, grid)  # such scales are powers of two and are never learned
    return stored_steps((scales.half() if grid.scale_dtype == "f16" else scales.bfloat16()).float(), offsets, grid)


def stored_steps(stored: Tensor, offsets: Tensor | None, grid: Grid) -> Steps:
    """Return the scaling for scales and offsets, [out, groups] each, that equal what the file will hold."""
    stored = stored.view(-1, 1)
    # In a group whose scale is 0, every weight is 0 steps.
    return _over(stored, stored.masked_fill(stored == 0, math.inf), offsets, grid)


def _over(stored: Tensor, divisors: Tensor, offsets: Tensor | None, grid: Grid) -> Steps:
    offsets = None if offsets is None else offsets.view(-1, 1)
    minima, zero_points = (offsets, None) if grid.offset == "minimum" else (None, offsets)
    return Steps(divisors, False, stored, minima, zero_points, minima, "half_even")


def extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, [groups, 1]."""
    return groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def fitted_steps(groups: Tensor, grid: Grid, extremes_of: ExtremesOf = extremes) -> Steps:
    """Return the scaling that follows from the weights, [groups, size], as in `packing.quantize`. No super-blocks."""
    low: Tensor | None = None
    if grid.scale_rule == "range":
        low, high = extremes_of(groups)
        if grid.offset == "zero_point":
            low, high = low.clamp_(max=0), high.clamp_(min=0)
        extent = high - low
    else:
        extent = (_signed_absmax if grid.scale_rule == "signed_absmax" else _absmax)(groups, extremes_of)
    # Divide by a tensor: CUDA turns division by a Python number into multiplication by its rounded reciprocal.
    scales = extent / torch.full((), grid.divisor, device=groups.device)
    if grid.container == "gguf":
        inverse = scales.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0, neginf=0.0)
        bases = None if low is None else low.half().float()
        return Steps(inverse, True, scales.half().float(), low, None, bases, grid.rounding)
    stored = scales.bfloat16().float()
    stored.masked_fill_(stored == 0, BF16_EPSILON)
    if low is not None:
        # In a group of zeros the quotient is NaN, and the zero point becomes 0.
        low = (grid.qmin - low / scales).nan_to_num_().clamp_(grid.qmin, grid.qmax).round_()
    return _over(stored, stored, low, grid)


def in_steps(groups: Tensor, steps: Steps, out: Tensor) -> None:
    """Write groups, [groups, size], in grid steps into `out`."""
    if steps.minima is not None:
        groups = torch.sub(groups, steps.minima, out=out)
    (torch.mul if steps.inverse else torch.div)(groups, steps.factors, out=out)
    if steps.zero_points is not None:
        out.add_(steps.zero_points)


def _absmax(groups: Tensor, extremes_of: ExtremesOf) -> Tensor:
    lowest, highest = extremes_of(groups)
    # A group of zeros may give -0, hence `abs_`.
    return torch.maximum(highest, lowest.neg_()).abs_()


def _signed_absmax(groups: Tensor, extremes_of: ExtremesOf) -> Tensor:
    if groups.device.type != "cpu":
        # A search for ties would wait for the device, in each layer of each step.
        (highest, first), (lowest, other) = groups.max(-1, keepdim=True), groups.min(-1, keepdim=True)
        return torch.where((highest > -lowest) | ((highest == -lowest) & (first < other)), highest, lowest)
    # The two extremes cost a third of a search for the place of the largest magnitude. That place is needed only on a
    # tie, when the first of the two in the group counts.
    lowest, highest = extremes_of(groups)
    largest = torch.where(highest > -lowest, highest, lowest)
    tied = (highest == -lowest).view(-1).nonzero().view(-1)
    if len(tied):
        candidates = groups[tied]
        largest[tied] = candidates.gather(-1, candidates.abs().argmax(-1, keepdim=True))
    return largest


def clips(grid: Grid) -> bool:
    """Return whether a weight can be clipped under a scale that follows from its group."""
    if grid.searched:
        return True
    if grid.scale_rule == "range":
        return grid.offset == "zero_point"
    # If even the largest magnitude stays within half a step of qmax, nothing can be clipped.
    return abs(grid.divisor) >= grid.qmax + 0.5


@cache
def next_beyond(grid: Grid) -> tuple[float, float]:
    """Return the float32 numbers just outside the bounds of the codes."""
    bounds, sides = torch.tensor([grid.qmin, grid.qmax]).float(), torch.tensor([-math.inf, math.inf])
    low, high = torch.nextafter(bounds, sides).tolist()
    return low, high

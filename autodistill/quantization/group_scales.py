"""Scaling of weight groups to grid steps, in torch: with scales that follow from the weights, or with given ones."""

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

    A step is the weight, less the minimum, times or over the factor, plus the zero point; a value is the step, rounded
    to a code, less the zero point, times the scale, plus the base.

    Attributes:
        factors: What is multiplied by where `inverse`, else divided by.
        inverse: Of scales before their rounding to the type that they are stored in.
        scales: As stored.
        minima: Before or after the same rounding; None on a grid without minima.
        zero_points: None on a grid without them.
        bases: The minima as stored.
        rounding: Where a tie goes, as `Grid.rounding`.
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
    """Return the scaling for given scales and offsets, [out, groups] each; scales may lie between storable values."""
    if grid.block_size:
        return stored_steps(super_blocks.stored(scales, grid, torch), offsets, grid)
    if grid.scale_dtype == "e8m0":
        return stored_steps(scales, offsets, grid)  # no such scale is learned: these are powers of two
    return stored_steps((scales.half() if grid.scale_dtype == "f16" else scales.bfloat16()).float(), offsets, grid)


def stored_steps(stored: Tensor, offsets: Tensor | None, grid: Grid) -> Steps:
    """Return the scaling for scales and offsets, [out, groups] each, that are exactly what the file will hold."""
    stored = stored.view(-1, 1)
    # Every weight of a group whose scale is 0 is in 0 steps.
    return _over(stored, stored.masked_fill(stored == 0, math.inf), offsets, grid)


def _over(stored: Tensor, divisors: Tensor, offsets: Tensor | None, grid: Grid) -> Steps:
    offsets = None if offsets is None else offsets.view(-1, 1)
    minima, zero_points = (offsets, None) if grid.offset == "minimum" else (None, offsets)
    return Steps(divisors, False, stored, minima, zero_points, minima, "half_even")


def extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest weight of each group, [groups, 1]."""
    return groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def fitted_steps(groups: Tensor, grid: Grid, extremes_of: ExtremesOf = extremes) -> Steps:
    """Return the scaling that follows from the weights, [groups, size], as in `packing.quantize`; no super-blocks."""
    low: Tensor | None = None
    if grid.scale_rule == "range":
        low, high = extremes_of(groups)
        if grid.offset == "zero_point":
            low, high = low.clamp_(max=0), high.clamp_(min=0)
        extent = high - low
    else:
        extent = (_signed_absmax if grid.scale_rule == "signed_absmax" else _absmax)(groups, extremes_of)
    # By a tensor, since CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scales = extent / torch.full((), grid.divisor, device=groups.device)
    if grid.container == "gguf":
        inverse = scales.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0, neginf=0.0)
        bases = None if low is None else low.half().float()
        return Steps(inverse, True, scales.half().float(), low, None, bases, grid.rounding)
    stored = scales.bfloat16().float()
    stored.masked_fill_(stored == 0, BF16_EPSILON)
    if low is not None:
        # Of a group of zeros the quotient is NaN, and its zero point 0.
        low = (grid.qmin - low / scales).nan_to_num_().clamp_(grid.qmin, grid.qmax).round_()
    return _over(stored, stored, low, grid)


def in_steps(groups: Tensor, steps: Steps, out: Tensor) -> None:
    """Write groups, [groups, size], as grid steps into `out`."""
    if steps.minima is not None:
        groups = torch.sub(groups, steps.minima, out=out)
    (torch.mul if steps.inverse else torch.div)(groups, steps.factors, out=out)
    if steps.zero_points is not None:
        out.add_(steps.zero_points)


def _absmax(groups: Tensor, extremes_of: ExtremesOf) -> Tensor:
    lowest, highest = extremes_of(groups)
    # A group of zeros may come out as -0, hence the last step.
    return torch.maximum(highest, lowest.neg_()).abs_()


def _signed_absmax(groups: Tensor, extremes_of: ExtremesOf) -> Tensor:
    if groups.device.type != "cpu":
        # To look for ties would wait for the device, in each layer of each step.
        (highest, first), (lowest, other) = groups.max(-1, keepdim=True), groups.min(-1, keepdim=True)
        return torch.where((highest > -lowest) | ((highest == -lowest) & (first < other)), highest, lowest)
    # The two extremes cost a third of a search for the largest magnitude's place, which is needed only where they tie:
    # there the first of the group counts.
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
    # Where the largest magnitude itself stays within half a step of qmax, nothing can be clipped.
    return abs(grid.divisor) >= grid.qmax + 0.5


@cache
def next_beyond(grid: Grid) -> tuple[float, float]:
    """Return the float32 numbers just outside the bounds of the codes."""
    bounds, sides = torch.tensor([grid.qmin, grid.qmax]).float(), torch.tensor([-math.inf, math.inf])
    low, high = torch.nextafter(bounds, sides).tolist()
    return low, high

"""Weights as a runtime will see them on the grids of `formats`, and the scales that follow from them, in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodistill import super_blocks
from autodistill.codes import BF16_EPSILON
from autodistill.grids import Grid, Scales, Storage

# Weights handled at once: on a CPU a chunk and its buffers stay in cache, so that each of the six or so passes costs a
# tenth of a nanosecond a weight, and memory is read and written once; of powers of two around it this was the fastest.
# Elsewhere a buffer has 128 MB at the most, which a table of 150,000 tokens would take several times.
_CPU_CHUNK, _CHUNK = 2**18, 2**25
# The same for scales that are searched for, in many short operations, to begin which takes torch longer than numpy.
_SEARCHED = 2**19
# The largest float32 below a half: x + this, with the sign of x, cut to an integer rounds halves away from 0. With 0.5
# the sum itself could be rounded up.
_BELOW_HALF = 0.5 - 2.0**-25


class Given(NamedTuple):
    """What is stored beside the codes of a matrix, float32 [groups, 1] each.

    Attributes:
        scales: Of the groups.
        offsets: Minima or zero points; None on a symmetric grid.
        divisors: The scales, but infinite where they are 0: every weight of such a group is in 0 steps.
    """

    scales: Tensor
    offsets: Tensor | None
    divisors: Tensor

    def part(self, part: slice) -> Given:
        """Those of some groups."""
        return Given(self.scales[part], None if self.offsets is None else self.offsets[part], self.divisors[part])


def given_scales(scales: Tensor, offsets: Tensor | None, grid: Grid) -> Given:
    """What the file will hold of scales and offsets, [out, groups] each; the scales may lie between its values."""
    if grid.block_size:
        return stored_scales(super_blocks.stored(scales, grid, torch), offsets)
    return stored_scales((scales.half() if grid.scale_dtype == "f16" else scales.bfloat16()).float(), offsets)


def stored_scales(stored: Tensor, offsets: Tensor | None) -> Given:
    """Scales and offsets, [out, groups] each, that are what the file will hold."""
    stored = stored.view(-1, 1)
    return Given(stored, None if offsets is None else offsets.view(-1, 1), stored.masked_fill(stored == 0, math.inf))


def deploy_tensor(weight: Tensor, storage: Storage, scales: Scales | None = None) -> Tensor:
    """The values that the runtime will see of `weight`, as float32 without gradient.

    Args:
        weight: Of any shape; [out, in] for a grid.
        storage: A grid or a float type; "f32" gives the weight's own memory.
        scales: Scales and offsets to use, learned ones say; by default they follow from the weights.
    """
    weight = weight.detach().float()
    if isinstance(storage, Grid):
        if scales is None:
            return fitted_values(weight, storage)
        learned, offsets = (None if part is None else torch.from_numpy(part).to(weight.device) for part in scales)
        assert learned is not None
        return given_values(weight, given_scales(learned, offsets, storage), storage)
    if storage == "f32":
        return weight
    if storage == "f32_plus_1":
        return (weight + 1) - 1
    return weight.to(torch.float16 if storage == "f16" else torch.bfloat16).float()


@torch.no_grad()
def fitted_scales(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The stored scales, and offsets, that follow from the weights: float32 [out, groups] each."""
    shape = (len(weight), -1)
    if grid.block_size:
        groups = weight.contiguous().view(-1, grid.group_size)
        at_once = _SEARCHED if weight.device.type == "cpu" else _CHUNK
        searched, minima = super_blocks.fitted(groups, grid, torch, at_once)
        return searched.view(shape), None if minima is None else minima.view(shape)
    size = grid.group(weight.shape[1])
    found = [_fitted_steps(groups, grid, torch.empty_like(groups)) for _, groups in chunks(size, weight)]
    scales, offsets = zip(*found, strict=True)
    return torch.cat(scales).view(shape), None if grid.symmetric else torch.cat(offsets).view(shape)


@torch.no_grad()
def fitted_values(
    weight: Tensor, grid: Grid, inside: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values on the grid under scales that follow from the weights.

    Args:
        weight: float32 [out, in].
        grid: The grid.
        inside: bool [out, in], which is filled with whether each weight was not clipped; or None.
        dtype: What the values are rounded to at last, as autocast would round them: one pass over them instead of two.
    """
    if grid.block_size:
        scales, offsets = fitted_scales(weight, grid)
        return given_values(weight, stored_scales(scales, offsets), grid, dtype, inside)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = grid.group(weight.shape[1])
    exact = dtype == torch.float32
    steps, codes = buffers_of(weight, size, 2)
    # What compressed-tensors holds is bfloat16, in float32 as well.
    brief = torch.empty_like(steps, dtype=torch.bfloat16) if exact and grid.container == "compressed-tensors" else None
    mask = None if inside is None else inside.view(torch.int8).view(-1, size)
    for part, groups, values in chunks(size, weight, out):
        step = steps[: len(groups)]
        target = values if exact else codes[: len(groups)]
        stored, offsets = _fitted_steps(groups, grid, step)
        if mask is not None:
            # A comparison written as floats is vectorised, one written as booleans is not.
            if grid.scale_rule == "range":
                torch.clamp(step, grid.qmin - 0.5, grid.qmax + 0.5, out=target)
                torch.eq(target, step, out=target)
            else:
                # No weight lies below the codes: the scale is chosen from the largest magnitude.
                torch.le(step, grid.qmax + 0.5, out=target)
            mask[part].copy_(target)
        _round(step, grid, target)
        _scaled(target, stored, offsets, grid, exact)
        if brief is not None:
            target.copy_(brief[: len(groups)].copy_(target))
        elif not exact:
            values.copy_(target)
    return out


@torch.no_grad()
def given_values(
    weight: Tensor, given: Given, grid: Grid, dtype: torch.dtype = torch.float32, inside: Tensor | None = None
) -> Tensor:
    """Values on the grid under scales that are known; otherwise as `fitted_values`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = grid.group(weight.shape[1])
    exact = dtype == torch.float32
    # What compressed-tensors holds is bfloat16, in float32 as well.
    short = exact and grid.container == "compressed-tensors"
    (buffer,) = buffers_of(weight, size, 1)
    mask = None if inside is None else inside.view(torch.int8).view(-1, size)
    brief = torch.empty_like(buffer, dtype=torch.bfloat16) if short else None
    for part, groups, values in chunks(size, weight, out):
        # Each pass in place: one that reads one memory and writes another takes twice as long.
        step, own = values if exact else buffer[: len(groups)], given.part(part)
        given_steps(groups, own, grid, step)
        if mask is not None:
            mask[part].copy_(step.clamp(grid.qmin - 0.5, grid.qmax + 0.5).eq_(step))
        step.clamp_(grid.qmin, grid.qmax).round_()
        _scaled(step, own.scales, own.offsets, grid, exact)
        if brief is not None:
            values.copy_(brief[: len(groups)].copy_(step))
        elif not exact:
            values.copy_(step)
    return out


def chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Some groups at a time: which, and those of each tensor, [groups, size]; all tensors have one shape."""
    rows = _rows(tensors[0], size)
    matrices = [tensor.reshape(-1, size) for tensor in tensors]
    starts = range(0, len(matrices[0]), rows)
    for start, *parts in zip(starts, *(matrix.split(rows) for matrix in matrices), strict=True):
        yield slice(start, start + rows), *parts


def buffers_of(tensor: Tensor, size: int, count: int) -> Tensor:
    """Working memory for the groups of a tensor that `chunks` gives at once, float32 [count, groups, size]."""
    return torch.empty((count, _rows(tensor, size), size), device=tensor.device)


def _rows(tensor: Tensor, size: int) -> int:
    """Groups handled at once: of chunks about equally large."""
    groups = max(1, tensor.numel() // size)
    parts = -(-tensor.numel() // (_CPU_CHUNK if tensor.device.type == "cpu" else _CHUNK))
    return -(-groups // max(1, min(parts, groups)))


def _scaled(codes: Tensor, scales: Tensor, offsets: Tensor | None, grid: Grid, exact: bool) -> None:
    """Codes become the values that are read from them, in place."""
    if exact:
        codes.add_(0.0)  # a code of 0 is never -0
    if offsets is not None and grid.offset == "zero_point":
        codes.sub_(offsets)
    codes.mul_(scales)
    if offsets is not None and grid.offset == "minimum":
        codes.add_(offsets)


def _fitted_steps(groups: Tensor, grid: Grid, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Writes the groups in steps of their scales into `out`, and gives what is stored; as `codes.quantize`."""
    low: Tensor | None = None
    if grid.scale_rule == "range":
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if grid.offset == "zero_point":
            low, high = low.clamp_(max=0), high.clamp_(min=0)
        extent = high - low
    else:
        extent = _signed_absmax(groups) if grid.scale_rule == "signed_absmax" else _absmax(groups)
    # By a tensor, since CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scales = extent / torch.full((), grid.divisor, device=groups.device)
    if grid.container == "gguf":
        inverse = scales.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0, neginf=0.0)
        if low is None:
            torch.mul(groups, inverse, out=out)
            return scales.half().float(), None
        torch.sub(groups, low, out=out).mul_(inverse)
        return scales.half().float(), low.half().float()
    stored = scales.bfloat16().float()
    stored.masked_fill_(stored == 0, BF16_EPSILON)
    if low is not None:
        # Of a group of zeros the quotient is NaN, and its zero point 0.
        low = (grid.qmin - low / scales).nan_to_num_().clamp_(grid.qmin, grid.qmax).round_()
    given_steps(groups, Given(stored, low, stored), grid, out)
    return stored, low


def given_steps(groups: Tensor, given: Given, grid: Grid, out: Tensor) -> None:
    """Writes the groups in steps of stored scales, plus their zero points, into `out`."""
    if given.offsets is None:
        torch.div(groups, given.divisors, out=out)
    elif grid.offset == "minimum":
        torch.sub(groups, given.offsets, out=out).div_(given.divisors)
    else:
        torch.div(groups, given.divisors, out=out).add_(given.offsets)


def _absmax(groups: Tensor) -> Tensor:
    # A group of zeros may come out as -0, hence the last step.
    return torch.maximum(groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True).neg_()).abs_()


def _signed_absmax(groups: Tensor) -> Tensor:
    if groups.device.type != "cpu":
        # To look for ties would wait for the device, in each layer of each step.
        (highest, first), (lowest, other) = groups.max(-1, keepdim=True), groups.min(-1, keepdim=True)
        return torch.where((highest > -lowest) | ((highest == -lowest) & (first < other)), highest, lowest)
    # The two extremes cost a third of a search for the largest magnitude's place, which is needed only where they tie:
    # there the first of the group counts.
    highest, lowest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    largest = torch.where(highest > -lowest, highest, lowest)
    tied = (highest == -lowest).view(-1).nonzero().view(-1)
    if len(tied):
        candidates = groups[tied]
        largest[tied] = candidates.gather(-1, candidates.abs().argmax(-1, keepdim=True))
    return largest


def _round(steps: Tensor, grid: Grid, out: Tensor) -> None:
    """Rounds to codes, as `codes.quantize` does, but that a code of 0 may be -0."""
    if grid.rounding == "half_up":
        torch.add(steps, 0.5 - grid.qmin, out=out).floor_().clamp_(0, grid.qmax - grid.qmin).add_(grid.qmin)
    elif grid.rounding == "half_even":
        torch.clamp(steps, grid.qmin, grid.qmax, out=out).round_()
    else:
        torch.add(steps, torch.sign(steps, out=out), alpha=_BELOW_HALF, out=out).clamp_(-grid.qmax, grid.qmax)
        # What is left of a number as an integer: by far faster than trunc.
        out.copy_(out.to(torch.int8))


def clips(grid: Grid) -> bool:
    """Whether a weight can be clipped under a scale that follows from its group."""
    if grid.scale_rule == "least_squares":
        return True
    if grid.scale_rule == "range":
        return grid.offset == "zero_point"
    # Where the largest magnitude itself stays within half a step of qmax, nothing can be clipped.
    return abs(grid.divisor) >= grid.qmax + 0.5


@cache
def next_beyond(grid: Grid) -> tuple[float, float]:
    """The float32 numbers next to the codes' bounds, outside of them."""
    bounds, sides = torch.tensor([grid.qmin, grid.qmax]).float(), torch.tensor([-math.inf, math.inf])
    low, high = torch.nextafter(bounds, sides).tolist()
    return low, high

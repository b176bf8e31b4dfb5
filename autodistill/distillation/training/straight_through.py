"""Fake quantisation: values on a grid, whose gradients pass straight through, under default or learned scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autodistill.quantization.grids import Grid
from autodistill.quantization.group_scales import Steps, clips, given_steps, in_steps, next_beyond
from autodistill.quantization.loops import loops
from autodistill.quantization.rounding import buffers_of, chunks, fitted_values, given_values

# The least scale above 0 that a super-block holds: float16's least unit, once.
_LEAST_SCALE = 2.0**-24


def fake_quantize(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32, steps: Steps | None = None) -> Tensor:
    """Return the values that the runtime will use for `weight`, with a straight-through gradient.

    The gradient passes unchanged where a weight was rounded and is zero where it was clipped: where weight / scale (+
    zero point) lies above qmax + 1/2, or below qmin - 1/2, which only a rounded zero point brings about.
    Bengio et al., 2013, arXiv:1308.3432; clipping as in Jacob et al., 2018, arXiv:1712.05877.

    Args:
        weight: [out, in], `in` a multiple of the group size.
        grid: The grid.
        dtype: What the values are given in.
        steps: The scaling of its groups, if it is not to follow from the weights as they are.

    Returns:
        [out, in], in float32 on a CPU and without given steps bit for bit `codes.deployed`.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StraightThrough.apply(weight.float(), grid, dtype, steps)
    return rounded_values(weight.float(), grid, dtype, steps)


def rounded_values(
    weight: Tensor, grid: Grid, dtype: torch.dtype, steps: Steps | None, inside: Tensor | None = None
) -> Tensor:
    """Return values on the grid, under given steps or those that follow from the weights; as `fitted_values`."""
    if steps is None:
        return fitted_values(weight, grid, inside, dtype)
    return given_values(weight, steps, grid, dtype, inside)


def fake_quantize_learned(
    weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values that the runtime will use for `weight` under a scale that is learned with it.

    Let v be weight / scale (+ zero point). Where v lies within qmin to qmax, the gradient of the weight is the incoming
    one and that of the scale round(v) - v times it; elsewhere they are 0 and the clipped code (less the zero point)
    times it. The scale's are summed over its group, times 1 / sqrt(N * Q_P): N weights in a group, Q_P levels.
    Learned step size quantisation (LSQ), Esser et al., 2019, arXiv:1902.08153. That the scale is rounded to the type it
    is stored in, or to a multiple in its super-block, passes gradients straight through: where it is that of 0, v and
    the gradients are by the unrounded scale, which so can grow again.

    Args:
        weight: float32 [out, in], `in` a multiple of the group size.
        scale: float32 [out, groups].
        offset: float32 [out, groups], as stored, on an asymmetric grid; it stays as it is.
        grid: The grid.
        dtype: What the values are given in.

    Returns:
        [out, in], in float32 on a CPU bit for bit `codes.deployed` with these scales, rounded, and offsets.
    """
    return _LearnedStep.apply(weight, scale, offset, grid, dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid, dtype: torch.dtype, steps: Steps | None) -> Tensor:
        """Return the weight as its fitted grid holds it."""
        inside = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if clips(grid) else None
        values = rounded_values(weight, grid, dtype, steps, inside)
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient as it is, with 0 where a weight was clipped."""
        # Read once: under checkpointing each reading would compute the layer again.
        saved = ctx.saved_tensors
        if not saved:
            return gradient.float(), None, None, None
        out = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        stop_clipped(gradient, saved[0], out)
        return out, None, None, None


def stop_clipped(gradient: Tensor, inside: Tensor, out: Tensor) -> None:
    """Write the gradient of a weight into `out` (it may be the incoming one), with 0 where it was clipped."""
    if (compiled := loops("rounding", gradient, inside, out)) is not None:
        compiled.stop_clipped(gradient, inside, out)
        return
    # As bytes the mask converts to float several times faster than as booleans.
    mask = inside.view(torch.int8)
    size = gradient.shape[1]
    (buffer,) = buffers_of(gradient, size, 1)
    for _, arriving, kept, target in chunks(size, gradient, mask, out):
        target.copy_(arriving)
        target.mul_(buffer[: len(kept)].copy_(kept))


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        """Return the weight as the grid of given scales holds it."""
        ctx.grid = grid
        # Codes are computed again in the backward pass: to write and read them back would cost as much, and memory.
        ctx.save_for_backward(weight, scale, offset)
        return given_values(weight, given_steps(scale, offset, grid), grid, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of weights and scales."""
        weight, scale, offset = ctx.saved_tensors
        weight_gradient = torch.empty_like(weight)
        scale_gradient = learned_gradients(weight, gradient, scale, offset, ctx.grid, weight_gradient)
        return weight_gradient, scale_gradient, None, None, None


def learned_gradients(
    weight: Tensor, gradient: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, out: Tensor
) -> Tensor:
    """Write the gradient of a weight into `out` (it may be the incoming one), and return that of its scales.

    With z the zero point, q the code less z, x the weight in steps, so that v = x + z, g the incoming gradient and h
    that of the weight (g where v lies within the codes, else 0), a group's scale gets the sum of g q - h x: where h is
    g that is round(v) - v times g, elsewhere q times g. Some groups at a time.
    """
    size = grid.group(weight.shape[1])
    steps = given_steps(scale, offset, grid)
    if grid.block_size:
        steps = steps._replace(factors=_revived(steps, scale, grid))
    factor = 1 / math.sqrt(size * grid.levels)
    if (compiled := loops("rounding", weight, gradient, out)) is not None:
        of_groups: Tensor = compiled.learned_gradients(weight, gradient, steps, grid, out)
        return of_groups.mul_(factor).view_as(scale)
    scale_gradient = torch.empty_like(scale)
    sums, ones = scale_gradient.view(-1), torch.ones(size, device=weight.device)
    low, high = next_beyond(grid)
    buffers = buffers_of(weight, size, 3)
    for part, groups, incoming, target in chunks(size, weight, gradient, out):
        step, code, arriving = buffers[:, : len(groups)]
        own = steps.part(part)
        arriving.copy_(incoming)
        in_steps(groups, own, step)
        torch.ops.aten.hardtanh_backward.grad_input(arriving, step, low, high, grad_input=target)
        torch.clamp(step, grid.qmin, grid.qmax, out=code).round_()
        if own.zero_points is not None:
            code.sub_(own.zero_points)
            step.sub_(own.zero_points)
        code.mul_(arriving).addcmul_(target, step, value=-1)
        # As a product: a sum over groups this short takes a third longer.
        torch.mv(code, ones, out=sums[part])
    return scale_gradient.mul_(factor)


def _revived(steps: Steps, scale: Tensor, grid: Grid) -> Tensor:
    """Return the divisors of groups, [groups, 1]; a stored scale of 0 becomes the unrounded scale, or the smallest.

    In steps of infinity every code is 0, and so is the gradient of the scale, which could not leave 0 any more.
    """
    unrounded = scale.view(-1, 1)
    # Below the least a step could be infinite; and only on a symmetric grid a scale has a sign.
    bounded = unrounded.clamp(min=_LEAST_SCALE)
    if grid.symmetric:
        bounded = torch.where(unrounded < 0, unrounded.clamp(max=-_LEAST_SCALE), bounded)
    return torch.where(steps.scales == 0, bounded, steps.factors)

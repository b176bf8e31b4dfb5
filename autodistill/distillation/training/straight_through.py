"""Fake quantisation: rounds values to a grid, with straight-through gradients, under fitted or learned scales."""

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

# The least scale above 0 that a super-block can store: the least float16 number above 0, times 1.
_LEAST_SCALE = 2.0**-24


def fake_quantize(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32, steps: Steps | None = None) -> Tensor:
    """Return the values that the runtime will use for `weight`, with a straight-through gradient.

    The gradient passes unchanged if a weight was rounded, and is zero if it was clipped. A weight is clipped if weight
    / scale (+ zero point) lies above qmax + 1/2 or below qmin - 1/2. Only a rounded zero point can cause the second
    case.
    Bengio et al., 2013, arXiv:1308.3432; clipping as in Jacob et al., 2018, arXiv:1712.05877.

    Args:
        weight: [out, in], `in` a multiple of the group size.
        grid: The grid.
        dtype: Type of the result.
        steps: The scaling of its groups. By default it follows from the weights.

    Returns:
        [out, in]. In float32, on a CPU and without given steps, it equals `codes.deployed` bit for bit.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StraightThrough.apply(weight.float(), grid, dtype, steps)
    return rounded_values(weight.float(), grid, dtype, steps)


def rounded_values(
    weight: Tensor, grid: Grid, dtype: torch.dtype, steps: Steps | None, inside: Tensor | None = None
) -> Tensor:
    """Return values on the grid, as `fitted_values` does, with given steps or with fitted ones."""
    if steps is None:
        return fitted_values(weight, grid, inside, dtype)
    return given_values(weight, steps, grid, dtype, inside)


def fake_quantize_learned(
    weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values that the runtime will use for `weight` under a scale that is learned with it.

    Let v be weight / scale (+ zero point), and g the incoming gradient. If v lies within qmin to qmax, the weight's
    gradient is g, and the scale's is (round(v) - v) g. Otherwise the weight's gradient is 0, and the scale's is g times
    the clipped code (minus the zero point). A scale's gradient is summed over its group and multiplied by 1 / sqrt(N *
    Q_P), with N weights in a group and Q_P levels.
    This is learned step size quantisation (LSQ), Esser et al., 2019, arXiv:1902.08153.

    The scale is rounded to its stored type, or to a multiple in its super-block. Gradients pass straight through this
    rounding. If the scale is rounded to 0, v and the gradients use the unrounded scale, so that it can grow again.

    Args:
        weight: float32 [out, in], `in` a multiple of the group size.
        scale: float32 [out, groups].
        offset: float32 [out, groups], as stored, on an asymmetric grid. It is not trained.
        grid: The grid.
        dtype: Type of the result.

    Returns:
        [out, in]. In float32 on a CPU, it equals `codes.deployed` with these offsets and the rounded scales bit for
            bit.
    """
    return _LearnedStep.apply(weight, scale, offset, grid, dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid, dtype: torch.dtype, steps: Steps | None) -> Tensor:
        """Return the weight's values on its fitted grid."""
        inside = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if clips(grid) else None
        values = rounded_values(weight, grid, dtype, steps, inside)
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient unchanged, but 0 for clipped weights."""
        # Read only once: under checkpointing, each read would compute the layer again.
        saved = ctx.saved_tensors
        if not saved:
            return gradient.float(), None, None, None
        out = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        stop_clipped(gradient, saved[0], out)
        return out, None, None, None


def stop_clipped(gradient: Tensor, inside: Tensor, out: Tensor) -> None:
    """Write a weight's gradient into `out`, which may be `gradient` itself, with 0 for clipped values."""
    if (compiled := loops("rounding", gradient, inside, out)) is not None:
        compiled.stop_clipped(gradient, inside, out)
        return
    # A mask of bytes converts to float several times faster than a mask of booleans.
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
        """Return the weight's values on the grid with the given scales."""
        ctx.grid = grid
        # The backward pass computes the codes again. Storing and reading them would take as long, and memory too.
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
    """Write a weight's gradient into `out`, which may be `gradient` itself, and return the gradient of its scales.

    Let z be the zero point, q the code minus z, and x the weight in steps, so that v = x + z. Let g be the incoming
    gradient, and h the weight's gradient: g if v lies within the codes, else 0. A group's scale gets the sum of g q - h
    x. That is (round(v) - v) g if h is g, and q g otherwise. It is computed for some groups at a time.
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
        # A product with ones, because a sum over such short groups takes a third longer.
        torch.mv(code, ones, out=sums[part])
    return scale_gradient.mul_(factor)


def _revived(steps: Steps, scale: Tensor, grid: Grid) -> Tensor:
    """Return the divisors of groups, [groups, 1]. A stored scale of 0 becomes the unrounded scale, or the least one.

    Otherwise such a group would divide by infinity. Every code and the scale's gradient would be 0, and the scale could
    never leave 0.
    """
    unrounded = scale.view(-1, 1)
    # With a scale below the least one, a step could be infinite. Only on a symmetric grid, a scale has a sign.
    bounded = unrounded.clamp(min=_LEAST_SCALE)
    if grid.symmetric:
        bounded = torch.where(unrounded < 0, unrounded.clamp(max=-_LEAST_SCALE), bounded)
    return torch.where(steps.scales == 0, bounded, steps.factors)

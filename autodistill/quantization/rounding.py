"""Rounding of weights to a grid, in torch: the values that a runtime will use, and scales that fit the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from autodistill.quantization import k_quants as super_blocks
from autodistill.quantization.grids import Grid, Scales, Storage
from autodistill.quantization.group_scales import Steps, extremes, fitted_steps, given_steps, in_steps, stored_steps
from autodistill.quantization.loops import loops

# Weights handled at once, operation by operation. On a CPU a chunk and its buffers stay in cache, so that each of about
# six passes costs a tenth of a nanosecond a weight, and memory is read and written once. This was the fastest of the
# nearby powers of two. On other devices a buffer has at most 128 MB; a table of 150,000 tokens would take several times
# that.
_CPU_CHUNK, _CHUNK = 2**18, 2**25
# The same for a search of scales. It consists of many short operations, which torch takes longer to start than numpy.
_SEARCHED = 2**19
# The largest float32 below a half. To round halves away from 0, this is added with the sign of x, and the sum is cut to
# an integer. With 0.5 the sum itself could be rounded up.
_BELOW_HALF = 0.5 - 2.0**-25


def deploy_tensor(weight: Tensor, storage: Storage, scales: Scales | None = None) -> Tensor:
    """Return the values that the runtime will use for `weight`, as float32 without gradient.

    Args:
        weight: A tensor of any shape; [out, in] for a grid, or matrices of experts [experts, out, in].
        storage: A grid or a float type; "f32" returns the weight's own memory.
        scales: Scales and offsets to use, such as learned ones; by default they follow from the weights.
    """
    weight = weight.detach().float()
    if weight.dim() > 2 and isinstance(storage, Grid):
        return deploy_tensor(weight.flatten(0, -2), storage, scales).view(weight.shape)
    if isinstance(storage, Grid):
        if scales is None:
            return fitted_values(weight, storage)
        learned, offsets = (None if part is None else torch.from_numpy(part).to(weight.device) for part in scales)
        assert learned is not None
        return given_values(weight, given_steps(learned, offsets, storage), storage)
    if storage == "f32":
        return weight
    if storage == "f32_plus_1":
        return (weight + 1) - 1
    return weight.to(torch.float16 if storage == "f16" else torch.bfloat16).float()


@torch.no_grad()
def fitted_scales(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return the stored scales and offsets that follow from the weights, float32 [out, groups] each."""
    shape = (len(weight), -1)
    if grid.searched:
        groups = weight.contiguous().view(-1, grid.group_size)
        at_once = _SEARCHED if weight.device.type == "cpu" else _CHUNK
        compiled = loops("k_quants", groups)
        search = None if compiled is None else compiled.nearest
        searched, minima = super_blocks.fitted(groups, grid, torch, at_once, search)
        return searched.view(shape), None if minima is None else minima.view(shape)
    size = grid.group(weight.shape[1])
    found = [fitted_steps(groups, grid, _extremes) for _, groups in chunks(size, weight)]
    offsets = [steps.bases if grid.offset == "minimum" else steps.zero_points for steps in found]
    return (
        torch.cat([steps.scales for steps in found]).view(shape),
        None if grid.symmetric else torch.cat([part for part in offsets if part is not None]).view(shape),
    )


@torch.no_grad()
def fitted_values(
    weight: Tensor, grid: Grid, inside: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return values on the grid, with scales that follow from the weights.

    Args:
        weight: float32 [out, in].
        grid: The grid.
        inside: bool [out, in], filled with whether each weight was not clipped; or None.
        dtype: Type to which the values are rounded at the end, as autocast would round them. This takes one pass
            instead of two.
    """
    if grid.searched:
        return given_values(weight, stored_steps(*fitted_scales(weight, grid), grid), grid, dtype, inside)
    return _values(weight, lambda groups, part: fitted_steps(groups, grid, _extremes), grid, dtype, inside)


@torch.no_grad()
def given_values(
    weight: Tensor, steps: Steps, grid: Grid, dtype: torch.dtype = torch.float32, inside: Tensor | None = None
) -> Tensor:
    """Return values on the grid for given scales, otherwise as `fitted_values` does."""
    return _values(weight, lambda groups, part: steps.part(part), grid, dtype, inside)


def _extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    if (compiled := loops("rounding", groups)) is not None:
        found: tuple[Tensor, Tensor] = compiled.extremes(groups)
        return found
    return extremes(groups)


def _values(
    weight: Tensor,
    steps_of: Callable[[Tensor, slice], Steps],
    grid: Grid,
    dtype: torch.dtype,
    inside: Tensor | None,
) -> Tensor:
    """Return values, with the scaling that `steps_of` gives for some groups at a time."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = grid.group(weight.shape[1])
    exact = dtype == torch.float32
    # compressed-tensors holds bfloat16 values, even if they are returned as float32.
    rounded = exact and grid.container == "compressed-tensors"
    if (compiled := loops("rounding", weight, out, inside)) is not None:
        steps = steps_of(weight.view(-1, size), slice(None))
        compiled.values(weight, steps, grid, rounded=rounded, out=out, inside=inside)
        return out
    (buffer,) = buffers_of(weight, size, 1)
    mask = None if inside is None else inside.view(torch.int8).view(-1, size)
    brief = torch.empty_like(buffer, dtype=torch.bfloat16) if rounded else None
    for part, groups, values in chunks(size, weight, out):
        # Each pass works in place: reading one memory and writing another takes twice as long.
        step, steps = values if exact else buffer[: len(groups)], steps_of(groups, part)
        in_steps(groups, steps, step)
        if mask is not None:
            # A comparison that is written as floats is vectorised; one that is written as booleans is not.
            mask[part].copy_(step.clamp(*grid.reach).eq_(step))
        _round(step, steps, grid)
        _scaled(step, steps, exact)
        if brief is not None:
            values.copy_(brief[: len(groups)].copy_(step))
        elif not exact:
            values.copy_(step)
    return out


def chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield the range of some groups, and each tensor's part, [groups, size]. All tensors have one shape."""
    rows = _rows(tensors[0], size)
    matrices = [tensor.reshape(-1, size) for tensor in tensors]
    starts = range(0, len(matrices[0]), rows)
    for start, *parts in zip(starts, *(matrix.split(rows) for matrix in matrices), strict=True):
        yield slice(start, start + rows), *parts


def buffers_of(tensor: Tensor, size: int, count: int) -> Tensor:
    """Return working memory for the groups that `chunks` yields at once, float32 [count, groups, size]."""
    return torch.empty((count, _rows(tensor, size), size), device=tensor.device)


def _rows(tensor: Tensor, size: int) -> int:
    """Return the number of groups to handle at once, so that chunks are about equally large."""
    groups = max(1, tensor.numel() // size)
    parts = -(-tensor.numel() // (_CPU_CHUNK if tensor.device.type == "cpu" else _CHUNK))
    return -(-groups // max(1, min(parts, groups)))


def _round(step: Tensor, steps: Steps, grid: Grid) -> None:
    """Round steps to codes in place, as `packing.quantize` does, except that a code of 0 may be -0."""
    if grid.codebook:
        step.copy_(super_blocks.nearest_codes(step, grid, torch))
    elif steps.rounding == "half_up":
        step.add_(0.5 - grid.qmin).floor_().clamp_(0, grid.qmax - grid.qmin).add_(grid.qmin)
    elif steps.rounding == "half_even":
        step.clamp_(grid.qmin, grid.qmax).round_()
    else:
        step.add_(torch.sign(step), alpha=_BELOW_HALF).clamp_(-grid.qmax, grid.qmax)
        # The conversion to an integer truncates, and is far faster than trunc.
        step.copy_(step.to(torch.int8))


def _scaled(codes: Tensor, steps: Steps, exact: bool) -> None:
    """Turn codes into the values that are read from them, in place."""
    if exact:
        codes.add_(0.0)  # a code of 0 is never -0
    if steps.zero_points is not None:
        codes.sub_(steps.zero_points)
    codes.mul_(steps.scales)
    if steps.bases is not None:
        codes.add_(steps.bases)

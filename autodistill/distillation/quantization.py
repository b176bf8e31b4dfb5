"""The grids of `formats` in torch: fake quantisation with straight-through gradients, and training under it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autodistill.errors import InputError
from autodistill.formats import BF16_EPSILON, Grid, Role, Storage, TensorSpec, check_tensor

# Weights handled at once on a CPU: a chunk and its buffers stay in cache, so that each of the ten or so passes costs a
# tenth of a nanosecond a weight, and memory is read and written once; of powers of two around it this was the fastest.
_CHUNK = 2**18
# The largest float32 below a half. Of x >= 0, floor(x + this) rounds halves up; with 0.5 the sum itself could do so.
_BELOW_HALF = 0.5 - 2.0**-25


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The values that the runtime will see of `weight`, with a straight-through gradient.

    The gradient passes unchanged where a weight was rounded and is zero where it was clipped: where weight / scale lies
    above qmax + 1/2. (No weight lies below qmin - 1/2: the scale is chosen from the largest magnitude.)
    Bengio et al., 2013, arXiv:1308.3432; clipping as in Jacob et al., 2018, arXiv:1712.05877.

    Args:
        weight: [out, in], `in` a multiple of the group size.
        grid: The grid.

    Returns:
        float32 [out, in], on a CPU bit for bit `formats.deployed`.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StraightThrough.apply(weight.float(), grid)
    return _on_grid(weight.float(), grid, None)


def deploy_tensor(weight: Tensor, storage: Storage) -> Tensor:
    """The values that the runtime will see of `weight`, as float32 without gradient.

    Args:
        weight: Of any shape; [out, in] for a grid.
        storage: A grid or a float type; "f32" gives the weight's own memory.
    """
    weight = weight.detach().float()
    if isinstance(storage, Grid):
        return _on_grid(weight, storage, None)
    if storage == "f32":
        return weight
    return weight.to(torch.float16 if storage == "f16" else torch.bfloat16).float()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        # Where the largest magnitude itself stays within half a step of qmax, nothing can be clipped.
        clips = abs(grid.divisor) >= grid.qmax + 0.5
        inside = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if clips else None
        values = _on_grid(weight, grid, inside)
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Read once: under checkpointing each reading would compute the layer again.
        saved = ctx.saved_tensors
        if not saved:
            return gradient, None
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        # As bytes the mask converts to float several times faster than as booleans.
        mask = saved[0].view(torch.int8).view(-1)
        size = _chunk_size(gradient)
        for source, kept, target in zip(
            gradient.reshape(-1).split(size), mask.split(size), out.view(-1).split(size), strict=True
        ):
            torch.mul(source, kept.float(), out=target)
        return out, None


def _chunk_size(tensor: Tensor) -> int:
    return _CHUNK if tensor.device.type == "cpu" else max(1, tensor.numel())


@torch.no_grad()
def _on_grid(weight: Tensor, grid: Grid, inside: Tensor | None) -> Tensor:
    """Values on the grid; fills the mask `inside` (bool [out, in]) with whether each weight was not clipped."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    groups, values = weight.reshape(-1, grid.group_size), out.view(-1, grid.group_size)
    rows = max(1, _chunk_size(weight) // grid.group_size)
    mask = None if inside is None else inside.view(torch.int8).view(-1, grid.group_size)
    scratch = torch.empty_like(values[:rows])
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        target = values[part]
        stored = _steps(groups[part], grid, target)
        if mask is not None:
            # A comparison written as floats is vectorised, one written as booleans is not.
            within = torch.le(target, grid.qmax + 0.5, out=scratch[: len(target)])
            mask[part].copy_(within)
        _round(target, grid)
        target.mul_(stored)
        if grid.container == "compressed-tensors":
            target.copy_(target.bfloat16())
    return out


def _steps(groups: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """Writes weight / scale into `out`, and gives the stored scales, float32 [groups, 1]; as `formats.quantize`."""
    largest = _signed_absmax(groups) if grid.scale_rule == "signed_absmax" else _absmax(groups)
    # By a tensor, since CUDA turns a division by a Python number into a product with its rounded reciprocal.
    scales = largest / torch.full((), grid.divisor, device=groups.device)
    if grid.container == "gguf":
        inverse = scales.reciprocal().nan_to_num_(nan=float("nan"), posinf=0.0, neginf=0.0)
        torch.mul(groups, inverse, out=out)
        return scales.half().float()
    stored = scales.bfloat16().float()
    stored.masked_fill_(stored == 0, BF16_EPSILON)
    torch.div(groups, stored, out=out)
    return stored


def _absmax(groups: Tensor) -> Tensor:
    # A group of zeros may come out as -0, hence the last step.
    return torch.maximum(groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True).neg_()).abs_()


def _signed_absmax(groups: Tensor) -> Tensor:
    # The two extremes cost a third of a search for the largest magnitude's place, which is needed only where they tie:
    # there the first of the group counts.
    highest, lowest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    largest = torch.where(highest > -lowest, highest, lowest)
    tied = (highest == -lowest).view(-1).nonzero().view(-1)
    if len(tied):
        candidates = groups[tied]
        largest[tied] = candidates.gather(-1, candidates.abs().argmax(-1, keepdim=True))
    return largest


def _round(steps: Tensor, grid: Grid) -> None:
    """Rounds in place to codes, as `formats.quantize` does; a code of 0 is never -0."""
    if grid.rounding == "half_up":
        steps.add_(0.5 - grid.qmin).floor_().clamp_(0, grid.qmax - grid.qmin).add_(grid.qmin)
    elif grid.rounding == "half_even":
        steps.clamp_(grid.qmin, grid.qmax).round_().add_(0.0)
    else:
        sign = steps.sign()
        steps.abs_().add_(_BELOW_HALF).floor_().clamp_(max=grid.qmax).mul_(sign).add_(0.0)


class FakeQuantized:
    """One master weight as its grid shows it; a tied weight has one of these for all the modules that use it.

    Args:
        master: float32 [out, in], which the optimiser updates.
        grid: The grid.
    """

    def __init__(self, master: nn.Parameter, grid: Grid) -> None:
        self.master = master
        self._grid = grid
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self) -> Tensor:
        """The quantised weight; that of a frozen master is computed once, until the master's values change."""
        if self.master.requires_grad:
            self._kept = None
            return fake_quantize(self.master, self._grid)
        state = (self.master._version, self.master.data_ptr())
        if self._kept is None or self._kept[0] != state:
            # What inference mode makes, autograd cannot use later.
            with torch.inference_mode(False):
                self._kept = (state, deploy_tensor(self.master, self._grid))
        return self._kept[1]


@contextmanager
def quantized_training(model: nn.Module, storage_of: Callable[[str], Storage | None]) -> Iterator[None]:
    """Within the context the model computes with weights on their grids, while the optimiser moves the float32 masters.

    Each module holds its quantised weight only while it runs, so that parameters, their names in the state dict, and
    ties are the same objects before, during and after. Weights that `storage_of` gives a float type, or None, are left
    as they are: a 16-bit type's rounding is far below a grid's.

    Args:
        model: Its parameters are looked up by name; a tied one has the name it is first met under.
        storage_of: What the parameter of this name is stored as.

    Raises:
        InputError: A grid for a parameter that is not the weight of a linear or embedding layer, or whose rows the
            groups do not divide.
    """
    quantized: dict[int, FakeQuantized] = {}
    for name, parameter in model.named_parameters():
        storage = storage_of(name)
        if isinstance(storage, Grid):
            check_tensor(TensorSpec(name=name, role=Role.LINEAR, shape=tuple(parameter.shape)), storage)
            quantized[id(parameter)] = FakeQuantized(parameter, storage)
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in quantized:
                    if not isinstance(module, nn.Linear | nn.Embedding) or name != "weight":
                        raise InputError(
                            f"{path}.{name} cannot be trained on a grid: only linear and embedding layers can, "
                            f"not {type(module).__name__}; leave the finishing stage out"
                        )
                    _attach(module, quantized[id(parameter)], hooks)
        yield


def _attach(module: nn.Module, weight: FakeQuantized, hooks: ExitStack) -> None:
    parameters: dict[str, Any] = module._parameters

    def show(module: nn.Module, inputs: Any) -> None:
        parameters["weight"] = weight()

    def hide(module: nn.Module, inputs: Any, output: Any) -> None:
        parameters["weight"] = weight.master

    hooks.callback(module.register_forward_pre_hook(show).remove)
    hooks.callback(module.register_forward_hook(hide, always_call=True).remove)

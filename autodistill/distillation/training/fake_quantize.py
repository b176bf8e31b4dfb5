"""Fake quantisation with straight-through gradients, with default or learned scales, and training under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autodistill.distillation.training.fsdp import whole
from autodistill.errors import InputError
from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.grids import Grid, Scales, Storage, check_tensor
from autodistill.quantization.group_scales import Steps, clips, given_steps, in_steps, next_beyond
from autodistill.quantization.loops import loops
from autodistill.quantization.rounding import (
    buffers_of,
    chunks,
    deploy_tensor,
    fitted_scales,
    fitted_values,
    given_values,
)

# The least scale above 0 that a super-block holds: float16's least unit, once.
_LEAST_SCALE = 2.0**-24


def fake_quantize(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values that the runtime will use for `weight`, with a straight-through gradient.

    The gradient passes unchanged where a weight was rounded and is zero where it was clipped: where weight / scale (+
    zero point) lies above qmax + 1/2, or below qmin - 1/2, which only a rounded zero point brings about.
    Bengio et al., 2013, arXiv:1308.3432; clipping as in Jacob et al., 2018, arXiv:1712.05877.

    Args:
        weight: [out, in], `in` a multiple of the group size.
        grid: The grid.
        dtype: What the values are given in.

    Returns:
        [out, in], in float32 on a CPU bit for bit `codes.deployed`.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return _StraightThrough.apply(weight.float(), grid, dtype)
    return fitted_values(weight.float(), grid, dtype=dtype)


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
    def forward(ctx: Any, weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Return the weight as its fitted grid holds it."""
        inside = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if clips(grid) else None
        values = fitted_values(weight, grid, inside, dtype)
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient as it is, with 0 where a weight was clipped."""
        # Read once: under checkpointing each reading would compute the layer again.
        saved = ctx.saved_tensors
        if not saved:
            return gradient.float(), None, None
        out = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        _stop_clipped(gradient, saved[0], out)
        return out, None, None


def _stop_clipped(gradient: Tensor, inside: Tensor, out: Tensor) -> None:
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
        scale_gradient = _learned_gradients(weight, gradient, scale, offset, ctx.grid, weight_gradient)
        return weight_gradient, scale_gradient, None, None, None


def _learned_gradients(
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


class _Passing(torch.autograd.Function):
    """Given values, whose gradient is passed unchanged to the weight that they replace."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


class _Step:
    """One weight during a step: quantised once, with its gradients summed and passed through the grid once.

    What a grid makes of a gradient is linear in it, so that it may be done to the sum.

    Args:
        weight: What is to be rounded, float32 [out, in]; a leaf, or with the graph of what it was made from.
        grid: The grid.
        scale: Learned scales, or None.
        offset: Stored beside them, on an asymmetric grid.
    """

    def __init__(self, weight: Tensor, grid: Grid, scale: nn.Parameter | None, offset: Tensor | None) -> None:
        self._weight = weight
        # Where the gradients of all passes are added up.
        self._leaf = weight if weight.is_leaf else weight.detach().requires_grad_()
        self._grid, self._scale, self._offset = grid, scale, offset
        self._inside: Tensor | None = None
        self._values: dict[torch.dtype, Tensor] = {}

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """Return the quantised weight, whose gradient goes to the sum."""
        if dtype not in self._values:
            self._values[dtype] = self._rounded(dtype)
        shown: Tensor = _Passing.apply(self._leaf, self._values[dtype])
        return shown

    @torch.no_grad()
    def _rounded(self, dtype: torch.dtype) -> Tensor:
        leaf, grid = self._leaf, self._grid
        if self._scale is not None:
            return given_values(leaf, given_steps(self._scale, self._offset, grid), grid, dtype)
        if self._inside is None and clips(grid):
            self._inside = torch.empty(leaf.shape, dtype=torch.bool, device=leaf.device)
        return fitted_values(leaf, grid, self._inside, dtype)

    def end(self) -> None:
        """Compute the gradients of the weight, its sources and its scales from the sum."""
        gradient = self._leaf.grad
        if gradient is None:
            return
        with torch.no_grad():
            if self._scale is not None:
                self._scale.grad = _learned_gradients(
                    self._leaf, gradient, self._scale, self._offset, self._grid, gradient
                )
            elif self._inside is not None:
                _stop_clipped(gradient, self._inside, gradient)
        if self._weight is not self._leaf:
            self._weight.backward(gradient)


class FakeQuantized:
    """One master weight as its grid shows it; all modules that share a tied weight share this object.

    Args:
        master: float32 [out, in], which the optimiser updates.
        grid: The grid.
        learned: Whether the scales of a trained master are parameters of their own, which begin as those of its groups.
        change: Gives the values to be rounded of a frozen master whose change is trained, with their gradient.

    Attributes:
        scale: float32 [out, groups], or None where scales follow from the weights.
    """

    def __init__(
        self,
        master: nn.Parameter,
        grid: Grid,
        *,
        learned: bool = False,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.master = master
        self._change = change
        self.grid = grid
        self.scale: nn.Parameter | None = None
        self._offset: Tensor | None = None
        self._kept: tuple[tuple[int, int], Tensor] | None = None
        self._held_over = False
        self._step: _Step | None = None
        if learned and (master.requires_grad or change is not None):
            scales, self._offset = fitted_scales(self._values(whole(master.detach())), grid)
            self.scale = nn.Parameter(scales)

    @property
    def frozen(self) -> bool:
        """Whether nothing in it is trained."""
        return not self.master.requires_grad and self._change is None

    def __call__(self, held: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the quantised weight; for a frozen master it is computed once, until the master changes.

        Args:
            held: Of a master that is sharded over processes the whole weight, as its module holds it now.
            dtype: What it is computed with, and so given in.
        """
        held = self.master if held is None else held
        if self._held_over and not self.frozen:
            if self._step is None:
                with torch.enable_grad():
                    self._step = _Step(self._values(held), self.grid, self.scale, self._offset)
            return self._step(dtype)
        if self.scale is not None:
            return fake_quantize_learned(self._values(held), self.scale, self._offset, self.grid, dtype)
        if not self.frozen:
            self._kept = None
            return fake_quantize(self._values(held), self.grid, dtype)
        if held is not self.master:
            return deploy_tensor(held, self.grid)
        state = (self.master._version, self.master.data_ptr())
        if self._kept is None or self._kept[0] != state:
            # What inference mode makes, autograd cannot use later.
            with torch.inference_mode(False):
                self._kept = (state, deploy_tensor(self.master, self.grid))
        return self._kept[1]

    def rows(self, held: Tensor, ids: Tensor) -> Tensor:
        """Return some rows of a frozen master, as its module holds it, on its grid; groups never cross a row."""
        return deploy_tensor(held.detach()[ids], self.grid)

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Within the context, master and scales do not change: the weight is quantised, and its gradient passed, once.

        The gradients of a trained master or change, and of learned scales, are whole when it ends: those of the passes
        in it, which must be the only ones, nothing being left of a step before. It is not for a master that is sharded.
        """
        self._held_over = True
        try:
            yield
            if self._step is not None:
                self._step.end()
        finally:
            self._held_over, self._step = False, None

    def _values(self, held: Tensor) -> Tensor:
        return held if self._change is None else self._change(held)

    def stored(self) -> Scales | None:
        """Return the learned scales and their offsets as a file holds them, or None if none are learned."""
        if self.scale is None:
            return None
        stored = given_steps(self.scale.detach(), None, self.grid).scales
        offset = None if self._offset is None else self._offset.cpu().numpy()
        return Scales(stored.view_as(self.scale).cpu().numpy(), offset)


@contextmanager
def one_step(weights: Collection[FakeQuantized]) -> Iterator[None]:
    """Apply `FakeQuantized.one_step` to all of these weights within the context."""
    with ExitStack() as stack:
        for weight in weights:
            stack.enter_context(weight.one_step())
        yield


@contextmanager
def quantized_training(
    model: nn.Module,
    storage_of: Callable[[str], Storage | None],
    *,
    learned: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[Mapping[str, FakeQuantized]]:
    """Within the context, the model computes with weights on their grids, and the optimiser updates float32 masters.

    Each module holds its quantised weight only while it runs, so that parameters, their names in the state dict, and
    ties are the same objects before, during and after. Weights that `storage_of` gives a float type, or None, are left
    as they are: a 16-bit type's rounding is far below a grid's.

    Args:
        model: Its parameters are looked up by name; a tied one has the name it is first met under.
        storage_of: What the parameter of this name is stored as.
        learned: Whether scales are learned, which is for the caller to do: they are no parameters of the model.
        changes: What gives the values of frozen weights whose changes are trained, by name.

    Yields:
        What is on a grid, by name of its parameter.

    Raises:
        InputError: A grid for a parameter that is not the weight of a linear or embedding layer, or whose rows the
            groups do not divide.
    """
    shown: dict[str, FakeQuantized] = {}
    for name, parameter in model.named_parameters():
        storage = storage_of(name)
        if isinstance(storage, Grid):
            check_tensor(TensorSpec(name=name, role=Role.LINEAR, shape=tuple(parameter.shape)), storage)
            change = (changes or {}).get(name)
            shown[name] = FakeQuantized(parameter, storage, learned=learned, change=change)
    quantized = {id(weight.master): weight for weight in shown.values()}
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in quantized:
                    check_module(module, path, name)
                    weight = quantized[id(parameter)]
                    if isinstance(module, nn.Embedding) and weight.frozen:
                        attach_rows(module, weight.rows, hooks)
                    else:
                        attach(module, weight, hooks)
        yield shown


def check_module(module: nn.Module, path: str, name: str) -> None:
    """Check that a parameter of a module can be shown on a grid.

    Raises:
        InputError: It is not the weight of a linear or embedding layer.
    """
    if not isinstance(module, nn.Linear | nn.Embedding) or name != "weight":
        raise InputError(
            f"{path}.{name} cannot be trained on a grid: only linear and embedding layers can, "
            f"not {type(module).__name__}; leave the finishing stage out"
        )


def attach_rows(module: nn.Embedding, rows: Callable[[Tensor, Tensor], Tensor], hooks: ExitStack) -> None:
    """Let an embedding look up rows that a function gives for its own weight and token ids, until hooks are closed."""
    parameters: dict[str, Any] = module._parameters
    held: list[Any] = []

    def show(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put a row for each token in the place of the table, and number them."""
        held.append((parameters["weight"], module.padding_idx))
        # One for each token: which of them are the same, nobody could say without waiting for a GPU.
        ids = inputs[0]
        places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        parameters["weight"] = rows(held[-1][0], ids.flatten())
        # Its row is elsewhere now; it matters to gradients alone.
        module.padding_idx = None  # type: ignore[assignment]
        return (places, *inputs[1:])

    def hide(module: nn.Module, inputs: Any, output: Any) -> None:
        if held:
            parameters["weight"], module.padding_idx = held.pop()

    hooks.callback(module.register_forward_pre_hook(show).remove)
    hooks.callback(module.register_forward_hook(hide, always_call=True).remove)


def attach(module: nn.Module, weight: Callable[[Tensor, torch.dtype], Tensor], hooks: ExitStack) -> None:
    """Let a module compute with a weight that a function gives for its own and a type, until the hooks are closed."""
    parameters: dict[str, Any] = module._parameters
    held: list[Any] = []

    def show(module: nn.Module, inputs: Any) -> None:
        """Put the rounded weight in the place of the trained one."""
        held.append(parameters["weight"])
        kind = held[-1].device.type
        # A product computes in autocast's type, and would round the weight to it in a pass of its own.
        cast = isinstance(module, nn.Linear) and torch.is_autocast_enabled(kind)
        parameters["weight"] = weight(held[-1], torch.get_autocast_dtype(kind) if cast else torch.float32)

    def hide(module: nn.Module, inputs: Any, output: Any) -> None:
        # A pass that fails before `show` has nothing to put back.
        if held:
            parameters["weight"] = held.pop()

    hooks.callback(module.register_forward_pre_hook(show).remove)
    hooks.callback(module.register_forward_hook(hide, always_call=True).remove)

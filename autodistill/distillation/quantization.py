"""The grids of `formats` in torch: fake quantisation with straight-through gradients, and training under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autodistill.codes import BF16_EPSILON
from autodistill.distillation.sharding import whole
from autodistill.errors import InputError
from autodistill.formats import Grid, Role, Scales, Storage, TensorSpec, check_tensor

# Weights handled at once on a CPU: a chunk and its buffers stay in cache, so that each of the six or so passes costs a
# tenth of a nanosecond a weight, and memory is read and written once; of powers of two around it this was the fastest.
_CHUNK = 2**18
# The largest float32 below a half: x + this, with the sign of x, cut to an integer rounds halves away from 0. With 0.5
# the sum itself could be rounded up.
_BELOW_HALF = 0.5 - 2.0**-25


def fake_quantize(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the runtime will see of `weight`, with a straight-through gradient.

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
    return _on_grid(weight.float(), grid, None, dtype=dtype)


def fake_quantize_learned(
    weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that the runtime will see of `weight` under a scale that is learned with it.

    Let v be weight / scale (+ zero point). Where v lies within qmin to qmax, the gradient of the weight is the incoming
    one and that of the scale round(v) - v times it; elsewhere they are 0 and the clipped code (less the zero point)
    times it. The scale's are summed over its group, times 1 / sqrt(N * Q_P): N weights in a group, Q_P levels.
    Learned step size quantisation (LSQ), Esser et al., 2019, arXiv:1902.08153. That the scale is rounded to the type it
    is stored in passes gradients straight through.

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


def deploy_tensor(weight: Tensor, storage: Storage, scales: Scales | None = None) -> Tensor:
    """The values that the runtime will see of `weight`, as float32 without gradient.

    Args:
        weight: Of any shape; [out, in] for a grid.
        storage: A grid or a float type; "f32" gives the weight's own memory.
        scales: Scales and offsets to use, learned ones say; by default they follow from the weights.
    """
    weight = weight.detach().float()
    if isinstance(storage, Grid):
        return _on_grid(weight, storage, None, None if scales is None else _columns(scales, weight.device))
    if storage == "f32":
        return weight
    if storage == "f32_plus_1":
        return (weight + 1) - 1
    return weight.to(torch.float16 if storage == "f16" else torch.bfloat16).float()


# Stored scales and offsets, float32 [groups, 1].
_Given: TypeAlias = tuple[Tensor, Tensor | None]


def _columns(scales: Scales, device: torch.device) -> _Given:
    stored, offsets = (None if values is None else torch.from_numpy(values).to(device).view(-1, 1) for values in scales)
    assert stored is not None
    return stored, offsets


def _part(given: _Given, part: slice) -> _Given:
    stored, offsets = given
    return stored[part], None if offsets is None else offsets[part]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        inside = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if _clips(grid) else None
        values = _on_grid(weight, grid, inside, dtype=dtype)
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient as it is, and 0 where a weight was clipped."""
        # Read once: under checkpointing each reading would compute the layer again.
        saved = ctx.saved_tensors
        if not saved:
            return gradient.float(), None, None
        out = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device)
        # As bytes the mask converts to float several times faster than as booleans.
        mask = saved[0].view(torch.int8).view(-1)
        size = _chunk_size(gradient)
        for source, kept, target in zip(
            gradient.reshape(-1).split(size), mask.split(size), out.view(-1).split(size), strict=True
        ):
            torch.mul(source.float(), kept.float(), out=target)
        return out, None, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> Tensor:
        ctx.grid = grid
        # Codes are computed again in the backward pass: to keep them would take more memory than the weights.
        ctx.save_for_backward(weight, scale, offset)
        return _on_grid(weight, grid, None, _stored(scale, offset, grid), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of weights and scales, some groups at a time.

        With z the zero point, q the code less z, x the weight in steps, so that v = x + z, g the incoming gradient and
        h that of the weight (g where v lies within the codes, else 0), a group's scale gets the sum of g q - h x: where
        h is g that is round(v) - v times g, elsewhere q times g.
        """
        weight, scale, offset = ctx.saved_tensors
        grid: Grid = ctx.grid
        size = grid.group(weight.shape[1])
        stored, offsets = _stored(scale, offset, grid)
        zero_points = offsets if grid.offset == "zero_point" else None
        minima = offsets if grid.offset == "minimum" else None
        weight_gradient, scale_gradient = torch.empty_like(weight), torch.empty_like(scale)
        groups, incoming, out = (tensor.reshape(-1, size) for tensor in (weight, gradient, weight_gradient))
        sums = scale_gradient.view(-1)
        rows = max(1, _chunk_size(weight) // size)
        steps, codes = torch.empty_like(groups[:rows]), torch.empty_like(groups[:rows])
        placed = torch.empty_like(steps) if zero_points is not None else steps
        ones, (low, high) = torch.ones(size, device=weight.device), _beyond(grid)
        for start in range(0, len(groups), rows):
            part = slice(start, start + rows)
            target, arriving = out[part], incoming[part].float()
            step, code, place = (buffer[: len(target)] for buffer in (steps, codes, placed))
            _given_steps(groups[part], (stored[part], None if minima is None else minima[part]), grid, step)
            if zero_points is not None:
                torch.add(step, zero_points[part], out=place)
            torch.ops.aten.hardtanh_backward.grad_input(arriving, place, low, high, grad_input=target)
            _round(place, grid, code)
            if zero_points is not None:
                code.sub_(zero_points[part])
            code.mul_(arriving).addcmul_(target, step, value=-1)
            torch.mv(code, ones, out=sums[part])
        return weight_gradient, scale_gradient.mul_(1 / math.sqrt(size * grid.levels)), None, None, None


def _stored(scale: Tensor, offset: Tensor | None, grid: Grid) -> _Given:
    """What the file will hold of a learned scale and its offset, float32 [groups, 1]."""
    rounded = (scale.half() if grid.scale_dtype == "f16" else scale.bfloat16()).float().view(-1, 1)
    return rounded, None if offset is None else offset.view(-1, 1)


def _clips(grid: Grid) -> bool:
    """Whether a weight can be clipped under a scale that follows from its group."""
    if grid.scale_rule == "range":
        return grid.offset == "zero_point"
    # Where the largest magnitude itself stays within half a step of qmax, nothing can be clipped.
    return abs(grid.divisor) >= grid.qmax + 0.5


def _chunk_size(tensor: Tensor) -> int:
    return _CHUNK if tensor.device.type == "cpu" else max(1, tensor.numel())


@torch.no_grad()
def _on_grid(
    weight: Tensor, grid: Grid, inside: Tensor | None, given: _Given | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values on the grid; fills the mask `inside` (bool [out, in]) with whether each weight was not clipped.

    Args:
        weight: float32 [out, in].
        grid: The grid.
        inside: bool [out, in], or None.
        given: Stored scales and offsets, or None where they follow from the weights.
        dtype: What the values are rounded to at last, as autocast would round them: one pass over them instead of two.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = grid.group(weight.shape[-1])
    groups, values = weight.reshape(-1, size), out.view(-1, size)
    rows = max(1, _chunk_size(weight) // size)
    mask = None if inside is None else inside.view(torch.int8).view(-1, size)
    exact = dtype == torch.float32
    steps = torch.empty_like(groups[:rows])
    codes = None if exact else torch.empty_like(steps)
    # What compressed-tensors holds is bfloat16, in float32 as well.
    brief = torch.empty_like(steps, dtype=torch.bfloat16) if exact and grid.container == "compressed-tensors" else None
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        step = steps[: len(values[part])]
        target = values[part] if codes is None else codes[: len(step)]
        if given is None:
            stored, offsets = _fitted_steps(groups[part], grid, step)
        else:
            stored, offsets = _given_steps(groups[part], _part(given, part), grid, step)
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
        if exact:
            target.add_(0.0)  # a code of 0 is never -0
        if offsets is not None and grid.offset == "zero_point":
            target.sub_(offsets)
        target.mul_(stored)
        if offsets is not None and grid.offset == "minimum":
            target.add_(offsets)
        if brief is not None:
            target.copy_(brief[: len(step)].copy_(target))
        elif codes is not None:
            values[part].copy_(target)
    return out


def _fitted_steps(groups: Tensor, grid: Grid, out: Tensor) -> _Given:
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
    return _given_steps(groups, (stored, low), grid, out)


def _given_steps(groups: Tensor, given: _Given, grid: Grid, out: Tensor) -> _Given:
    """Writes the groups in steps of stored scales into `out`, and gives those back; under a scale of 0 all are 0."""
    scales, offsets = given
    scales = scales.masked_fill(scales == 0, math.inf)
    if offsets is None:
        torch.div(groups, scales, out=out)
    elif grid.offset == "minimum":
        torch.sub(groups, offsets, out=out).div_(scales)
    else:
        torch.div(groups, scales, out=out).add_(offsets)
    return given


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


def _beyond(grid: Grid) -> tuple[float, float]:
    """The float32 numbers next to the codes' bounds, outside of them."""
    bounds, sides = torch.tensor([grid.qmin, grid.qmax]).float(), torch.tensor([-math.inf, math.inf])
    low, high = torch.nextafter(bounds, sides).tolist()
    return low, high


class FakeQuantized:
    """One master weight as its grid shows it; a tied weight has one of these for all the modules that use it.

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
        if learned and self._values(master).requires_grad:
            scales, self._offset = fitted_scales(whole(self._values(master).detach()), grid)
            self.scale = nn.Parameter(scales)

    def __call__(self, held: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The quantised weight; that of a frozen master is computed once, until the master's values change.

        Args:
            held: Of a master that is sharded over processes the whole weight, as its module holds it now.
            dtype: What it is computed with, and so given in.
        """
        held = self.master if held is None else held
        if self.scale is not None:
            return fake_quantize_learned(self._values(held), self.scale, self._offset, self.grid, dtype)
        if self.master.requires_grad or self._change is not None:
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

    def _values(self, held: Tensor) -> Tensor:
        return held if self._change is None else self._change(held)

    def stored(self) -> Scales | None:
        """The learned scales and their offsets as a file holds them, or None where none are learned."""
        if self.scale is None:
            return None
        scales, _ = _stored(self.scale.detach(), None, self.grid)
        offset = None if self._offset is None else self._offset.cpu().numpy()
        return Scales(scales.view_as(self.scale).cpu().numpy(), offset)


def fitted_scales(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The stored scales, and offsets, that follow from the weights: float32 [out, groups] each."""
    groups = weight.reshape(-1, grid.group(weight.shape[1]))
    found = [
        _fitted_steps(part, grid, torch.empty_like(part))
        for part in groups.split(max(1, _chunk_size(weight) // groups.shape[1]))
    ]
    scales, offsets = zip(*found, strict=True)
    shape = (len(weight), -1)
    return torch.cat(scales).view(shape), None if grid.symmetric else torch.cat(offsets).view(shape)


@contextmanager
def quantized_training(
    model: nn.Module,
    storage_of: Callable[[str], Storage | None],
    *,
    learned: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[Mapping[str, FakeQuantized]]:
    """Within the context the model computes with weights on their grids, while the optimiser moves the float32 masters.

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
                    if not isinstance(module, nn.Linear | nn.Embedding) or name != "weight":
                        raise InputError(
                            f"{path}.{name} cannot be trained on a grid: only linear and embedding layers can, "
                            f"not {type(module).__name__}; leave the finishing stage out"
                        )
                    _attach(module, quantized[id(parameter)], hooks)
        yield shown


def _attach(module: nn.Module, weight: FakeQuantized, hooks: ExitStack) -> None:
    parameters: dict[str, Any] = module._parameters
    held: list[Any] = []

    def show(module: nn.Module, inputs: Any) -> None:
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

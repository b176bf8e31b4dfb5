"""Trains only the scales of weights, whose codes stay fixed. That trains a sixteenth as many numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autodistill.distillation.training.fake_quantize import attach, attach_rows, check_module
from autodistill.models.tensors import Role, TensorSpec, stacked
from autodistill.quantization import k_quants
from autodistill.quantization.grids import Grid, Scales, Storage, check_tensor
from autodistill.quantization.group_scales import given_steps
from autodistill.quantization.loops import loops
from autodistill.quantization.packing import quantize
from autodistill.quantization.rounding import buffers_of, chunks, fitted_scales

RATE = 15.0
"""Factor of the learning rate for scales, which are trained as shares of their first values. For SmolLM2 in 4 bits,
trained for 117 steps, 6e-4 per step was better than 3e-4 and 2e-3. For its weights, 4e-5 is known to be best."""


class ScaledCodes(nn.Module):
    """One weight as fixed codes with trained scales and minima: a weight is code * scale (+ minimum).

    Both are trained as shares of the first scales, so that one learning rate suits all groups. A scale is (1 + change)
    times its first value. A change of 1 moves a minimum by the first scale times half the range of codes. This is the
    second phase of EfficientQAT (arXiv:2407.11062), with minima in place of integer zero points.

    Args:
        master: float32 [out, in], or [experts, out, in]. Its memory is freed until `settle`.
        grid: The grid.
        scales: Initial scales. By default they follow from the weights.
        trained: Whether scales and minima are trained at all.
    """

    def __init__(self, master: nn.Parameter, grid: Grid, scales: Scales | None = None, *, trained: bool = True) -> None:
        super().__init__()
        self.grid = grid
        self._master = [master]  # in a list, so that it does not become a parameter of this module
        self._was_trained = master.requires_grad
        self._held = tuple(master.shape)
        weight = master.detach().flatten(0, -2)
        self._shape = tuple(weight.shape)
        offsets: Tensor | None
        if scales is None:
            first, offsets = fitted_scales(weight, grid)
            if grid.searched:
                scales = Scales(first.cpu().numpy(), None if offsets is None else offsets.cpu().numpy())
        else:
            first = torch.from_numpy(scales.scales).to(weight.device)
            offsets = None if scales.offsets is None else torch.from_numpy(scales.offsets).to(weight.device)
        self._first: Tensor
        self._offsets: Tensor | None
        self._codes: Tensor
        self.register_buffer("_first", first.contiguous(), persistent=False)
        self.register_buffer("_offsets", offsets, persistent=False)
        self.register_buffer("_codes", _codes(weight, grid, scales), persistent=False)
        # Scales that are powers of two are not trained, and neither are integer zero points.
        self.scale = nn.Parameter(torch.zeros_like(first), requires_grad=trained and grid.scale_dtype != "e8m0")
        moved = grid.offset == "minimum"
        self.minimum = nn.Parameter(torch.zeros_like(first), requires_grad=trained) if moved else None
        master.requires_grad_(False)
        master.data = weight.new_empty(0)

    def forward(self, held: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight as the runtime will compute with it, in the master's shape and the type `dtype`."""
        exact = self._exact and dtype == torch.float32
        values = _Scaled.apply(self._codes, *self._stored(), self._zero_points, dtype)
        shown: Tensor = values.view(self._held)
        return _rounded(shown, shown.detach().bfloat16().float()) if exact else shown

    def rows(self, ids: Tensor) -> Tensor:
        """Return some rows of the weight in float32, [ids, in]."""
        scales, bases = self._stored()
        columns = self._shape[1]
        codes = self._codes.view(self._shape)[ids].float().view(len(ids), -1, self.grid.group(columns))
        if self._zero_points is not None:
            codes -= self._zero_points[ids].unsqueeze(-1)
        found = codes * scales[ids].unsqueeze(-1)
        found = (found if bases is None else found + bases[ids].unsqueeze(-1)).view(len(ids), columns)
        return _rounded(found, found.detach().bfloat16().float()) if self._exact else found

    @torch.no_grad()
    def move(self, trained: Scales, share: float) -> None:
        """Set scales and minima to a point on the line from their first values to trained ones.

        Args:
            trained: Scales and offsets of the same grid and shape.
            share: 0 for the first values, 1 for the trained ones.
        """
        ends = torch.from_numpy(trained.scales).to(self._first.device)
        # A first scale of 0 stays 0, because changes are shares of it.
        self.scale.copy_(share * (ends / self._first - 1).nan_to_num(0.0, 0.0, 0.0))
        if self.minimum is not None and self._offsets is not None and trained.offsets is not None:
            lower = torch.from_numpy(trained.offsets).to(self._first.device) - self._offsets
            self.minimum.copy_(share * (lower / (self._first * (self.grid.levels / 2))).nan_to_num(0.0, 0.0, 0.0))

    def stored(self) -> Scales:
        """Return scales and offsets as a file stores them."""
        with torch.no_grad():
            scales, bases = self._stored()
        offsets = bases if self._zero_points is None else self._zero_points
        return Scales(scales.cpu().numpy(), None if offsets is None else offsets.detach().cpu().numpy())

    @torch.no_grad()
    def settle(self) -> Scales:
        """Give the master its trained values, and return the scales and offsets that are stored with its codes."""
        (master,) = self._master
        master.data = self.rows(torch.arange(self._shape[0], device=self._codes.device)).view(self._held)
        master.requires_grad_(self._was_trained)
        return self.stored()

    @property
    def _exact(self) -> bool:
        """Whether values are rounded to bfloat16, whatever type the model computes with."""
        return self.grid.container == "compressed-tensors"

    @property
    def _zero_points(self) -> Tensor | None:
        return self._offsets if self.grid.offset == "zero_point" else None

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and minima, [out, groups], rounded as they are stored, with straight-through gradients."""
        grid = self.grid
        if grid.block_size and not self.scale.requires_grad:
            return self._first, self._offsets  # they may come from another tool's file, whose blocks have other units
        moved = self._first * (1 + self.scale)
        scales = _rounded(moved, given_steps(moved.detach(), None, grid).scales.view_as(moved))
        if self.minimum is None or self._offsets is None:
            return scales, None
        minima = self._offsets + self._first * (grid.levels / 2) * self.minimum
        if grid.block_size:
            minima = minima.clamp(max=0)
            return scales, _rounded(minima, -k_quants.stored(-minima.detach(), grid, torch))
        return scales, _rounded(minima, minima.detach().half().float())


def _rounded(value: Tensor, stored: Tensor) -> Tensor:
    """Return `stored`, with a straight-through gradient to the value it was rounded from."""
    return stored + (value - value.detach())


def _codes(weight: Tensor, grid: Grid, scales: Scales | None) -> Tensor:
    """Return the codes of a weight, int8 [groups, size], rounded as its file format rounds them."""
    codes, _ = quantize(weight.cpu().numpy(), grid, scales)
    return torch.from_numpy(codes).to(weight.device).view(-1, grid.group(weight.shape[1]))


class _Scaled(torch.autograd.Function):
    """Computes values from codes, scales and minima, for some groups at a time, which fit the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scales: Tensor, minima: Tensor | None, zero_points: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return the values, [groups, size]."""
        ctx.save_for_backward(codes, zero_points)
        ctx.shape, ctx.has_minima = scales.shape, minima is not None
        of_groups = [None if one is None else one.reshape(-1, 1) for one in (scales, minima, zero_points)]
        size = codes.shape[1]
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        if (compiled := loops("rounding", codes, scales, minima, zero_points, out)) is not None:
            compiled.scaled_codes(codes, scales, minima, zero_points, out=out)
            return out
        (buffer,) = buffers_of(codes, size, 1)
        for part, groups, target in chunks(size, codes, out):
            scale, minimum, zero_point = (None if one is None else one[part] for one in of_groups)
            values = buffer[: len(groups)].copy_(groups)
            if zero_point is not None:
                values.sub_(zero_point)
            values.mul_(scale)
            if minimum is not None:
                values.add_(minimum)
            target.copy_(values)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        """Return two sums over each group: of gradient times code, and of the gradient."""
        codes, zero_points = ctx.saved_tensors
        groups, size = codes.shape
        of_scales = torch.empty(groups, device=codes.device)
        of_minima = torch.empty_like(of_scales) if ctx.has_minima else None
        if (compiled := loops("rounding", codes, gradient, zero_points)) is not None:
            compiled.scale_gradients(gradient, codes, zero_points, of_scales=of_scales, of_minima=of_minima)
            return _shaped(ctx, of_scales, of_minima)
        ones = torch.ones(size, device=codes.device)
        buffers = buffers_of(codes, size, 2)
        for part, held, incoming in chunks(size, codes, gradient):
            arriving, code = buffers[:, : len(held)]
            arriving.copy_(incoming)
            code.copy_(held)
            if zero_points is not None:
                code.sub_(zero_points.reshape(-1, 1)[part])
            # A product with ones, because a sum over such short groups takes a third longer.
            if of_minima is not None:
                torch.mv(arriving, ones, out=of_minima[part])
            torch.mv(arriving.mul_(code), ones, out=of_scales[part])
        return _shaped(ctx, of_scales, of_minima)


def _shaped(ctx: Any, of_scales: Tensor, of_minima: Tensor | None) -> tuple[None, Tensor, Tensor | None, None, None]:
    """Return the result of `_Scaled.backward`, with the gradients in the shape of the scales."""
    return None, of_scales.view(ctx.shape), None if of_minima is None else of_minima.view(ctx.shape), None, None


def _rows(weight: ScaledCodes, _: Tensor, ids: Tensor) -> Tensor:
    """Return rows of a weight, and ignore the tensor that its module holds."""
    return weight.rows(ids)


class TrainedScales:
    """Lets a model compute with the codes and trained scales of all its weights on a grid, until `settle`.

    Args:
        model: The model. Its parameters are looked up by name, a tied one by the first of its names.
        storage_of: Returns how the parameter of a name is stored.
        beginning: Initial scales by name. By default they follow from the weights.

    Attributes:
        by_name: Each weight that lies on a grid.
    """

    def __init__(
        self,
        model: nn.Module,
        storage_of: Callable[[str], Storage | None],
        beginning: Mapping[str, Scales] | None = None,
    ) -> None:
        self._hooks = ExitStack()
        self.by_name: dict[str, ScaledCodes] = {}
        by_master: dict[int, ScaledCodes] = {}
        for name, parameter in list(model.named_parameters()):
            storage = storage_of(name)
            if isinstance(storage, Grid):
                check_tensor(TensorSpec(name=name, role=Role.LINEAR, shape=stacked(name, parameter.shape)), storage)
                given = (beginning or {}).get(name)
                weight = ScaledCodes(parameter, storage, given, trained=parameter.requires_grad)
                self.by_name[name] = by_master[id(parameter)] = weight
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if (shown := by_master.get(id(parameter))) is None:
                    continue
                check_module(module, path, name)
                if isinstance(module, nn.Embedding):
                    attach_rows(module, partial(_rows, shown), self._hooks)
                else:
                    attach(module, shown, self._hooks, name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters, with names that begin with their weight's name."""
        for name, weight in self.by_name.items():
            for kind, parameter in weight.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{kind}", parameter

    def settle(self) -> dict[str, Scales]:
        """Give the model its weights back, with trained values, and return the stored scales and offsets."""
        self._hooks.close()
        return {name: weight.settle() for name, weight in self.by_name.items()}

"""Training under fake quantisation: the model computes with quantised weights, and float32 masters are updated."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autodistill.distillation.training.fsdp import whole
from autodistill.distillation.training.straight_through import (
    fake_quantize,
    fake_quantize_learned,
    learned_gradients,
    rounded_values,
    stop_clipped,
)
from autodistill.errors import InputError
from autodistill.models.tensors import Role, TensorSpec, is_expert, stacked
from autodistill.quantization.grids import Grid, Scales, Storage, check_tensor
from autodistill.quantization.group_scales import Steps, clips, given_steps, stored_steps
from autodistill.quantization.rounding import deploy_tensor, fitted_scales, given_values

REFITTED = 8
"""Updates of a master after which its searched scales are searched again. A search takes several times as long as
rounding, and weights hardly move in one step."""


class _Passing(torch.autograd.Function):
    """Returns given values, and passes their gradient unchanged to the weight that they replace."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


class _Step:
    """One weight during a step: it is quantised once, and the sum of its gradients passes through the grid once.

    This is exact because the gradient through a grid is linear in the incoming gradient.

    Args:
        weight: The weight to round, float32 [out, in]: a leaf, or a result with the graph that made it.
        grid: The grid.
        scale: Learned scales, or None.
        offset: Stored offsets of an asymmetric grid, or None.
        steps: The scaling found for scales that are not learned, or None.
    """

    def __init__(
        self, weight: Tensor, grid: Grid, scale: nn.Parameter | None, offset: Tensor | None, steps: Steps | None
    ) -> None:
        self._weight = weight
        # The gradients of all passes add up here.
        self._leaf = weight if weight.is_leaf else weight.detach().requires_grad_()
        self._grid, self._scale, self._offset, self._steps = grid, scale, offset, steps
        self._inside: Tensor | None = None
        self._values: dict[torch.dtype, Tensor] = {}

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """Return the quantised weight, whose gradient is added to the sum."""
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
        return rounded_values(leaf, grid, dtype, self._steps, self._inside)

    def end(self) -> None:
        """Compute the gradients of the weight, its sources and its scales from the sum."""
        gradient = self._leaf.grad
        if gradient is None:
            return
        with torch.no_grad():
            if self._scale is not None:
                self._scale.grad = learned_gradients(
                    self._leaf, gradient, self._scale, self._offset, self._grid, gradient
                )
            elif self._inside is not None:
                stop_clipped(gradient, self._inside, gradient)
        if self._weight is not self._leaf:
            self._weight.backward(gradient)


class FakeQuantized:
    """One master weight as its grid stores it. All modules that share a tied weight share this object.

    Args:
        master: float32 [out, in], which the optimiser updates; or [experts, out, in], rounded as one matrix.
        grid: The grid.
        learned: Whether the scales of a trained master are parameters of their own. They begin as the fitted scales of
            its groups.
        change: For a frozen master with a trained change (LoRA): returns the values to round, with their gradient.

    Attributes:
        scale: float32 [out, groups], or None if scales follow from the weights.
        lasting: Whether scales are searched for, and kept for a few updates of the master, which `moved` counts.
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
        self.lasting = grid.searched and not learned and change is None and master.requires_grad
        self._searched: Steps | None = None
        self._changes = 0
        self._in_one_step = False
        self._step: _Step | None = None
        if learned and (master.requires_grad or change is not None):
            scales, self._offset = fitted_scales(self._values(whole(master.detach())), grid)
            self.scale = nn.Parameter(scales)

    @property
    def frozen(self) -> bool:
        """Whether neither the master nor a change of it is trained."""
        return not self.master.requires_grad and self._change is None

    def __call__(self, held: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the quantised weight. For a frozen master it is computed once and kept until the master changes.

        Args:
            held: If the master is sharded over processes, the whole weight, as its module holds it now.
            dtype: Type of the result, which the module computes with.
        """
        held = self.master if held is None else held
        shown = self._shown(held, dtype)
        return shown if held.dim() == 2 else shown.view(held.shape)

    def _shown(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the quantised rows of the weight that its module holds."""
        if self._in_one_step and not self.frozen:
            if self._step is None:
                with torch.enable_grad():
                    steps = self._steps(held)
                    self._step = _Step(self._values(held), self.grid, self.scale, self._offset, steps)
            return self._step(dtype)
        if self.scale is not None:
            return fake_quantize_learned(self._values(held), self.scale, self._offset, self.grid, dtype)
        if not self.frozen:
            self._kept = None
            return fake_quantize(self._values(held), self.grid, dtype, self._steps(held))
        if held is not self.master:
            return deploy_tensor(held, self.grid)
        state = (self.master._version, self.master.data_ptr())
        if self._kept is None or self._kept[0] != state:
            # Autograd cannot use tensors that were made in inference mode.
            with torch.inference_mode(False):
                self._kept = (state, deploy_tensor(self.master, self.grid))
        return self._kept[1]

    def rows(self, held: Tensor, ids: Tensor) -> Tensor:
        """Return some quantised rows of a frozen master, as its module holds it. No group crosses rows."""
        return deploy_tensor(held.detach()[ids], self.grid)

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Within the context, master and scales must not change: weight and gradient pass through the grid only once.

        When the context ends, the gradients of a trained master or change, and of learned scales, are complete. They
        are the gradients of all passes inside the context. No gradient of an earlier step may be left when it begins.
        It does not work for a sharded master.
        """
        self._in_one_step = True
        try:
            yield
            if self._step is not None:
                self._step.end()
        finally:
            self._in_one_step, self._step = False, None

    def moved(self, _: Tensor | None = None) -> None:
        """Count an update of the master. Used as a hook of its gradient."""
        self._changes += 1

    def _steps(self, held: Tensor) -> Steps | None:
        """Return the kept scaling of searched scales, or None if none is kept or the master is sharded."""
        if not self.lasting or held is not self.master:
            return None
        if self._searched is None or self._changes >= REFITTED:
            with torch.no_grad():
                self._searched = stored_steps(*fitted_scales(_as_rows(held), self.grid), self.grid)
            self._changes = 0
        return self._searched

    def _values(self, held: Tensor) -> Tensor:
        return _as_rows(held) if self._change is None else self._change(held)

    def stored(self) -> Scales | None:
        """Return the learned scales and their offsets as a file stores them, or None if no scales are learned."""
        if self.scale is None:
            return None
        stored = given_steps(self.scale.detach(), None, self.grid).scales
        offset = None if self._offset is None else self._offset.cpu().numpy()
        return Scales(stored.view_as(self.scale).cpu().numpy(), offset)


def _as_rows(held: Tensor) -> Tensor:
    """Return a weight as one matrix; the matrices of experts are stacked."""
    return held if held.dim() == 2 else held.flatten(0, -2)


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

    Each module holds its quantised weight only while it runs. So parameters, their names in the state dict, and ties
    stay the same objects. Weights with a float type or None from `storage_of` stay as they are: the rounding error of a
    16-bit type is far below that of a grid.

    Args:
        model: The model. Its parameters are looked up by name, a tied one by the first of its names.
        storage_of: Returns how the parameter of a name is stored.
        learned: Whether scales are learned. The caller must give them to its optimiser, since they are not parameters
            of the model.
        changes: For frozen weights whose changes are trained: functions that return their values, by name.

    Yields:
        The weights on a grid, by name of the parameter.

    Raises:
        InputError: A parameter with a grid is not the weight of a linear or embedding layer, nor one of experts, or its
            groups do not divide its rows.
    """
    shown: dict[str, FakeQuantized] = {}
    for name, parameter in model.named_parameters():
        storage = storage_of(name)
        if isinstance(storage, Grid):
            check_tensor(TensorSpec(name=name, role=Role.LINEAR, shape=stacked(name, parameter.shape)), storage)
            change = (changes or {}).get(name)
            shown[name] = FakeQuantized(parameter, storage, learned=learned, change=change)
    quantized = {id(weight.master): weight for weight in shown.values()}
    with ExitStack() as hooks:
        for weight in shown.values():
            if weight.lasting:
                # Updates must be counted by a hook: fused optimisers do not raise the version counter of a weight.
                hooks.callback(weight.master.register_post_accumulate_grad_hook(weight.moved).remove)
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in quantized:
                    check_module(module, path, name)
                    weight = quantized[id(parameter)]
                    if isinstance(module, nn.Embedding) and weight.frozen:
                        attach_rows(module, weight.rows, hooks)
                    else:
                        attach(module, weight, hooks, name)
        yield shown


def rounding_seconds(
    model: nn.Module,
    grids: Mapping[str, Grid],
    *,
    learned: bool,
    dtype: torch.dtype,
) -> float:
    """Measure the seconds that quantising the weights adds to a training step on the CPU.

    Args:
        model: The model. Its weights have no gradients before, and none afterwards.
        grids: Grids of its weights, by name.
        learned: As for `quantized_training`.
        dtype: Type that the model computes with.
    """

    def all_of(weights: Collection[FakeQuantized]) -> float:
        """Quantise each weight, pass a gradient back through it, and return the seconds."""
        began = time.perf_counter()
        for weight in weights:
            shown = weight(dtype=dtype)
            if not weight.frozen:
                torch.autograd.backward(shown, torch.zeros_like(shown))
                weight.master.grad = None
        return time.perf_counter() - began

    masters = [(parameter, grids[name]) for name, parameter in model.named_parameters() if name in grids]
    # The first run compiles loops. The second one times a search of scales. The third one uses the scales it found.
    for _ in range(2):
        weights = [FakeQuantized(master, grid, learned=learned) for master, grid in masters]
        searched = all_of(weights)
    kept = all_of(weights)
    return kept + max(0.0, searched - kept) / REFITTED


def check_module(module: nn.Module, path: str, name: str) -> None:
    """Check that a parameter of a module can be replaced by its quantised values.

    Raises:
        InputError: The parameter is not the weight of a linear or embedding layer, nor one of experts.
    """
    weight = isinstance(module, nn.Linear | nn.Embedding) and name == "weight"
    if not weight and not is_expert(f"{path}.{name}"):
        raise InputError(
            f"{path}.{name} cannot be trained on a grid: only linear layers, embedding layers and experts can, "
            f"not {type(module).__name__}; leave the finishing stage out"
        )


def attach_rows(module: nn.Embedding, rows: Callable[[Tensor, Tensor], Tensor], hooks: ExitStack) -> None:
    """Let an embedding look up the rows that `rows` returns for its weight and the token ids, until `hooks` close."""
    parameters: dict[str, Any] = module._parameters
    held: list[Any] = []

    def show(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Replace the table by one row per token, and the token ids by the numbers of these rows."""
        table = parameters["weight"]
        held.append((table, module.padding_idx))
        # One row per token, even for equal tokens: to find equal ones, the process would have to wait for the GPU.
        ids = inputs[0]
        places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        parameters["weight"] = rows(table, ids.flatten())
        # The padding token has another row now. The index only matters to gradients.
        module.padding_idx = None  # type: ignore[assignment]
        return (places, *inputs[1:])

    def hide(module: nn.Module, inputs: Any, output: Any) -> None:
        if held:
            parameters["weight"], module.padding_idx = held.pop()

    hooks.callback(module.register_forward_pre_hook(show).remove)
    hooks.callback(module.register_forward_hook(hide, always_call=True).remove)


def attach(
    module: nn.Module, weight: Callable[[Tensor, torch.dtype], Tensor], hooks: ExitStack, name: str = "weight"
) -> None:
    """Let a module compute with the weight that `weight` returns for its own one and a type, until `hooks` close.

    Args:
        module: A linear or embedding layer, or a module of experts.
        weight: Returns the weight.
        hooks: Receives what ends the replacement.
        name: Name of the module's own weight.
    """
    parameters: dict[str, Any] = module._parameters
    held: list[Any] = []

    def show(module: nn.Module, inputs: Any) -> None:
        """Replace the trained weight by the rounded one."""
        held.append(parameters[name])
        kind = held[-1].device.type
        # A matrix product computes in autocast's type. Asking for that type here saves an extra pass over the weight.
        cast = not isinstance(module, nn.Embedding) and torch.is_autocast_enabled(kind)
        parameters[name] = weight(held[-1], torch.get_autocast_dtype(kind) if cast else torch.float32)

    def hide(module: nn.Module, inputs: Any, output: Any) -> None:
        # If a pass fails before `show`, there is nothing to put back.
        if held:
            parameters[name] = held.pop()

    hooks.callback(module.register_forward_pre_hook(show).remove)
    hooks.callback(module.register_forward_hook(hide, always_call=True).remove)

"""One process's part of a model that is divided over several processes, and how its modules compute with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from autodistill.inference.half_precision import TYPES, hold
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import HeldType
from autodistill.quantization.grids import Scales


def whole_input(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the whole input of a linear layer, whichever part of it this process has."""
    found: Tensor = getattr(module, "whole_input", inputs[0])
    return found


class _Part(NamedTuple):
    """The part of a matrix that a process has: the divided dimension, and the range in it."""

    dim: int
    start: int
    stop: int


def own_part(folder: Path, held_type: HeldType, device: str, rank: int, count: int) -> Any:
    """Return this process's part of a model. Modules compute with plain tensors, and communicate if they have to."""
    model: Any = load_model(folder, TYPES[held_type], device, divided=count)
    plan = model._expand_parallel_plan(model.tp_plan)
    local: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                own = local.setdefault(id(parameter), nn.Parameter(parameter.to_local(), requires_grad=False))
                (placement,) = parameter.placements
                if isinstance(placement, Shard):
                    dim, size = placement.dim % parameter.ndim, parameter.shape[placement.dim]
                    own.part = _part(dim, size, rank, count)  # type: ignore[attr-defined]
                module._parameters[name] = own
        # transformers' own `forward` expects distributed tensors.
        module.__dict__.pop("forward", None)
    hold(model)
    for name, module in model.named_modules():
        style = plan.get(name)
        if style == "rowwise":
            module.forward = partial(_sum_of_products, module, type(module).forward)
        elif style == "embedding_rowwise":
            module.forward = partial(_sum_of_rows, module, type(module).forward)
        elif style == "colwise_gather_output":
            module.forward = partial(_whole_outputs, module, type(module).forward)
        else:
            assert style in (None, "colwise", "replicated_with_grad_allreduce"), f"{name} is divided {style}"
    return model


def _part(dim: int, size: int, rank: int, count: int) -> _Part:
    each = -(-size // count)
    return _Part(dim, min(size, rank * each), min(size, (rank + 1) * each))


def _sum_of_products(module: Any, forward: Callable[..., Tensor], input: Tensor) -> Tensor:
    """Compute a linear layer if each process has a part of its inputs."""
    bias, module.bias = module.bias, None
    try:
        found = forward(module, input).contiguous()
    finally:
        module.bias = bias
    dist.all_reduce(found)
    return found if bias is None else found + bias


def _sum_of_rows(module: Any, forward: Callable[..., Tensor], input: Tensor) -> Tensor:
    """Look up a table if each process has a part of its tokens."""
    _, start, stop = module.weight.part
    own = (input >= start) & (input < stop)
    found = forward(module, (input - start).clamp(0, max(0, stop - start - 1))) * own.unsqueeze(-1)
    dist.all_reduce(found)
    return found


def _whole_outputs(module: Any, forward: Callable[..., Tensor], input: Tensor) -> Tensor:
    """Compute a head if each process has a part of its tokens."""
    return _gathered(forward(module, input), module.out_features)


def _gathered(own: Tensor, size: int) -> Tensor:
    """Return the parts of all processes joined along the last dimension, which then has `size` entries."""
    count = dist.get_world_size()
    each = -(-size // count)
    own = nn.functional.pad(own, (0, each - own.shape[-1])).contiguous()
    parts = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(parts, own)
    return torch.cat(parts, dim=-1)[..., :size]


@contextmanager
def gathering(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Let the named modules, which hold parts of layers, also see the whole input of their layer within the context.

    Args:
        model: A model divided over the processes, all of which call this.
        names: Names of its modules. Each has the gathered input of its last call as `whole_input`.
    """
    modules = [model.get_submodule(name) for name in names]

    def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
        module.whole_input = _gathered(inputs[0], module.in_features)

    handles = [module.register_forward_pre_hook(see) for module in modules]
    try:
        yield
    finally:
        for handle, module in zip(handles, modules, strict=True):
            handle.remove()
            module.__dict__.pop("whole_input", None)


def own_scales(model: Any, scales: Mapping[str, Scales] | None) -> dict[str, Scales] | None:
    """Return the scales and offsets, [out, groups], of this process's part of each matrix."""
    if scales is None:
        return None
    parts = {name: getattr(parameter, "part", None) for name, parameter in model.named_parameters()}
    sizes = {one.name: one.shape for one in spec_from_config(model.config.to_dict()).tensors}

    def cut(whole: Any, part: _Part, size: int) -> Any:
        """Return this process's part of scales or offsets, given the matrix's size in the divided dimension."""
        groups = whole.shape[part.dim]
        return np.ascontiguousarray(
            whole.take(range(part.start * groups // size, part.stop * groups // size), axis=part.dim)
        )

    found = dict(scales)
    for name, given in scales.items():
        if (part := parts[name]) is not None:
            size = sizes[name][part.dim]
            offsets = None if given.offsets is None else cut(given.offsets, part, size)
            found[name] = Scales(cut(given.scales, part, size), offsets)
    return found

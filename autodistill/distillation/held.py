"""A large teacher's weights held in 16 bits, while everything that it computes is still computed in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodistill.contracts import HeldType
from autodistill.distillation.grid_values import deploy_tensor
from autodistill.distillation.teacher import load_model
from autodistill.formats import Storage

# Weights shown in float32 at once: a table of 150,000 tokens would take gigabytes, for each thread that multiplies.
_SHOWN = 2**25
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_held(folder: Path, held: HeldType, device: str = "cpu") -> Any:
    """Loads a model for inference in float32, its matrices held in `held`.

    A matrix is cast to float32, some rows of it at a time, whenever a product reads it, which is exact: where the
    folder has its weights in that type, logits are those of the model in float32 but for the order of sums in products
    that are made in parts. Biases and norms are float32 throughout, and so is a table that its module scales.

    Args:
        folder: Of transformers.
        held: Type of the matrices; "float32" gives `load_model`'s.
        device: Where the model goes.
    """
    model = load_model(folder, _TYPES[held])
    if held != "float32":
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                module.__class__ = _HeldLinear
            elif type(module) is nn.Embedding:
                module.__class__ = _HeldEmbedding
        for module in model.modules():
            _widen(module)
    return model.to(device)  # type: ignore[arg-type]


class _Held:
    """How a weight is stored in the deployment that is simulated; None for the weight itself."""

    deployed_as: Storage | None = None

    def shown(self, rows: Tensor) -> Tensor:
        """Some rows of the weight in float32, as the runtime will see them."""
        return rows.float() if self.deployed_as is None else deploy_tensor(rows, self.deployed_as)


class _HeldLinear(nn.Linear, _Held):
    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in float32, or by autocast in its own type."""
        weight, kind = self.weight, input.device.type
        if (
            self.deployed_as is None
            and torch.is_autocast_enabled(kind)
            and weight.dtype == torch.get_autocast_dtype(kind)
        ):
            # What autocast would round the float32 weight to.
            return functional.linear(input, weight, self.bias)
        rows = max(1, _SHOWN // weight.shape[1])
        parts = [
            functional.linear(
                input,
                self.shown(weight[start : start + rows]),
                None if self.bias is None else self.bias[start : start + rows],
            )
            for start in range(0, len(weight), rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _HeldEmbedding(nn.Embedding, _Held):
    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Embedding`, in float32: of the rows that are read alone, since groups never cross a row."""
        rows = super().forward(input)
        return self.shown(rows.flatten(0, -2)).view_as(rows)


def _widen(module: nn.Module) -> None:
    """Makes float32 of what a module holds but for matrices that are shown when they are read."""
    held = isinstance(module, _Held)
    for name, parameter in module.named_parameters(recurse=False):
        if not (held and name == "weight"):
            parameter.data = parameter.data.float()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name == "embed_scale":
            # Gemma's scale of its table was rounded with the weights; its exact value stands beside it.
            module.register_buffer(name, torch.tensor(float(module.scalar_embed_scale)), persistent=False)  # type: ignore[arg-type]


def is_held(model: Any) -> bool:
    """Whether a model's matrices are held in 16 bits."""
    return any(isinstance(module, _Held) for module in model.modules())


@contextmanager
def held_as_deployed(model: Any, storages: Mapping[str, Storage]) -> Iterator[None]:
    """Within the context a held model computes with the values that a runtime will see, and keeps its own in 16 bits.

    Args:
        model: Of `load_held`.
        storages: How each tensor is stored, by name; a tied head is stored as its table.
    """
    by_id = {id(parameter): storages[name] for name, parameter in model.named_parameters()}
    masters: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                storage = by_id[id(parameter)]
                if isinstance(module, _Held) and name == "weight":
                    module.deployed_as = storage
                elif storage != "f32" and not any(parameter is other for other, _ in masters):
                    masters.append((parameter, parameter.data))
                    parameter.data = deploy_tensor(parameter.data, storage)
        yield
    finally:
        for parameter, master in masters:
            parameter.data = master
        for module in model.modules():
            if isinstance(module, _Held):
                module.deployed_as = None

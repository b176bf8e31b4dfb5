"""Low-rank changes (LoRA) of a student's frozen weights, merged into them at the end of training."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodistill.distillation.training.fsdp import like, whole
from autodistill.errors import InputError
from autodistill.estimates.training_memory import adapted_tensors
from autodistill.models.spec import ModelSpec
from autodistill.strategy.recipe import Lora


def check_lora(lora: Lora, spec: ModelSpec) -> None:
    """Check that the rank is smaller than both sides of each adapted matrix.

    Raises:
        InputError: The rank is too large; the message names the smallest matrix. Or there is no such matrix.
    """
    adapted = adapted_tensors(spec, lora)
    if not adapted:
        raise InputError(
            f"lora.layers is {lora.layers}, where a {spec.architecture} has no linear layer: low-rank changes are not "
            "made of experts; choose attention or all"
        )
    smallest = min(adapted, key=lambda tensor: min(tensor.shape))
    if lora.rank >= min(smallest.shape):
        raise InputError(
            f"lora.rank {lora.rank} does not reduce {smallest.name}, which is {smallest.shape[0]} x "
            f"{smallest.shape[1]}: choose a smaller rank, or leave lora out"
        )


class Adapter(nn.Module):
    """The change (alpha / r) B A of one weight W [out, in] (LoRA, Hu et al., 2021, arXiv:2106.09685).

    Args:
        weight: W, for its shape and device.
        lora: Rank and alpha.
        seed: Seed of A, which is initialised as `nn.Linear` initialises its weight. B begins as 0.

    Attributes:
        down: A, float32 [rank, in].
        up: B, float32 [out, rank].
    """

    def __init__(self, weight: Tensor, lora: Lora, seed: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(weight.shape[1])
        generator = torch.Generator().manual_seed(seed)
        down = torch.empty(lora.rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], lora.rank, device=weight.device))
        self._scale = lora.alpha / lora.rank

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the change adds to the layer's outputs, by two thin products instead of a merged weight."""
        return self._scale * functional.linear(functional.linear(inputs, self.down), self.up)

    def merged(self, weight: Tensor) -> Tensor:
        """Return W + (alpha / r) B A in float32, even under autocast: exactly the values that are merged at the end."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self._scale)


class Adapters(nn.Module):
    """The adapters of a model, stored outside it. The model's modules, names and frozen weights do not change.

    If the model is sharded afterwards, each process has whole adapters and its shards of the frozen weights.

    Args:
        model: The student. All its weights become frozen.
        spec: The student's shape.
        lora: Which matrices are adapted, and how.
        seed: Seed of the adapters.
    """

    def __init__(self, model: Any, spec: ModelSpec, lora: Lora, seed: int) -> None:
        super().__init__()
        model.requires_grad_(False)
        names = [tensor.name for tensor in adapted_tensors(spec, lora)]
        self._adapters = nn.ModuleList(
            Adapter(model.get_parameter(name), lora, 1000 * seed + index) for index, name in enumerate(names)
        )
        self.by_name: dict[str, Adapter] = dict(zip(names, self._adapters, strict=True))  # type: ignore[arg-type]

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield A and B of each weight, with names that begin with the weight's name."""
        for name, adapter in self.by_name.items():
            for part, parameter in adapter.named_parameters():
                yield f"{name}.{part}", parameter

    @contextmanager
    def added(self, model: Any, but: Collection[str] = ()) -> Iterator[None]:
        """Within the context, the adapted layers of the model compute with their changes.

        Args:
            model: The student.
            but: Names of weights to leave out, because their layers already compute with merged values.
        """
        with ExitStack() as hooks:
            for name, adapter in self.by_name.items():
                if name not in but:
                    layer = model.get_submodule(name.removesuffix(".weight"))
                    hooks.callback(layer.register_forward_hook(_adding(adapter)).remove)
            yield

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        """Merge the changes into the model's weights. Afterwards the adapters add nothing."""
        for name, adapter in self.by_name.items():
            weight = model.get_parameter(name)
            weight.copy_(like(adapter.merged(whole(weight)), weight))
            adapter.up.zero_()


def _adding(adapter: Adapter) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0])

    return hook

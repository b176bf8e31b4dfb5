"""A model with one block's weights in memory at a time; they are read from its safetensors files as it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from autodistill.models.config import spec_from_config
from autodistill.models.families import get_family
from autodistill.models.layer_widths import model_class
from autodistill.models.loading import ATTENTION
from autodistill.models.model_folder import read_config
from autodistill.models.stored_tensors import check_stored, stored_tensors


class BlocksOnDisk:
    """A causal language model with table, head and norms in memory, in float32, and each block only while it runs.

    A file is mapped into memory only while a block is read from it, so that its pages do not stay.

    Args:
        folder: transformers' folder of a model of a supported family.
        device: Where the model computes.

    Attributes:
        model: The model; its blocks have no weights outside of `block`.

    Raises:
        InputError: The weights are not those of the model that the folder's config describes.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        spec = spec_from_config(read_config(folder))
        check_stored(folder, spec)
        self._device, self._stored = device, stored_tensors(folder)
        family = get_family(spec.architecture)
        self._in_files = {"lm_head.weight": f"{family.stored_head}.weight"}
        self.model = _without_weights(folder, device)
        self._parameters = dict(self.model.named_parameters())
        self._blocks: dict[int, list[str]] = {}
        for tensor in spec.tensors:
            part = family.layer_part(tensor.name)
            if part is None:
                self._parameters[tensor.name].data = self._read([tensor.name])[0]
            else:
                self._blocks.setdefault(part[0], []).append(tensor.name)

    @property
    def in_blocks(self) -> frozenset[str]:
        """Names of the tensors that are in memory only while their block runs."""
        return frozenset(name for names in self._blocks.values() for name in names)

    @contextmanager
    def block(self, index: int) -> Iterator[list[str]]:
        """Give a block its float32 weights within the context, and yield their names."""
        names = self._blocks[index]
        try:
            for name, values in zip(names, self._read(names), strict=True):
                self._parameters[name].data = values
            yield names
        finally:
            for name in names:
                self._parameters[name].data = torch.empty(0, device=self._device)

    def _read(self, names: list[str]) -> list[Tensor]:
        found = {}
        places = {name: self._stored.get(name) or self._stored[self._in_files[name]] for name in names}
        for path in dict.fromkeys(place.path for place in places.values()):
            with safe_open(path, "pt") as file:
                for name, place in places.items():
                    if place.path == path:
                        found[name] = cast("Tensor", file.get_tensor(place.name)).to(self._device, torch.float32)
        return [found[name] for name in names]


def _without_weights(folder: Path, device: str) -> Any:
    """Return the model of a folder with empty parameters, and with the constants that transformers computes itself."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: Any = model_class(config)._from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    for module in model.modules():
        constants = list(module.named_buffers(recurse=False))
        for name, buffer in constants:
            setattr(module, name, torch.empty_like(buffer, device=device))
        if constants:
            model._init_weights(module)
    empty: dict[int, nn.Parameter] = {}  # a tied table and head share one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
            module.register_parameter(name, empty.setdefault(id(parameter), made))
    return model.eval()

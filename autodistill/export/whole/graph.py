"""What a llama.cpp graph reads of a model that belongs to no family: settings, and tensors under its own names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, GGUFWriter, TensorNameMap, get_tensor_name_map

from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.quantization.grids import Floats, Scales


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A tensor of a GGUF file, made from a transformers tensor.

    Attributes:
        name: GGUF's name.
        shape: Shape in the file.
        rows: Indices of the rows that it takes from transformers' tensor, int64, in the file's order; None for all rows
            in their order.
        change: Function applied to the values of a vector; None if they stay unchanged.
    """

    name: str
    shape: tuple[int, ...]
    rows: npt.NDArray[np.int64] | None = None
    change: Callable[[Floats], Floats] | None = None

    def of(self, values: Floats) -> Floats:
        """Return its values, given the rows of transformers' tensor."""
        found = values if self.rows is None else values[self.rows]
        return found if self.change is None else self.change(found)

    def scales(self, given: Scales) -> Scales:
        """Return the scales of its rows, given those of transformers' tensor."""
        offsets = given.offsets
        if self.rows is None:
            return given
        return Scales(given.scales[self.rows], None if offsets is None else offsets[self.rows])


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A llama.cpp graph, for the transformers models that are written for it.

    Attributes:
        name: llama.cpp's name.
        refuses: Returns what a config requires that the graph does not compute, or "".
        add_settings: Writes everything that the graph reads in addition to tensors.
        parts: Returns the file's tensors that are made from one transformers tensor.
        more: Returns tensors that follow from the config alone, float32, by name.
        columns: Returns the file's column order of a matrix, int64, or None if it equals that of transformers. Types
            store columns in blocks, so a matrix is rounded in this order.
    """

    name: str
    refuses: Callable[[ModelSpec, Mapping[str, Any]], str]
    add_settings: Callable[[GGUFWriter, ModelSpec, Mapping[str, Any]], None]
    parts: Callable[[TensorSpec, ModelSpec, Mapping[str, Any]], Sequence[Part]]
    more: Callable[[ModelSpec, Mapping[str, Any]], Mapping[str, Floats]] = lambda spec, config: {}
    columns: Callable[[str, Mapping[str, Any]], npt.NDArray[np.int64] | None] = lambda name, config: None


def gguf_name(kind: MODEL_ARCH, layers: int, name: str) -> str:
    """Return the gguf package's name for a transformers tensor."""
    found = _names(kind, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


@lru_cache(8)  # some thousand names for each model
def _names(kind: MODEL_ARCH, layers: int) -> TensorNameMap:
    return get_tensor_name_map(kind, layers)


def settings(config: Mapping[str, Any]) -> Any:
    """Return transformers' own reading of a config, with defaults and sizes of single layers; do not change it."""
    return _settings(json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(8)  # called for each tensor
def _settings(config: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(config))

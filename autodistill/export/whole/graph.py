"""What a graph of llama.cpp reads of a model of no family: settings, and tensors under names of its own."""

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
    """A tensor of a GGUF file, made of one of transformers'.

    Attributes:
        name: GGUF's.
        shape: In the file.
        rows: The rows of transformers' tensor that it has, in the order of the file, int64; None for all as they are.
        change: What becomes of the values of a vector; None where they stay.
    """

    name: str
    shape: tuple[int, ...]
    rows: npt.NDArray[np.int64] | None = None
    change: Callable[[Floats], Floats] | None = None

    def of(self, values: Floats) -> Floats:
        """Return its values, of those of transformers' tensor as rows."""
        found = values if self.rows is None else values[self.rows]
        return found if self.change is None else self.change(found)

    def scales(self, given: Scales) -> Scales:
        """Return the scales of its rows, of those of transformers' tensor."""
        offsets = given.offsets
        if self.rows is None:
            return given
        return Scales(given.scales[self.rows], None if offsets is None else offsets[self.rows])


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One of llama.cpp's graphs, for the models of transformers that are written for it.

    Attributes:
        name: llama.cpp's.
        refuses: Says what a config asks for that the graph does not compute, "" for nothing.
        add_settings: Writes what its graph reads beside its tensors.
        parts: The tensors of a file that one of transformers becomes.
        more: Tensors that follow from the config alone, float32, by name.
        columns: Of a matrix the order in which a file has its columns, int64, or None for that of transformers. Types
            hold them in blocks, so that a matrix is rounded in this order.
    """

    name: str
    refuses: Callable[[ModelSpec, Mapping[str, Any]], str]
    add_settings: Callable[[GGUFWriter, ModelSpec, Mapping[str, Any]], None]
    parts: Callable[[TensorSpec, ModelSpec, Mapping[str, Any]], Sequence[Part]]
    more: Callable[[ModelSpec, Mapping[str, Any]], Mapping[str, Floats]] = lambda spec, config: {}
    columns: Callable[[str, Mapping[str, Any]], npt.NDArray[np.int64] | None] = lambda name, config: None


def gguf_name(kind: MODEL_ARCH, layers: int, name: str) -> str:
    """Return the name that the gguf package knows for a tensor of transformers."""
    found = _names(kind, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


@lru_cache(8)  # some thousand names for each model
def _names(kind: MODEL_ARCH, layers: int) -> TensorNameMap:
    return get_tensor_name_map(kind, layers)


def settings(config: Mapping[str, Any]) -> Any:
    """Return transformers' own reading of a config, with defaults and sizes of single layers; not to be changed."""
    return _settings(json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(8)  # asked for each tensor
def _settings(config: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(config))


def full_and_others(kinds: Sequence[str], full: str = "full_attention") -> int:
    """Return n if every n-th layer is of the kind `full` and all others are not; 0 if there is no such n."""
    places = [layer for layer, kind in enumerate(kinds) if kind == full]
    every = places[0] + 1 if places else 0
    return every if places == list(range(every - 1, len(kinds), every or 1)) else 0

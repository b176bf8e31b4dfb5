"""The small models with which blocks are timed. They have random weights, and differ from a reference in one thing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, LlamaFileType, TokenType

from autodistill.errors import InputError
from autodistill.estimates.block_times import FFN_IN, FFN_OUT, HEAD, PARTS, part_of, part_weights
from autodistill.estimates.serving_memory import check_cache
from autodistill.export.gguf_writing import KINDS, add_metadata, write_tensor
from autodistill.models.config import config_of, resized
from autodistill.models.families import get_family
from autodistill.models.llama_cpp_graphs import graph_of
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.formats import CACHE_BYTES, TYPES, tensor_bytes
from autodistill.quantization.grids import Grid, Storage
from autodistill.quantization.packing import pack

REFERENCE = "q8_0"  # type of all parts of the reference

_WEIGHTS = 96 * 2**20  # weights of all timed layers: more than any processor's cache holds, and no more than needed

_TILE = 32  # rows of random weights that a matrix repeats

_SCANNED = (REFERENCE, "q4_0")  # types whose FFNs are timed in odd widths

_ODD = (32, 64, 128)

COARSE = 256  # neurons: widths between two multiples of this are compared with them

Model: TypeAlias = tuple[str, ...]
"""The name of a small model: how it differs from the reference."""


@dataclass(frozen=True, kw_only=True)
class SmallModel:
    """A small model: its shape, the types of its parts and cache, and whether it is also timed at a full context."""

    spec: ModelSpec
    kinds: Mapping[str, str] = field(default_factory=dict)
    cache: str = "f16"
    far: bool = False

    def kind(self, name: str, role: Role, columns: int) -> str:
        """Return the type of a matrix. If the type's blocks do not divide its rows, it has the reference's type."""
        part = part_of(self.spec, name, role)
        kind = self.kinds.get(part or HEAD, REFERENCE)
        return kind if divides(kind, columns) else REFERENCE


def divides(kind: str, columns: int) -> bool:
    stored = TYPES[kind]
    return not isinstance(stored, Grid) or stored.divides(columns)


def models_of(spec: ModelSpec, kinds: Collection[str] = tuple(TYPES)) -> dict[Model, SmallModel]:
    """Return the small models that are timed, by how they differ from the reference.

    Args:
        spec: The model.
        kinds: Types that are timed in addition to the reference's.

    Raises:
        InputError: The dimensions are too small to be halved.
    """
    count = sum(count for part, count in part_weights(spec).items() if part != HEAD)
    layers = min(spec.layers, max(2, math.ceil(_WEIGHTS / count)))
    if layers < 2 or spec.ffn_width < 64 or spec.vocabulary < 64:
        raise InputError("blocks are timed of models of at least 2 layers, 64 neurons and a vocabulary of 64")
    whole = resized(spec, range(layers), ffn_width=spec.ffn_width)
    reference = SmallModel(spec=whole, far=True)
    half = max(32, spec.ffn_width // 2 // 32 * 32)
    found: dict[Model, SmallModel] = {
        ("reference",): reference,
        ("half of the layers",): replace(reference, spec=resized(whole, range(layers // 2)), far=False),
        ("half of the FFN",): replace(reference, spec=resized(whole, ffn_width=half), far=False),
        ("part of the vocabulary",): replace(
            reference, spec=resized(whole, vocabulary=max(32, spec.vocabulary // 8)), far=False
        ),
    }
    again = replace(reference, far=False)
    for part in PARTS:
        columns = {one.shape[1] for one in whole.tensors if part_of(whole, one.name, one.role) == part}
        for kind in kinds:
            if kind != REFERENCE and any(divides(kind, one) for one in columns):
                found[part, kind] = replace(again, kinds={part: kind})
                found["all", kind] = replace(again, kinds=dict.fromkeys(PARTS, kind))
    # The place of a process in memory changes its times by some percent, so the reference is loaded three times.
    found["again", "first"] = again
    for kind in CACHE_BYTES:
        if kind != "f16" and _holds(spec, kind):
            found["cache", kind] = replace(reference, cache=kind)
    base = (spec.ffn_width - 1) // COARSE * COARSE
    low = base - COARSE
    for kind in (one for one in _SCANNED if low > 0 and (one == REFERENCE or one in kinds)):
        for width in (low, *(low + odd for odd in _ODD), base):
            narrow = resized(whole, ffn_width=width)
            found["width", str(width), kind] = SmallModel(spec=narrow, kinds={FFN_IN: kind, FFN_OUT: kind})
    return found | {("again", "second"): again}


def _holds(spec: ModelSpec, kind: str) -> bool:
    try:
        check_cache(spec, "llama.cpp", (kind, kind))
    except InputError:
        return False
    return True


def write_model(path: Path, one: SmallModel) -> None:
    """Write a small model as a GGUF file. Every matrix repeats some rows of random weights."""
    spec, family = one.spec, get_family(one.spec.architecture)
    writer = GGUFWriter(path, graph_of(spec))
    add_metadata(writer, spec, config_of(spec), LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{index}" for index in range(spec.vocabulary)])
    writer.add_token_types([TokenType.NORMAL] * spec.vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(1)
    storages: list[tuple[tuple[int, ...], Storage]] = []
    for tensor in spec.tensors:
        stored: Storage = "f32"
        if len(tensor.shape) > 1:
            stored = TYPES[one.kind(tensor.name, tensor.role, tensor.shape[1])]
        storages.append((tensor.shape, stored))
        dtype = np.dtype(np.float32 if stored == "f32" else np.float16)
        size = tensor_bytes(tensor, stored)
        writer.add_tensor_info(family.gguf_name(tensor.name), tensor.shape, dtype, size, raw_dtype=KINDS[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape, stored in storages:
        write_tensor(writer, _weights(shape, stored))
    writer.close()


def _weights(shape: tuple[int, ...], stored: Storage) -> npt.NDArray[Any]:
    """Return packed weights: ones for a vector, repeated random rows for a matrix."""
    if len(shape) < 2:
        return np.ones(shape, np.float32)
    rows, columns = shape
    tile = _tile(columns, stored)
    return np.resize(tile, (rows, *tile.shape[1:]))


@lru_cache(64)
def _tile(columns: int, stored: Storage) -> npt.NDArray[Any]:
    """Return packed random rows."""
    rows = np.random.default_rng(0).normal(0, columns**-0.5, (_TILE, columns)).astype(np.float32)
    packed: npt.NDArray[Any] = pack(rows, stored)["data"]
    return packed

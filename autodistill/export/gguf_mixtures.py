"""Mixtures of experts as GGUF files: written from a model in memory, and read back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from gguf import GGUFReader, GGUFWriter

from autodistill.errors import VerificationError
from autodistill.export.base import Artifact, Label
from autodistill.export.gguf import (
    FILE,
    FILE_TYPES,
    KINDS,
    STORAGES,
    add_general,
    add_metadata,
    add_sampling,
    write_tensor,
)
from autodistill.export.gguf_tokenizer import add_tokenizer
from autodistill.export.student_reader import replacing
from autodistill.models.families import FAMILIES, GGUF_MIXTURES, get_family
from autodistill.models.llama_cpp_graphs import not_computed, row_order
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.quantization.formats import tensor_bytes
from autodistill.quantization.grids import Floats, Storage
from autodistill.quantization.packing import pack, unpack
from autodistill.strategy.deployment import Deployment

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.\w+\.gate\.weight")
_NORMALIZED = {"mixtral": True, "qwen3_moe": True, "olmoe": False}
"""Whether llama.cpp's graph gives the experts that a token takes weights that sum to one."""


def cannot_write(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """Return why no GGUF file is written of a mixture of experts, or of a model of no family; "" if one is."""
    name = spec.architecture
    if name not in GGUF_MIXTURES:
        return "" if name in FAMILIES else _unknown(name)
    if reason := not_computed(_like(config), spec.head_dim):
        return reason
    if name != "mixtral" and bool(config.get("norm_topk_prob", False)) != _NORMALIZED[name]:
        return f"llama.cpp computes {name} with norm_topk_prob {str(_NORMALIZED[name]).lower()} alone"
    if name == "olmoe" and spec.kv_heads != spec.heads:
        heads = f"{spec.kv_heads} for {spec.heads}"
        return f"llama.cpp computes olmoe with as many heads of keys as of queries, and not {heads}"
    if config.get("clip_qkv") is not None:
        return "llama.cpp clips no queries and keys (clip_qkv)"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return f"a {name} is written whose layers are all mixtures"
    if any(tensor.name.endswith(".bias") for tensor in spec.tensors):
        return f"llama.cpp has no biases for {name}"
    window = config.get("sliding_window") if config.get("use_sliding_window", name == "mixtral") else None
    if window and window < spec.max_context:
        return f"llama.cpp has no sliding window of {window} tokens for {name}"
    return ""


def _unknown(name: str) -> str:
    return f"no GGUF file is written of {name[:60]!r}; of mixtures of experts, {', '.join(GGUF_MIXTURES)} are"


def _like(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the family whose names and rotary embedding a mixture has."""
    return dict(config) | {"model_type": GGUF_MIXTURES[str(config["model_type"])][0]}


def write_mixture(
    values: Callable[[str], Floats],
    spec: ModelSpec,
    config: Mapping[str, Any],
    deployment: Deployment,
    text: Path,
    out: Path,
    **label: Unpack[Label],
) -> Artifact:
    """Write a mixture of experts to `out/student.gguf`, one tensor in memory at a time.

    Args:
        values: Gives a tensor, float32: of experts [experts, out, in], else in its own shape.
        spec, config: Of the model, of which `cannot_write` says nothing.
        deployment: How each tensor is stored.
        text: Folder with the tokenizer and the settings for sampling.
        out: Folder that the file goes into.
        label: As for `GgufExporter.export`.

    Raises:
        InputError: The tokenizer cannot be held by GGUF, or `out` not be written.
    """
    graph = GGUF_MIXTURES[spec.architecture][1]
    with replacing(out) as partial:
        writer = GGUFWriter(os.fspath(partial / FILE), graph)
        try:
            add_metadata(writer, spec, _like(config), FILE_TYPES[deployment.format])
            writer.add_expert_count(spec.experts)
            writer.add_expert_used_count(spec.active_experts)
            writer.add_expert_feed_forward_length(spec.ffn_width)
            add_general(writer, spec, **label)
            add_sampling(writer, text)
            add_tokenizer(writer, text, spec.vocabulary)
            _write_tensors(writer, values, spec, deployment)
        finally:
            writer.close()
    return Artifact(path=out / FILE, size_bytes=(out / FILE).stat().st_size)


def _write_tensors(
    writer: GGUFWriter, values: Callable[[str], Floats], spec: ModelSpec, deployment: Deployment
) -> None:
    for tensor in spec.tensors:
        storage = deployment.storage(tensor)
        dtype = np.dtype(np.float32 if storage == "f32" else np.float16)
        size = tensor_bytes(tensor, storage)
        parts = _gguf_parts(tensor, spec)
        for name, shape in parts:
            writer.add_tensor_info(name, shape, dtype, size // len(parts), raw_dtype=KINDS[storage])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in spec.tensors:
        storage = deployment.storage(tensor)
        for name, part in _split(tensor, values(tensor.name), spec):
            rows = np.ascontiguousarray(part.reshape(-1, part.shape[-1]) if part.ndim == 3 else part)
            data = pack(rows, storage)["data"]
            order = row_order(writer.arch, name, spec.heads, spec.kv_heads)
            write_tensor(writer, order.to_graph(data) if order else data)


def _gguf_parts(tensor: TensorSpec, spec: ModelSpec) -> list[tuple[str, tuple[int, ...]]]:
    """GGUF's names and shapes of what a tensor of transformers is in a file."""
    if found := _EXPERTS.fullmatch(tensor.name):
        rows, columns = tensor.shape[0] // spec.experts, tensor.shape[1]
        if found[2] == "down_proj":
            return [(f"blk.{found[1]}.ffn_down_exps.weight", (spec.experts, rows, columns))]
        half = (spec.experts, rows // 2, columns)
        return [(f"blk.{found[1]}.ffn_{part}_exps.weight", half) for part in ("gate", "up")]
    if found := _ROUTER.fullmatch(tensor.name):
        return [(f"blk.{found[1]}.ffn_gate_inp.weight", tensor.shape)]
    return [(get_family(GGUF_MIXTURES[spec.architecture][0]).gguf_name(tensor.name), tensor.shape)]


def _split(tensor: TensorSpec, values: Floats, spec: ModelSpec) -> Iterator[tuple[str, Floats]]:
    """Yield what a tensor of transformers is in a file: experts' gates and ups lie apart."""
    parts = _gguf_parts(tensor, spec)
    for (name, _), part in zip(
        parts, np.split(values, len(parts), axis=1) if len(parts) > 1 else [values], strict=True
    ):
        yield name, part


def verify_mixture(artifact: Path, values: Callable[[str], Floats], spec: ModelSpec, deployment: Deployment) -> int:
    """Compare every tensor of a file with what was meant to be written, and return how many there are.

    Args:
        artifact: The file.
        values: As `write_mixture` takes them, as they are stored.
        spec, deployment: As `write_mixture` takes them.

    Raises:
        VerificationError: Names the first tensor that differs, or is missing.
    """
    stored = {tensor.name: tensor for tensor in GGUFReader(artifact).tensors}
    count = 0
    for tensor in spec.tensors:
        for name, wanted in _split(tensor, values(tensor.name), spec):
            held = stored.get(name)
            if held is None:
                raise VerificationError(f"{artifact} lacks {name}")
            storage: Storage = STORAGES[held.tensor_type]
            rows = wanted.reshape(-1, wanted.shape[-1]) if wanted.ndim == 3 else wanted
            found = unpack(
                {"data": held.data.reshape(len(rows), -1) if rows.ndim > 1 else held.data}, storage, rows.shape
            )
            order = row_order(GGUF_MIXTURES[spec.architecture][1], name, spec.heads, spec.kv_heads)
            found = order.to_transformers(found) if order else found
            if deployment.storage(tensor) != storage or not np.array_equal(found, rows):
                raise VerificationError(f"{artifact} holds other values of {name} than were measured")
            count += 1
    return count

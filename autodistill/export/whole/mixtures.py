"""Mixtures of experts for which llama.cpp's graphs store all experts of a layer in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from gguf import GGUFWriter

from autodistill.export.gguf_writing import add_rotary, add_sizes
from autodistill.export.whole.graph import Graph, Part
from autodistill.models.families import GGUF_MIXTURES, get_family
from autodistill.models.llama_cpp_graphs import not_computed, row_order
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.\w+\.gate\.weight")
_NORMALIZED = {"mixtral": True, "qwen3_moe": True, "olmoe": False}
"""Whether llama.cpp's graph normalises the weights of the experts that a token uses to a sum of one."""


def _refuses(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    name = spec.architecture
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


def _like(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the family whose names and rotary embedding a mixture uses."""
    return dict(config) | {"model_type": GGUF_MIXTURES[str(config["model_type"])][0]}


def _add_settings(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    add_sizes(writer, spec)
    add_rotary(writer, spec, _like(config))
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.active_experts)
    writer.add_expert_feed_forward_length(spec.ffn_width)


def _parts(graph: str, tensor: TensorSpec, spec: ModelSpec, config: Mapping[str, Any]) -> list[Part]:
    if found := _EXPERTS.fullmatch(tensor.name):
        rows, columns = tensor.shape[0] // spec.experts, tensor.shape[1]
        if found[2] == "down_proj":
            return [Part(name=f"blk.{found[1]}.ffn_down_exps.weight", shape=(spec.experts, rows, columns))]
        # Each expert's gates and ups follow each other in transformers, but are separate tensors in a file.
        halves = np.arange(tensor.shape[0], dtype=np.int64).reshape(spec.experts, 2, rows // 2)
        shape = (spec.experts, rows // 2, columns)
        return [
            Part(name=f"blk.{found[1]}.ffn_{part}_exps.weight", shape=shape, rows=halves[:, half].ravel())
            for half, part in enumerate(("gate", "up"))
        ]
    if found := _ROUTER.fullmatch(tensor.name):
        return [Part(name=f"blk.{found[1]}.ffn_gate_inp.weight", shape=tensor.shape)]
    name = get_family(GGUF_MIXTURES[spec.architecture][0]).gguf_name(tensor.name)
    order = row_order(graph, name, spec.heads, spec.kv_heads)
    places = None if order is None else order.to_graph(np.arange(tensor.shape[0]))
    return [Part(name=name, shape=tensor.shape, rows=places)]


MIXTURES: Mapping[str, Graph] = {
    name: Graph(name=graph, refuses=_refuses, add_settings=_add_settings, parts=partial(_parts, graph))
    for name, (_, graph) in GGUF_MIXTURES.items()
}
"""Graphs by transformers' `model_type`."""

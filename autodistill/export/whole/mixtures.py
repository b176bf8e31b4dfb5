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
from autodistill.models.llama_cpp_graphs import row_order
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.models.whole.mixtures import not_computed, without_experts

_EXPERTS = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.\w+\.gate\.weight")


def _add_settings(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    add_sizes(writer, spec)
    add_rotary(writer, spec, without_experts(config))
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
    name: Graph(name=graph, refuses=not_computed, add_settings=_add_settings, parts=partial(_parts, graph))
    for name, (_, graph) in GGUF_MIXTURES.items()
}
"""Graphs by transformers' `model_type`."""

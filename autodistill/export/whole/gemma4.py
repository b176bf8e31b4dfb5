"""Gemma 4's text model without experts, as llama.cpp's graph "gemma4" reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter

from autodistill.errors import InputError
from autodistill.export.gguf_writing import add_sizes
from autodistill.export.whole.graph import Graph, Part, gguf_name, settings
from autodistill.models.llama_cpp_graphs import FULL, SLIDING
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.models.whole.gemma4 import describe_gemma4
from autodistill.quantization.grids import Floats

_NAME = "gemma4"
_UNTURNED = 1e30  # divisor of the frequency of channels that are not rotated


def _refuses(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    try:
        return describe_gemma4(config).not_in_gguf
    except InputError as error:
        return str(error)


def _layers(own: Any) -> list[Any]:
    """Return the config of each layer."""
    return [own.per_layer_config[layer] for layer in range(own.num_hidden_layers)]


def _add_settings(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    own, layers = settings(config), _layers(settings(config))
    widths = {tensor.name: tensor.shape[0] for tensor in spec.tensors if tensor.name.endswith("mlp.gate_proj.weight")}
    full, windowed = (layers[own.layer_types.index(kind)].head_dim for kind in (FULL, SLIDING))
    add_sizes(
        writer,
        spec,
        ffn=[widths[f"model.layers.{layer}.mlp.gate_proj.weight"] for layer in range(spec.layers)],
        kv_heads=[layer.num_key_value_heads for layer in layers],
    )
    writer.add_layer_norm_rms_eps(own.rms_norm_eps)
    writer.add_sliding_window(own.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in own.layer_types])
    writer.add_shared_kv_layers(own.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(own.hidden_size_per_layer_input or 0)
    writer.add_key_length(full)
    writer.add_value_length(full)
    writer.add_key_length_swa(windowed)
    writer.add_value_length_swa(windowed)
    writer.add_rope_dimension_count(full)
    writer.add_rope_dimension_count_swa(windowed)
    writer.add_rope_freq_base(own.rope_parameters[FULL]["rope_theta"])
    writer.add_rope_freq_base_swa(own.rope_parameters[SLIDING]["rope_theta"])
    if own.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(own.final_logit_softcapping)


def _parts(tensor: TensorSpec, spec: ModelSpec, config: Mapping[str, Any]) -> list[Part]:
    name = gguf_name(MODEL_ARCH.GEMMA4, spec.layers, tensor.name)
    return [Part(name=name if name.endswith(".weight") else f"{name}.weight", shape=tensor.shape)]


def _more(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Floats]:
    """Return the divisors of full attention's frequencies; channels that are not rotated lie among the others."""
    own = settings(config)
    rope, pairs = own.rope_parameters[FULL], own.per_layer_config[own.layer_types.index(FULL)].head_dim // 2
    turned = int(rope.get("partial_rotary_factor", 1.0) * pairs) if rope["rope_type"] == "proportional" else pairs
    return {"rope_freqs.weight": np.where(np.arange(pairs) < turned, 1, _UNTURNED).astype(np.float32)}


GEMMA4 = Graph(name=_NAME, refuses=_refuses, add_settings=_add_settings, parts=_parts, more=_more)

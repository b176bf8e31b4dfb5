"""Qwen3.5's text model without experts, as llama.cpp's graph "qwen35" reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, GGUFWriter

from autodistill.errors import InputError
from autodistill.export.gguf_writing import add_sizes
from autodistill.export.whole.graph import Graph, Part, gguf_name, settings
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.models.whole.qwen3_5 import describe_qwen3_5, full_interval

_SECTIONS = [11, 11, 10, 0]
"""How the rotated channels are divided among an image's three positions, which are all the same in text. This is
Qwen3.5's default; llama.cpp loads no file without it."""


def _refuses(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    try:
        return describe_qwen3_5(config).not_in_gguf
    except InputError as error:
        return str(error)


def _add_settings(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    own = settings(config)
    rope = own.rope_parameters
    add_sizes(writer, spec)
    writer.add_layer_norm_rms_eps(own.rms_norm_eps)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(spec.head_dim * rope.get("partial_rotary_factor", 1.0)))
    sections = list(rope.get("mrope_section") or _SECTIONS)
    writer.add_rope_dimension_sections(sections + [0] * (len(_SECTIONS) - len(sections)))
    writer.add_full_attention_interval(full_interval(own.layer_types))
    writer.add_ssm_conv_kernel(own.linear_conv_kernel_dim)
    writer.add_ssm_state_size(own.linear_key_head_dim)
    writer.add_ssm_group_count(own.linear_num_key_heads)
    writer.add_ssm_time_step_rank(own.linear_num_value_heads)
    writer.add_ssm_inner_size(own.linear_num_value_heads * own.linear_value_head_dim)


def _order(config: Mapping[str, Any], each: int, before: int = 0) -> npt.NDArray[np.int64] | None:
    """Return the row order in a file for the heads of values, or None if it equals that of transformers.

    transformers keeps value heads of the same key head together. llama.cpp takes the first value head of each key head,
    then the second of each, and so on.

    Args:
        config: Config of the model.
        each: Rows of a head.
        before: Number of rows before the heads, which stay in place.
    """
    own = settings(config)
    keys, values = own.linear_num_key_heads, own.linear_num_value_heads
    if keys == values:
        return None
    places = np.arange(values * each, dtype=np.int64).reshape(keys, values // keys, each).swapaxes(0, 1).ravel()
    return np.concatenate([np.arange(before, dtype=np.int64), before + places])


def _parts(tensor: TensorSpec, spec: ModelSpec, config: Mapping[str, Any]) -> list[Part]:
    own, name, shape = settings(config), tensor.name, tensor.shape
    head, keys = own.linear_value_head_dim, 2 * own.linear_num_key_heads * own.linear_key_head_dim
    last = name.partition(".linear_attn.")[2]
    if last == "dt_bias":
        block = gguf_name(MODEL_ARCH.QWEN35, spec.layers, name.replace("dt_bias", "A_log")).rpartition(".")[0]
        return [Part(name=f"{block}.ssm_dt.bias", shape=shape, rows=_order(config, 1))]
    theirs = gguf_name(MODEL_ARCH.QWEN35, spec.layers, name)
    if last == "A_log":
        return [Part(name=theirs, shape=shape, rows=_order(config, 1), change=lambda values: -np.exp(values))]
    if last == "conv1d.weight":
        return [Part(name=theirs, shape=(shape[0], shape[-1]), rows=_order(config, head, keys))]
    if last == "in_proj_qkv.weight":
        return [Part(name=theirs, shape=shape, rows=_order(config, head, keys))]
    if last in ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight"):
        return [Part(name=theirs, shape=shape, rows=_order(config, head if "_z." in last else 1))]
    if name.endswith("norm.weight") and not last:
        # Norms multiply by their weights plus 1, except for the norm behind a recurrent state.
        return [Part(name=theirs, shape=shape, change=lambda values: values + np.float32(1))]
    return [Part(name=theirs, shape=shape)]


def _columns(name: str, config: Mapping[str, Any]) -> npt.NDArray[np.int64] | None:
    if not name.endswith(".linear_attn.out_proj.weight"):
        return None
    return _order(config, settings(config).linear_value_head_dim)


QWEN3_5 = Graph(name="qwen35", refuses=_refuses, add_settings=_add_settings, parts=_parts, columns=_columns)

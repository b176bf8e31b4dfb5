"""What GGUF files of all models are written by: names of types, fields of the header, and the bytes of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.utility import size_label

from autodistill.export.base import Label
from autodistill.export.student_reader import read_json
from autodistill.models.llama_cpp_graphs import SLIDING, rotary, rotary_dims, window_period
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Storage

FILE = "student.gguf"

# If all linear layers share a K-quant grid, this is the least mixed of llama.cpp's types; all except Q6_K are mixtures.
FILE_TYPES = {
    "gguf-f16": LlamaFileType.MOSTLY_F16,
    "gguf-bf16": LlamaFileType.MOSTLY_BF16,
    "gguf-q8_0": LlamaFileType.MOSTLY_Q8_0,
    "gguf-q5_1": LlamaFileType.MOSTLY_Q5_1,
    "gguf-q5_0": LlamaFileType.MOSTLY_Q5_0,
    "gguf-q4_1": LlamaFileType.MOSTLY_Q4_1,
    "gguf-iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "gguf-q4_0": LlamaFileType.MOSTLY_Q4_0,
    "gguf-mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE,
    "gguf-q6_k": LlamaFileType.MOSTLY_Q6_K,
    "gguf-q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "gguf-q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "gguf-q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "gguf-q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "gguf-q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "gguf-q2_k": LlamaFileType.MOSTLY_Q2_K_S,
}
KINDS: Mapping[Storage, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f32_plus_1": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    **{storage: GGMLQuantizationType[name.upper()] for name, storage in TYPES.items()},
}
STORAGES: Mapping[GGMLQuantizationType, Storage] = {kind: storage for storage, kind in reversed(list(KINDS.items()))}


def add_metadata(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any], file_type: LlamaFileType) -> None:
    """Write the shape of the model under the keys that llama.cpp's graphs read."""
    add_kind(writer, file_type)
    add_sizes(writer, spec)
    add_rotary(writer, spec, config)


def add_kind(writer: GGUFWriter, file_type: LlamaFileType) -> None:
    """Write that the file is a model, and which type most of its matrices have."""
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def add_sizes(
    writer: GGUFWriter, spec: ModelSpec, ffn: Sequence[int] | None = None, kv_heads: Sequence[int] | None = None
) -> None:
    """Write the sizes that every graph reads; FFN widths and KV heads are lists if layers differ."""
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(ffn or spec.ffn_widths or spec.ffn_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(kv_heads or spec.kv_heads)
    writer.add_vocab_size(spec.vocabulary)


def add_rotary(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Write positions, norms, heads and windows of a family, or of a mixture that resembles one."""
    rope = rotary(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(rotary_dims(config, spec.head_dim))
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(rope["factor"])
    if writer.arch == "gptneox":
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
        writer.add_parallel_residual(bool(config.get("use_parallel_residual", True)))
    else:
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    # llama.cpp assumes another head dim for Gemma 3.
    if spec.head_dim * spec.heads != spec.width or writer.arch == "gemma3":
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    if writer.arch == "gemma3" and spec.window:
        period = window_period(spec)
        assert period is not None
        writer.add_sliding_window(spec.window)
        writer.add_sliding_window_pattern(period)
        writer.add_float32("gemma3.rope.freq_base_swa", rotary(config, SLIDING)["rope_theta"])


def add_general(writer: GGUFWriter, spec: ModelSpec, **label: Unpack[Label]) -> None:
    """Write what programs show in lists of models, as llama.cpp's own converter does."""
    teacher, license, name = label.get("teacher"), label.get("license"), label.get("name")
    writer.add_size_label(size_label(spec.parameters, 0, 0, 0))
    if name is not None or teacher is not None:
        writer.add_name(name if name is not None else f"Student of {teacher}")
    if teacher is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, teacher.rpartition("/")[2])
        if "/" in teacher:
            # The teacher is from the hub.
            writer.add_base_model_organization(0, teacher.partition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{teacher}")
    if license is not None:
        writer.add_license(license.lower())


def add_sampling(writer: GGUFWriter, folder: Path) -> None:
    """Write the sampling settings that the model's makers recommend; llama.cpp uses them as defaults."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    top_k: Any = settings.get("top_k")
    if type(top_k) is int and 0 <= top_k < 2**31:
        writer.add_sampling_top_k(top_k)
    for name, add in (
        ("temperature", writer.add_sampling_temp),
        ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p),
    ):
        value: Any = settings.get(name)
        if type(value) in (int, float) and 0 <= value < math.inf:
            add(float(value))


class _Data(np.ndarray[Any, np.dtype[Any]]):
    """A tensor's data as a file holds it. A failing write reports the disk's reason, which numpy's own error lacks."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """Write the data to an open file."""
        fid.write(np.ascontiguousarray(self).data)


def write_tensor(writer: GGUFWriter, data: npt.NDArray[Any]) -> None:
    """Write the bytes of the next tensor.

    Raises:
        OSError: The bytes cannot be written; its number says why.
    """
    writer.write_tensor_data(data.view(_Data))

"""Exports a student as one GGUF file, which llama.cpp serves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType

from autodistill.codes import unpack
from autodistill.contracts import Artefact, ModelSpec
from autodistill.distillation.gguf_file import transformers_name
from autodistill.errors import InputError, VerificationError
from autodistill.export.gguf_tokenizer import add_tokenizer
from autodistill.export.student_files import StudentFiles, replacing
from autodistill.families import FAMILIES, get_family
from autodistill.formats import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Floats, Grid, Storage, tensor_bytes
from autodistill.strategy import Deployment

FILE = "student.gguf"

_FILE_TYPES = {
    "gguf-f16": LlamaFileType.MOSTLY_F16,
    "gguf-q8_0": LlamaFileType.MOSTLY_Q8_0,
    "gguf-q5_1": LlamaFileType.MOSTLY_Q5_1,
    "gguf-q5_0": LlamaFileType.MOSTLY_Q5_0,
    "gguf-q4_1": LlamaFileType.MOSTLY_Q4_1,
    "gguf-q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_TYPES: Mapping[Storage, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    Q8_0: GGMLQuantizationType.Q8_0,
    Q5_1: GGMLQuantizationType.Q5_1,
    Q5_0: GGMLQuantizationType.Q5_0,
    Q4_1: GGMLQuantizationType.Q4_1,
    Q4_0: GGMLQuantizationType.Q4_0,
}
_STORAGES: Mapping[GGMLQuantizationType, Storage] = {kind: storage for storage, kind in _TYPES.items()}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufExporter:
    """Writes `student.gguf`: weights, shape, tokenizer and chat template in one file."""

    name = "gguf"
    formats = tuple(_FILE_TYPES)

    def export(self, student: Path, deployment: Deployment, out: Path) -> Artefact:
        """Packs the student into `out/student.gguf`, one tensor in memory at a time.

        Raises:
            InputError: The student cannot be read or be held by GGUF, or `out` not be written.
        """
        with StudentFiles(student, deployment) as files, replacing(out) as partial:
            writer = GGUFWriter(os.fspath(partial / FILE), _gguf_architecture(files.spec))
            try:
                add_metadata(writer, files.spec, files.config, _FILE_TYPES[deployment.format])
                add_tokenizer(writer, student, files.spec.vocabulary)
                _write_tensors(writer, files, deployment)
            finally:
                writer.close()
        return Artefact(path=out / FILE, size_bytes=(out / FILE).stat().st_size)

    def unpack(self, artefact: Path) -> Iterator[tuple[str, Floats]]:
        """Yields each stored tensor, in transformers' names and row order.

        Raises:
            VerificationError: The file holds a tensor that no export writes.
        """
        reader = GGUFReader(artefact)
        architecture = _field(reader, "general.architecture")
        heads = _field(reader, f"{architecture}.attention.head_count")
        kv_heads = _field(reader, f"{architecture}.attention.head_count_kv")
        for tensor in reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                continue  # follows from the config
            name = transformers_name(tensor.name)
            if name is None or tensor.tensor_type not in _STORAGES:
                raise VerificationError(f"{artefact} holds {tensor.name} as {tensor.tensor_type.name}: not an export")
            shape = tuple(int(size) for size in reversed(tensor.shape))
            values = unpack({"data": tensor.data}, _STORAGES[tensor.tensor_type], shape)
            permuted = _permuted_heads(architecture, name, heads, kv_heads)
            yield name, unpermute(values, permuted) if permuted else values


def _gguf_architecture(spec: ModelSpec) -> str:
    name = get_family(spec.architecture).gguf
    if name is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.gguf)
        raise InputError(f"GGUF export does not know the architecture {spec.architecture!r}; it knows {known}")
    return name


def gguf_name(name: str) -> str:
    """GGUF's name of transformers' tensor "model.layers.0.mlp.up_proj.weight", say."""
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def permute(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Puts the rows of Q or K in the order of llama.cpp's "llama" graph.

    Within a head, transformers rotates row i together with row i + half, llama.cpp rows 2i and 2i + 1.

    Args:
        rows: [heads * head dim, ...]: weights, their packed bytes, or a bias.
        heads: Heads of queries, or of keys.
    """
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def unpermute(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The inverse of `permute`."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def _permuted_heads(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """The heads whose rows llama.cpp wants in another order, or 0."""
    if architecture != "llama":
        return 0
    stem = name.rpartition(".")[0]
    return heads if stem.endswith(".q_proj") else kv_heads if stem.endswith(".k_proj") else 0


def _write_tensors(writer: GGUFWriter, files: StudentFiles, deployment: Deployment) -> None:
    storages = {name: deployment.storage(tensor) for name, tensor in files.specs.items()}
    factors = _rope_factors(files.config)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, storage in storages.items():
        size = tensor_bytes(files.specs[name], storage)
        # The shape of the weights, with a dtype that keeps the writer from taking it for one of bytes.
        dtype = np.dtype(np.float16 if isinstance(storage, Grid) else storage.replace("f", "float"))
        writer.add_tensor_info(gguf_name(name), files.specs[name].shape, dtype, size, raw_dtype=_TYPES[storage])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name in storages:
        data = files.pack(name)["data"]
        permuted = _permuted_heads(writer.arch, name, files.spec.heads, files.spec.kv_heads)
        writer.write_tensor_data(permute(data, permuted) if permuted else data)


def add_metadata(writer: GGUFWriter, spec: ModelSpec, config: Mapping[str, Any], file_type: LlamaFileType) -> None:
    """Writes the shape of the model under the keys that llama.cpp's graphs read.

    Raises:
        InputError: The model has attention or position encoding that llama.cpp's graph would not compute.
    """
    _check_graph(spec, config)
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.ffn_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(spec.head_dim)
    if spec.head_dim * spec.heads != spec.width:
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(rope["factor"])


def _check_graph(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    kind = _rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"GGUF export does not know the rotary scaling {kind!r}; it knows default, linear and llama3")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"llama.cpp computes {spec.architecture} with silu, not with {config['hidden_act']!r}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < spec.max_context:
        raise InputError(
            f"llama.cpp has no sliding window of {window} tokens for {spec.architecture}: set sliding_window to null "
            f"and max_position_embeddings to {window} in the model's config.json"
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters, which older configs spread over `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _rope_factors(config: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    """What each frequency of llama3's rotary scaling is divided by, float32 [head dim / 2], or None."""
    if _rope(config)["rope_type"] != "llama3":
        return None
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = AutoConfig.for_model(**config)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")[0].double().numpy()
    exponents = np.arange(len(scaled)) / len(scaled)
    return (_rope(config)["rope_theta"] ** -exponents / scaled).astype(np.float32)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise VerificationError(f"the GGUF file lacks {key}: export the student again")
    return field.contents()

"""Exporter to a single GGUF file, which llama.cpp serves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.utility import size_label

from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import InputError, VerificationError
from autodistill.estimates.fit import check_holds
from autodistill.export.base import (
    KEPT_TOKENS,
    PROMPT_TOKENS,
    WRITTEN_TOKENS,
    Artifact,
    Label,
    Pace,
    Ran,
    TokenIds,
    check_written,
)
from autodistill.export.gguf_tokenizer import add_tokenizer, spaces
from autodistill.export.student_reader import StudentFiles, read_json, replacing
from autodistill.export.tokenizer_check import agreement, cannot_cut, comparable
from autodistill.export.verify import falls_short
from autodistill.hardware.runtime import Runtime
from autodistill.models.families import FAMILIES, GGUF_FAMILIES, get_family
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.llama_cpp_graphs import SLIDING, graph_of, rotary, rotary_dims, row_order, window_period
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.formats import TYPES, formats_of, tensor_bytes
from autodistill.quantization.grids import Floats, Storage
from autodistill.quantization.packing import unpack
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment

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
_ROPE_FACTORS = "rope_freqs.weight"
_TIMED = 8  # tokens
_SEQUENCES_AT_ONCE = 8  # sequences that the runtime reads at once when a file is verified
MIN_SAME_CUT = 0.99
"""Least share of tokens of validation text that the runtime makes as the tokenizer does. llama.cpp's tables may differ
for rare characters (for tekken, capitals beyond ASCII), which proves nothing. A wrong way to split text shows in every
sentence."""


class GgufExporter:
    """Writes `student.gguf`: weights, shape, tokenizer, chat template and origin, in one file."""

    name = "gguf"
    formats = formats_of("gguf")
    runtimes: tuple[Runtime, ...] = ()

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the quantised student to `out/student.gguf`, one tensor in memory at a time.

        Raises:
            InputError: The student cannot be read or GGUF cannot hold it, or `out` cannot be written.
        """
        with StudentFiles(student, deployment) as files, replacing(out) as partial:
            writer = GGUFWriter(os.fspath(partial / FILE), graph_of(files.spec))
            try:
                check_holds(files.spec, deployment)
                if reason := cannot_cut(student, files.spec.vocabulary):
                    raise InputError(reason)
                add_metadata(writer, files.spec, files.config, FILE_TYPES[deployment.format])
                add_general(writer, files.spec, **label)
                add_sampling(writer, student)
                add_tokenizer(writer, student, files.spec.vocabulary)
                _write_tensors(writer, files, deployment)
            finally:
                writer.close()
        return Artifact(path=out / FILE, size_bytes=(out / FILE).stat().st_size)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, with the names and row order of transformers.

        Raises:
            VerificationError: The file holds a tensor that no export writes.
        """
        reader = GGUFReader(artifact)
        graph = _field(reader, "general.architecture")
        family = FAMILIES[GGUF_FAMILIES[graph]]
        heads = _field(reader, f"{graph}.attention.head_count")
        kv_heads = _field(reader, f"{graph}.attention.head_count_kv")
        for tensor in reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                continue  # follows from the config
            name = family.from_gguf_name(tensor.name)
            if name is None or tensor.tensor_type not in STORAGES:
                raise VerificationError(f"{artifact} holds {tensor.name} as {tensor.tensor_type.name}: not an export")
            shape = tuple(int(size) for size in reversed(tensor.shape))
            storage = STORAGES[tensor.tensor_type]
            if storage == "f32" and family.norm_role is Role.NORM_ABOVE_ONE:
                storage = "f32_plus_1"  # a graph with such norms has no biases
            values = unpack({"data": tensor.data}, storage, shape)
            order = row_order(graph, tensor.name, heads, kv_heads)
            yield name, order.to_transformers(values) if order else values

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the file in llama.cpp; see `Exporter.run`."""
        return _run(artifact, sequences, threads, student, deployment)


def _run(path: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
    keys, values = deployment.cache_types
    # Beyond the context that a model was made for, its server writes nothing.
    asked = max(1, min(WRITTEN_TOKENS, read_gguf(path).context_length - PROMPT_TOKENS))
    context = max(sequences.shape[1] + 1, PROMPT_TOKENS + asked)
    slots = min(len(sequences), _SEQUENCES_AT_ONCE)
    server = LlamaServer(path, context, threads, slots, cache_type_k=keys, cache_type_v=values, whole_cache=True)
    rows, found = sequences.tolist(), None
    with suppress(VerificationError):
        found = server.read_at_once(rows, KEPT_TOKENS)
    with server:
        top1 = np.array(server.choices(rows)) if found is None else found[0][..., 0]
        prompt = sequences[0, :PROMPT_TOKENS].tolist()
        written = server.write(prompt, asked)
        seconds = server.begin([prompt])
        began = server.used_seconds()
        steps = [server.step() for _ in range(max(1, min(_TIMED, asked - 1)))]
        used = server.used_seconds() - began
        pace = Pace(1e3 * seconds, len(steps) / sum(steps), 1e3 * used / len(steps), server.peak_bytes())
        same_cut = 1.0 if student.samefile(path.parent) else _check_cut(path, server, sequences, student)
    check_written(path, len(written.tokens), asked)
    return Ran(top1, written.text, same_cut, found, written.tokens, pace)


def _check_cut(path: Path, server: LlamaServer, sequences: TokenIds, student: Path) -> float:
    """Return the share of the text's tokens that are as the student's tokenizer makes them, if it is large enough."""
    tokenizer, put = load_tokenizer(student), spaces(student)
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in sequences.tolist()]
    found = agreement(tokenizer, server, [comparable(text, tokenizer, put) for text in texts])
    if falls_short(found.same, found.tokens, MIN_SAME_CUT):
        raise VerificationError(
            f"llama.cpp cuts the text of {path} into other tokens than the student's tokenizer does; only "
            f"{found.share:.1%} are the same: {found.first}; export to huggingface or compressed-tensors instead"
        )
    return found.share


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


def _write_tensors(writer: GGUFWriter, files: StudentFiles, deployment: Deployment) -> None:
    storages = {name: deployment.storage(tensor) for name, tensor in files.specs.items()}
    family = get_family(files.spec.architecture)
    factors = _rope_factors(files.config)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, storage in storages.items():
        size = tensor_bytes(files.specs[name], storage)
        # Give the shape of the weights. With this dtype, the writer does not take it for a shape in bytes.
        dtype = np.dtype(np.float32 if storage in ("f32", "f32_plus_1") else np.float16)
        writer.add_tensor_info(family.gguf_name(name), files.specs[name].shape, dtype, size, raw_dtype=KINDS[storage])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        write_tensor(writer, factors)
    for name in storages:
        data = files.pack(name)["data"]
        order = row_order(writer.arch, family.gguf_name(name), files.spec.heads, files.spec.kv_heads)
        write_tensor(writer, order.to_graph(data) if order else data)


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


def _rope_factors(config: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    """Return the divisors of each frequency in llama3's rotary scaling, float32 [head dim / 2], or None."""
    if rotary(config)["rope_type"] != "llama3":
        return None
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = AutoConfig.for_model(**config)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")[0].double().numpy()
    exponents = np.arange(len(scaled)) / len(scaled)
    return (rotary(config)["rope_theta"] ** -exponents / scaled).astype(np.float32)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise VerificationError(f"the GGUF file lacks {key}: export the student again")
    return field.contents()

"""Exporter to a single GGUF file, which llama.cpp serves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFWriter

from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import InputError, VerificationError
from autodistill.estimates.fit import check_holds
from autodistill.export.base import (
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
from autodistill.export.gguf_writing import (
    FILE,
    FILE_TYPES,
    KINDS,
    STORAGES,
    add_general,
    add_metadata,
    add_sampling,
    write_tensor,
)
from autodistill.export.student_reader import StudentFiles, replacing
from autodistill.export.tokenizer_check import agreement, cannot_cut, comparable
from autodistill.export.verify import held_as_in_transformers
from autodistill.export.whole.file import held_of_student, read_whole, write_student
from autodistill.hardware.runtime import Runtime
from autodistill.models.families import FAMILIES, GGUF_FAMILIES, WHOLE_FAMILIES, get_family
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.gguf_to_transformers import find_original
from autodistill.models.llama_cpp_graphs import graph_of, rotary, row_order
from autodistill.models.tensors import Role
from autodistill.quantization.formats import formats_of, tensor_bytes
from autodistill.quantization.grids import Floats
from autodistill.quantization.packing import unpack
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment

_ROPE_FACTORS = "rope_freqs.weight"
_TIMED = 8  # tokens
_SEQUENCES_AT_ONCE = 8  # sequences that the runtime reads at once when a file is verified
_OTHER_CUT, _FEW = 0.01, 4
"""Share of tokens of validation text, and number of them, that the runtime may make in another way than the tokenizer.
llama.cpp's tables may differ for rare characters (for tekken, capitals beyond ASCII), which proves nothing. A wrong way
to split text shows in every sentence."""


class GgufExporter:
    """Writes `student.gguf`: weights, shape, tokenizer, chat template and origin, in one file."""

    name = "gguf"
    formats = formats_of("gguf")
    runtimes: tuple[Runtime, ...] = ()

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the quantised student to `out/student.gguf`, one tensor in memory at a time.

        A file as it was given is copied, byte for byte.

        Raises:
            InputError: The student cannot be read or GGUF cannot hold it, or `out` cannot be written.
        """
        if deployment.file is not None:
            return _copied(find_original(student, deployment.file.sha256), out)
        with StudentFiles(student, deployment) as files:
            check_holds(files.spec, deployment)
            if reason := cannot_cut(student, files.spec.vocabulary):
                raise InputError(reason)
            if files.spec.architecture in WHOLE_FAMILIES:
                return write_student(files, deployment, student, out, **label)
            return _write(files, deployment, student, out, **label)

    def file_tensors(self, files: StudentFiles) -> Mapping[str, Callable[[], Floats]]:
        """Return what `unpack` yields of a student's file; see `Rearranges`."""
        whole = files.spec.architecture in WHOLE_FAMILIES
        return held_of_student(files) if whole else held_as_in_transformers(files)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, with the names and row order of transformers if the layers are alike, else GGUF's.

        Raises:
            VerificationError: The file holds a tensor that no export writes.
        """
        reader = GGUFReader(artifact)
        graph = _field(reader, "general.architecture")
        if graph not in GGUF_FAMILIES:
            yield from read_whole(artifact)
            return
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
        found = server.read(rows)
    with server:
        top1, nll = found or (np.array(server.choices(rows)), None)
        prompt = sequences[0, :PROMPT_TOKENS].tolist()
        written = server.write(prompt, asked)
        seconds = server.begin([prompt])
        began = server.used_seconds()
        steps = [server.step() for _ in range(max(1, min(_TIMED, asked - 1)))]
        used = server.used_seconds() - began
        pace = Pace(1e3 * seconds, len(steps) / sum(steps), 1e3 * used / len(steps), server.peak_bytes())
        same_cut = 1.0 if student.samefile(path.parent) else _check_cut(path, server, sequences, student)
    check_written(path, len(written.tokens), asked)
    return Ran(top1, nll, written.text, same_cut, written.tokens, pace)


def _check_cut(path: Path, server: LlamaServer, sequences: TokenIds, student: Path) -> float:
    """Return the share of the text's tokens that are as the student's tokenizer makes them, if it is large enough."""
    tokenizer, put = load_tokenizer(student), spaces(student)
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in sequences.tolist()]
    found = agreement(tokenizer, server, [comparable(text, tokenizer, put) for text in texts])
    if found.tokens - found.same > _OTHER_CUT * found.tokens + _FEW:
        raise VerificationError(
            f"llama.cpp cuts the text of {path} into other tokens than the student's tokenizer does; only "
            f"{found.share:.1%} are the same: {found.first}; export to huggingface or compressed-tensors instead"
        )
    return found.share


def _copied(given: Path, out: Path) -> Artifact:
    with replacing(out) as partial:
        shutil.copyfile(given, partial / FILE)
    return Artifact(path=out / FILE, size_bytes=(out / FILE).stat().st_size)


def _write(files: StudentFiles, deployment: Deployment, text: Path, out: Path, **label: Unpack[Label]) -> Artifact:
    """Write a student of a family that can be cut."""
    with replacing(out) as partial:
        writer = GGUFWriter(os.fspath(partial / FILE), graph_of(files.spec))
        try:
            add_metadata(writer, files.spec, files.config, FILE_TYPES[deployment.format])
            add_general(writer, files.spec, **label)
            add_sampling(writer, text)
            add_tokenizer(writer, text, files.spec.vocabulary)
            _write_tensors(writer, files, deployment)
        finally:
            writer.close()
    return Artifact(path=out / FILE, size_bytes=(out / FILE).stat().st_size)


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

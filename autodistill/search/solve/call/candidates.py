"""GGUF files of the teacher's model that the user names, made by any tool. They are measured like solutions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from autodistill.distillation.teacher.stored_grids import of_gguf, stored_types
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import MemoryEstimate, memory
from autodistill.export.gguf_tokenizer import add_tokenizer
from autodistill.export.gguf_writing import add_metadata
from autodistill.hardware.budget import on_gpu
from autodistill.models.families import get_family
from autodistill.models.gguf_reader import GgufFile, read_gguf
from autodistill.models.spec import ModelSpec
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.utils.hashing import file_hash
from autodistill.utils.json_files import read_json

_ROPE_FACTORS = "rope_freqs.weight"
_OTHER_WEIGHTS = 0.5
"""Squared difference from the teacher's weights, as a share of their squares, above which a file is of another model.
Rounding to two bits gives about 0.1, unrelated weights give 2."""
_OTHER_TOKENS = 0.01  # share of differing tokens above which it is another tokenizer; tools respell some tokens
_MAY_DIFFER = ("context_length", "vocab_size")  # metadata of the shape that may differ from the teacher's
_GIVE = "give a GGUF file of the same model"
# Names the runtime of a file with types that AutoDistill does not write. Memory counts the file's own bytes.
_SERVED = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file of the teacher's model, and the types of the cache that it is served with.

    Attributes:
        file: Its header.
        stored: The deployment that stores each tensor as the file does, or None if AutoDistill does not write one of
            its types.
        cache_types: Types of the cache's keys and values.
    """

    file: GgufFile
    stored: Deployment | None
    cache_types: tuple[str, str] = ("f16", "f16")

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def name(self) -> str:
        """The file's name, with the types of the cache if they have fewer than 16 bits."""
        return self.file.path.name + self.deployment.name.removeprefix(self.with_cache(("f16", "f16")).deployment.name)

    @property
    def deployment(self) -> Deployment:
        """The runtime and the cache of the file. The types of its weights are right only if `stored` is known."""
        keys, values = self.cache_types
        return replace(self.stored or _SERVED, cache_type_k=keys, cache_type_v=values)

    @cached_property
    def key(self) -> str:
        """The key of its measurements: a hash of its bytes, and the cache."""
        return " ".join(("candidate", file_hash(self.path)[:16], *self.cache_types))

    def with_cache(self, cache_types: tuple[str, str]) -> Candidate:
        """Return the same file with another cache."""
        return replace(self, cache_types=cache_types)

    def memory(self, options: Options) -> MemoryEstimate:
        """Return the memory of the process, or of the GPU, with the file's own tensors."""
        budget, stored = options.budget, sum(tensor.size for tensor in self.file.tensors)
        load: Mapping[str, Any] = {"context": budget.context, "batch": budget.batch, "on_gpu": on_gpu(budget)}
        return memory(options.spec, self.deployment, weights=stored, **load)

    def fitting(self, options: Options) -> Candidate:
        """Return this candidate, or if only then it fits, the same with an 8-bit cache."""
        smaller = ("q8_0", "q8_0")
        if self.memory(options).total_bytes > options.budget.memory_bytes and smaller in options.caches:
            other = self.with_cache(smaller)
            if other.memory(options).total_bytes <= options.budget.memory_bytes:
                return other
        return self

    def weights(self, bench: Bench) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the file, dequantised in float32, under transformers' names.

        Raises:
            InputError: A block format cannot be read, weights are not numbers, or they are of another model.
        """
        family = get_family(bench.spec.architecture)
        moved, size = 0.0, 0.0
        for tensor in self.file.tensors:
            name = family.from_gguf_name(tensor.name)
            if tensor.name == _ROPE_FACTORS or name is None:
                continue
            read = self.file.values(tensor)
            values = torch.from_numpy(read if read.flags.writeable else read.copy()).to(bench.device)
            if values.ndim > 1:
                own = bench.master(name)
                moved += float((values - own).square().sum(dtype=torch.float64))
                size += float(own.square().sum(dtype=torch.float64))
            yield name, values
        if moved > _OTHER_WEIGHTS * size:
            raise InputError(f"{self.path} holds other weights than the teacher's: {_GIVE}")


def open_candidate(path: Path, spec: ModelSpec) -> Candidate:
    """Read the header of a file, which must have the teacher's shape.

    Raises:
        InputError: The file is damaged, not GGUF, or of another model.
    """
    file = read_gguf(path)
    family = get_family(spec.architecture)
    if file.architecture != family.gguf:
        raise InputError(f"{path} holds the architecture {file.architecture}, and the teacher {family.gguf}: {_GIVE}")
    wanted = {family.gguf_name(tensor.name): tensor.shape for tensor in spec.tensors}
    found = {tensor.name: tensor.shape for tensor in file.tensors if tensor.name != _ROPE_FACTORS}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            has, had = (list(one[name]) if name in one else "none" for one in (found, wanted))
            raise InputError(f"{path} has {has} for {name}, where the teacher has {had}: {_GIVE}")
    # If all tensors have 16 bits, no deployment is looked up.
    stored = of_gguf(file, spec) if stored_types(file, spec) else None
    return Candidate(file=file, stored=None if stored is None else stored.deployment)


def check_candidate(candidate: Candidate, folder: Path, spec: ModelSpec) -> None:
    """Compare a file's metadata of model and tokenizer with the metadata that would be written for the teacher.

    Raises:
        InputError: The file has another model or tokenizer.
    """
    writer = GGUFWriter(os.devnull, get_family(spec.architecture).gguf)
    add_metadata(writer, spec, read_json(folder / "config.json"), LlamaFileType.ALL_F32)
    add_tokenizer(writer, folder, spec.vocabulary)
    wanted = {key: value.value for part in writer.kv_data for key, value in part.items()}
    found = candidate.file.metadata
    for key, value in wanted.items():
        part = key.removeprefix(f"{writer.arch}.")
        if part == key or part in _MAY_DIFFER or key not in found:
            continue
        if not _alike(found[key], value):
            raise InputError(f"{candidate.path} has {key} {found[key]!r:.60}, where the teacher has {value}: {_GIVE}")
    _check_tokens(candidate.path, found, wanted)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-5)
    return type(one) is not type(other) or bool(one == other)  # one may list by layer what the other has as one number


def _check_tokens(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    prefix = "tokenizer.ggml."
    tokens, own = found.get(f"{prefix}tokens"), wanted[f"{prefix}tokens"]
    kinds = wanted[f"{prefix}token_type"]
    used = [place for place, kind in enumerate(kinds) if kind != TokenType.UNUSED]
    if not isinstance(tokens, list) or len(tokens) <= used[-1]:
        count = len(tokens) if isinstance(tokens, list) else 0
        raise InputError(f"{path} has {count:,} tokens, and the teacher's tokenizer {used[-1] + 1:,}: {_GIVE}")
    if (model := found.get(f"{prefix}model")) != wanted[f"{prefix}model"]:
        raise InputError(f"{path} has a tokenizer of the kind {model!r:.60}, and the teacher another: {_GIVE}")
    merges, others = found.get(f"{prefix}merges"), wanted.get(f"{prefix}merges")
    odd = [place for place in used if tokens[place] != own[place]]
    if len(odd) > _OTHER_TOKENS * len(used):
        raise InputError(
            f"{path} has another tokenizer: its token {odd[0]} is {tokens[odd[0]]!r:.40}, and the teacher's "
            f"{own[odd[0]]!r:.40}: {_GIVE}"
        )
    if merges and others and merges != others:
        raise InputError(f"{path} merges characters in another order than the teacher's tokenizer: {_GIVE}")

"""The formats of quantised weights, without torch: their grids, the runtimes that serve them, and bytes of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

from autodistill import plugins
from autodistill.errors import InputError
from autodistill.models.config import uniform
from autodistill.models.families import FAMILIES, WHOLE_FAMILIES
from autodistill.models.llama_cpp_graphs import cannot_run
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec, kinds_of
from autodistill.quantization.grids import (
    IQ4_NL,
    MXFP4,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Grid,
    Storage,
    integer_grid,
    integer_suffix,
)

CACHE_BYTES: Mapping[str, tuple[int, int]] = {"f16": (2, 1), "q8_0": (34, 32), "q4_0": (18, 32)}
"""Bytes of a block of keys or values, and the number of values in a block, by type of KV cache."""

Key: TypeAlias = tuple[int, int, bool]


def key_of(storage: Storage) -> Key:
    """Return bits, group size and whether a storage is symmetric: how a scheme picks one of a format's storages."""
    return (storage.bits, storage.group_size, storage.symmetric) if isinstance(storage, Grid) else (16, 0, True)


def _describe(keys: Iterable[Key]) -> str:
    """Describe keys in words. A format holds every combination of its keys' values."""
    bits, groups, symmetric = (list(dict.fromkeys(values)) for values in zip(*keys, strict=True))
    if bits == [16]:
        return "16 bits without groups"
    sizes = [str(size) for size in groups if size]
    cut = [f"in groups of {either(sizes)}"] if sizes else []
    if 0 in groups:
        cut.append("in whole rows")
    kinds = ["symmetric" if kind else "asymmetric" for kind in symmetric]
    return f"{either(map(str, bits))} bits {either(cut)}, {either(kinds)}"


def either(words: Iterable[str]) -> str:
    """Return words as a choice, like "a, b or c"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format for quantised weights, with the rule for how each tensor is stored.

    Attributes:
        name: Its name in strategies, deployments and on the command line.
        container: Name of the exporter that writes it: "gguf", "compressed-tensors", "huggingface" or a plug-in's.
        runtimes: The runtimes that serve it, the usual one first.
        linears: Possible storage of linear layers; a quantisation scheme chooses one.
        tables: Storage of the embedding table and an untied head; in a mixture, of the matrices that get more bits.
        mixture: Whether it is one of llama.cpp's mixtures of types, in which each tensor says whether it gets more bits
            (`TensorSpec.more_bits`). Those include attention values and last FFN matrices of some layers, but not an
            untied embedding table.
        kept: Storage of weights that a scheme keeps off its grid.
        vectors: Storage of norms and biases.
        norms_above_one: Storage of norms to which a model adds 1, or None if they are stored like other vectors.
        layer_widths: How it holds layers of different widths: "own" keeps each as it is; "padded" pads with zeros to
            the widest; "one" cannot hold them.
        dense_in: Runtimes that expand its grids to 16-bit weights while they serve it.
        written_by: By runtime that does not read its container, the exporter that writes it for that runtime.
        refuses: Function that returns why no scheme of it can hold a model of a given shape, or "".
    """

    name: str
    container: str
    runtimes: tuple[str, ...]
    linears: tuple[Storage, ...]
    tables: Storage
    kept: Literal["f16", "bf16"]
    vectors: Literal["f32", "bf16"]
    mixture: bool = False
    norms_above_one: Literal["f32_plus_1"] | None = None
    layer_widths: Literal["one", "padded", "own"] = "one"
    dense_in: tuple[str, ...] = ()
    written_by: Mapping[str, str] = field(default_factory=dict, hash=False)
    refuses: Callable[[ModelSpec], str] = lambda spec: ""

    def container_for(self, runtime: str) -> str:
        """Return the container for a runtime: its own, or another one that the runtime reads instead."""
        return self.written_by.get(runtime, self.container)

    def linear(self, bits: int, group_size: int, symmetric: bool) -> Storage:
        """Return how linear layers are stored under this choice.

        Raises:
            InputError: The format cannot hold this choice; the message lists what it can hold.
        """
        asked = (bits, group_size, symmetric)
        if asked not in self._held:
            raise InputError(f"{self.name} cannot hold {_describe([asked])}; it holds {_describe(self._held)}")
        return self._held[asked]

    @cached_property
    def _held(self) -> Mapping[Key, Storage]:
        return {key_of(storage): storage for storage in self.linears}


@dataclass(frozen=True, kw_only=True)
class _AsGiven(Format):
    """The format of a file that is served as it is: any bit width, and weights that are read in float32."""

    def linear(self, bits: int, group_size: int, symmetric: bool) -> Storage:
        """Return float32, whatever the file's types are: the weights that are known are dequantised already."""
        return self.tables


_GRAPHS = {"onnxruntime": "onnx"}


def _gguf(
    name: str,
    linears: Storage,
    tables: Storage,
    *,
    mixture: bool = False,
    kept: Literal["f16", "bf16"] = "f16",
) -> Format:
    return Format(
        name=name,
        container="gguf",
        runtimes=("llama.cpp", "onnxruntime"),
        linears=(linears,),
        tables=tables,
        kept=kept,
        vectors="f32",
        mixture=mixture,
        norms_above_one="f32_plus_1",
        layer_widths="own",
        written_by=_GRAPHS,
        refuses=_not_in_llama_cpp,
    )


def _not_in_llama_cpp(spec: ModelSpec) -> str:
    reason = cannot_run(spec)
    return f"GGUF cannot hold this {spec.architecture}: {reason}" if reason else ""


def _differs_in_kind(spec: ModelSpec) -> str:
    if spec.architecture not in WHOLE_FAMILIES:
        return ""
    return f"compressed-tensors is written of {', '.join(FAMILIES)} alone: store a {spec.architecture} as GGUF"


FORMATS: Mapping[str, Format] = {
    scheme.name: scheme
    for scheme in (
        _gguf("gguf-f16", "f16", "f16"),
        _gguf("gguf-bf16", "bf16", "bf16", kept="bf16"),
        _gguf("gguf-q8_0", Q8_0, Q8_0),
        # The table stays at 8 bits: a tied table is also the output head, and llama.cpp's own Q4_0 files keep it above
        # 4.
        *(_gguf(grid.name, grid, Q8_0) for grid in (Q5_1, Q5_0, Q4_1, IQ4_NL, Q4_0, MXFP4)),
        # One grid for all linear layers, whereas llama.cpp's types that end in _S, _M and _L mix several. The tables
        # have the type of the heads in llama.cpp's files.
        *(_gguf(grid.name, grid, Q6_K) for grid in (Q6_K, Q5_K, Q4_K, Q3_K, Q2_K)),
        # llama.cpp's _M types of these two use one other grid for all that gets more bits. Q3_K's uses two.
        *(_gguf(f"{grid.name}_m", grid, Q6_K, mixture=True) for grid in (Q5_K, Q4_K)),
        Format(
            name="compressed-tensors",
            container="compressed-tensors",
            runtimes=("vllm", "transformers"),
            linears=tuple(
                integer_grid(bits, group_size, symmetric)
                for bits in (8, 6, 4, 3, 2)
                for group_size in (32, 64, 128, 0)
                for symmetric in (True, False)
            ),
            tables="bf16",
            kept="bf16",
            vectors="bf16",
            layer_widths="padded",
            refuses=_differs_in_kind,
            # transformers decompresses the weights in its first forward pass.
            dense_in=("transformers",),
        ),
        Format(
            name="huggingface",
            container="huggingface",
            runtimes=("transformers", "vllm", "onnxruntime"),
            linears=("bf16",),
            tables="bf16",
            kept="bf16",
            vectors="bf16",
            layer_widths="padded",
            written_by=_GRAPHS,
        ),
    )
}
"""The formats of this project's own exporters, by name."""


AS_GIVEN = _AsGiven(
    name="gguf-file",
    container="gguf",
    runtimes=("llama.cpp",),
    linears=("f32",),
    tables="f32",
    kept="f16",
    vectors="f32",
    layer_widths="own",
    refuses=_not_in_llama_cpp,
)
"""A GGUF file that a user gave, as it is. It is not one of `FORMATS`: no space names it, nothing is packed in it."""


def formats_of(container: str) -> tuple[Format, ...]:
    """Return the formats of one of this project's own exporters."""
    return tuple(one for one in FORMATS.values() if one.container == container)


def all_formats() -> dict[str, Format]:
    """Return every format by name: this project's own first, then those of plug-ins' exporters.

    Raises:
        InputError: A plug-in cannot be imported, or its format has another container or a name that is taken.
    """
    found = dict(FORMATS)
    for container in plugins.foreign_names("exporters"):
        for one in plugins.load("exporters", container).formats:
            if one.container != container or one.name in (*found, AS_GIVEN.name):
                problem = f"the container {one.container!r}" if one.container != container else "a name that is taken"
                raise InputError(f"the exporter {container!r} gives its format {one.name!r} {problem}")
            found[one.name] = one
    return found


TYPES: Mapping[str, Storage] = {
    "f16": "f16",
    **{
        grid.name.removeprefix("gguf-"): grid
        for grid in (Q8_0, Q6_K, Q5_1, Q5_0, Q5_K, Q4_1, IQ4_NL, Q4_0, Q4_K, MXFP4, Q3_K, Q2_K)
    },
}
"""Possible storage of a single matrix of a GGUF file, by llama.cpp's names in small letters, the most bits first."""

INTEGER_TYPES: Mapping[str, Storage] = {
    "bf16": "bf16",
    **{
        integer_suffix(*key_of(grid)).removeprefix("-"): grid
        for grid in FORMATS["compressed-tensors"].linears
        if isinstance(grid, Grid)
    },
}
"""Possible storage of a linear layer in compressed-tensors, by names like "int4-g64-asym", the most bits first."""


def types_of(form: str) -> Mapping[str, Storage]:
    """Return the possible storage of single matrices of a format, by name; empty if the format has one type for all."""
    found: dict[str, Mapping[str, Storage]] = {"gguf": TYPES, "compressed-tensors": INTEGER_TYPES}
    return found.get(get_format(form).container, {})


def get_format(name: str) -> Format:
    """Look up a format by name, among plug-ins too if it is not this project's own.

    Raises:
        InputError: The format is unknown; the message lists the known ones.
    """
    if name == AS_GIVEN.name:
        return AS_GIVEN
    found = FORMATS if name in FORMATS else all_formats()
    if name not in found:
        raise InputError(f"there is no format {name!r}; the formats are {', '.join(found)}")
    return found[name]


class Storing(Protocol):
    """Protocol of a quantisation scheme: it decides how the tensors of a model are stored."""

    @property
    def format(self) -> str:
        """Name of its format."""

    @property
    def by_name(self) -> bool:
        """Whether tensors of one role and shape may be stored in different ways, by their names."""

    @property
    def known_bytes(self) -> int:
        """Bytes of all tensors if they are a file's own and do not follow from `storage`; otherwise 0."""

    def storage(self, tensor: TensorSpec) -> Storage:
        """Return how a tensor is stored."""


def as_held(spec: ModelSpec, scheme: Storing) -> ModelSpec:
    """Return the shape in which a scheme's format holds a model: layers may be padded to the widest."""
    return uniform(spec) if spec.ffn_widths and get_format(scheme.format).layer_widths == "padded" else spec


def tensor_bytes(tensor: TensorSpec, storage: Storage) -> int:
    """Return the bytes of one tensor as `pack` writes it, with scales and without padding."""
    count = math.prod(tensor.shape)
    if not isinstance(storage, Grid):
        return count * (4 if storage in ("f32", "f32_plus_1") else 2)
    rows, columns = tensor.shape
    groups = columns // storage.group(columns)
    if storage.container == "gguf":
        values = 1 if storage.symmetric else 2
        if storage.block_size:
            blocks = count // storage.block_size
            return count * storage.bits // 8 + values * (2 * blocks + rows * groups * storage.multiplier_bits // 8)
        return count * storage.bits // 8 + rows * groups * storage.scale_bytes * values
    zero_points = 0 if storage.symmetric else _words(rows, storage.bits) * groups
    return rows * (_words(columns, storage.bits) + 2 * groups) + zero_points + 16


def _words(codes: int, bits: int) -> int:
    """Return the bytes of a row of codes in whole 32-bit words."""
    return -(-codes * bits // 32) * 4


def weights_bytes(tensors: Iterable[TensorSpec], scheme: Storing) -> int:
    """Return the bytes that all tensors of a model take under a quantisation scheme, or in a file as it was given.

    Raises:
        InputError: As `scheme.QuantizationScheme.storage`.
    """
    return scheme.known_bytes or storage_bytes(tensors, scheme)


def storage_bytes(tensors: Iterable[TensorSpec], scheme: Storing) -> int:
    """Return the sum of the bytes of a model's tensors, each as `scheme.storage` says."""
    kinds = ((tensor, 1) for tensor in tensors) if scheme.by_name else kinds_of(tensors)
    return sum(count * tensor_bytes(tensor, scheme.storage(tensor)) for tensor, count in kinds)

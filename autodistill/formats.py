"""The one truth on packing, free of torch: each format's grids and bytes, and what each tensor is stored as.

A grid says how a group of weights becomes integer codes and a scale, precisely enough that codes and scales equal, bit
for bit, those of the format's own tools: `gguf.quants` (and so llama.cpp) and the `compressed-tensors` package. `codes`
does that arithmetic.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float32]


class Role(StrEnum):
    """What a tensor does in its model, as far as its storage depends on it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    LINEAR = "linear"
    NORM = "norm"
    NORM_ABOVE_ONE = "norm above one"  # its factors are its weights plus 1
    BIAS = "bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        name: transformers' name, like "model.layers.0.mlp.up_proj.weight".
        role: What it does. A tied table is stored once, as the embedding.
        shape: A linear is [out, in].
    """

    name: str
    role: Role
    shape: tuple[int, ...]


class Layout:
    """Names and roles of a family's tensors, and which of them are of one shape, whatever the shapes are.

    Attributes:
        entries: Name, role and index of the shape of each tensor.
        kinds: The first entry of each role and index, experts' apart, and how many are like it.
    """

    def __init__(self, entries: Iterable[tuple[str, Role, int]]) -> None:
        self.entries = tuple(entries)
        keys = [(role, index, is_expert(name)) for name, role, index in self.entries]
        first = dict(zip(reversed(keys), reversed(self.entries), strict=True))
        self.kinds = tuple((first[key], count) for key, count in Counter(keys).items())


class Tensors(Sequence[TensorSpec]):
    """The tensors of a layout in some shapes, which are made once somebody looks at one: most sums need kinds alone.

    Args:
        layout: What there is.
        shapes: By the layout's indices.
    """

    def __init__(self, layout: Layout, shapes: Sequence[tuple[int, ...]]) -> None:
        self._layout = layout
        self._shapes = tuple(shapes)

    @cached_property
    def _made(self) -> tuple[TensorSpec, ...]:
        shapes = self._shapes
        return tuple([TensorSpec(name=name, role=role, shape=shapes[i]) for name, role, i in self._layout.entries])

    @property
    def kinds(self) -> Iterator[tuple[TensorSpec, int]]:
        """One tensor of each role and index of a shape, and how many there are."""
        for (name, role, index), count in self._layout.kinds:
            yield TensorSpec(name=name, role=role, shape=self._shapes[index]), count

    @overload
    def __getitem__(self, index: int) -> TensorSpec: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorSpec, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorSpec | tuple[TensorSpec, ...]:
        return self._made[index]

    def __len__(self) -> int:
        return len(self._layout.entries)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self._made)

    def __eq__(self, other: object) -> bool:
        return tuple(other) == self._made if isinstance(other, Tensors | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._made)


def is_expert(name: str) -> bool:
    """Whether a tensor is one of a mixture's experts, of which a token takes some."""
    return ".experts." in name


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the consecutive weights of a row that make a group become integer codes, one scale and perhaps one offset.

    The scale is m / `divisor`, stored in `scale_dtype`; m is the group's largest magnitude ("absmax"), the first value
    that has it, with its sign ("signed_absmax"), or the largest weight less the smallest one ("range"). A symmetric
    grid has no offset. Else it is the smallest weight, stored as the scale is ("minimum"), or the code that 0 is read
    from ("zero_point"), for which 0 counts among the group's weights.

    Of a grid of super-blocks scales and minima lie on a second grid: each block has a unit in `scale_dtype` for its
    scales, and one for its minima, and each group small whole multiples of them. Its scales, of the rule
    "least_squares", are searched for (`super_blocks`); minima are at most 0, and stored without that sign.

    - "gguf": a code is the rounded product of weight (less its minimum) and 1/scale, in float32 and with scale and
      minimum *before* their rounding to `scale_dtype`; a weight is read as code * stored scale (+ stored minimum) in
      float32.
    - "compressed-tensors": a code is the rounded quotient of weight and *stored* scale in float32 (+ zero point), where
      a stored scale of 0 becomes bfloat16's epsilon; a weight is read as (code - zero point) * stored scale rounded to
      bfloat16. Quantising what was read again would move it (the largest weight lies half a step off the codes):
      weights are quantised once.

    Where scales are given and not derived (`Scales`), and in super-blocks, a code is in both the quotient by the stored
    scale (+ zero point), rounded with ties to the even neighbour.

    Attributes:
        name: Like "gguf-q4_0" or "compressed-tensors-int4-g64".
        container: The container whose arithmetic and layout it follows.
        bits: Width of a code.
        group_size: Weights that share a scale; 0 where a whole row does.
        qmin, qmax: The codes used; what rounds beyond them is clipped.
        scale_dtype: Of the stored scale.
        scale_rule, divisor: How the scale follows from the group.
        rounding: Where a tie goes under a scale that is derived: "half_up" (to the larger), "half_away" (from zero) or
            "half_even".
        offset: What is stored beside the scale.
        block_size: Weights of a super-block; 0 where each group's scale is stored by itself.
        multiplier_bits: Width of a scale, and of a minimum, in units of its super-block; those of a symmetric grid have
            a sign.
        cuts: By how many steps the least and the largest code are moved inwards from the ends of a group (of a
            symmetric grid from its largest magnitude, the second number alone) in each of the tries of
            "least_squares". Chosen greedily among some hundred by the squared error that the best of them leaves of
            normal weights, of Student's t with four degrees of freedom and of a trained model's; but for one of Q4_K
            and Q5_K, by which weights that lie on a grid of as many levels, or one fewer, stay where they are.
        fallback: The grid of a matrix whose rows the super-blocks do not divide; as llama.cpp chooses it, but that
            what it puts on IQ4_NL goes on Q4_0.
    """

    name: str
    container: Literal["gguf", "compressed-tensors"]
    bits: int
    group_size: int
    qmin: int
    qmax: int
    scale_dtype: Literal["f16", "bf16"]
    scale_rule: Literal["absmax", "signed_absmax", "range", "least_squares"]
    divisor: float
    rounding: Literal["half_up", "half_away", "half_even"]
    offset: Literal["none", "minimum", "zero_point"] = "none"
    block_size: int = 0
    multiplier_bits: int = 0
    cuts: tuple[tuple[float, float], ...] = ()
    fallback: Grid | None = None

    @property
    def symmetric(self) -> bool:
        """Whether 0 is read from the code 0."""
        return self.offset == "none"

    @property
    def levels(self) -> int:
        """Steps of the longer side of 0, or of the whole range where it is asymmetric: LSQ's Q_P."""
        return self.qmax if self.symmetric else self.qmax - self.qmin

    def group(self, columns: int) -> int:
        """Weights that share a scale in a row of `columns`."""
        return self.group_size or columns

    @property
    def groups_per_block(self) -> int:
        """Groups whose scales have a unit in common."""
        return self.block_size // self.group_size if self.block_size else 1

    @property
    def largest_multiplier(self) -> int:
        """Of units of a super-block."""
        return int(2 ** (self.multiplier_bits - self.symmetric)) - 1

    def divides(self, columns: int) -> bool:
        """Whether a row of so many weights can be cut into its groups and super-blocks."""
        return columns % (self.block_size or self.group(columns)) == 0


FloatType: TypeAlias = Literal["f32", "f32_plus_1", "f16", "bf16"]
"""How values are stored one by one; "f32_plus_1" is float32 of the value plus 1, which a runtime uses as it is."""

Storage: TypeAlias = Grid | FloatType


class Scales(NamedTuple):
    """What stands beside the codes of a matrix.

    Attributes:
        scales: float32 [out, groups], values of the grid's scale dtype, or multiples of them that a super-block holds.
        offsets: float32 [out, groups], minima or zero points; None on a symmetric grid.
    """

    scales: Floats
    offsets: Floats | None = None


def _gguf_grid(kind: str, bits: int, **rule: Any) -> Grid:
    return Grid(name=f"gguf-{kind}", container="gguf", bits=bits, group_size=32, scale_dtype="f16", **rule)


_SIGNED: Mapping[str, Any] = {"scale_rule": "signed_absmax", "rounding": "half_up"}
_MINIMUM: Mapping[str, Any] = {"scale_rule": "range", "rounding": "half_up", "offset": "minimum"}
Q4_0 = _gguf_grid("q4_0", 4, qmin=-8, qmax=7, divisor=-8.0, **_SIGNED)
Q4_1 = _gguf_grid("q4_1", 4, qmin=0, qmax=15, divisor=15.0, **_MINIMUM)
Q5_0 = _gguf_grid("q5_0", 5, qmin=-16, qmax=15, divisor=-16.0, **_SIGNED)
Q5_1 = _gguf_grid("q5_1", 5, qmin=0, qmax=31, divisor=31.0, **_MINIMUM)
Q8_0 = _gguf_grid("q8_0", 8, qmin=-127, qmax=127, divisor=127.0, scale_rule="absmax", rounding="half_away")


def _k_grid(kind: str, bits: int, group_size: int, multiplier_bits: int, fallback: Grid, **rule: Any) -> Grid:
    """One of llama.cpp's K-quants, symmetric where no offset is named."""
    lowest = -(2 ** (bits - 1)) if rule.get("offset", "none") == "none" else 0
    return Grid(
        name=f"gguf-{kind}",
        container="gguf",
        bits=bits,
        group_size=group_size,
        qmin=lowest,
        qmax=lowest + 2**bits - 1,
        scale_dtype="f16",
        scale_rule="least_squares",
        divisor=float(lowest or 2**bits - 1),
        rounding="half_even",
        block_size=256,
        multiplier_bits=multiplier_bits,
        fallback=fallback,
        **rule,
    )


def _cuts(fourth: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    return ((0.0, 0.2), (0.4, 0.0), (-0.2, 0.4), fourth, (0.3, 0.3))


def _one_code_fewer(divisor: int) -> tuple[float, float]:
    """The cut that gives codes from the least to the one before the largest: that of weights on such a grid already."""
    return (0.0, -divisor / (divisor - 1))


Q2_K = _k_grid("q2_k", 2, 16, 4, Q4_0, offset="minimum", cuts=_cuts((0.4, -0.2)))
Q3_K = _k_grid("q3_k", 3, 16, 6, Q4_0, cuts=((0, -0.125), (0, -0.625), (0, 0.75), (0, 0.25)))
Q4_K = _k_grid("q4_k", 4, 32, 6, Q5_0, offset="minimum", cuts=_cuts(_one_code_fewer(15)))
Q5_K = _k_grid("q5_k", 5, 32, 6, Q5_1, offset="minimum", cuts=_cuts(_one_code_fewer(31)))
Q6_K = _k_grid("q6_k", 6, 16, 8, Q8_0, cuts=((0, 0), (0, 1), (0, 2), (0, 3)))


def _integers(bits: int, group_size: int, symmetric: bool) -> Grid:
    # compressed-tensors' `calculate_qparams`: absmax / ((qmax - qmin) / 2), or the range / (qmax - qmin).
    levels = 2**bits
    return Grid(
        name=f"compressed-tensors{_suffix(bits, group_size, symmetric)}",
        container="compressed-tensors",
        bits=bits,
        group_size=group_size,
        qmin=-levels // 2,
        qmax=levels // 2 - 1,
        scale_dtype="bf16",
        scale_rule="absmax" if symmetric else "range",
        divisor=(levels - 1) / 2 if symmetric else levels - 1,
        rounding="half_even",
        offset="none" if symmetric else "zero_point",
    )


def _suffix(bits: int, group_size: int, symmetric: bool) -> str:
    return f"-int{bits}-{f'g{group_size}' if group_size else 'row'}{'' if symmetric else '-asym'}"


_Key: TypeAlias = tuple[int, int, bool]


def _key(storage: Storage) -> _Key:
    return (storage.bits, storage.group_size, storage.symmetric) if isinstance(storage, Grid) else (16, 0, True)


def _describe(keys: Iterable[_Key]) -> str:
    """The keys in words; a format holds every combination of the values that it holds."""
    bits, groups, symmetric = (list(dict.fromkeys(values)) for values in zip(*keys, strict=True))
    if bits == [16]:
        return "16 bits without groups"
    sizes = [str(size) for size in groups if size]
    cut = [f"in groups of {_either(sizes)}"] if sizes else []
    if 0 in groups:
        cut.append("in whole rows")
    kinds = ["symmetric" if kind else "asymmetric" for kind in symmetric]
    return f"{_either(map(str, bits))} bits {_either(cut)}, {_either(kinds)}"


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to pack a model, and the rule that says what each of its tensors is stored as.

    Attributes:
        name: Its name in strategies, deployments and on the command line.
        container: "gguf", "compressed-tensors" or "huggingface".
        runtimes: The engines that serve it, the usual one first.
        linears: What the weights of linear layers may be stored as; a packing picks one.
        tables: What the embedding and an untied head are stored as.
        kept: What weights are stored as that a packing keeps off its grid.
        vectors: What norms and biases are stored as.
    """

    name: str
    container: Literal["gguf", "compressed-tensors", "huggingface"]
    runtimes: tuple[str, ...]
    linears: tuple[Storage, ...]
    tables: Storage
    kept: Literal["f16", "bf16"]
    vectors: Literal["f32", "bf16"]

    def linear(self, bits: int, group_size: int, symmetric: bool) -> Storage:
        """What linear layers are stored as at this choice.

        Raises:
            InputError: It cannot hold that; the message lists what it can.
        """
        asked = (bits, group_size, symmetric)
        if asked not in self._held:
            raise InputError(f"{self.name} cannot hold {_describe([asked])}; it holds {_describe(self._held)}")
        return self._held[asked]

    @cached_property
    def _held(self) -> Mapping[_Key, Storage]:
        return {_key(storage): storage for storage in self.linears}


_KEEP = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the weights of a model are stored: a format, one of the grids that it holds, and what stays off the grid.

    Attributes:
        format: Name of a format.
        bits: Bit-width of the linear layers; 16 where they are not quantised.
        group_size: Weights of a row that share a scale; 0 where the whole row does, or nothing is quantised.
        symmetric: Whether a group has a scale alone, and no offset.
        keep: What stays in 16 bits (mixed precision): "attention", "embeddings", "head", or part of a weight's dotted
            name in transformers, like "layers.0", "down_proj" or "layers.0.mlp.down_proj". In alphabetical order.
    """

    format: str
    bits: int
    group_size: int
    symmetric: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        linear = get_format(self.format).linear(self.bits, self.group_size, self.symmetric)
        if self.keep and not isinstance(linear, Grid):
            raise InputError(f"{self.format} holds all weights in 16 bits: leave keep out")
        for part in self.keep:
            if not _KEEP.fullmatch(part):
                raise InputError(
                    f"keep holds {part!r}: it can be attention, embeddings, head, or part of a weight's name such as "
                    "layers.0 or mlp.down_proj"
                )
        object.__setattr__(self, "keep", tuple(sorted(set(self.keep))))

    @property
    def packing(self) -> Packing:
        """The fields of this class alone, whatever else the object says: equal where weights are stored equally."""
        return Packing(**{field.name: getattr(self, field.name) for field in fields(Packing)})

    @property
    def container(self) -> str:
        """The container of its format."""
        return get_format(self.format).container

    @property
    def name(self) -> str:
        """Short readable name, like "gguf-q4_0", "compressed-tensors-int4-g64-asym" or "gguf-q4_0+attention"."""
        choices = len(get_format(self.format).linears)
        suffix = _suffix(self.bits, self.group_size, self.symmetric) if choices > 1 else ""
        return "+".join([self.format + suffix, *self.keep])

    def storage(self, tensor: TensorSpec) -> Storage:
        """What `tensor` is stored as: where super-blocks do not divide its rows, on the grid that stands in for theirs.

        Raises:
            InputError: The tensor cannot be cut into the groups.
        """
        held = get_format(self.format)
        if tensor.role is Role.NORM_ABOVE_ONE and held.container == "gguf":
            return "f32_plus_1"
        if tensor.role in (Role.NORM, Role.NORM_ABOVE_ONE, Role.BIAS):
            return held.vectors
        if any(_is_part(part, tensor) for part in self.keep):
            return held.kept
        storage = held.tables
        if tensor.role is Role.LINEAR:
            storage = held.linear(self.bits, self.group_size, self.symmetric)
        if isinstance(storage, Grid) and storage.fallback and not storage.divides(tensor.shape[-1]):
            # Where that does not divide them either, the grid that was asked for is named.
            storage = storage.fallback if storage.fallback.divides(tensor.shape[-1]) else storage
        check_tensor(tensor, storage)
        return storage

    def check_model(self, tensors: Iterable[TensorSpec]) -> None:
        """Refuses a model that cannot be packed so.

        Raises:
            InputError: A tensor that cannot be cut into the groups, a part to keep that would be on no grid, or linear
                layers of which none can be cut into the format's super-blocks.
        """
        storages = {tensor: self.storage(tensor) for tensor in tensors}
        linear = get_format(self.format).linear(self.bits, self.group_size, self.symmetric)
        if isinstance(linear, Grid) and linear.fallback:
            self._check_blocks(linear, storages)
        if not self.keep:
            return
        if not any(isinstance(storage, Grid) for storage in storages.values()):
            raise InputError(f"keep leaves no weight on the grid of {self.format}: name fewer parts")
        plain = replace(self, keep=())
        gridded = [tensor for tensor in storages if isinstance(plain.storage(tensor), Grid)]
        unused = [part for part in self.keep if not any(_is_part(part, tensor) for tensor in gridded)]
        if unused:
            raise InputError(
                f"keep names {', '.join(unused)}, but no weight of this model that {self.format} would quantise "
                "is called so: leave it out (a tied head is the embeddings)"
            )

    def _check_blocks(self, grid: Grid, storages: Mapping[TensorSpec, Storage]) -> None:
        """Refuses linear layers of which none is on a grid of super-blocks, but some on what stands in for it."""
        linear = {tensor: storage for tensor, storage in storages.items() if tensor.role is Role.LINEAR}
        if grid.fallback not in linear.values() or grid in linear.values():
            return
        assert grid.fallback is not None
        if any(grid.divides(tensor.shape[-1]) for tensor in linear):
            raise InputError(f"keep leaves no linear layer on the grid of {grid.name}: name fewer parts")
        raise InputError(
            f"rows in {grid.name} are of whole blocks of {grid.block_size} weights, and those of none of this model's "
            f"linear layers are: all would be stored as {grid.fallback.name}, so choose that format"
        )


_ROLES = {"embeddings": Role.EMBEDDING, "head": Role.HEAD}


def _is_part(part: str, tensor: TensorSpec) -> bool:
    if part in _ROLES:
        return tensor.role is _ROLES[part]
    names = ("self_attn", "attention") if part == "attention" else (part,)
    return any(f".{name}." in f".{tensor.name}." for name in names)


def check_tensor(tensor: TensorSpec, storage: Storage) -> None:
    """Refuses a tensor whose rows the grid's groups do not divide, so that training it is never begun.

    Raises:
        InputError: Not two-dimensional, or a row that is no multiple of the group or super-block.
    """
    if not isinstance(storage, Grid):
        return
    if len(tensor.shape) != 2:
        raise InputError(f"{tensor.name} of shape {list(tensor.shape)} is no matrix: {storage.name} cannot hold it")
    if not storage.divides(tensor.shape[1]):
        cut = f"blocks of {storage.block_size}" if storage.block_size else f"groups of {storage.group_size}"
        instead = storage.fallback and f", nor the groups of {storage.fallback.group_size} that stand in for them,"
        raise InputError(
            f"{tensor.name} has rows of {tensor.shape[1]} weights, which the {cut} of {storage.name}{instead or ''} do "
            f"not divide: choose {'' if instead else 'a smaller group, or '}a format without groups"
        )


def _gguf(name: str, linears: Storage, tables: Storage) -> Format:
    return Format(
        name=name,
        container="gguf",
        runtimes=("llama.cpp",),
        linears=(linears,),
        tables=tables,
        kept="f16",
        vectors="f32",
    )


FORMATS: Mapping[str, Format] = {
    packing.name: packing
    for packing in (
        _gguf("gguf-f16", "f16", "f16"),
        _gguf("gguf-q8_0", Q8_0, Q8_0),
        # The table stays at 8 bits: tied, it is also the output head, and llama.cpp's own Q4_0 files keep it above 4.
        *(_gguf(grid.name, grid, Q8_0) for grid in (Q5_1, Q5_0, Q4_1, Q4_0)),
        # One grid for all linear layers, where llama.cpp's types that end in _S, _M and _L mix some; the tables as the
        # heads of its files.
        *(_gguf(grid.name, grid, Q6_K) for grid in (Q6_K, Q5_K, Q4_K, Q3_K, Q2_K)),
        Format(
            name="compressed-tensors",
            container="compressed-tensors",
            runtimes=("vllm", "transformers"),
            linears=tuple(
                _integers(bits, group_size, symmetric)
                for bits in (8, 6, 4, 3, 2)
                for group_size in (32, 64, 128, 0)
                for symmetric in (True, False)
            ),
            tables="bf16",
            kept="bf16",
            vectors="bf16",
        ),
        Format(
            name="huggingface",
            container="huggingface",
            runtimes=("transformers", "vllm"),
            linears=("bf16",),
            tables="bf16",
            kept="bf16",
            vectors="bf16",
        ),
    )
}


def get_format(name: str) -> Format:
    """Looks a format up by name.

    Raises:
        InputError: Unknown; the message lists the known ones.
    """
    if name not in FORMATS:
        raise InputError(f"there is no format {name!r}; the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def tensor_bytes(tensor: TensorSpec, storage: Storage) -> int:
    """Bytes that one tensor takes, scales included: what `pack` writes, no padding."""
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
        return count * storage.bits // 8 + rows * groups * 2 * values
    zero_points = 0 if storage.symmetric else _words(rows, storage.bits) * groups
    return rows * (_words(columns, storage.bits) + 2 * groups) + zero_points + 16


def _words(codes: int, bits: int) -> int:
    """Bytes of a row of codes in whole words of 32 bits."""
    return -(-codes * bits // 32) * 4


def weights_bytes(tensors: Iterable[TensorSpec], packing: Packing) -> int:
    """Bytes that all of a model's tensors take in a packing.

    Raises:
        InputError: As `Packing.storage`.
    """
    return sum(tensor_bytes(tensor, packing.storage(tensor)) for tensor in tensors)

"""The tensors of a model, as far as storage depends on them: names, roles, shapes, and which of them get more bits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple, overload


class Role(StrEnum):
    """What a tensor does in its model, as far as storage depends on it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    LINEAR = "linear"
    NORM = "norm"
    NORM_ABOVE_ONE = "norm above one"  # the factors are the weights plus 1
    BIAS = "bias"


_LAYER = re.compile(r"\.layers\.(\d+)\.|\.h\.(\d+)\.")
_TABLES = {Role.EMBEDDING: "embeddings", Role.HEAD: "head"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        name: transformers' name, like "model.layers.0.mlp.up_proj.weight".
        role: What the tensor does. A tied table is stored once, as the embedding.
        shape: Sizes; [out, in] for a linear layer.
        more_bits: Whether llama.cpp's mixtures of types store this matrix in more bits than most.
        run: If a file holds the columns in another order than transformers, the number of columns that stay together; 0
            if the order is the same.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    more_bits: bool = False
    run: int = 0

    @property
    def together(self) -> int:
        """The columns that the blocks and groups of a grid must divide: a row, or less if a file reorders columns."""
        return self.run or self.shape[-1]


def block_of(tensor: TensorSpec) -> str:
    """Return the number of the layer that a tensor belongs to, or else "embeddings", "head" or "the rest"."""
    found = _LAYER.search(tensor.name)
    return next(filter(None, found.groups())) if found else _TABLES.get(tensor.role, "the rest")


class Entry(NamedTuple):
    """The entry of a layout for one tensor: the fields of `TensorSpec`, with an index into the shapes."""

    name: str
    role: Role
    more_bits: bool
    shape: int


class Layout:
    """Names and roles of a family's tensors, and which of them have the same shape, whatever the shapes are.

    Attributes:
        entries: The entry of each tensor.
        kinds: The first entry of each group that differs only in names, with the size of the group. Experts' tensors
            are never grouped with others.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        keys = [(*entry[1:], is_expert(entry.name)) for entry in self.entries]
        first = dict(zip(reversed(keys), reversed(self.entries), strict=True))
        self.kinds = tuple((first[key], count) for key, count in Counter(keys).items())
        self._ending: dict[str, tuple[Entry, ...]] = {}

    def ending(self, suffix: str) -> tuple[Entry, ...]:
        """Return the entries whose names end so, which are looked for once."""
        if suffix not in self._ending:
            self._ending[suffix] = tuple(entry for entry in self.entries if entry.name.endswith(suffix))
        return self._ending[suffix]

    @cached_property
    def by_role(self) -> Mapping[Role, tuple[Entry, ...]]:
        """The entries of each role that there are."""
        found: dict[Role, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.role, []).append(entry)
        return {role: tuple(entries) for role, entries in found.items()}


class Tensors(Sequence[TensorSpec]):
    """The tensors of a layout for given shapes, made only on access: most computations need `kinds` only.

    Args:
        layout: The names, roles and groups of the tensors.
        shapes: The shapes, by the layout's indices.
    """

    def __init__(self, layout: Layout, shapes: Sequence[tuple[int, ...]]) -> None:
        self._layout = layout
        self._shapes = tuple(shapes)

    @cached_property
    def _made(self) -> tuple[TensorSpec, ...]:
        return tuple(map(self._tensor, self._layout.entries))

    @property
    def kinds(self) -> Iterator[tuple[TensorSpec, int]]:
        """Yield one tensor of each group that differs only in names, with the size of the group."""
        for entry, count in self._layout.kinds:
            yield self._tensor(entry), count

    def ending(self, suffix: str) -> list[TensorSpec]:
        """Return the tensors whose names end so."""
        return list(map(self._tensor, self._layout.ending(suffix)))

    def of_role(self, role: Role) -> list[TensorSpec]:
        """Return the tensors of a role."""
        return list(map(self._tensor, self._layout.by_role.get(role, ())))

    def _tensor(self, entry: Entry) -> TensorSpec:
        name, role, more_bits, shape = entry
        return TensorSpec(name=name, role=role, shape=self._shapes[shape], more_bits=more_bits)

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
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._made)


def kinds_of(tensors: Iterable[TensorSpec]) -> Iterable[tuple[TensorSpec, int]]:
    """Return one tensor of each group that differs only in names, with its size; tensors in a list stay alone."""
    return tensors.kinds if isinstance(tensors, Tensors) else ((tensor, 1) for tensor in tensors)


def tensors_ending(tensors: Sequence[TensorSpec], suffix: str) -> list[TensorSpec]:
    """Return the tensors whose names end so."""
    if isinstance(tensors, Tensors):
        return tensors.ending(suffix)
    return [tensor for tensor in tensors if tensor.name.endswith(suffix)]


def tensors_of(tensors: Sequence[TensorSpec], role: Role) -> list[TensorSpec]:
    """Return the tensors of a role."""
    if isinstance(tensors, Tensors):
        return tensors.of_role(role)
    return [tensor for tensor in tensors if tensor.role is role]


def is_expert(name: str) -> bool:
    """Return whether a tensor belongs to a mixture's experts, from which each token uses a few."""
    return ".experts." in name


def stacked(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a `TensorSpec` gives a parameter: the matrices of experts form one, stacked by rows."""
    return (math.prod(shape[:-1]), shape[-1]) if is_expert(name) else tuple(shape)


def takes_more_bits(layer: int, layers: int) -> bool:
    """Return whether llama.cpp's mixtures of types use more bits in a layer.

    They do in the first and last eighth of the layers, and in every third layer between. The rule is
    `use_more_bits` in its `llama-quant.cpp`, with integer divisions.
    """
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2

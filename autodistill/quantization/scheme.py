"""Quantisation schemes: a format, one of its grids, and the storage of single parts of a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Literal

from autodistill.errors import InputError
from autodistill.models.tensors import Role, TensorSpec, kinds_of
from autodistill.quantization.formats import FORMATS, INTEGER_TYPES, TYPES, either, get_format, key_of, types_of
from autodistill.quantization.grids import (
    Grid,
    Storage,
    check_tensor,
    integer_suffix,
)
from autodistill.utils.hashing import content_hash
from autodistill.utils.plain_dataclass import left_out

_KEEP = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


@dataclass(frozen=True, kw_only=True)
class QuantizationScheme:
    """A quantisation scheme: a format, one of its grids, and the parts that stay off the grid.

    Attributes:
        format: Name of a format.
        bits: Bit width of the linear layers; 16 if they are not quantised.
        group_size: Number of weights in a row that share a scale; 0 if the whole row does, or nothing is quantised.
        symmetric: Whether a group has only a scale, and no offset.
        keep: What stays in 16 bits (mixed precision): "attention", "embeddings", "head", or part of a weight's dotted
            name in transformers, like "layers.0", "down_proj" or "layers.0.mlp.down_proj". In alphabetical order.
        types: Types of single matrices, which override the format. Each is a pair of a part of the model, as in `keep`,
            and a name of the container's types. These are `TYPES` for GGUF and, for linear layers only, `INTEGER_TYPES`
            for compressed-tensors. If several parts match a weight, the one with the most dotted names decides. In
            alphabetical order.
    """

    format: str
    bits: int
    group_size: int
    symmetric: bool = True
    keep: tuple[str, ...] = ()
    types: tuple[tuple[str, str], ...] = left_out((), mapping=True)

    def __post_init__(self) -> None:
        linear = self.linear  # raises if the format cannot hold it
        self._check_types()
        if self.keep and not isinstance(linear, Grid):
            raise InputError(f"{self.format} holds all weights in 16 bits: leave keep out")
        for part in self.keep:
            if not _KEEP.fullmatch(part):
                raise InputError(
                    f"keep holds {part!r}: it can be attention, embeddings, head, or part of a weight's name such as "
                    "layers.0 or mlp.down_proj"
                )
        object.__setattr__(self, "keep", tuple(sorted(set(self.keep))))
        object.__setattr__(self, "types", tuple(sorted(self.types)))

    def _check_types(self) -> None:
        if not self.types:
            return
        known = types_of(self.format)
        if not known:
            raise InputError(
                f"types can be set in GGUF and compressed-tensors only, and {self.format} has one type for all "
                "weights: leave types out"
            )
        if self.keep:
            raise InputError(
                "keep and types both say how single weights are stored: write what is kept as "
                f"{get_format(self.format).kept} in types"
            )
        for part, kind in self.types:
            if not _KEEP.fullmatch(part):
                raise InputError(
                    f"types has {part!r}: it can be attention, embeddings, head, or part of a weight's name such as "
                    "layers.0 or mlp.down_proj"
                )
            if kind not in known:
                raise InputError(f"types has {part} as {kind!r}; a type can be {', '.join(known)}")
        if len(dict(self.types)) < len(self.types):
            raise InputError("types names a part of the model twice: name each once")

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The distinct grids that linear layers may be on: the scheme's own, and those that `types` name."""
        known = types_of(self.format) if self.types else {}
        named = [self.linear, *(known[kind] for _, kind in self.types)]
        return tuple(dict.fromkeys(grid for grid in named if isinstance(grid, Grid)))

    @property
    def by_name(self) -> bool:
        """Whether tensors of one role and shape may be stored in different ways, by their names."""
        return bool(self.keep or self.types)

    @property
    def known_bytes(self) -> int:
        """See `Storing`."""
        return 0

    @property
    def scheme(self) -> QuantizationScheme:
        """The fields of this class only, even if `self` is of a subclass: equal if weights are stored equally."""
        return QuantizationScheme(**{field.name: getattr(self, field.name) for field in fields(QuantizationScheme)})

    @property
    def linear(self) -> Storage:
        """Storage of linear layers; in a mixture of types, of those that do not get more bits.

        Raises:
            InputError: The format cannot hold this choice.
        """
        return get_format(self.format).linear(self.bits, self.group_size, self.symmetric)

    @property
    def container(self) -> str:
        """The container of the format."""
        return get_format(self.format).container

    @property
    def name(self) -> str:
        """Short readable name, like "gguf-q4_0", "compressed-tensors-int4-g64-asym" or "gguf-q4_0+attention".

        Types of at most two parts are named, as in "gguf-q4_1+embeddings-q5_0". If there are more, a hash stands for
        them.
        """
        choices = len(get_format(self.format).linears)
        suffix = integer_suffix(self.bits, self.group_size, self.symmetric) if choices > 1 else ""
        named = [f"{part}-{kind}" for part, kind in self.types]
        if len(named) > _NAMED_TYPES:
            named = [f"types-{content_hash(list(map(list, self.types)), 8)}"]
        return "+".join([self.format + suffix, *self.keep, *named])

    def storage(self, tensor: TensorSpec) -> Storage:
        """Return how `tensor` is stored. If super-blocks do not divide its rows, this is the fallback grid.

        Raises:
            InputError: The groups do not divide the tensor's rows.
        """
        held = get_format(self.format)
        if tensor.role is Role.NORM_ABOVE_ONE and held.norms_above_one:
            return held.norms_above_one
        if tensor.role in (Role.NORM, Role.NORM_ABOVE_ONE, Role.BIAS):
            return held.vectors
        if self.keep and any(_is_part(part, tensor) for part in self.keep):
            return held.kept
        if (own := self._own_type(tensor)) is not None:
            stored = types_of(self.format)[own]
            if tensor.role is not Role.LINEAR and stored != held.tables and held.container != "gguf":
                raise InputError(
                    f"types has {tensor.name} as {own}, and {self.format} holds tables in 16 bits: name linear layers"
                )
            check_tensor(tensor, stored)
            return stored
        table = tensor.more_bits if held.mixture else tensor.role is not Role.LINEAR
        if (place := (table, tensor.shape, tensor.run)) not in self._places:
            self._places[place] = self._on_own_grid(tensor, held.tables if table else self.linear)
        return self._places[place]

    @cached_property
    def _places(self) -> dict[tuple[bool, tuple[int, ...], int], Storage]:
        """Cache of `storage`, which is called often, for tables and other matrices without a type of their own."""
        return {}

    @staticmethod
    def _on_own_grid(tensor: TensorSpec, storage: Storage) -> Storage:
        if isinstance(storage, Grid) and storage.fallback and not storage.divides(tensor.together):
            # If the fallback does not divide the rows either, the error names the grid that was asked for.
            storage = storage.fallback if storage.fallback.divides(tensor.together) else storage
        check_tensor(tensor, storage)
        return storage

    def _own_type(self, tensor: TensorSpec) -> str | None:
        """Return the name of the type that `types` gives a matrix, or None if it gives none."""
        if not self.types:
            return None
        found: dict[int, dict[str, str]] = {}
        for part, size in _parts_of(tensor):
            if part in self._types:
                found.setdefault(size, {})[part] = self._types[part]
        if not found:
            return None
        most = found[max(found)]
        if len(set(most.values())) > 1:
            raise InputError(
                f"types gives {tensor.name} two types, by {' and by '.join(sorted(most))}: name it in full"
            )
        return next(iter(most.values()))

    @cached_property
    def _types(self) -> Mapping[str, str]:
        return dict(self.types)

    def grids_of(self, tensors: Iterable[TensorSpec]) -> dict[str, Grid]:
        """Return the grid of each tensor that is stored on one, by the tensor's name."""
        storages = {tensor.name: self.storage(tensor) for tensor in tensors}
        return {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}

    def check_model(self, tensors: Iterable[TensorSpec]) -> None:
        """Refuse a model that cannot be stored under this scheme.

        Raises:
            InputError: The groups do not divide a tensor's rows, a part in `keep` is on no grid anyway, `types` names a
                part that the model does not have, or the format's super-blocks divide no linear layer.
        """
        asked = tensors if self.by_name else (tensor for tensor, _ in kinds_of(tensors))
        storages = {tensor: self.storage(tensor) for tensor in asked}
        matrices = [tensor for tensor in storages if tensor.role in (Role.LINEAR, Role.EMBEDDING, Role.HEAD)]
        known = {part for tensor in matrices for part, _ in _parts_of(tensor)} if self.types else ()
        if absent := [part for part, _ in self.types if part not in known]:
            raise InputError(
                f"types names {', '.join(absent)}, but no matrix of this model is called so: leave it out (a tied head "
                "is the embeddings)"
            )
        if isinstance(self.linear, Grid) and self.linear.fallback:
            self._check_blocks(self.linear, storages)
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
        """Refuse a model that has no linear layer on the super-block grid and some on its fallback."""
        linear = {tensor: storage for tensor, storage in storages.items() if tensor.role is Role.LINEAR}
        grids = {storage for storage in linear.values() if isinstance(storage, Grid)}
        if not grids or any(one.block_size for one in grids):
            return
        if any(grid.divides(tensor.together) for tensor in linear):
            raise InputError(f"keep leaves no linear layer on the grid of {grid.name}: name fewer parts")
        raise InputError(
            f"rows in {grid.name} are of whole blocks of {grid.block_size} weights, and those of none of this model's "
            f"linear layers are: all would be stored as {either(sorted(one.name for one in grids))}, so choose "
            f"{'that format' if len(grids) == 1 else 'one of these'}"
        )


_NAMED_TYPES = 2  # most types that a scheme's name spells out


@lru_cache(maxsize=2**14)
def _parts_of(tensor: TensorSpec) -> tuple[tuple[str, int], ...]:
    """Return each part that a matrix belongs to, with the number of its dotted names; 0 for words like "attention"."""
    words = [word for word, role in _ROLES.items() if role is tensor.role]
    if _is_part("attention", tensor):
        words.append("attention")
    names = tensor.name.removesuffix(".weight").split(".")
    spans = [(first, last) for first in range(len(names)) for last in range(first + 1, len(names) + 1)]
    parts = {".".join(names[first:last]): last - first for first, last in spans}
    return (*((word, 0) for word in words), *((part, size) for part, size in parts.items() if part not in words))


_ROLES = {"embeddings": Role.EMBEDDING, "head": Role.HEAD}


def _is_part(part: str, tensor: TensorSpec) -> bool:
    if part in _ROLES:
        return tensor.role is _ROLES[part]
    names = ("self_attn", "attention") if part == "attention" else (part,)
    return any(f".{name}." in f".{tensor.name}." for name in names)


_IN_A_LAYER = re.compile(r"\.\d+\.(.+?)(?:\.weight)?$")


@lru_cache(maxsize=2**14)
def _part_of_a_layer(name: str) -> str | None:
    """Return what follows the layer's number in a tensor's name, or None outside layers."""
    found = _IN_A_LAYER.search(name)
    return found[1] if found else None


def scheme_by_tensor(
    types: Mapping[TensorSpec, str], container: Literal["gguf", "compressed-tensors"] = "gguf"
) -> QuantizationScheme:
    """Return the shortest scheme that stores each matrix of a model as the given type.

    The scheme's own grid is the type that holds the most weights of linear layers. A part that is alike in all layers
    is named once.

    Args:
        types: The type of every matrix of a model: a name of `TYPES`, or of `INTEGER_TYPES` for compressed-tensors.
        container: The container whose types these are.

    Raises:
        InputError: The groups of a type do not divide the rows of its matrix; or the container is compressed-tensors
            and no linear layer is on a grid, which is the format "huggingface".
    """
    known = TYPES if container == "gguf" else INTEGER_TYPES
    weights: Counter[str] = Counter()
    for tensor, kind in types.items():
        check_tensor(tensor, known[kind])
        # A scheme of compressed-tensors must have a grid, so "bf16" cannot be its own type.
        counted = tensor.role is Role.LINEAR and (container == "gguf" or isinstance(known[kind], Grid))
        weights[kind] += math.prod(tensor.shape) if counted else 0
    most = max(weights, key=lambda kind: weights[kind])
    if not weights[most]:
        raise InputError("no linear layer is on a grid: choose huggingface, which holds all in 16 bits")
    form = FORMATS[f"gguf-{most}" if container == "gguf" else container]
    bits, group_size, symmetric = key_of(known[most])
    plain = QuantizationScheme(format=form.name, bits=bits, group_size=group_size, symmetric=symmetric)
    named: dict[str, str] = {}
    alike: dict[str, set[str]] = {}
    for tensor, kind in types.items():
        if part := _part_of_a_layer(tensor.name):
            alike.setdefault(part, set()).add(kind)
    for tensor, kind in types.items():
        if _stores(plain, tensor, kind):
            continue
        words = [word for word, role in _ROLES.items() if role is tensor.role]
        part = _part_of_a_layer(tensor.name)
        if part and len(alike[part]) == 1:
            words = [part]
        named[words[0] if words else tensor.name.partition(".")[2].removesuffix(".weight")] = kind
    return replace(plain, types=tuple(named.items()))


def _stores(scheme: QuantizationScheme, tensor: TensorSpec, kind: str) -> bool:
    try:
        return scheme.storage(tensor) == types_of(scheme.format)[kind]
    except InputError:  # the scheme's groups do not divide the rows
        return False

"""Check of a model's safetensors files against the tensors that its config requires; only headers are read.

transformers gives random values to missing tensors, and ignores those that it does not know.
"""

from __future__ import annotations

import json
import re
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from autodistill.errors import InputError
from autodistill.models.families import names_of
from autodistill.models.model_folder import HeldType, shards, weight_files
from autodistill.models.spec import ModelSpec
from autodistill.models.whole.mixtures import stored_parts

_FLOATS = ("F32", "F16", "BF16", "F64")
_HEAD = "lm_head.weight"
# Constants that older versions of transformers saved with a model, and that transformers computes itself. And layers of
# Qwen3.5 that predict further tokens, which transformers leaves out.
_LEFT_OUT = re.compile(r".*\.rotary_emb\.inv_freq|gpt_neox\.layers\.\d+\.attention\.(masked_)?bias|mtp\..+")
_NAMED = 3  # most tensors that a message names
_COMPARED = 2**24  # bytes compared at once


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        path: The file.
        name: Name in the file.
        shape: Its sizes.
        dtype: The format's name of its type, like "BF16".
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a model's folder by its name in the file; empty for a folder without weights.

    Raises:
        InputError: A file is truncated, damaged or unreadable, two files have the same tensor, or a tensor is not where
            the index says.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for tensor in _header(path):
            if tensor.name in found:
                other = found[tensor.name].path.name
                raise InputError(f"{folder} has {tensor.name} twice, in {other} and {path.name}: get the folder again")
            found[tensor.name] = tensor
    files = {tensor.path for tensor in found.values()}
    for name, file in (shards(folder) or {}).items():
        if folder / file in files and (name not in found or found[name].path.name != file):
            raise InputError(f"{folder / file} lacks {name}, which the folder's index has there: get the folder again")
    return found


def _header(path: Path) -> list[Stored]:
    """Return the tensors of one file; the safetensors library checks that each lies in the file and none overlap."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no file: get the file again")
        with safe_open(path, framework="numpy") as file:
            parts = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - the file is no mapping
            tensors = [
                Stored(path=path, name=name, shape=tuple(part.get_shape()), dtype=part.get_dtype())
                for name, part in parts
            ]
        repeated = _repeated(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        said = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
        raise InputError(f"{path} is truncated or damaged ({said[:160]}): get the file again") from error
    if repeated is not None:
        raise InputError(f"{path} is damaged: its header has {repeated!r} twice: get the file again")
    return tensors


def _repeated(path: Path) -> str | None:
    """Return a name that occurs twice in a valid header, or None; readers would take either of the two."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            twice.append(next(name for place, name in enumerate(names) if name in names[:place]))

    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=pairs)
    return twice[-1] if twice else None


def check_stored(folder: Path, spec: ModelSpec) -> None:
    """Refuse a folder whose weights are not those of its model; names, shapes and types of all tensors are checked.

    Args:
        folder: transformers' folder of a model of a supported family.
        spec: Description of the model by its config.

    Raises:
        InputError: Tensors are missing, unexpected, of another shape, or of no 16- or 32-bit type; the message names
            the first ones. The folder has no weights. Also raised as by `stored_tensors`.
    """
    stored = stored_tensors(folder)
    if not stored:
        raise InputError(f"{folder} holds no model.safetensors, nor an index of several: give a folder with weights")
    wanted: dict[str, tuple[int, ...]] = {}
    for tensor in spec.tensors:
        parts = stored_parts(tensor, spec)
        wanted |= {name: (rows.stop - rows.start, tensor.shape[1]) for name, rows in parts.items()}
        wanted |= {} if parts else {tensor.name: tensor.shape}
    family = names_of(spec.architecture)
    found = {name: tensor for name, tensor in stored.items() if not _LEFT_OUT.fullmatch(name)}
    head = f"{family.stored_head}.weight"
    if head in found and _HEAD not in found:
        found[_HEAD] = found.pop(head)
    table = f"{family.body}.{family.embedding}.weight"
    if spec.tied and _HEAD in found and table in found:
        _check_tied(folder, found.pop(_HEAD), found[table])
    faults = []
    if missing := [name for name in wanted if name not in found]:
        faults.append(f"lacks {_named(missing)}")
    if unexpected := [name for name in found if name not in wanted]:
        faults.append(f"has {_named(unexpected)}, for which it has no place")
    known = [name for name in wanted if name in found]
    if shaped := [
        f"{name} of {list(found[name].shape)} in place of {list(wanted[name])}"
        for name in known
        if found[name].shape != wanted[name]
    ]:
        faults.append(f"has {_named(shaped)}")
    if faults:
        raise InputError(
            f"{folder} does not hold the weights of the {spec.architecture} that its config.json describes: it "
            f"{', and '.join(faults)}: get the folder again, or mend its config.json"
        )
    if typed := [f"{name} as {found[name].dtype}" for name in known if found[name].dtype not in _FLOATS]:
        raise InputError(
            f"{folder} stores {_named(typed)}: give the model in 16- or 32-bit floats ({', '.join(_FLOATS[:3])}), or "
            "as a GGUF file"
        )


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _check_tied(folder: Path, head: Stored, table: Stored) -> None:
    """Refuse a stored head that should be tied to the embedding table but differs from it.

    transformers would treat them as two different tensors, whatever the config says.
    """
    alike = (head.shape, head.dtype) == (table.shape, table.dtype)
    if not alike or any(not np.array_equal(a, b) for a, b in zip(_bytes(head), _bytes(table), strict=True)):
        raise InputError(
            f"{folder} holds {head.name} and {table.name}, which its config.json has tied, and the two differ: set "
            "tie_word_embeddings to false in it, or get the folder again"
        )


def _bytes(tensor: Stored) -> Iterable[np.ndarray[Any, np.dtype[np.uint8]]]:
    with tensor.path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start, end = json.loads(file.read(length))[tensor.name]["data_offsets"]
        whole = np.memmap(file, np.uint8, "r", offset=8 + length + start, shape=(end - start,))
    return (whole[place : place + _COMPARED] for place in range(0, end - start, _COMPARED))


def stored_type(folder: Path) -> HeldType:
    """Return the 16-bit type that all weights of a folder share, or float32 if they have another type or several."""
    types = {tensor.dtype for name, tensor in stored_tensors(folder).items() if not _LEFT_OUT.fullmatch(name)}
    names: Mapping[str, HeldType] = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(types.pop(), "float32") if len(types) == 1 else "float32"

"""What the files of a model's folder say of it before any weight is loaded, and the hashes by which it is known."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from autodistill.contracts import HeldType
from autodistill.errors import InputError
from autodistill.hashes import content_hash, file_hash

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT_FILES = (".json", ".model", ".txt", ".jinja")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model's folder.

    Raises:
        InputError: Missing or unreadable.
    """
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """One of the JSON objects of a model's folder.

    Raises:
        InputError: Missing, unreadable, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: give a folder that transformers can load") from error
    except RecursionError:
        raise InputError(f"cannot read {path}: it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object: give a folder that transformers can load")
    return data


def shards(folder: Path) -> list[str] | None:
    """The names of the safetensors files that a folder's index names; None of a folder without an index.

    Raises:
        InputError: An index that cannot be read.
    """
    index = folder / _INDEX
    if not index.is_file():
        return None
    return sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads; some models have the same weights a second time, in another.

    Raises:
        InputError: An index that cannot be read.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    indexed = shards(folder)
    if indexed is not None:
        return [folder / name for name in indexed]
    return sorted(folder.glob("*.safetensors"))


def check_weights(folder: Path) -> None:
    """Checks that each safetensors file of a folder's model is as long as its header says.

    Raises:
        InputError: One that is truncated, damaged or unreadable.
    """
    for path in weight_files(folder):
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """Checks a safetensors file: its header says where each tensor ends."""
    try:
        length, header = _header(path)
        size = path.stat().st_size
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes, but has {size}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): get the file again") from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """A safetensors file's header and its length: JSON, whose length in bytes is in the first 8."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size - 8:
            raise ValueError("its header ends beyond the file")
        return length, json.loads(file.read(length))


def stored_weights(folder: Path) -> int:
    """How many weights the safetensors of a folder hold, each tensor by its shape; 0 where there are none.

    Raises:
        InputError: A header without the shapes.
    """
    count = 0
    for path in weight_files(folder):
        for name, entry in _header(path)[1].items():
            if name == "__metadata__":
                continue
            shape = entry.get("shape")
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise InputError(f"{path} is damaged: its tensor {name!r} has no shape: get the file again")
            count += math.prod(shape)
    return count


def stored_type(folder: Path) -> HeldType:
    """The 16-bit type that every weight of a folder has, or float32 where they have another, or several."""
    headers = (_header(path)[1] for path in weight_files(folder))
    types = {entry["dtype"] for header in headers for name, entry in header.items() if name != "__metadata__"}
    return {"BF16": "bfloat16", "F16": "float16"}.get(types.pop(), "float32") if len(types) == 1 else "float32"  # type: ignore[return-value]


def folder_fingerprint(folder: Path) -> str:
    """Hash of the files that transformers may read from a model's folder."""
    text = [path for path in folder.iterdir() if path.is_file() and path.suffix in _TEXT_FILES]
    files = sorted([*text, *weight_files(folder)])
    return content_hash([[path.name, file_hash(path)] for path in files], digits=16)


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of what decides the tokens of a text: the tokenizer's files and its special tokens.

    Raises:
        InputError: No tokenizer in the folder.
    """
    files = [[name, file_hash(folder / name)] for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} holds no tokenizer: give a folder with a tokenizer.json")
    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            data = read_json(folder / name)
            special |= {key: data[key] for key in ("bos_token", "eos_token") if data.get(key) is not None}
    return content_hash([files, special], digits=16)

"""A model's folder before any weight is loaded: checks of its files, hashes that identify it, and its licence."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from autodistill.errors import InputError
from autodistill.utils.hashing import content_hash, file_hash

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_TEXT_FILES = (".json", ".model", ".txt", ".jinja")

_LONGEST_TEXT = 2**28  # bytes of a JSON file; the largest tokenizers have a tenth of it

# transformers would load these in addition to the weights that are checked here, or instead of them.
_ADAPTER, _SHARDS_OF_A_GROUP = "adapter_config.json", re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

_LONGEST_LICENSE = 200  # characters; identifiers and names are short, and anything longer is a licence's text


def gguf_within(path: Path) -> Path:
    """Return the file of an exported folder that has one GGUF file and no config.json, otherwise the path itself."""
    files = [] if (path / "config.json").exists() or not path.is_dir() else sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else path


def linked(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Link a file to another place, which takes no space on the same file system. Copy it if linking fails."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return os.fspath(target)


def check_files(folder: Path) -> None:
    """Refuse a folder with links out of it or with anything but files; its files are copied into students.

    The hub's cache keeps the files of a model in `blobs`, next to its snapshots, and links to them. Such links are
    allowed.

    Raises:
        InputError: A link leaves the folder, an entry is a device or pipe, or transformers would load other weights
            because of a file.
    """
    here = folder.resolve()
    for path in _entries(here):
        if path.is_symlink() and not _stays(path, here):
            raise InputError(
                f"{path} is a link to {os.readlink(path)}, outside of the model's folder: put a copy of the file in "
                "its place, or remove it"
            )
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue  # a dangling link, which nothing reads
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path} is a pipe or device where a model's folder has files: remove it")
        if path.name == _ADAPTER:
            raise InputError(f"{folder} holds an adapter ({_ADAPTER}): merge it into the model's weights first")
        if _SHARDS_OF_A_GROUP.fullmatch(path.name):
            raise InputError(f"{folder} holds a checkpoint of distributed training ({path.name}): save the model whole")


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the entries of a folder, and those of the one subfolder that is read too."""
    try:
        yield from folder.iterdir()
        if (folder / MORE_TEMPLATES).is_dir():
            yield from (folder / MORE_TEMPLATES).rglob("*")
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error


def _stays(link: Path, folder: Path) -> bool:
    """Return whether a link ends in the folder, or in the blobs of the hub's cache that the folder belongs to."""
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # the links form a circle
        return False
    cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return cached or target.is_relative_to(folder)


_MULTIMODAL = ("qwen3_5", "gemma4")  # models that read images or sound too
_SHARED_FIELDS = ("quantization_config", "tie_word_embeddings", "dtype", "torch_dtype", "license")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model's folder; for a model that also reads images or sound, return that of its text model.

    Raises:
        InputError: The config is missing or unreadable, or as by `text_config`.
    """
    return text_config(read_json(folder / "config.json"))


def holds_more_than_text(folder: Path) -> bool:
    """Return whether a folder's model also reads images or sound, so that its text model is only a part of it.

    Raises:
        InputError: The config is missing or unreadable.
    """
    return read_json(folder / "config.json").get("model_type") in _MULTIMODAL


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the text model inside a model with images or sound; other configs are returned as they are.

    Raises:
        InputError: The config has no text model's config.
    """
    name, own = config.get("model_type"), config.get("text_config")
    if name not in _MULTIMODAL:
        return config
    if not isinstance(own, dict) or not own:
        raise InputError(f"the model's config must give text_config of a {name}, a mapping: check config.json")
    return {key: config[key] for key in _SHARED_FIELDS if key in config} | own | {"model_type": f"{name}_text"}


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the JSON files of a model's folder.

    Raises:
        InputError: The file is missing or unreadable, or holds no object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no file: give a folder that transformers can load")
        if found.st_size > _LONGEST_TEXT:
            raise InputError(f"{path} has {found.st_size:,} bytes, which is no description of a model: get it again")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: give a folder that transformers can load") from error
    except RecursionError:
        raise InputError(f"cannot read {path}: it is nested too deep") from None
    except (OSError, ValueError, MemoryError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object: give a folder that transformers can load")
    return data


def shards(folder: Path) -> dict[str, str] | None:
    """Return the safetensors file of each tensor according to the folder's index, or None if there is no index.

    Raises:
        InputError: The index cannot be read, names no files, or names files that are not in the folder.
    """
    path = folder / _INDEX
    if not path.is_file():
        return None
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path} is damaged: it has no weight_map of tensors to files: get the file again")
    for name in places.values():
        # Allow only plain file names, so that a name leads out of the folder on no system.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise InputError(
                f"{path} is damaged: it names {str(name)[:60]!r}, which is no safetensors file of the folder: get the "
                "file again"
            )
    missing = sorted(name for name in set(places.values()) if not _is_file(folder / name))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{folder} lacks {', '.join(missing[:3])}{more}, which its index names: complete the folder")
    return places


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads; some folders hold the same weights twice.

    Raises:
        InputError: As by `shards`.
    """
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    return [folder / name for name in sorted(set((shards(folder) or {}).values()))]


def folder_fingerprint(folder: Path) -> str:
    """Return a hash of the files that transformers may read from a model's folder."""
    text = [path for path in folder.iterdir() if path.is_file() and path.suffix in _TEXT_FILES]
    files = sorted([*text, *weight_files(folder)])
    return content_hash([[path.name, file_hash(path)] for path in files], digits=16)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return a hash of everything that decides the tokens of a text: tokenizer files and special tokens.

    Raises:
        InputError: The folder has no tokenizer.
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


# The type that a teacher's matrices are held in; it computes in float32 in any case.
HeldType = Literal["float32", "bfloat16", "float16"]

MORE_TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's further chat templates; conversations are rendered with the default template."""


def stated_license(license: object) -> str | None:
    """Return the licence in one line, or None if no readable licence is given.

    Model cards have an identifier or a list of identifiers. GGUF files may have a value of any kind under their key.
    """
    if isinstance(license, list | tuple):
        return ", ".join(filter(None, map(stated_license, license))) or None
    if not isinstance(license, str):
        return None
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in license).split())
    return line[:_LONGEST_LICENSE] or None

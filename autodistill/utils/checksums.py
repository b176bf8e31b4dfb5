"""Checksums of files on disk: a folder has a list next to its files, and a safetensors file has one in its header."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from autodistill.errors import DamagedError
from autodistill.utils.durable import put
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash, file_hash

LIST = "checksums.json"
"""Name of the list. It is written last, so a folder that has it is complete."""

# There are two names, so that a file whose seal lost one of them is not mistaken for one without a seal.
_SEAL, _MARK = "sha256", "sealed"
_OPEN = "0" * 64
_CHUNK = 2**22
# Longer than any header that is written here. A damaged length must not make us read gigabytes.
_LONGEST_HEADER = 100_000_000


def write_list(folder: Path) -> str:
    """Write the bytes and the SHA-256 of every file of a folder to `LIST`, and return the list's own hash.

    Args:
        folder: The folder. Nobody may write to it any more.
    """
    found = {name: _entry(folder / name) for name in _names(folder)}
    (folder / LIST).write_text(json.dumps({"files": found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return content_hash(found, 64)


def check_list(folder: Path, known: str | None = None) -> bool:
    """Check every file of a folder against its list; return False if it has none (earlier versions).

    This reads all of it: about a second per gigabyte, if the disk is fast enough.

    Args:
        folder: A folder for which `write_list` wrote the list.
        known: The list's hash, if the run's log has it. A folder without a list is then damaged.

    Raises:
        DamagedError: A file or the list has changed since it was written. The message names the first one.
    """
    path = folder / LIST
    if not path.exists() and known is None:
        return False
    try:
        found = json.loads(path.read_bytes())["files"]
        listed = content_hash(found, 64)
        sizes = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read as a list of checksums") from error
    if known is not None and listed != known:
        raise DamagedError(f"{folder} is not what the run's log names: its list of checksums is another one")
    _check(folder, sizes, _names(folder))
    return True


def entries(folder: Path, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the bytes and the SHA-256 of every file of a folder, except some."""
    return {name: _entry(folder / name) for name in _names(folder) if name not in without}


def check_entries(folder: Path, found: Mapping[str, Mapping[str, Any]], *, without: Collection[str] = ()) -> None:
    """Check every file of a folder against the result of `entries`.

    Raises:
        DamagedError: A file has changed, is missing or is new, or the entries are malformed. The message names the
            first.
    """
    try:
        sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in found.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"the checksums of {folder} cannot be read") from error
    _check(folder, sizes, [name for name in _names(folder) if name not in without])


def _check(folder: Path, sizes: Mapping[str, tuple[int, str]], present: Collection[str]) -> None:
    odd = sorted(set(present) ^ set(sizes))
    if odd:
        raise DamagedError(f"{folder / odd[0]} {'is missing' if odd[0] in sizes else 'is none of the files written'}")
    for name, (size, digest) in sizes.items():
        file = folder / name
        try:
            same = file.stat().st_size == size and file_hash(file) == digest
        except OSError as error:
            raise DamagedError(f"{file} cannot be read: {error.strerror}") from error
        if not same:
            raise DamagedError(f"{file} has changed since it was written: its checksum differs")


def saved_once(cache: Path, key: str, name: str, save: Callable[[Path], None]) -> Path:
    """Return the path of a saved object. It is saved only if no complete copy is there, by its checksums.

    Args:
        cache: Folder of everything that later searches may reuse.
        key: Hash of the object's content.
        name: Name of its file or folder.
        save: Writes it to a path of that name.
    """
    folder = (cache / "objects" / key).resolve()
    with exclusive(folder):
        with suppress(DamagedError):
            if check_list(folder):
                return folder / name
        temporary = folder.with_name(f".{key}-{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            save(temporary / name)
            write_list(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / name


def _names(folder: Path) -> list[str]:
    """Return the files of a folder without the list, and without names that begin with a dot."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name != LIST and not name.startswith("."))


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def unsealed(metadata: dict[str, str]) -> dict[str, str]:
    """Return the metadata with which a safetensors file must be written before `seal`."""
    return {**metadata, _SEAL: _OPEN, _MARK: "yes"}


def seal(path: Path) -> None:
    """Write the SHA-256 of a safetensors file into its header, in the place that `unsealed` reserved.

    The hash is over the file with zeros in that place. So the file carries its own checksum wherever it is copied.
    """
    place = _place(path)
    assert place is not None, "the file was not written with `unsealed` metadata"
    with path.open("r+b") as file:
        file.seek(place)
        file.write(_hash_around(path, place).encode())


def check_seal(path: Path) -> bool:
    """Check a sealed file; return False if it has no seal (earlier versions).

    Raises:
        DamagedError: The file has changed since it was written.
        OSError: The file cannot be read.
    """
    place = _place(path)
    if place is None:
        return False
    with path.open("rb") as file:
        file.seek(place)
        written = file.read(64).decode(errors="replace")
    if written != _hash_around(path, place):
        raise DamagedError(f"{path} has changed since it was written: its checksum differs")
    return True


def _place(path: Path) -> int | None:
    """Return where the 64 digits of the seal begin, or None if there is no seal."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        whole = len(header) == length and "__metadata__" in json.loads(header)
    except (ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{path} is no whole safetensors file")
    # Any character is accepted as a digit here. If one has changed, the comparison of hashes shows it.
    found = re.search(rb'"%s":"(.{64})"' % _SEAL.encode(), header, re.DOTALL)
    if (found is None) != (b'"%s":"yes"' % _MARK.encode() not in header):
        raise DamagedError(f"{path} has changed since it was written: its seal is not whole")
    return None if found is None else 8 + found.start(1)


def _hash_around(path: Path, place: int) -> str:
    """Return the SHA-256 of a file's bytes, with zeros for 64 bytes at the given place."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(place) + _OPEN.encode())
        file.seek(place + 64)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

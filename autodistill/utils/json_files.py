"""Strict JSON in files: written atomically, and without values that would be read back differently."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.utils.durable import make_folder, put


def strict_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with None for every NaN and infinity, which JSON cannot represent.

    The key `non_finite` keeps what each value was: it maps the dotted path of the value to "nan", "inf" or "-inf".

    Raises:
        TypeError: A key is not a string, so the data would not be read back as written.
    """
    found: dict[str, str] = {}
    plain = {key: _finite(value, str(key), found) for key, value in data.items()}
    _check_keys(data)
    return plain | {"non_finite": found} if found else plain


def _finite(value: Any, where: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[where] = str(float(value))
        return None
    if isinstance(value, Mapping):
        _check_keys(value)
        return {key: _finite(item, f"{where}.{key}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        try:
            if math.isfinite(sum(value)):  # so all are numbers, and finite
                return list(value)
        except (TypeError, OverflowError):
            pass
        return [_finite(item, f"{where}.{index}", found) for index, item in enumerate(value)]
    return value


def _check_keys(data: Mapping[Any, Any]) -> None:
    wrong = [key for key in data if not isinstance(key, str)]
    if wrong:
        raise TypeError(f"keys of a record are text, not {wrong[0]!r}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. At the end, sync the file and rename it to `path`.

    A reader sees either the old file or the whole new one. After an exception nothing is left behind.

    Raises:
        InputError: The folder cannot be written to, or the path is a folder, a device or a pipe.
    """
    if not path.name:
        raise InputError(f"{path} is a folder: name a file in it")
    if path.exists() and not (path.is_file() or path.is_dir()):
        # A superuser's rename would put the file in its place.
        raise InputError(f"{path} is a device, a pipe or a socket, and is not replaced: name a file")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        make_folder(path.parent)
        temporary.touch()
    except OSError as error:
        raise unwritable(path.parent, error, "") from error
    try:
        yield temporary
        put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any], *, compact: bool = False) -> None:
    """Write data as strict JSON, atomically. `strict_json` describes how values that are not finite are written.

    Args:
        path: The file.
        data: Its content.
        compact: Write one line, which is faster: for caches that are written again and again.
    """
    text = json.dumps(strict_json(data), indent=None if compact else 2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        InputError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        data = plain_json(read_plain(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it from a copy, or start a new run") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object: restore it from a copy, or start a new run")
    return data


def read_plain(path: Path) -> bytes:
    """Return the bytes of a regular file. Never wait for a pipe, and never read a device.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        return file.read()


def plain_json(text: bytes | str) -> Any:
    """Parse strict JSON text.

    Raises:
        ValueError: The text is not JSON, has a number that is not finite, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(name: str) -> float:
    raise ValueError(f"JSON has no {name}")


def unwritable(folder: Path, error: OSError, option: str = "--out") -> InputError:
    """Return the error for a folder that cannot be written. It names the option that chooses another folder, if any."""
    where = f" with {option}" if option else ""
    return InputError(f"cannot write into {folder}: {error.strerror or error}; choose another folder{where}")

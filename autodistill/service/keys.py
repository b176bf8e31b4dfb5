"""The key of a server: made, kept in a file that only its owner can read, or found again by a client."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from autodistill.distillation.teacher.endpoint import KEY_VARIABLE
from autodistill.errors import InputError
from autodistill.utils.input_files import read_file

_MOST = 4096  # bytes of a file with a key
_LEAST = 16  # characters of a key that a server accepts


def make_key() -> str:
    """Return a new key of 256 random bits."""
    return secrets.token_urlsafe(32)


def kept_key(path: Path) -> str:
    """Return the key in a file. If there is no file, write a new key into one that only its owner can read.

    Raises:
        InputError: The file holds no key, or cannot be read or written.
    """
    if not path.exists():
        key = make_key()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(key + "\n")
        except OSError as error:
            raise InputError(f"cannot write the key to {path}: {error.strerror}") from None
        return key
    key = _one_line(read_file(path, _MOST), str(path))
    if len(key) < _LEAST:
        raise InputError(f"{path} has a key of {len(key)} characters: give one of {_LEAST} or more, or remove the file")
    return key


def client_key(path: Path | None) -> str | None:
    """Return the key that a client sends, from a file or from AUTODISTILL_API_KEY; None if neither is given.

    Raises:
        InputError: The file does not exist, or its text is not a key.
    """
    if path is not None:
        if not path.exists():
            raise InputError(f"there is no {path}: give the file that autodistill serve --key-file wrote")
        return _one_line(read_file(path, _MOST), str(path))
    given = os.environ.get(KEY_VARIABLE, "").strip()
    return _one_line(given.encode(), KEY_VARIABLE) if given else None


def _one_line(text: bytes, where: str) -> str:
    key = text.decode("utf-8", "replace").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where} is not one word of printable ASCII: it must hold the key alone")
    return key

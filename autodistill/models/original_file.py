"""The GGUF file that a model's folder was made from, which is kept in this folder so that it can be exported."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from autodistill.errors import DamagedError
from autodistill.utils.hashing import file_hash
from autodistill.utils.linked_files import linked

ORIGINAL = "original.gguf"
"""The name of the file in the folder."""


def keep_original(file: Path, folder: Path) -> None:
    """Keep a file in the folder that was made from it. It is linked, or copied if linking fails."""
    temporary = folder / f".{ORIGINAL}-{uuid.uuid4().hex}"
    linked(file, temporary)
    os.replace(temporary, folder / ORIGINAL)


def find_original(folder: Path, sha256: str) -> Path:
    """Return the file that a folder was made from, after comparing its bytes with a hash.

    Raises:
        DamagedError: The file is not there, or its bytes were changed.
    """
    path = folder / ORIGINAL
    if not path.is_file():
        raise DamagedError(f"{path} is missing, the GGUF file that was evaluated: run the search again")
    if file_hash(path) != sha256:
        raise DamagedError(
            f"{path} was changed since it was evaluated (its SHA-256 is not {sha256[:12]}...): put the file back where "
            "it was given, and resume the search"
        )
    return path

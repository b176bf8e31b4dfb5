"""Hashes that identify content: of plain data, and of the bytes of a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def content_hash(data: Any, digits: int = 12) -> str:
    """Return a hash of plain data, the same in every process and on every platform.

    Keys are sorted. Floats are written by `repr`, which gives the shortest text that reads back as the same float.
    """
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

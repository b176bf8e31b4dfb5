"""Limits the disk space of scores and solutions. The least recently used files are removed first."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from autodistill.utils.file_locks import try_lock

LIMIT = 256 * 10**6
"""Bytes that all libraries and the records of solutions may take together. A library of a 135M model takes about one
million bytes for each 1,024 tokens of calibration text."""

_ABANDONED_SECONDS = 3600  # age above which an unfinished file is from a process that was killed


def mark_used(path: Path, limit: int = LIMIT) -> None:
    """Mark a library as used now. Remove others, the least recently used first, until the rest is within a limit.

    This library and those that another process works on stay, even above the limit.

    Args:
        path: The library's file, in the folder that is cleaned. It need not exist yet.
        limit: Bytes of all files together.
    """
    with suppress(OSError):
        os.utime(path)
    found = {}
    for file in path.parent.rglob("*.json"):
        with suppress(OSError):  # another process may just have moved the file
            found[file] = file.stat()
    total = sum(status.st_size for status in found.values())
    for file in sorted(found, key=lambda one: (not one.name.startswith("."), found[one].st_mtime)):
        if file.name.startswith("."):
            removable = time.time() - found[file].st_mtime > _ABANDONED_SECONDS
        else:
            removable = total > limit and file != path
        with try_lock(file.with_name(f".{file.name}.lock")) as free:
            if removable and free:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
                    total -= found[file].st_size

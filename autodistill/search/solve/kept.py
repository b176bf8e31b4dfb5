"""The disk that scores and solutions take together: what was used least recently goes first."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from autodistill.utils.file_locks import claimed

LIMIT = 256 * 10**6
"""Bytes that all libraries, and what is told of solutions, may take together; a library of a 135M model has about one
million for each 1,024 tokens of calibration text."""

_ABANDONED_SECONDS = 3600  # after which an unfinished file is one of a process that was killed


def use(path: Path, limit: int = LIMIT) -> None:
    """Mark a library as used now, and remove others, the least recently used first, until all take a limit.

    One that another process works on stays, and so does this one, whatever the limit.

    Args:
        path: The library's file, in the folder that is cleaned; it need not be there yet.
        limit: Bytes of all files together.
    """
    with suppress(OSError):
        os.utime(path)
    found = {}
    for file in path.parent.rglob("*.json"):
        with suppress(OSError):  # of a file that another process has just moved
            found[file] = file.stat()
    total = sum(status.st_size for status in found.values())
    for file in sorted(found, key=lambda one: (not one.name.startswith("."), found[one].st_mtime)):
        if file.name.startswith("."):
            removable = time.time() - found[file].st_mtime > _ABANDONED_SECONDS
        else:
            removable = total > limit and file != path
        with claimed(file.with_name(f".{file.name}.lock")) as free:
            if removable and free:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
                    total -= found[file].st_size

"""Files and folders whose data and names are on the disk when a call returns, so that they survive a crash.

A rename alone is not enough. After a power failure the new name may be there without the data, or the old one still.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that say that there is no room for a file: the disk, a quota, or the largest file that is allowed."""


def sync(path: Path) -> None:
    """Make the data of a file, or the names in a folder, survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(folder: Path) -> None:
    """Make a folder, and everything below it, survive a crash."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents; their names survive a crash."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def put(temporary: Path, path: Path) -> None:
    """Rename a file, or a folder with everything below it, once it is on the disk; the name survives a crash too.

    Args:
        temporary: What was written, on the same file system.
        path: Its name from now on; a file may have it, or an empty folder.
    """
    if temporary.is_dir():
        sync_below(temporary)
    else:
        sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)

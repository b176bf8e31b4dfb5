"""Files and folders whose data and names are on the disk when a call returns, so that they survive a crash.

A rename alone is not enough. After a power failure there may be the new name without the data, or still the old name.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error codes for a lack of room: the disk is full, a quota is used up, or the file would be too large."""


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
    """Create a folder and its missing parents, so that their names survive a crash."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def put(temporary: Path, path: Path) -> None:
    """Write a file, or a folder with everything below it, to the disk, and rename it so that the name survives a crash.

    Args:
        temporary: The file or folder, on the same file system.
        path: Its new name. A file or an empty folder of this name is replaced.
    """
    if temporary.is_dir():
        sync_below(temporary)
    else:
        sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)

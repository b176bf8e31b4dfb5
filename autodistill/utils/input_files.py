"""Files that a user names: only regular files are read, and never more bytes than expected.

A pipe has no end until somebody writes to it, and a device like /dev/zero has no end at all.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from autodistill.errors import InputError
from autodistill.units import format_bytes


def check_file(path: Path) -> None:
    """Refuse a path that exists and is not a file. A missing path is left to the code that opens it.

    Raises:
        InputError: The path is a folder, a pipe, a link to nothing, a socket or a device, or no file can have this
            path.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise InputError(f"{path} is a link to a missing file: give a file") from None
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}: give a file")


def read_file(path: Path, most: int) -> bytes:
    """Return the bytes of a file.

    Args:
        path: A file.
        most: The largest size in bytes that such a file can have.

    Raises:
        InputError: The file cannot be read, is not a regular file, or is larger.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise InputError(f"{path} is larger than {format_bytes(most)}, which no such file is: check which file it is")
    return data

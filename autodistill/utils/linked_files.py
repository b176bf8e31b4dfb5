"""Puts files and folders in a second place: linked, which takes no space on the same file system, or else copied."""

from __future__ import annotations

import os
import shutil


def linked(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> str:
    """Link a file to another place. Copy it if linking fails."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return os.fspath(target)

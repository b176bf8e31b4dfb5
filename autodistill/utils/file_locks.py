"""Locks on files that several processes of a machine share: one process makes them, and nobody removes files in use."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autodistill.utils.durable import make_folder


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock while a file is made, so that other processes wait and then find it.

    The lock ends with its holder, however the holder ends. If a file system has no locks, nobody waits. Each process
    then makes the file and renames the whole file into place.
    """
    make_folder(path.parent)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The previous holder removed the file that this process waited for. Another one may have made a new file.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Yield whether the lock on a file was free; it is held inside the block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            free = error.errno not in (errno.EAGAIN, errno.EACCES)  # other errors: a file system without locks
        yield free
    finally:
        os.close(descriptor)

"""A machine's copies of what storages have: held while they are used, and collected under a limit."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from autodistill.durable import make_folder
from autodistill.records.locks import claimed
from autodistill.records.store import default_cache
from autodistill.storage import FETCHING, Storage

# What nobody has written to for this long was left by a process that was killed.
_ABANDONED_SECONDS = 3600
# A process uses what it has fetched until it ends; so do these locks last.
_held: list[int] = []


def hold_copy(storage: Storage, key: str) -> Path:
    """Where this machine keeps its copy of what a storage has under a key, for all searches on it.

    From here on, and until this process ends, it is not collected.
    """
    path = _root() / hashlib.sha256(f"{storage.uri}/{key}".encode()).hexdigest()[:16]
    make_folder(path.parent)
    descriptor = os.open(_used(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.append(descriptor)
    # Waits where it is being collected just now; a file system without locks holds nothing.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(descriptor)
    return path


def collect_copies(limit_bytes: int) -> None:
    """Removes the copies longest unused until all take `limit_bytes` at most, never one that a process holds."""
    sizes = {path: _size(path) for path in _root().glob("*") if path.is_dir()}
    total = sum(size for path, size in sizes.items() if not path.name.startswith(FETCHING))
    for path in sorted(sizes, key=_last_used):
        if path.name.startswith(FETCHING):
            if time.time() - _last_used(path) > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        elif total > limit_bytes:
            with claimed(_used(path)) as free:
                if free:
                    # Renamed first, since a copy that is there counts as whole.
                    gone = path.with_name(f"{FETCHING}{uuid.uuid4().hex}")
                    with suppress(FileNotFoundError):
                        path.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)
                    total -= sizes[path]


def _root() -> Path:
    return default_cache() / "from-storage"


def _used(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.used")


def _last_used(path: Path) -> float:
    """When a copy was last held, or a part of one last written."""
    used = _used(path)
    if used.exists():
        return used.stat().st_mtime
    return max((file.stat().st_mtime for file in (path, *path.rglob("*")) if file.exists()), default=0.0)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

"""Files that trials read. They are sent to the run's storage once, and fetched once on each node."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from autodistill.errors import AutoDistillError
from autodistill.options import cache_folder
from autodistill.search.worker.failures import is_disk_full
from autodistill.search.worker.messages import TrialSetting
from autodistill.utils.durable import make_folder
from autodistill.utils.file_locks import try_lock
from autodistill.utils.hashing import content_hash
from autodistill.utils.storage import FETCHING, Storage

_MANIFEST = "supplies.json"

# Seconds between tries to fetch, for a storage that fails for a moment.
_WAITS = (1.0, 4.0, 15.0, 40.0)


def send(setting: TrialSetting, storage: Storage, limit_bytes: int) -> TrialSetting:
    """Send the files that trials read, except those that are already there.

    Args:
        setting: The setting with this machine's paths.
        storage: The run's storage.
        limit_bytes: Disk that a node's copies may take, not counting those in use.

    Returns:
        The setting with which any node finds them.

    Raises:
        AutoDistillError: They cannot be sent.
    """
    manifest = {}
    try:
        for name, path in _paths(setting):
            key = f"supplies/{path.name.lstrip('.')}-{_content(path)}"
            storage.send_folder(path, key)
            manifest[name] = {"key": key, "file": path.name if path.is_file() else ""}
        storage.write(_MANIFEST, json.dumps(manifest).encode())
    except OSError as error:
        raise AutoDistillError(
            f"what trials read could not be sent to {storage.uri} ({error}): check the storage and your credentials, "
            "and go on with --resume, which sends what is not there yet"
        ) from error
    return replace(setting, storage=storage, copies_limit_bytes=limit_bytes)


def absolute(setting: TrialSetting) -> TrialSetting:
    """Return the setting for processes that may have started in another folder."""
    return _with(setting, {name: path.absolute() for name, path in _paths(setting)}, setting.checkpoints.absolute())


def fetch(setting: TrialSetting) -> TrialSetting:
    """Return the setting with the paths of this node's copies, if the run has a storage. Old copies make room for them.

    Raises:
        OSError: They cannot be fetched, even after a minute of trying.
    """
    if setting.storage is None:
        return setting
    storage, paths = setting.storage, {}
    for wait in (*_WAITS, None):
        try:
            paths = _fetched(storage)
            break
        except OSError as error:
            if wait is None or is_disk_full(error) or isinstance(error, FileNotFoundError):
                raise OSError(f"what trials read could not be fetched from {storage.uri}: {error}") from error
            # While it waits, this node takes no work that a node with a working storage could do.
            time.sleep(wait)
    checkpoints = hold_copy(storage, "checkpoints")
    if setting.copies_limit_bytes is not None:
        collect_copies(setting.copies_limit_bytes)
    return _with(setting, paths, checkpoints)


def _fetched(storage: Storage) -> dict[str, Path]:
    """Return this node's copies of what trials read, by name."""
    paths = {}
    for name, where in json.loads(storage.read(_MANIFEST)).items():
        folder = storage.fetch_folder(where["key"], hold_copy(storage, where["key"]))
        paths[name] = folder / where["file"]
    return paths


def _paths(setting: TrialSetting) -> Iterator[tuple[str, Path]]:
    for item in fields(setting):
        path = getattr(setting, item.name)
        if isinstance(path, Path) and item.name != "checkpoints":  # trials write there
            yield item.name, path
    for model, path in setting.pretrained.items():
        yield f"pretrained/{model}", path


def _with(setting: TrialSetting, paths: dict[str, Path], checkpoints: Path) -> TrialSetting:
    models = {name.partition("/")[2]: path for name, path in paths.items() if name.startswith("pretrained/")}
    own: dict[str, Any] = {name: path for name, path in paths.items() if "/" not in name}
    return replace(setting, pretrained=models, checkpoints=checkpoints, **own)


def _content(path: Path) -> str:
    """Return a hash that changes with the name, size or time of any file."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = {str(file.relative_to(path.parent)): file.stat() for file in files if file.is_file()}
    return content_hash({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}, 16)


# A part that nobody has written to for this long was left by a process that was killed.
_ABANDONED_SECONDS = 3600

# A process uses what it has fetched until it ends, so these locks last as long.
_held: list[int] = []


def hold_copy(storage: Storage, key: str) -> Path:
    """Return where this machine keeps its copy of what a storage has under a key, for all searches on the machine.

    The copy cannot be collected from now on until this process ends.
    """
    path = _root() / hashlib.sha256(f"{storage.uri}/{key}".encode()).hexdigest()[:16]
    make_folder(path.parent)
    descriptor = os.open(_used(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.append(descriptor)
    # This waits if the copy is being collected just now. A file system without locks protects nothing.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(descriptor)
    return path


def collect_copies(limit_bytes: int) -> None:
    """Remove the least recently used copies until all take at most `limit_bytes`; those that processes hold stay."""
    sizes = {path: _size(path) for path in _root().glob("*") if path.is_dir()}
    total = sum(size for path, size in sizes.items() if not path.name.startswith(FETCHING))
    for path in sorted(sizes, key=_last_used):
        if path.name.startswith(FETCHING):
            if time.time() - _last_used(path) > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        elif total > limit_bytes:
            with try_lock(_used(path)) as free:
                if free:
                    # It is renamed first, because a copy that is there counts as complete.
                    gone = path.with_name(f"{FETCHING}{uuid.uuid4().hex}")
                    with suppress(FileNotFoundError):
                        path.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)
                    total -= sizes[path]


def _root() -> Path:
    return cache_folder() / "from-storage"


def _used(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.used")


def _last_used(path: Path) -> float:
    """Return when a copy was last held, or when a part of one was last written."""
    used = _used(path)
    if used.exists():
        return used.stat().st_mtime
    return max((file.stat().st_mtime for file in (path, *path.rglob("*")) if file.exists()), default=0.0)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

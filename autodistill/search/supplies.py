"""What trials read, sent to the run's storage once, and fetched from it once on each node."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from autodistill.errors import AutoDistillError
from autodistill.hashes import content_hash
from autodistill.search.failures import is_disk_full
from autodistill.search.node_copies import collect_copies, hold_copy
from autodistill.storage import Storage
from autodistill.trial_data import TrialSetting

_MANIFEST = "supplies.json"
# Seconds between tries to fetch, for a storage that fails for a moment.
_WAITS = (1.0, 4.0, 15.0, 40.0)


def send(setting: TrialSetting, storage: Storage, limit_bytes: int) -> TrialSetting:
    """Sends the files that trials read, those that are not there yet.

    Args:
        setting: With this machine's paths.
        storage: The run's.
        limit_bytes: Disk that a node's copies may take, those in use aside.

    Returns:
        The setting by which any node finds them.

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
    """The setting for processes that may have been started in another folder."""
    return _with(setting, {name: path.absolute() for name, path in _paths(setting)}, setting.checkpoints.absolute())


def fetch(setting: TrialSetting) -> TrialSetting:
    """The setting with the paths of this node's copies, where the run has a storage; others make room for them.

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
            # Meanwhile it takes no work that a node which reaches the storage could do.
            time.sleep(wait)
    checkpoints = hold_copy(storage, "checkpoints")
    if setting.copies_limit_bytes is not None:
        collect_copies(setting.copies_limit_bytes)
    return _with(setting, paths, checkpoints)


def _fetched(storage: Storage) -> dict[str, Path]:
    """This node's copies of what trials read, by name."""
    paths = {}
    for name, where in json.loads(storage.read(_MANIFEST)).items():
        folder = storage.fetch_folder(where["key"], hold_copy(storage, where["key"]))
        paths[name] = folder / where["file"]
    return paths


def _paths(setting: TrialSetting) -> Iterator[tuple[str, Path]]:
    for item in fields(setting):
        path = getattr(setting, item.name)
        if isinstance(path, Path) and item.name != "checkpoints":  # which trials write
            yield item.name, path
    for model, path in setting.pretrained.items():
        yield f"pretrained/{model}", path


def _with(setting: TrialSetting, paths: dict[str, Path], checkpoints: Path) -> TrialSetting:
    models = {name.partition("/")[2]: path for name, path in paths.items() if name.startswith("pretrained/")}
    own: dict[str, Any] = {name: path for name, path in paths.items() if "/" not in name}
    return replace(setting, pretrained=models, checkpoints=checkpoints, **own)


def _content(path: Path) -> str:
    """Changes with any of the files: their names, sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = {str(file.relative_to(path.parent)): file.stat() for file in files if file.is_file()}
    return content_hash({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}, 16)

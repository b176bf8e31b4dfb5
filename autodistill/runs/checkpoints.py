"""The store of stages: checkpoints of stable training, keyed by what determines their bits, shared by all trials."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autodistill.distillation.training.plan import Plan
from autodistill.strategy.strategy import Strategy
from autodistill.utils.durable import make_folder, put
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash
from autodistill.utils.storage import Storage

_KEY = re.compile(r"([A-Za-z0-9_.]+)\.(\d{12})\.safetensors\Z", re.ASCII)
# Checkpoints and students may take one part in four of the free disk. The rest is for caches and other users of it.
_DEFAULT_SHARE = 4


def stage_key(strategy: Strategy, seed: int, plan: Plan, device: str) -> str:
    """Return the content address of the stable part of a training, within its run.

    The address leaves out teacher, data and cache, which are the same for the whole run. Two trainings with the same
    address have the same bits after the same number of tokens. Rungs, evaluation and decay are not part of the address:
    they only say how far the stable part is followed and what branches off it. After the plan's tokens a training may
    use more threads, but only extended training continues such checkpoints.

    Args:
        strategy: The strategy, without its finishing.
        seed: Seed of data order, projections and draws.
        plan: Gives steps, schedule, precision and, on a CPU, the number of threads, which affects the order of sums.
        device: The device that trains: "cpu" or "cuda".
    """
    names = ("tokens", "most_tokens", "sequence_length", "batch_tokens", "warmup_tokens", "bf16")
    means = ("micro_batch", "checkpointing", "optimizer_state", "processes")
    # The number of threads does not affect a GPU's sums, and may differ between machines.
    threads = ("threads",) if device == "cpu" else ()
    settings = {name: getattr(plan, name) for name in (*names, *means, *threads)}
    return content_hash({"stage": strategy.stable_id, "seed": seed, "device": device, "settings": settings}, 16)


class Files(Protocol):
    """Files by key, on any kind of storage."""

    def put(self, file: Path, key: str) -> None:
        """Move a local file in, completely or not at all; it replaces any file that the key had.

        Raises:
            OSError: It cannot be written.
        """
        ...

    def get(self, key: str) -> Path | None:
        """Return a local path of the file, which must not be changed, or None if there is no such file."""
        ...

    def drop_copy(self, key: str) -> bool:
        """Drop the local copy that `get` returned, so that it is fetched again; return False if it was no copy."""
        ...

    def list(self) -> dict[str, int]:
        """Return the bytes of each file, by key."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file, if it exists."""
        ...


class LocalFiles:
    """Files in a folder of this machine.

    Args:
        root: The folder, which is made when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, file: Path, key: str) -> None:
        """Move the file in by a rename, so that readers never see a partial file and a crash never leaves one."""
        make_folder(self._root)
        put(file, self._root / key)

    def get(self, key: str) -> Path | None:
        """Return the file itself; a reader that has it open can read on after it is removed."""
        path = self._root / key
        return path if path.is_file() else None

    def drop_copy(self, key: str) -> bool:
        """Return False: `get` returns the file itself, so there is no copy."""
        return False

    def list(self) -> dict[str, int]:
        """Return the bytes of each file, by key; a file that is removed meanwhile is left out."""
        found = {}
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
                    except FileNotFoundError:
                        continue
        except FileNotFoundError:
            return {}
        return found

    def remove(self, key: str) -> None:
        """Remove the file."""
        (self._root / key).unlink(missing_ok=True)


class StoredFiles:
    """Files on a storage whose content never changes, with local copies of those that this machine uses.

    Args:
        storage: The storage.
        scratch: Folder of the copies.
    """

    def __init__(self, storage: Storage, scratch: Path) -> None:
        self._storage = storage
        self._scratch = scratch

    def put(self, file: Path, key: str) -> None:
        """Send a file, and keep it as this machine's copy.

        Raises:
            OSError: It cannot be written.
        """
        self._drop_removed()
        self._storage.put(file, key)
        os.replace(file, self._scratch / key)

    def get(self, key: str) -> Path | None:
        """Return this machine's copy, which all processes share, or None if there is no such file."""
        path = self._scratch / key
        if not self._storage.has(key):
            path.unlink(missing_ok=True)
            return None
        with exclusive(path):
            if not path.is_file():
                self._drop_removed()
                try:
                    self._storage.get(key, path)
                except FileNotFoundError:
                    return None
        return path

    def _drop_removed(self) -> None:
        """Make room for another copy: remove copies of files that were removed from the storage.

        If the free disk could not hold one more file of the largest size, the least recently used copies are removed
        too. They can be fetched again.
        """
        make_folder(self._scratch)
        # List the copies before the storage: a file is on the storage before its copy is here.
        copies = [path for path in self._scratch.iterdir() if path.is_file() and not path.name.startswith(".")]
        kept = self._storage.list()
        for path in copies:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        held = sorted((path for path in copies if path.name in kept), key=_used)
        largest = max((kept[path.name] for path in held), default=0)
        for path in held:
            if shutil.disk_usage(self._scratch).free >= largest:
                break
            path.unlink(missing_ok=True)

    def drop_copy(self, key: str) -> bool:
        """Delete this machine's copy; the next `get` fetches it again."""
        (self._scratch / key).unlink(missing_ok=True)
        return True

    def list(self) -> dict[str, int]:
        """Return the size of each file, by key."""
        return self._storage.list()

    def remove(self, key: str) -> None:
        """Remove a file, and this machine's copy."""
        self._storage.remove(key)
        (self._scratch / key).unlink(missing_ok=True)


def _used(path: Path) -> float:
    """Return when a file was last read or written; a missing file was never used."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0.0
    return max(stat.st_atime, stat.st_mtime)


@dataclass(frozen=True, kw_only=True, order=True)
class Checkpoint:
    """A checkpoint of a stage.

    Attributes:
        stage: Content address of the stage, or the id of a trial that shares its stages with no other.
        tokens: Number of tokens trained on.
        bytes: Size of its file.
    """

    stage: str
    tokens: int
    bytes: int

    @property
    def key(self) -> str:
        """Key of the checkpoint's file."""
        return _key(self.stage, self.tokens)


def _key(stage: str, tokens: int) -> str:
    return f"{stage}.{tokens:012d}.safetensors"


class StageStore:
    """Checkpoints of stages, written and read by any number of processes at once.

    Processes that write the same checkpoint write the same bits, so it does not matter whose file is kept.

    Args:
        files: The files of the checkpoints.
        scratch: Local folder in which a checkpoint is written before it is put into `files`. For `LocalFiles` it must
            be on the same file system.
    """

    def __init__(self, files: Files, scratch: Path) -> None:
        self._files = files
        self._scratch = scratch

    def find(self, stage: str, at_most_tokens: int) -> tuple[Path, Checkpoint] | None:
        """Return the checkpoint of a stage with the most tokens up to `at_most_tokens`, and its local file, or None."""
        for checkpoint in sorted(self.checkpoints(stage), reverse=True):
            if checkpoint.tokens <= at_most_tokens:
                path = self._files.get(checkpoint.key)
                if path is not None:  # if it is None, the checkpoint was removed meanwhile
                    return path, checkpoint
        return None

    def holds(self, stage: str, tokens: int) -> bool:
        """Return whether there is a checkpoint of a stage at exactly these tokens."""
        return any(checkpoint.tokens == tokens for checkpoint in self.checkpoints(stage))

    def save(self, stage: str, tokens: int, write: Callable[[Path], None]) -> None:
        """Save a checkpoint, completely or not at all.

        Args:
            stage, tokens: As in `Checkpoint`.
            write: Writes the checkpoint to the local path that it is given.

        Raises:
            OSError: It cannot be written. Errors of `write` are passed on.
        """
        make_folder(self._scratch)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            file = Path(folder) / _key(stage, tokens)
            write(file)
            self._files.put(file, file.name)

    def checkpoints(self, stage: str | None = None) -> list[Checkpoint]:
        """Return all checkpoints, or those of one stage, sorted by stage and tokens."""
        found = []
        for key, size in self._files.list().items():
            match = _KEY.match(key)
            if match and stage in (None, match[1]):
                found.append(Checkpoint(stage=match[1], tokens=int(match[2]), bytes=size))
        return sorted(found)

    def drop_copy(self, checkpoint: Checkpoint) -> bool:
        """Drop this machine's copy, so that it is fetched again; return False if there is no separate copy."""
        return self._files.drop_copy(checkpoint.key)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint, if it still exists."""
        self._files.remove(checkpoint.key)

    def sweep(self) -> None:
        """Remove partial files of killed writers. Call it only while nobody writes."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def open_stages(checkpoints: Path, storage: Storage | None = None) -> StageStore:
    """Open the store of a run's stages.

    Args:
        checkpoints: The run's folder of trained weights, on this machine.
        storage: The run's storage. If there is one, it holds the stages, and the folder has copies.
    """
    root = checkpoints / "stages"
    files: Files = LocalFiles(root) if storage is None else StoredFiles(storage.at("stages"), root)
    return StageStore(files, scratch=root / ".partial")


def default_limit(folder: Path, storage: Storage | None = None, students: int = 0) -> int | None:
    """Return the bytes that a run's checkpoints and students may take by default.

    It is a quarter of the free disk and what they already take together, on the disk that holds them. An object store
    cannot fill up, so for it there is no limit (None).

    Args:
        folder: The run's folder of trained weights, on this machine.
        storage: The run's storage. If there is one, it holds the stages.
        students: Bytes that the run's students take.
    """
    root = folder if storage is None else storage.folder
    if root is None:
        return None
    held = sum(checkpoint.bytes for checkpoint in open_stages(folder, storage).checkpoints())
    existing = next(path for path in (root, *root.parents) if path.exists())
    return (shutil.disk_usage(existing).free + held + students) // _DEFAULT_SHARE

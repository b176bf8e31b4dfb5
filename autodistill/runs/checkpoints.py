"""The store of stages: checkpoints of stable training by what decides their bits, for any trial to continue."""

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
from autodistill.utils.file_locks import alone
from autodistill.utils.hashing import content_hash
from autodistill.utils.storage import Storage

_KEY = re.compile(r"([A-Za-z0-9_.]+)\.(\d{12})\.safetensors\Z", re.ASCII)
# Of the free disk; the rest is left to the students, the caches and whoever else writes there.
_DEFAULT_SHARE = 4


def stage_key(strategy: Strategy, seed: int, plan: Plan, device: str) -> str:
    """Return the content address of the stable part of a training, within its run.

    Teacher, data and cache are the run's own. Two trainings with one address have the same bits at the same tokens.
    Rungs, evaluation and decay, which say how far the stable part is followed and what branches off it, are none of it.
    Past the plan's tokens it may have more threads, and only what trains the best on goes on from there.

    Args:
        strategy: Its finishing is left out.
        seed: Of data order, projections and draws.
        plan: Steps, schedule, precision and, on a CPU, the threads that order sums.
        device: Where it is trained: "cpu" or "cuda".
    """
    names = ("tokens", "most_tokens", "sequence_length", "batch_tokens", "warmup_tokens", "bf16")
    means = ("micro_batch", "checkpointing", "optimizer_state", "processes")
    # A GPU sums the same whatever cores its machine has for it, which of another machine may be fewer.
    threads = ("threads",) if device == "cpu" else ()
    settings = {name: getattr(plan, name) for name in (*names, *means, *threads)}
    return content_hash({"stage": strategy.stable_id, "seed": seed, "device": device, "settings": settings}, 16)


class Files(Protocol):
    """Files by key, on whatever holds them."""

    def put(self, file: Path, key: str) -> None:
        """Take a local file over, whole or not at all, in the place of any that the key had.

        Raises:
            OSError: It cannot be written.
        """
        ...

    def get(self, key: str) -> Path | None:
        """A local path of the file, to be read and not to be changed; None where there is none."""
        ...

    def drop_copy(self, key: str) -> bool:
        """Drop what `get` gave where that was a copy, which is fetched again then; False where it was the file."""
        ...

    def list(self) -> dict[str, int]:
        """Return the bytes of each file, by key."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file; nothing where there is none."""
        ...


class LocalFiles:
    """Files in a folder of this machine.

    Args:
        root: Made when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, file: Path, key: str) -> None:
        """Rename what is on the disk, so that a reader sees no part of a file and a kill or a crash leaves none."""
        make_folder(self._root)
        put(file, self._root / key)

    def get(self, key: str) -> Path | None:
        """The file itself; one that is open outlives its removal."""
        path = self._root / key
        return path if path.is_file() else None

    def drop_copy(self, key: str) -> bool:
        """Drop nothing: `get` gives the file itself."""
        return False

    def list(self) -> dict[str, int]:
        """A file that is removed meanwhile is left out."""
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
    """Files with keys and constant content on a storage, with a copy on this machine of those it uses.

    Args:
        storage: What holds them.
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
        """Return this machine's copy, fetched once for all processes; None if there is no such file."""
        path = self._scratch / key
        if not self._storage.has(key):
            path.unlink(missing_ok=True)
            return None
        with alone(path):
            if not path.is_file():
                self._drop_removed()
                try:
                    self._storage.get(key, path)
                except FileNotFoundError:
                    return None
        return path

    def _drop_removed(self) -> None:
        """Make room for another copy: remove copies of files that were removed from the storage.

        Where the disk does not hold another one of the largest, those longest unused go too: they can be fetched again.
        """
        make_folder(self._scratch)
        # Looked at first, since a copy is here only after its file is on the storage.
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
        stage: Its content address, or the id of a trial that shares with nobody.
        tokens: Trained on.
        bytes: Of its file.
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

    Two that write the same checkpoint write the same bits, so that it does not matter whose is kept.

    Args:
        files: What holds them.
        scratch: Local folder in which one is written before it is put; for `LocalFiles` on the same file system.
    """

    def __init__(self, files: Files, scratch: Path) -> None:
        self._files = files
        self._scratch = scratch

    def find(self, stage: str, at_most_tokens: int) -> tuple[Path, Checkpoint] | None:
        """The furthest checkpoint of a stage at or below a point, as a local file; None where there is none."""
        for checkpoint in sorted(self.checkpoints(stage), reverse=True):
            if checkpoint.tokens <= at_most_tokens:
                path = self._files.get(checkpoint.key)
                if path is not None:  # else it was removed meanwhile
                    return path, checkpoint
        return None

    def holds(self, stage: str, tokens: int) -> bool:
        """Return whether there is a checkpoint of a stage at exactly these tokens."""
        return any(checkpoint.tokens == tokens for checkpoint in self.checkpoints(stage))

    def save(self, stage: str, tokens: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint, whole or not at all.

        Args:
            stage, tokens: Of the checkpoint.
            write: Writes it to the local path that it is given.

        Raises:
            OSError: It cannot be written; so may `write` raise.
        """
        make_folder(self._scratch)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            file = Path(folder) / _key(stage, tokens)
            write(file)
            self._files.put(file, file.name)

    def checkpoints(self, stage: str | None = None) -> list[Checkpoint]:
        """All checkpoints, or those of one stage, in order."""
        found = []
        for key, size in self._files.list().items():
            match = _KEY.match(key)
            if match and stage in (None, match[1]):
                found.append(Checkpoint(stage=match[1], tokens=int(match[2]), bytes=size))
        return sorted(found)

    def drop_copy(self, checkpoint: Checkpoint) -> bool:
        """Drop this machine's copy, which is fetched again; False where there is none beside the checkpoint itself."""
        return self._files.drop_copy(checkpoint.key)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint; nothing where it is gone."""
        self._files.remove(checkpoint.key)

    def sweep(self) -> None:
        """Remove what killed writers left behind; called while nobody writes."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def open_stages(checkpoints: Path, storage: Storage | None = None) -> StageStore:
    """The store of a run.

    Args:
        checkpoints: The run's folder of trained weights, on this machine.
        storage: The run's, which holds its stages then; the folder has copies.
    """
    root = checkpoints / "stages"
    files: Files = LocalFiles(root) if storage is None else StoredFiles(storage.at("stages"), root)
    return StageStore(files, scratch=root / ".partial")


def default_limit(folder: Path, storage: Storage | None = None, students: int = 0) -> int | None:
    """Return the bytes that a run's checkpoints and students may take where nobody says: a quarter of them and the free
    disk.

    The disk is that which holds them. Of an object store, which has none that could be full, there is no limit.

    Args:
        folder: The run's, of trained weights, on this machine.
        storage: The run's, which holds its stages then.
        students: Bytes that its students take.
    """
    root = folder if storage is None else storage.folder
    if root is None:
        return None
    held = sum(checkpoint.bytes for checkpoint in open_stages(folder, storage).checkpoints())
    existing = next(path for path in (root, *root.parents) if path.exists())
    return (shutil.disk_usage(existing).free + held + students) // _DEFAULT_SHARE

"""Computes what a disk holds after a crash from the calls made until then: names and data, and what was synced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from tests.crash.kernel import Call

Model = Literal["killed", "synced", "names", "zeros"]
MODELS: dict[Model, str] = {
    "killed": "the process is killed, the machine goes on: all that was written is there",
    "synced": "power fails: data count once their file is synced, and names once their folder is",
    "names": "power fails: all names are there, of unsynced files without the data (ext4, delayed allocation)",
    "zeros": "power fails: all names and lengths are there, unsynced data are zeros (ext4 in writeback mode, XFS)",
}


@dataclass(frozen=True)
class Kept:
    """A file after the crash: its bytes, and when they were written."""

    data: bytes
    time: float


class _File:
    def __init__(self, time: float) -> None:
        self.data, self.synced, self.time, self.synced_time = bytearray(), b"", time, time
        self.digests: dict[Model, bytes] = {}

    def after(self, model: Model) -> bytes:
        if model == "killed":
            return bytes(self.data)
        if model == "zeros":
            return self.synced[: len(self.data)].ljust(len(self.data), b"\0")
        return self.synced

    def digest(self, model: Model) -> bytes:
        if model not in self.digests:
            self.digests[model] = hashlib.blake2b(self.after(model), digest_size=16).digest()
        return self.digests[model]


class _Folder:
    def __init__(self) -> None:
        self.entries: dict[str, _File | _Folder] = {}
        self.synced: dict[str, _File | _Folder] = {}

    def after(self, model: Model) -> Mapping[str, _File | _Folder]:
        return self.synced if model == "synced" else self.entries


class Disk:
    """A folder and everything below it, as `Call`s change it. A call that the kernel would refuse changes nothing."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._keys: dict[Model, bytes] = {}

    def apply(self, call: Call) -> None:
        """Apply one call.

        Raises:
            AssertionError: This kind of call is not known here, such as writing through shared memory.
        """
        folder, name = self._folder(call.path), PurePosixPath(call.path).name
        if call.name == "sync":
            self._sync(self._at(call.path))
        elif folder is None:
            return
        elif call.name == "create":
            there = folder.entries.get(name)
            if there is None and call.flags & os.O_CREAT:
                folder.entries[name] = _File(call.time)
            elif isinstance(there, _File) and call.flags & os.O_TRUNC and not call.flags & os.O_EXCL:
                _resize(there, 0, call.time)
        elif call.name in ("write", "truncate"):
            file = folder.entries.get(name)
            if not isinstance(file, _File):
                return
            if call.name == "truncate":
                _resize(file, call.offset, call.time)
            elif call.data:
                _resize(file, max(len(file.data), call.offset + len(call.data)), call.time)
                file.data[call.offset : call.offset + len(call.data)] = call.data
        elif call.name == "mkdir":
            folder.entries.setdefault(name, _Folder())
        elif call.name == "rmdir":
            there = folder.entries.get(name)
            if isinstance(there, _Folder) and not there.entries:
                del folder.entries[name]
        elif call.name == "unlink":
            if isinstance(folder.entries.get(name), _File):
                del folder.entries[name]
        elif call.name in ("rename", "link"):
            self._rename(call, folder, name)
        else:
            raise AssertionError(f"{call.name} of {call.path} is not known to this model of a disk")

    def _rename(self, call: Call, folder: _Folder, name: str) -> None:
        target, new = self._folder(call.other), PurePosixPath(call.other).name
        found = folder.entries.get(name)
        if found is None or target is None:
            return
        there = target.entries.get(new)
        if call.name == "link":
            target.entries.setdefault(new, found)
            return
        if isinstance(there, _Folder) and (there.entries or isinstance(found, _File)):
            return
        if isinstance(there, _File) and isinstance(found, _Folder):
            return
        del folder.entries[name]
        target.entries[new] = found

    def _sync(self, node: _File | _Folder | None) -> None:
        if isinstance(node, _Folder):
            node.synced = dict(node.entries)
        elif node is not None:
            node.synced, node.synced_time = bytes(node.data), node.time
            node.digests.clear()

    def _folder(self, path: str) -> _Folder | None:
        parent = PurePosixPath(path).parent
        found = self._at(str(parent))
        return found if isinstance(found, _Folder) else None

    def _at(self, path: str) -> _File | _Folder | None:
        node: _File | _Folder | None = self._root
        for part in PurePosixPath(path).parts:
            node = node.entries.get(part) if isinstance(node, _Folder) else None
        return node

    def after(self, model: Model) -> dict[str, Kept | None]:
        """Return what exists after a crash, by path: a file, or None for a folder."""
        return {
            path: Kept(node.after(model), node.time if model == "killed" else node.synced_time)
            if isinstance(node, _File)
            else None
            for path, node in _walk(self._root, model)
        }

    def changed(self, model: Model) -> bool:
        """Return whether the state after a crash differs from the last time that this was asked for the model."""
        before, self._keys[model] = self._keys.get(model), self.key(model)
        return before != self._keys[model]

    def key(self, model: Model) -> bytes:
        """Return a key that is the same for two equal states."""
        total = hashlib.blake2b(digest_size=16)
        for path, node in sorted(_walk(self._root, model), key=lambda item: item[0]):
            total.update(path.encode() + b"\0" + (node.digest(model) if isinstance(node, _File) else b"/") + b"\0")
        return total.digest()


def _walk(folder: _Folder, model: Model, below: str = "") -> Iterator[tuple[str, _File | _Folder]]:
    for name, node in folder.after(model).items():
        yield f"{below}{name}", node
        if isinstance(node, _Folder):
            yield from _walk(node, model, f"{below}{name}/")


def _resize(file: _File, size: int, time: float) -> None:
    file.time = time
    file.digests.clear()
    del file.data[size:]
    file.data.extend(bytes(size - len(file.data)))


@dataclass(frozen=True, kw_only=True)
class State:
    """A state that a crash may leave: the calls made, the model, and how many prefixes lead to the same state."""

    calls: int
    model: Model
    prefixes: int


def states(calls: Sequence[Call]) -> list[State]:
    """Return all distinct states of every prefix of the calls under every model, each where it first occurs."""
    disk = Disk()
    first: dict[bytes, tuple[int, Model]] = {}
    counts: dict[bytes, int] = {}
    for done in range(len(calls) + 1):
        if done:
            disk.apply(calls[done - 1])
        for model in MODELS:
            key = disk.key(model)
            first.setdefault(key, (done, model))
            counts[key] = counts.get(key, 0) + 1
    return [State(calls=done, model=model, prefixes=counts[key]) for key, (done, model) in first.items()]


def replay(calls: Sequence[Call], state: State, folder: Path) -> None:
    """Write the files of a state into an empty folder, with the times at which they were written."""
    disk = Disk()
    for call in calls[: state.calls]:
        disk.apply(call)
    for path, kept in disk.after(state.model).items():
        if kept is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(kept.data)
            os.utime(folder / path, (kept.time, kept.time))

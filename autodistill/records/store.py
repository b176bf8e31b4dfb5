"""The run folder and its append-only event log, readable after a kill at any byte."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from autodistill.errors import AutoDistillError, InputError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\Z", re.ASCII)
_LOCK = "lock"
_SEARCH = "search.json"


def strict_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data in which every NaN or infinity, which JSON cannot hold, has become None.

    What each was is kept under the key `non_finite`: the dotted path of the value to "nan", "inf" or "-inf".

    Raises:
        TypeError: A key is not a string, so that the data would not read back as written.
    """
    found: dict[str, str] = {}
    plain = {key: _finite(value, str(key), found) for key, value in data.items()}
    _check_keys(data)
    return plain | {"non_finite": found} if found else plain


def _finite(value: Any, where: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[where] = str(float(value))
        return None
    if isinstance(value, Mapping):
        _check_keys(value)
        return {key: _finite(item, f"{where}.{key}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{where}.{index}", found) for index, item in enumerate(value)]
    return value


def _check_keys(data: Mapping[Any, Any]) -> None:
    wrong = [key for key in data if not isinstance(key, str)]
    if wrong:
        raise TypeError(f"keys of a record are text, not {wrong[0]!r}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; at the end it is synced and renamed to `path`.

    A reader sees the old file or the whole new one. After an exception nothing is left behind.

    Raises:
        InputError: The folder cannot be written to.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lets one process, and one thread, at a time make what is to lie at `path`; others wait, and find it made.

    The lock ends with its holder, however that ends. Where a file system has no locks nobody waits: what is made twice
    is renamed into place whole by each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The holder before removed the file that was waited for; another one may have made the next by now.
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
def claimed(path: Path) -> Iterator[bool]:
    """Gives whether no run holds a file (see `RunFolder.hold`); none can take hold of it within the block."""
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
            free = error.errno not in (errno.EAGAIN, errno.EACCES)  # else a file system without locks
        yield free
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes data as strict JSON, atomically; see `strict_json` on values that are not finite."""
    text = json.dumps(strict_json(data), indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        InputError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it from a copy, or start a new run") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object: restore it from a copy, or start a new run")
    return data


class EventLog:
    """An append-only file of events, one line of strict JSON each.

    Reading never changes the file. Appending locks the file for that moment, so several processes may append.

    Args:
        path: The file; made by the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Writes one event and syncs it to the disk; returns once it will outlive a crash.

        A torn last line, left by a writer that was killed, is removed first; a whole one that lacks only its newline
        is given it.

        Raises:
            AutoDistillError: The line could not be written whole; the log then ends with the event before it.
        """
        line = json.dumps(strict_json(event), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        created = not self.path.exists()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _repair(descriptor)
                _write_whole(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if created:
                _sync(self.path.parent)
        except OSError as error:
            raise AutoDistillError(
                f"cannot write to {self.path}: {error.strerror}; what it held is kept: make room for it, and go on "
                "with --resume"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All whole events, oldest first; none where there is no file yet.

        Raises:
            InputError: The file is unreadable, or a line other than a torn last one is no JSON object.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        *lines, tail = data.split(b"\n")
        events = [self._whole(number, line) for number, line in enumerate(lines, start=1)]
        # A proper beginning of a JSON object is never one itself, so a tail that parses lacks nothing but its newline.
        last = _event(tail)
        return events if last is None else [*events, last]

    def _whole(self, number: int, line: bytes) -> dict[str, Any]:
        event = _event(line)
        if event is None:
            raise InputError(
                f"line {number} of {self.path} is corrupt (no JSON object): restore the file from a copy, or remove "
                "that line to go on without its event"
            )
        return event


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return event if isinstance(event, dict) else None


def _repair(descriptor: int) -> None:
    """Makes the file end with a newline: truncates a torn last line, completes a whole one."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        data = file.read()
    start = data.rfind(b"\n") + 1
    if _event(data[start:]) is None:
        os.ftruncate(descriptor, start)
    else:
        _write_whole(descriptor, b"\n")


def _write_whole(descriptor: int, line: bytes) -> None:
    before = os.fstat(descriptor).st_size
    if os.write(descriptor, line) != len(line):
        os.ftruncate(descriptor, before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _TakenError(InputError):
    """A run of this name is there, or another process holds it."""


class RunFolder:
    """The folder of one run: `search.json`, `trials.jsonl`, `leaderboard.parquet`, `checkpoints/`, `student/`.

    A context manager; leaving it gives up the lock.

    Attributes:
        name: The run's name.
        path: `<out>/<name>`.
    """

    def __init__(self, out: Path, name: str) -> None:
        _check_name(name)
        self.name = name
        self.path = out / name
        self._lock: int | None = None
        self._log = EventLog(self.path / "trials.jsonl")
        self._held: list[int] = []

    @classmethod
    def create(cls, out: Path, name: str) -> RunFolder:
        """Makes the folder of a new run and locks it.

        Raises:
            InputError: No plain name, the folder cannot be written, a run of this name exists or another process
                holds it, or the folder holds something that is not a run.
        """
        run = cls(out, name)
        run.check_free()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(out, error) from error
        run._acquire()
        try:
            # Another process may have made the run and ended between the first look and the lock.
            run.check_free()
        except InputError:
            run.close()
            raise
        return run

    @classmethod
    def create_free(cls, out: Path, stem: str) -> RunFolder:
        """As `create`, under the first of the names `stem`, `stem-2`, `stem-3`, ... that is free.

        Raises:
            InputError: The folder cannot be written.
        """
        for number in count(1):
            try:
                return cls.create(out, stem if number == 1 else f"{stem}-{number}")
            except _TakenError:
                continue
        raise AssertionError("numbers do not end")

    @classmethod
    def open(cls, out: Path, name: str, *, lock: bool = False) -> RunFolder:
        """An existing run: to read it, or with `lock` to go on with it.

        Raises:
            InputError: No plain name, no such run (the known ones are listed), or another process holds it.
        """
        run = cls(out, name)
        if not run.search_file.is_file():
            known = known_runs(out)
            listed = f"the runs there are {', '.join(known)}" if known else "there are no runs there"
            raise InputError(f"there is no run {name!r} in {out}: {listed}")
        if lock:
            run._acquire()
        return run

    @property
    def search_file(self) -> Path:
        """All that is needed to run the search again."""
        return self.path / _SEARCH

    @property
    def events(self) -> EventLog:
        """The log of the trials."""
        return self._log

    def use(self, log: EventLog) -> None:
        """Appends to another log, which keeps this one."""
        self._log = log

    @property
    def leaderboard_file(self) -> Path:
        """The rows, derived from the log."""
        return self.path / "leaderboard.parquet"

    @property
    def checkpoints(self) -> Path:
        """Folder of trained weights."""
        return self.path / "checkpoints"

    def student(self, container: str) -> Path:
        """Folder of the exported student in one container, like "gguf"."""
        return self.path / "student" / container

    def close(self) -> None:
        """Gives up the lock, if it is held, and what is held with it."""
        while self._held:
            os.close(self._held.pop())
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hold(self, path: Path) -> bool:
        """Keeps other runs from removing a shared file (see `claimed`) until this one is closed; False if it is gone.

        Args:
            path: The file.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._held.append(descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Another run may have been removing it just before.
        return path.exists()

    def discard(self) -> None:
        """Removes the folder of a run that was made and ended before anything was planned, so that nothing is left."""
        if self.search_file.exists():
            return
        for path in self.path.iterdir():
            if self._left_over(path):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            self.path.rmdir()

    @staticmethod
    def _left_over(path: Path) -> bool:
        """Whether a file is what a run leaves that was killed before anything was planned."""
        return path.name == _LOCK or (path.name.startswith(".search.") and path.suffix == ".json")

    def check_free(self) -> None:
        """Refuses a name that a run, or anything else, has already."""
        if self.search_file.exists():
            raise _TakenError(
                f"the run {self.name!r} exists in {self.path.parent}: go on with it by --resume, or choose another "
                "name with --name"
            )
        if self.path.exists() and (not self.path.is_dir() or not all(map(self._left_over, self.path.iterdir()))):
            raise _TakenError(f"{self.path} exists and is not a run: choose another name with --name")

    def _acquire(self) -> None:
        """Locks the run for this process; the kernel frees the lock however the process ends."""
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
            os.close(descriptor)
            where = f" on {host}" if host not in ("", socket.gethostname()) else ""
            raise _TakenError(
                f"the run {self.name!r} is held by the running process {process or '(unknown)'}{where}: wait for it, "
                f"or stop it{where} (kill {process or 'PID'}) and go on with --resume; a new run takes another --name"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise InputError(f"{self.path} cannot be locked ({error.strerror}): put --out on a local disk") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        self._lock = descriptor


def default_cache() -> Path:
    """Where teachers, prepared data, teacher outputs and this machine's measurement are kept for all runs."""
    return Path.home() / ".cache" / "autodistill"


def known_runs(out: Path) -> list[str]:
    """Names of the runs in a folder, sorted."""
    return sorted(path.parent.name for path in out.glob(f"*/{_SEARCH}") if _NAME.match(path.parent.name))


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise InputError(
            f"{name!r} is not a plain run name: use up to 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter, a digit or '_'"
        )


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write into {folder}: {error.strerror}; choose another folder with --out")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The folder of a run, which one process at a time can lock."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

from autodistill.errors import InputError
from autodistill.runs.run_log import RunLog
from autodistill.runs.schema import check_log, read_search
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import unwritable

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\Z", re.ASCII)
_LOCK = "lock"
_SEARCH = "search.json"
_COPYING_SECONDS = 10


class _TakenError(InputError):
    """A run of this name exists, or another process holds it."""


class RunFolder:
    """The folder of one run: `search.json`, `trials.jsonl`, `leaderboard.parquet`, `checkpoints/`, `student/`.

    It is a context manager that gives up the lock at its end.

    Attributes:
        name: The run's name.
        path: `<out>/<name>`.
    """

    def __init__(self, out: Path, name: str) -> None:
        _check_name(name)
        self.name = name
        self.path = out / name
        self._lock: int | None = None
        self._log = RunLog(self.path / "trials.jsonl")
        self._held: list[int] = []

    @classmethod
    def create(cls, out: Path, name: str) -> Self:
        """Make the folder of a new run and lock it.

        Raises:
            InputError: The name is not a plain name, or the folder cannot be written. Also if a run of this name
                exists, another process holds it, or the folder contains something that is not a run.
        """
        run = cls(out, name)
        run.check_free()
        try:
            make_folder(run.path)
        except OSError as error:
            raise unwritable(out, error, "--runs") from error
        run._acquire()
        try:
            # Another process may have made the run and ended between the first check and the lock.
            run.check_free()
        except InputError:
            run.close()
            raise
        return run

    @classmethod
    def create_free(cls, out: Path, stem: str) -> Self:
        """Create a run's folder under the first of the names `stem`, `stem-2`, `stem-3`, ... that is free.

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
    def open(cls, out: Path, name: str, *, lock: bool = False) -> Self:
        """Open an existing run to read it, or with `lock` to continue it.

        Raises:
            InputError: The name is not a plain name, there is no such run (the message lists the known ones), or
                another process holds it.
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
        """The file with everything that is needed to repeat the search."""
        return self.path / _SEARCH

    def read_settings(self, *needed: str) -> dict[str, Any]:
        """Return the content of `search_file`.

        Args:
            needed: As in `schema.read_search`.

        Raises:
            InputError: The file is not what a search writes.
        """
        return read_search(self.search_file, *needed)

    def check_together(self, rungs: int, *, whole: bool = False) -> None:
        """Check that the events of the log fit together, as `schema.check_log` does.

        Raises:
            InputError: They do not. The message names the log and what does not fit.
        """
        try:
            check_log(self._log.read(), rungs, whole=whole)
        except InputError as error:
            raise InputError(f"{self._log.path} is not whole: {error}; restore it from a copy") from None

    @property
    def events(self) -> RunLog:
        """The log of the trials."""
        return self._log

    def use(self, log: RunLog) -> None:
        """Use another log from now on, which also writes to the file of this one."""
        self._log = log

    @property
    def leaderboard_file(self) -> Path:
        """The file with the table of rows, which is derived from the log."""
        return self.path / "leaderboard.parquet"

    @property
    def tabled(self) -> bool:
        """Whether `leaderboard_file` is as new as the log. It is not if the run is under way or was resumed."""
        if not self.leaderboard_file.is_file():
            return False
        log = self._log.path
        return not log.is_file() or log.stat().st_mtime_ns <= self.leaderboard_file.stat().st_mtime_ns

    @property
    def state(self) -> str:
        """The state of the run: "finished", "under way", or "stopped", in which case it can be resumed."""
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return self._ended_as()
        try:
            # This shared lock is given up at once. It fails only if a run holds its exclusive lock.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "under way"
        except OSError:
            pass
        finally:
            os.close(descriptor)
        return self._ended_as()

    def _ended_as(self) -> str:
        table, log = self.leaderboard_file, self._log.path
        if not table.is_file():
            return "stopped"
        # The table is written last, but copying both files may reverse the order of their times.
        later = log.stat().st_mtime - table.stat().st_mtime if log.is_file() else 0.0
        return "finished" if later < _COPYING_SECONDS else "stopped"

    @property
    def checkpoints(self) -> Path:
        """Folder of trained weights."""
        return self.path / "checkpoints"

    def student(self, container: str) -> Path:
        """Folder of the exported student in one container, like "gguf"."""
        return self.path / "student" / container

    def close(self) -> None:
        """Give up the lock, if it is held, and the shared files that were held by `hold`."""
        while self._held:
            os.close(self._held.pop())
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self, path: Path) -> bool:
        """Keep other runs from removing a shared file (see `try_lock`) until this one closes; False if it is gone."""
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
        """Remove the folder of a run that ended before anything was planned.

        Files that cannot be removed stay, for example on a disk that has become read-only. The name is free anyway.
        """
        if self.search_file.exists():
            return
        with suppress(OSError):  # also raised by `rmdir` if other files are in the folder
            for path in self.path.iterdir():
                if self._left_over(path):
                    path.unlink(missing_ok=True)
            self.path.rmdir()

    @staticmethod
    def _left_over(path: Path) -> bool:
        """Return whether a file can be left by a run that was killed before anything was planned."""
        return path.name == _LOCK or (path.name.startswith(".search.") and path.suffix == ".json")

    def check_free(self) -> None:
        """Refuse a name that a run, or anything else in the folder of runs, has already."""
        if self.search_file.exists():
            raise _TakenError(
                f"the run {self.name!r} exists in {self.path.parent}: go on with it by --resume, or choose another "
                "name with --name"
            )
        if self.path.exists() and (not self.path.is_dir() or not all(map(self._left_over, self.path.iterdir()))):
            raise _TakenError(f"{self.path} exists and is not a run: choose another name with --name")

    def _acquire(self) -> None:
        """Lock the run for this process. The kernel frees the lock when the process ends, for any reason."""
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise unwritable(self.path, error, "--runs") from error
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
            raise InputError(f"{self.path} cannot be locked ({error.strerror}): put --runs on a local disk") from error
        self._lock = descriptor
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise unwritable(self.path, error, "--runs") from error


def read_each(out: Path, read: Callable[[RunFolder], T], names: Iterable[str] = ()) -> dict[str, T]:
    """Return the result of `read` for each of some runs, or for each run in a folder, by name.

    Without `names`, unreadable runs are left out, with a line on stderr for each, unless no run can be read.

    Args:
        out: Folder of the runs.
        read: Reads one run.
        names: Names of runs; all runs of the folder by default.

    Raises:
        InputError: There is no such run, a named run cannot be read, or none of the folder's runs can be read.
    """
    if named := list(dict.fromkeys(names)):
        return {name: read(RunFolder.open(out, name)) for name in named}
    found: dict[str, T] = {}
    refused: dict[str, InputError] = {}
    for name in known_runs(out):
        try:
            found[name] = read(RunFolder.open(out, name))
        except InputError as error:
            refused[name] = error
    if refused and not found:
        raise next(iter(refused.values()))
    for name, why in refused.items():
        print(f"warning: the run {name} is left out: {why}", file=sys.stderr, flush=True)
    return found


def newest_run(out: Path) -> RunFolder:
    """Return the newest run of a folder, and print its name on stderr.

    Raises:
        InputError: There is no run, or none that can be read.
    """
    made = read_each(out, lambda run: run.read_settings("created")["created"])
    if not made:
        raise no_runs(out)
    name = max(made, key=lambda name: (made[name], name))
    print(f"run {name}, the newest in {out}", file=sys.stderr, flush=True)
    return RunFolder.open(out, name)


def no_runs(out: Path) -> InputError:
    """Return the error that says that a folder has no runs."""
    return InputError(f"there are no runs in {out}: make one with autodistill search, or name another folder of runs")


def known_runs(out: Path) -> list[str]:
    """Return the names of the runs in a folder, sorted."""
    return sorted(path.parent.name for path in out.glob(f"*/{_SEARCH}") if _NAME.match(path.parent.name))


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        raise InputError(
            f"{name!r} is not a plain run name: use up to 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter, a digit or '_'"
        )

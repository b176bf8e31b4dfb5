"""An append-only log of events that can be read after a kill at any byte."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from autodistill.errors import AutoDistillError, InputError, LaterVersionError
from autodistill.utils.durable import NO_ROOM, sync
from autodistill.utils.json_files import plain_json, read_plain, strict_json

# Inode, size and time of change. If they are unchanged, so are the lines of the file.
_Stamp: TypeAlias = tuple[int, int, int]


class EventLog:
    """An append-only file of events, one line of strict JSON each.

    Reading never changes the file. Appending locks the file for that moment, so several processes may append. Events
    that were read, or appended here, are kept in memory. The file is read again only if another process has changed it.

    Args:
        path: The file. The first `append` creates it.
        check: Checks each event that is read, and raises `InputError` if it is not valid.
    """

    def __init__(self, path: Path, check: Callable[[Mapping[str, Any]], None] = lambda event: None) -> None:
        self.path = path
        self._check_event = check
        self._events: list[dict[str, Any]] = []
        self._checked_count = 0  # how many of these have been checked
        self._read_stamp: _Stamp | None = None  # stamp of the file that contains them

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event. When this returns, the event survives a crash.

        First, a last line that a killed writer left is repaired: a torn line is removed, and a whole line that lacks
        only its newline gets one.

        Raises:
            AutoDistillError: The line could not be written completely. The log then ends with the event before it.
        """
        line = json.dumps(strict_json(event), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        created = not self.path.exists()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                known = self._read_stamp is not None and self._read_stamp == _stamp(os.fstat(descriptor))
                _repair(descriptor)
                self._read_stamp = None
                _write_whole(descriptor, line)
                os.fsync(descriptor)
                if known:
                    self._events.append(plain_json(line))
                    self._read_stamp = _stamp(os.fstat(descriptor))
            finally:
                os.close(descriptor)
            if created:
                sync(self.path.parent)
        except OSError as error:
            remedy = "make room for it" if error.errno in NO_ROOM else "look after its disk"
            raise AutoDistillError(
                f"cannot write to {self.path}: {error.strerror}; what it held is kept: {remedy}, and go on with "
                "--resume"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """Return all complete events, oldest first; an empty list if there is no file yet.

        Raises:
            InputError: The file is unreadable, or a line is not a JSON object or not valid. A torn last line is
                allowed.
        """
        try:
            now = self._stamp()
            if now is None or now != self._read_stamp:
                self._forget()
                self._events, self._checked_count, self._read_stamp = [], 0, None
            if now != self._read_stamp:
                self._events, self._read_stamp = self._whole_file(), now
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        for number, event in enumerate(self._events[self._checked_count :], start=self._checked_count + 1):
            try:
                self._check_event(event)
            except LaterVersionError as error:
                raise InputError(f"line {number} of {self.path}: {error}") from None
            except (InputError, ValueError, OverflowError) as error:
                raise InputError(
                    f"line {number} of {self.path} is not what was written: {error}; restore the file from a copy, or "
                    "remove that line to go on without it"
                ) from None
            self._checked_count = number
        return list(self._events)

    def _stamp(self) -> _Stamp | None:
        try:
            return _stamp(self.path.stat())
        except FileNotFoundError:
            return None

    def _forget(self) -> None:
        """Forget what `check` has kept of the events. It is called before the whole file is read again."""

    def _whole_file(self) -> list[dict[str, Any]]:
        *lines, tail = read_plain(self.path).split(b"\n")
        events = [self._whole(number, line) for number, line in enumerate(lines, start=1)]
        # A proper prefix of a JSON object is never one itself, so a tail that can be parsed lacks only its newline.
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


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = plain_json(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8, or nested deeper than anything written here
        return None
    return event if isinstance(event, dict) else None


def _repair(descriptor: int) -> None:
    """Make the file end with a newline: remove a torn last line, or complete a whole one."""
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

"""A run's second copy on a storage, and the lease with which one machine at a time continues the run.

`pyarrow.fs` cannot create an object on the condition that it does not exist yet. A lease is therefore written, and read
again a moment later. This guarantees three things. A run whose holder still renews its lease is refused. If several
processes take a run at once, the last one to write has it. A holder that lost its lease, for example because its
machine slept, notices at its next beat and writes no more events. Until that beat two processes may work on the run.
Nothing is lost or overwritten then, since each event is an object of its own and checkpoints are addressed by content,
but a trial may be trained twice.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from autodistill.errors import AutoDistillError, InputError
from autodistill.runs.events import read_events
from autodistill.runs.run_log import RunLog
from autodistill.units import format_duration
from autodistill.utils.event_log import EventLog
from autodistill.utils.json_files import plain_json, strict_json
from autodistill.utils.storage import Storage
from autodistill.utils.typed_data import check_typed

BEAT_SECONDS = 20.0

STALE_SECONDS = 120.0
"""Seconds without a beat after which a lease may be taken over: several beats, so that a slow storage does no harm."""

# Wait between writing a lease and reading it again: longer than the request of a process that writes at the same time.
_SETTLE_SECONDS = 2.0

_KEY = "lease.json"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a run.

    Attributes:
        host, process: Host name and process id, to show to a person.
        place: Identifies the running kernel and the namespace of process ids. If this process has the same place, it
            can see whether the holder still runs.
        born: When the process began, since process ids are reused.
        token: Random id of this one hold.
    """

    host: str
    process: int
    place: str
    born: float
    token: str

    @classmethod
    def here(cls) -> Holder:
        """Return this process as a holder."""
        born = psutil.Process().create_time()
        return cls(host=socket.gethostname(), process=os.getpid(), place=_place(), born=born, token=uuid.uuid4().hex)

    def describe(self) -> str:
        """Return the holder in words."""
        return f"process {self.process} on {self.host}"

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended: processes of its place are visible from here, and it is not among them."""
        if not self.place or self.place != _place():
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Lease:
    """A run that this process holds.

    It is a context manager. Within it a thread renews the lease, and at its end the lease is given up.

    Args:
        storage: The run's storage.
        notify: Called with a message if the lease is taken over from another process.
    """

    def __init__(self, storage: Storage, notify: Callable[[str], None] = lambda line: None) -> None:
        self._storage = storage
        self._notify = notify
        self._holder = Holder.here()
        self._taken_by: Holder | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            InputError: Another process holds it, or took it at the same moment.
        """
        before = check_unheld(self._storage)
        if before is not None:
            why = "which has ended" if before.ended else f"not heard of for {format_duration(STALE_SECONDS)} or more"
            self._notify(f"the run is taken over from {before.describe()}, {why}")
        self._write()
        time.sleep(_SETTLE_SECONDS)
        now = _read(self._storage)
        if now != self._holder:
            who = now.describe() if now else "another process"
            raise InputError(f"{who} took the run on {self._storage.uri} at the same moment: leave it to that one")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        try:
            if _read(self._storage) == self._holder:
                self._storage.remove(_KEY)
        except (OSError, InputError):
            return  # the lease expires by itself

    def check(self) -> None:
        """Refuse to continue a run that another process has taken over.

        Raises:
            AutoDistillError: Another process holds the run.
        """
        if self._taken_by is not None:
            raise AutoDistillError(
                f"the run on {self._storage.uri} was taken over by {self._taken_by.describe()}, since this process had "
                "not been heard of: it ends here, and what it had written down is kept"
            )

    def beat(self) -> None:
        """Renew the lease, unless another process has it."""
        try:
            now = _read(self._storage)
            if now is not None and now != self._holder:
                self._taken_by = now
            else:
                self._write()
        except (OSError, InputError):
            return  # the next beat may succeed

    def _renew(self) -> None:
        while self._taken_by is None and not self._over.wait(BEAT_SECONDS):
            self.beat()

    def _write(self) -> None:
        data = asdict(self._holder) | {"beat": time.time()}
        try:
            self._storage.write(_KEY, json.dumps(data).encode())
        except OSError as error:
            raise InputError(f"cannot write to {self._storage.uri}: {error}") from error


def check_unheld(storage: Storage) -> Holder | None:
    """Refuse a run that another process holds, as far as can be seen.

    Returns:
        The previous holder if the run may be taken over from it, or None if there is none.

    Raises:
        InputError: The run is held. The message says by whom, and when it may be taken over.
    """
    holder = _read(storage)
    if holder is None or holder.ended:
        return holder
    # The age is by the storage's own clock, since the clocks of two machines may differ by minutes.
    age = storage.age(_KEY)
    if age is None or age >= STALE_SECONDS:
        return holder
    raise InputError(
        f"the run on {storage.uri} is held by {holder.describe()}, last heard of {format_duration(max(age, 0.0))} ago: "
        "wait for it, or stop it there and go on with --resume. If that machine is gone, the run may be taken over in "
        f"{format_duration(STALE_SECONDS - age)}"
    )


def _read(storage: Storage) -> Holder | None:
    try:
        data = json.loads(storage.read(_KEY))
        return Holder(**{name: data[name] for name in Holder.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{_KEY} of {storage.uri} cannot be read ({error}): remove it if no search runs") from error


def _place() -> str:
    """Return the boot id of the kernel and the namespace of process ids, or "" if they are unknown.

    Within one such place, a process id identifies a process.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


_FOLDER, _SEARCH = "events", "search.json"


class StoredLog(RunLog):
    """A log that writes each event to the storage before the local log, so that any machine can continue the run.

    Object stores cannot append, so each event is an object. Its name begins with the time and sorts after all earlier
    names. Names are therefore in the order of events for any number of writers. Names of different writers never clash.

    Args:
        path: Path of the local log.
        storage: The run's storage.
        check: Called before anything is written. It raises if another process has taken over the run.
    """

    def __init__(self, path: Path, storage: Storage, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self._storage = storage
        self._check = check
        self._last = 0

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event to the storage, and then to the local log.

        Raises:
            AutoDistillError: The event could not be written, or another process has taken over the run.
        """
        self._check()
        self._last = max(time.time_ns(), self._last + 1)
        key = f"{_FOLDER}/{self._last:020d}-{uuid.uuid4().hex[:8]}.json"
        data = json.dumps(strict_json(event), separators=(",", ":"), allow_nan=False).encode()
        try:
            self._storage.write(key, data)
        except OSError as error:
            raise AutoDistillError(f"cannot write to {self._storage.uri}: {error}; what it held is kept") from error
        super().append(event)

    def sync(self) -> None:
        """Make the local log equal to the events on the storage, which take precedence.

        Raises:
            InputError: An event cannot be read.
        """
        keys = sorted(self._storage.list(_FOLDER))
        try:
            self._last = max((int(Path(key).name.partition("-")[0]) for key in keys), default=0)
            events = [plain_json(data) for data in self._storage.read_all(keys)]
            check_typed(events, list[dict[str, Any]], "the events")
            read_events(events)
        except (OSError, ValueError, InputError) as error:
            raise InputError(f"the events of {self._storage.uri} cannot be read ({error}): restore them") from error
        if events == self.read():
            return
        self.path.unlink(missing_ok=True)
        log = EventLog(self.path)
        for event in events:
            log.append(event)


def check_free(storage: Storage) -> None:
    """Refuse the name of a run that exists on the storage.

    Raises:
        InputError: The run exists.
    """
    if storage.has(_SEARCH):
        raise InputError(
            f"there is a run on {storage.uri}: go on with it by --resume, or choose another name with --name"
        )


def keep(search_file: Path, storage: Storage) -> None:
    """Copy the run's `search.json` to its storage.

    Raises:
        AutoDistillError: It cannot be written.
    """
    try:
        storage.put(search_file, _SEARCH)
    except OSError as error:
        raise AutoDistillError(f"cannot write to {storage.uri}: {error}") from error


def pull(folder: Path, storage: Storage) -> bool:
    """Fetch the run's `search.json` from the storage, and replace the local one with it.

    Another machine may have continued the run in the meantime. If the storage has no such file yet, the local one
    stays.

    Returns:
        Whether there is a `search.json` now.

    Raises:
        InputError: The folder cannot be written, or the storage cannot be read.
    """
    file = folder / _SEARCH
    try:
        if not storage.has(_SEARCH):
            return file.exists()
        storage.get(_SEARCH, file)
    except OSError as error:
        raise InputError(f"cannot fetch the run from {storage.uri} into {folder}: {error}") from error
    return True

"""A run's second copy on a storage, and the lease by which one machine at a time goes on with it.

No object store that `pyarrow.fs` reaches creates an object only where there is none, so a lease is written, and read
again a moment later. What that guarantees: a run whose holder is heard of is refused; of several that take it at once
the last to write has it; and a holder that was overtaken, or slept too long, finds so at its next beat and writes no
more events. What it does not: until that beat two may go on side by side. Nothing is lost or overwritten then, since
events are objects of their own and checkpoints lie under their content, but a trial may be trained twice.
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
"""After so long without a beat a lease may be taken over: a few of them, and a storage that was slow."""

# Between writing a lease and reading it again: longer than a request of whoever writes at the same moment.
_SETTLE_SECONDS = 2.0

_KEY = "lease.json"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that goes on with a run.

    Attributes:
        host, process: For a person.
        place: Of the kernel that runs it since its start, and the processes that see each other: where it is this
            process's own too, whether the holder still runs can be seen.
        born: When the process began, since numbers of processes are used again.
        token: Of this one hold.
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
        """Whether it is known to have ended: its processes are seen from here, and it is none of them."""
        if not self.place or self.place != _place():
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Lease:
    """A run that this process holds. A context manager: within it a thread renews the lease, and its end gives it up.

    Args:
        storage: The run's.
        notify: Told of a lease that is taken over.
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
            return  # it goes stale

    def check(self) -> None:
        """Refuse to go on with a run that another process holds by now.

        Raises:
            AutoDistillError: It does.
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
            return  # the next one may succeed

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
    """Refuse a run that a process holds, as far as can be seen; return the holder of one that may be taken over.

    Raises:
        InputError: It is held; the message has by whom, and when it may be taken over.
    """
    holder = _read(storage)
    if holder is None or holder.ended:
        return holder
    # By the storage's own clock, since those of two machines may differ by minutes.
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
    """Return what tells processes apart that may have one number: the kernel's start and the namespace; "" where
    unknown.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


_FOLDER, _SEARCH = "events", "search.json"


class StoredLog(RunLog):
    """An event is on the storage before it is in the local log, so that the run can go on from any machine.

    Object stores cannot append. An object's name begins with the time, and is later than those before it, so that names
    are in the order of events whoever wrote them, and no two writers share one.

    Args:
        path: Of the local log.
        storage: The run's.
        check: Called before anything is written; raises where another process goes on with the run.
    """

    def __init__(self, path: Path, storage: Storage, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self._storage = storage
        self._check = check
        self._last = 0

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event to the storage, and then to the local log.

        Raises:
            AutoDistillError: It could not be written, or the run is another process's by now.
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
        """Bring the local log to what the storage holds, which counts.

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
    """Refuse the name of a run that the storage has already.

    Raises:
        InputError: It has.
    """
    if storage.has(_SEARCH):
        raise InputError(
            f"there is a run on {storage.uri}: go on with it by --resume, or choose another name with --name"
        )


def keep(search_file: Path, storage: Storage) -> None:
    """Keep the run's `search.json` on its storage too.

    Raises:
        AutoDistillError: It cannot be written.
    """
    try:
        storage.put(search_file, _SEARCH)
    except OSError as error:
        raise AutoDistillError(f"cannot write to {storage.uri}: {error}") from error


def pull(folder: Path, storage: Storage) -> bool:
    """Fetch the run's `search.json`, in the place of this machine's; False where neither has one.

    Another machine may have gone on with the run since. What the storage has not got yet is this machine's alone.

    Raises:
        InputError: The folder cannot be written, or the storage not read.
    """
    file = folder / _SEARCH
    try:
        if not storage.has(_SEARCH):
            return file.exists()
        storage.get(_SEARCH, file)
    except OSError as error:
        raise InputError(f"cannot fetch the run from {storage.uri} into {folder}: {error}") from error
    return True

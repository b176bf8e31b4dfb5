"""A run that is kept on a storage: an object for each event, beside the local log that everything else reads."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autodistill.errors import AutoDistillError, InputError
from autodistill.kinds import hold
from autodistill.records.event_log import EventLog
from autodistill.records.json_files import plain_json, strict_json
from autodistill.records.schema import check_event
from autodistill.storage import Storage

_FOLDER, _SEARCH = "events", "search.json"


class StoredLog(EventLog):
    """An event is on the storage before it is in the local log, so that the run can go on from any machine.

    Object stores cannot append. An object's name begins with the time, and is later than those before it, so that names
    are in the order of events whoever wrote them, and no two writers share one.

    Args:
        path: Of the local log.
        storage: The run's.
        check: Called before anything is written; raises where another process goes on with the run.
    """

    def __init__(self, path: Path, storage: Storage, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(path, check_event)
        self._storage = storage
        self._check = check
        self._last = 0

    def append(self, event: Mapping[str, Any]) -> None:
        """Writes one event to the storage, and then to the local log.

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
        """Brings the local log to what the storage holds, which counts.

        Raises:
            InputError: An event cannot be read.
        """
        keys = sorted(self._storage.list(_FOLDER))
        try:
            self._last = max((int(Path(key).name.partition("-")[0]) for key in keys), default=0)
            events = [plain_json(data) for data in self._storage.read_all(keys)]
            for event in events:
                hold(event, Mapping[str, Any], "an event")
                check_event(event)
        except (OSError, ValueError, InputError) as error:
            raise InputError(f"the events of {self._storage.uri} cannot be read ({error}): restore them") from error
        if events == self.read():
            return
        self.path.unlink(missing_ok=True)
        log = EventLog(self.path)
        for event in events:
            log.append(event)


def check_free(storage: Storage) -> None:
    """Refuses the name of a run that the storage has already.

    Raises:
        InputError: It has.
    """
    if storage.has(_SEARCH):
        raise InputError(
            f"there is a run on {storage.uri}: go on with it by --resume, or choose another name with --name"
        )


def keep(search_file: Path, storage: Storage) -> None:
    """Keeps the run's `search.json` on its storage too.

    Raises:
        AutoDistillError: It cannot be written.
    """
    try:
        storage.put(search_file, _SEARCH)
    except OSError as error:
        raise AutoDistillError(f"cannot write to {storage.uri}: {error}") from error


def pull(folder: Path, storage: Storage) -> bool:
    """Fetches the run's `search.json`, in the place of this machine's; False where neither has one.

    Another machine may have gone on with the run since. What the storage has not got yet is this machine's alone.

    Args:
        folder: Of the run.
        storage: The run's.

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

"""How long the sessions of a run lasted, in total and by phase, including sessions that were killed.

A session's start is in the log. While the session runs, a sign of life next to the log records until when it was seen
to run. The next session writes this into the log as the end of the previous one.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.runs.events import RunEvent, SessionBegan, SessionEnded, of_kind
from autodistill.utils.clock import now
from autodistill.utils.json_files import plain_json, read_json, write_json
from autodistill.utils.storage import Storage
from autodistill.utils.typed_data import check_typed

_FILE = "alive.json"
_BEAT_SECONDS = 20.0


class SignsOfLife:
    """Records how long a session has lasted, every 20 s and at its end; a context manager.

    Args:
        folder: The run's folder.
        storage: The run's storage, or None.
        started: The time in the session's first event, by `utils.clock.now()`.
        seconds: Returns the seconds by phase so far.
    """

    def __init__(
        self, folder: Path, storage: Storage | None, started: float, seconds: Callable[[], Mapping[str, float]]
    ) -> None:
        self._folder = folder
        self._storage = storage
        self._started = started
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="alive", daemon=True)

    def __enter__(self) -> SignsOfLife:
        self.give()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.give()

    def give(self) -> None:
        """Write a sign of life.

        If it cannot be written, the one before stays. The time budget of the next session is then a little less exact.
        """
        data = {"session": self._started, "time": now(), "seconds": dict(self._seconds())}
        try:
            write_json(self._folder / _FILE, data)
            if self._storage is not None:
                self._storage.write(_FILE, json.dumps(data).encode())
        except (OSError, InputError):
            return

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            self.give()


def last_ended(events: Sequence[RunEvent], folder: Path, storage: Storage | None) -> SessionEnded | None:
    """Return the event that records the end of the last session, or None if it is in the log already or unknown.

    Args:
        events: The log.
        folder, storage: As in `SignsOfLife`.
    """
    last = next((event for event in reversed(events) if isinstance(event, SessionBegan | SessionEnded)), None)
    if not isinstance(last, SessionBegan):
        return None
    signs = [sign for sign in _signs(folder, storage) if sign.session == last.time]
    return max(signs, key=lambda sign: sign.time or 0.0, default=None)


def _signs(folder: Path, storage: Storage | None) -> Iterable[SessionEnded]:
    """Yield the last signs of life on this machine and on the storage.

    The later one is from the machine that continued the run last. An invalid one is ignored, since it only says how
    long something took.
    """
    found = []
    if (folder / _FILE).is_file():
        with suppress(InputError):
            found.append(read_json(folder / _FILE))
    if storage is not None:
        with suppress(OSError, ValueError):
            found.append(plain_json(storage.read(_FILE)))
    for sign in found:
        with suppress(InputError):
            check_typed(sign, Mapping[str, Any], _FILE)
            check_typed(sign.get("time"), float, _FILE)
            yield SessionEnded.from_json(sign)


def lasted(events: Sequence[RunEvent], since: float = 0.0) -> float:
    """Return the seconds that the sessions of a log lasted, each from its start to its last event.

    Args:
        events: The log.
        since: Start of the first session to count. Sessions before it in the log are left out, whatever times they
            have. If the log has no session with this start, sessions that began earlier are left out.
    """
    starts = [index for index, event in enumerate(events) if isinstance(event, SessionBegan)]
    begun = [events[index].time for index in starts]
    first = begun.index(since) if since in begun else 0
    total = 0.0
    for number, (start, end) in enumerate(pairwise([*starts, len(events)])):
        times = [event.time for event in events[start:end] if event.time is not None]
        if number >= first and (since in begun or times[0] >= since):
            total += max(times) - times[0]
    return total


def by_phase(events: Iterable[RunEvent]) -> dict[str, float]:
    """Return the seconds of ended sessions by phase, added up."""
    total: Counter[str] = Counter()
    for event in of_kind(events, SessionEnded):
        total.update(event.seconds)
    return dict(total)

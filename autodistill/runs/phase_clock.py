"""A clock that measures the seconds of each phase of a search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from autodistill.utils.clock import now

_PHASES = ("load", "solve", "plan", "cache", "train", "evaluate", "export")


class Clock:
    """Adds up wall-clock seconds by phase.

    Args:
        started: `time.monotonic()` when this session began.
        notify: Called with the text of each phase that begins.

    Attributes:
        started_at: The start of this session on the clock of `utils.clock.now()`.
        earlier: Seconds by phase of the sessions before this one.
    """

    def __init__(self, started: float, notify: Callable[[str], None]) -> None:
        self.started = started
        self.started_at = now() - (time.monotonic() - started)
        self.seconds: dict[str, float] = {}
        self.earlier: Mapping[str, float] = {}
        self._notify = notify
        self._running: Callable[[], Mapping[str, float]] = dict

    @contextmanager
    def phase(self, name: str, message: str) -> Iterator[None]:
        """Measure the time of the block, also if it ends with an error."""
        self._notify(message)
        began = time.monotonic()
        with self.counting(lambda: {name: time.monotonic() - began}):
            yield

    @contextmanager
    def counting(self, seconds: Callable[[], Mapping[str, float]]) -> Iterator[None]:
        """Add the result of `seconds` when the block ends. Within the block, its current result is counted too."""
        before, self._running = self._running, seconds
        try:
            yield
        finally:
            self._running = before
            for name, spent in seconds().items():
                self.add(name, spent)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def session(self) -> dict[str, float]:
        """Return the seconds of this session by phase; time outside of all phases is "overhead"."""
        total, running = time.monotonic() - self.started, self._running()
        known = {name: self.seconds.get(name, 0.0) + running.get(name, 0.0) for name in _PHASES}
        return {**known, "overhead": max(0.0, total - sum(known.values())), "total": total}

    def summary(self) -> dict[str, float]:
        """Return the seconds of all sessions by phase."""
        return {name: seconds + self.earlier.get(name, 0.0) for name, seconds in self.session().items()}

"""What a search tells a person while it runs, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autodistill.search.campaign import Campaign


class Clock:
    """Adds up wall-clock seconds by phase."""

    def __init__(self, started: float, notify: Callable[[str], None]) -> None:
        self.started = started
        self.seconds: dict[str, float] = {}
        self._notify = notify

    @contextmanager
    def phase(self, name: str, shown: str) -> Iterator[None]:
        """Times the block, whatever ends it."""
        self._notify(shown)
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def summary(self) -> dict[str, float]:
        """Seconds by phase; what is in none of them is overhead."""
        total = time.monotonic() - self.started
        known = {name: self.seconds.get(name, 0.0) for name in ("load", "cache", "train", "evaluate", "export")}
        return {**known, "overhead": max(0.0, total - sum(known.values())), "total": total}


class Observer:
    """What a search tells a person while it runs; the default tells nothing."""

    def phase(self, name: str) -> None:
        """A phase began."""

    def line(self, text: str) -> None:
        """Something worth a line happened."""

    def campaign(self, campaign: Campaign, best: float | None, baseline: float | None) -> None:
        """Trials changed."""

"""The log of a run: its events, and the rows that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autodistill.runs.events import E, RowAdded, RowTested, RunEvent, of_kind, read_event, rows_of
from autodistill.runs.results.row import Row
from autodistill.utils.clock import now
from autodistill.utils.event_log import EventLog


class RunLog(EventLog):
    """The events of one run. Each event is read and parsed once.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._take)
        self._parsed: list[RunEvent] = []

    def _take(self, data: Mapping[str, Any]) -> None:
        event = read_event(data)
        if event is not None:
            self._parsed.append(event)

    def _forget(self) -> None:
        self._parsed.clear()

    def add(self, event: RunEvent) -> None:
        """Write an event, with the current time unless it has one. Once this returns, the event survives a crash.

        Raises:
            AutoDistillError: As `append`.
        """
        self.append((event if event.time is not None else replace(event, time=now())).to_json())

    def all(self) -> list[RunEvent]:
        """Return the events, oldest first, without those whose kind only a later version knows.

        Raises:
            InputError: As `read`.
        """
        self.read()
        return list(self._parsed)

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of one kind, oldest first.

        Raises:
            InputError: As `read`.
        """
        return of_kind(self.all(), kind)

    def rows(self, *kinds: type[RowAdded | RowTested], split: str | None = None) -> list[Row]:
        """Return the rows. A later row replaces an earlier one with the same id and kind of event.

        Args:
            kinds: The kinds of events to read, `RowAdded` by default.
            split: The split of the rows to return; all by default.

        Raises:
            InputError: As `read`.
        """
        return [row for row in rows_of(self.all(), kinds) if split in (None, row.split)]

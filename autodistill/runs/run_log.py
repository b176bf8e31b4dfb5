"""The log of a run: its events as they were written, and the rows that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodistill.runs.results.row import Row
from autodistill.runs.schema import check_event
from autodistill.utils.event_log import EventLog


class RunLog(EventLog):
    """The events of one run, read once and held to what each kind must have; a row is parsed where it is read.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._take)
        self._rows: dict[tuple[str, str], Row] = {}

    def _take(self, event: Mapping[str, Any]) -> None:
        row = check_event(event)
        if row is not None:
            self._rows[event["event"], row.row_id] = row

    def _forget(self) -> None:
        self._rows.clear()

    def rows(self, *kinds: str, split: str | None = None) -> list[Row]:
        """The rows, a later one in the place of an earlier one with the same id.

        Args:
            kinds: Of the events that hold them, "row" or "test"; "row" by default.
            split: That they are of; all by default.

        Raises:
            InputError: As `read`.
        """
        self.read()
        found = (row for (kind, _), row in self._rows.items() if kind in (kinds or ("row",)))
        return [row for row in found if split in (None, row.split)]

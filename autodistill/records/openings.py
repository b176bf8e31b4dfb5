"""How often the test split of some data was opened, by which runs: a ledger beside the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autodistill.records.event_log import EventLog

_OPENINGS = "test_openings.jsonl"


def record_test_opening(out: Path, *, run: str, data: str) -> None:
    """Records in `<out>/test_openings.jsonl` that a run opens its test split; called before it does.

    Args:
        out: The folder of the runs.
        run: Name of the run.
        data: Fingerprint of the data.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    EventLog(out / _OPENINGS).append({"run": run, "data": data, "time": time})


def recorded_test_openings(out: Path, *, data: str | None = None) -> list[dict[str, Any]]:
    """Every recorded opening of a test split (run, data, time), or those of the data with one fingerprint."""
    openings = EventLog(out / _OPENINGS).read()
    return [opening for opening in openings if data is None or opening["data"] == data]


def openings_of(out: Path, search: Mapping[str, Any]) -> dict[str, int]:
    """How often each run in a folder opened the test split of the data that a search is on, from its `search.json`."""
    data = search.get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
    found = recorded_test_openings(out, data=fingerprint) if fingerprint else []
    return dict(Counter(opening["run"] for opening in found).most_common())


def opened(openings: Mapping[str, int]) -> str:
    """The openings of one test split in a sentence."""
    times = sum(openings.values())
    if not times:
        return "The test split of this data has not been opened here."
    runs = ", ".join(f"{run} {count}" for run, count in openings.items())
    return f"The test split of this data has been opened {times} time{'s' if times > 1 else ''} here, by {runs}."

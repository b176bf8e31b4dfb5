"""How often each run opened the test split of some data, from a ledger in the folder of runs and the runs' own logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autodistill.runs.events import RowTested, RunEvent, SessionBegan
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.schema import check_opening
from autodistill.units import count_of
from autodistill.utils.event_log import EventLog

_OPENINGS = "test_openings.jsonl"


def record_test_opening(out: Path, *, run: str, data: str) -> None:
    """Record in `<out>/test_openings.jsonl` that a run opens its test split. Call it before the split is opened.

    Args:
        out: The folder of the runs.
        run: Name of the run.
        data: Fingerprint of the data.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    EventLog(out / _OPENINGS).append({"run": run, "data": data, "time": time})


def recorded_test_openings(out: Path, *, data: str | None = None) -> list[dict[str, Any]]:
    """Return all recorded openings of test splits (run, data, time), or those of the data with one fingerprint."""
    openings = EventLog(out / _OPENINGS, check_opening).read()
    return [opening for opening in openings if data is None or opening["data"] == data]


def openings_in(events: Iterable[RunEvent]) -> int:
    """Return the number of sessions in which a run's test split was scored, according to the run's own log."""
    count, scored = 0, False
    for event in events:
        if isinstance(event, SessionBegan):
            scored = False
        elif isinstance(event, RowTested) and not scored:
            count, scored = count + 1, True
    return count


def times_opened(run: RunFolder, data: str) -> int:
    """Return how often a run has opened its test split: the larger of the counts in the ledger and in its log.

    Args:
        run: The run.
        data: Fingerprint of its data.
    """
    recorded = sum(opening["run"] == run.name for opening in recorded_test_openings(run.path.parent, data=data))
    # The ledger lacks what another machine opened, and the log may be stored for other machines too.
    return max(recorded, openings_in(run.events.all()))


def already_opened(times: int) -> str:
    """Return a clause that says how often, at least, a run's test split has been opened."""
    return f"this run's test split was used before ({count_of(times, 'time')})"


def openings_of(out: Path, search: Mapping[str, Any]) -> dict[str, int]:
    """Return how often each run in a folder opened the test split of a search's data.

    For the search itself the count of its log is used if it is larger.

    Args:
        out: Folder of the runs.
        search: `search.json` of the search.
    """
    data = search.get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
    found = recorded_test_openings(out, data=fingerprint) if fingerprint else []
    counts = Counter(opening["run"] for opening in found)
    name = search.get("name")
    if fingerprint and name and (run := RunFolder(out, name)).events.path.exists():
        # The ledger lacks what another machine opened.
        counts |= Counter({name: openings_in(run.events.all())})
    return dict(counts.most_common())


def opened(openings: Mapping[str, int]) -> str:
    """Return a sentence about the openings of one test split."""
    times = sum(openings.values())
    if not times:
        return "The test split of this data has not been used here."
    if times == 1:
        return f"The test split of this data has been used once here, by {next(iter(openings))}."
    runs = ", ".join(f"{run} {count}" for run, count in openings.items())
    return f"The test split of this data has been used {times} times here, by {runs}."

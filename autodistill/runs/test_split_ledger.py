"""How often the test split of some data was opened, by which runs: a ledger beside the runs, and their own logs."""

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
    openings = EventLog(out / _OPENINGS, check_opening).read()
    return [opening for opening in openings if data is None or opening["data"] == data]


def openings_in(events: Iterable[RunEvent]) -> int:
    """Return the number of sessions in which a run's test split was scored, by the run's own log."""
    count, scored = 0, False
    for event in events:
        if isinstance(event, SessionBegan):
            scored = False
        elif isinstance(event, RowTested) and not scored:
            count, scored = count + 1, True
    return count


def times_opened(run: RunFolder, data: str) -> int:
    """Return how often a run has opened its test split: by the ledger beside it, or by its log where that has more.

    Args:
        run: The run, whose log may be kept elsewhere too.
        data: Fingerprint of its data.
    """
    recorded = sum(opening["run"] == run.name for opening in recorded_test_openings(run.path.parent, data=data))
    # The ledger does not know what another machine opened.
    return max(recorded, openings_in(run.events.all()))


def already_opened(times: int) -> str:
    """Return a clause that says how often, at least, a run's test split has been opened."""
    return f"this run's test split was used before ({count_of(times, 'time')})"


def openings_of(out: Path, search: Mapping[str, Any]) -> dict[str, int]:
    """Return how often each run in a folder opened the test split of the data that a search is on, from its
    `search.json`.

    The search's own openings are those of its log, where that has more.
    """
    data = search.get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, Mapping) else None
    found = recorded_test_openings(out, data=fingerprint) if fingerprint else []
    counts = Counter(opening["run"] for opening in found)
    name = search.get("name")
    if fingerprint and name and (run := RunFolder(out, name)).events.path.exists():
        # The ledger does not know what another machine opened.
        counts |= Counter({name: openings_in(run.events.all())})
    return dict(counts.most_common())


def opened(openings: Mapping[str, int]) -> str:
    """The openings of one test split in a sentence."""
    times = sum(openings.values())
    if not times:
        return "The test split of this data has not been used here."
    if times == 1:
        return f"The test split of this data has been used once here, by {next(iter(openings))}."
    runs = ", ".join(f"{run} {count}" for run, count in openings.items())
    return f"The test split of this data has been used {times} times here, by {runs}."

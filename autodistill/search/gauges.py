"""Gauges of a search for dashboards, read from the run's log at each request."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodistill.runs.events import RunEvent, RungReached, TrialAdded, TrialEnded, of_kind, rows_of
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import chosen
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of

PREFIX = "autodistill_search_"
"""Prefix of each gauge's name."""

_STATES = ("running", "completed", "stopped", "rejected", "failed")
_OUTPUTS = "teacher-outputs"  # the folder of the cache that `--cache-limit` limits


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """A figure that can go up and down.

    Attributes:
        name: Its name in Prometheus, with its unit.
        about: A description for a person.
        values: Finite values, by the values of their labels.
        labels: Names of the labels.
    """

    name: str
    about: str
    values: Mapping[tuple[str, ...], float]
    labels: tuple[str, ...] = ()


class SearchGauges:
    """The gauges of one search. They show only what is already on disk, so a reading during the search is consistent.

    Args:
        run: The search's folder.
        cache: Folder that holds the teachers' outputs.
        cache_limit: Bytes that the teachers' outputs may take.
    """

    def __init__(self, run: RunFolder, cache: Path, cache_limit: int) -> None:
        self._run, self._cache, self._cache_limit = run, cache / _OUTPUTS, cache_limit

    def read(self) -> Iterator[Gauge]:
        """Yield every gauge that has a value, by the log at this moment.

        Raises:
            InputError: The run's files are not as a search writes them.
        """
        asked, events = self._run.read_settings("metric", "direction"), self._run.events.all()
        for name, told, value in self._figures(asked, events):
            if value is not None and math.isfinite(value):
                yield Gauge(name=PREFIX + name, about=told, values={(): value})
        metric = str(asked["metric"])
        leaders = {(metric, of): row.figure(metric) for of, row in self._leaders(asked, events).items() if row}
        yield Gauge(
            name=PREFIX + "best",
            about="Value of the metric that ranks, on validation text",
            labels=("metric", "of"),
            values={key: value for key, value in leaders.items() if value is not None},
        )
        yield Gauge(
            name=PREFIX + "trials",
            about="Trials by their state",
            labels=("state",),
            values={(state,): float(count) for state, count in _states(events).items()},
        )

    def _figures(self, asked: dict[str, Any], events: Sequence[RunEvent]) -> Iterator[tuple[str, str, float | None]]:
        """Yield the name, description and value of each gauge without labels."""
        best = self._leaders(asked, events)["best"]
        perplexity = None if best is None else best.figure("perplexity")
        budget, plan = asked.get("budget") or {}, asked.get("plan") or {}
        rungs, workers = of_kind(events, RungReached), int(plan.get("workers") or 1)
        seconds = sum(rung.seconds.get("train", 0.0) for rung in rungs)
        trained = sum(rung.trained for rung in rungs)
        yield (
            "best_nll_nats",
            "Mean negative log-likelihood of the best row",
            math.log(perplexity) if perplexity else None,
        )
        yield "best_memory_bytes", "Inference memory of the best row", None if best is None else best.memory_bytes
        yield "budget_bytes", "Memory that a student may take", budget.get("memory_bytes")
        yield "trained_tokens", "Tokens trained on by all trials", float(trained)
        yield (
            "tokens_per_second",
            "Training tokens a second of all workers together, over the segments that are done",
            trained / seconds * workers if seconds else 0.0,
        )
        yield "final_student_share", "Share of the time that trained the final student", _final_share(asked, events)
        yield "cache_bytes", "Disk that teachers' cached outputs take", float(_size(self._cache))
        yield "cache_limit_bytes", "Disk that they may take", float(self._cache_limit)

    def _leaders(self, asked: dict[str, Any], events: Sequence[RunEvent]) -> dict[str, Row | None]:
        """Return the best row and the best untrained row, on validation text."""
        rows = [row for row in rows_of(events) if row.split == "validation"]
        untrained = [row for row in rows if row.kind in ("teacher", "initial")]
        metric, direction = asked["metric"], asked["direction"]
        return {
            "best": best_of(self._run, rows),
            "untrained": chosen(untrained, metric, direction, students_only=False),
        }


def _states(events: Sequence[RunEvent]) -> Counter[str]:
    """Count the trials by state. Trials that have not ended count as running, even if they wait at a rung."""
    ends = {end.trial: end.status.value for end in of_kind(events, TrialEnded)}
    counts = Counter(dict.fromkeys(_STATES, 0))
    counts.update(ends.get(trial.trial, "running") for trial in of_kind(events, TrialAdded))
    return counts


def _final_share(asked: dict[str, Any], events: Sequence[RunEvent]) -> float:
    """Return the share of the time that trained the best student beyond the plan's tokens, in one trunk or in stages.

    It is relative to the time budget, or to all training seconds if there is no time budget.
    """
    longer = {one.trial for one in of_kind(events, TrialAdded) if one.length > 1 and one.kind != "confirmation"}
    trained = [(rung.trial in longer, rung.seconds.get("train", 0.0)) for rung in of_kind(events, RungReached)]
    whole = (asked.get("box") or {}).get("seconds") or sum(seconds for _, seconds in trained)
    return sum(seconds for final, seconds in trained if final) / whole if whole else 0.0


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder. Files may vanish while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total

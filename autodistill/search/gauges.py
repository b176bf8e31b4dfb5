"""Gauges of a search for Prometheus, on this machine alone, read from the run's log each time they are asked for."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError, MissingDependencyError
from autodistill.runs.events import RunEvent, RungReached, TrialAdded, TrialEnded, of_kind, rows_of
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import chosen
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of
from autodistill.search.callbacks import Callback, SearchFinished, SearchStarted

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

HOST = "127.0.0.1"
_STATES = ("running", "completed", "stopped", "rejected", "failed")
_OUTPUTS = "teacher-outputs"  # of the cache: what `--cache-limit` limits


class SearchGauges(Callback):
    """Serves the gauges of one search over HTTP on loopback, from when it is made until `close`.

    Before the search has a folder, only `autodistill_search_running` is there. What a gauge says is on disk already,
    so that one asked for in the middle of an event is whole, and a search that is resumed goes on from where it was.

    Args:
        port: To listen on; 0 for any that is free.
        cache: Folder of the teacher's outputs.
        cache_limit: Bytes that these may take.

    Attributes:
        port: That it listens on.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
        InputError: The port is in use, or is none.
    """

    def __init__(self, port: int, cache: Path, cache_limit: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise MissingDependencyError(
                "--metrics-port needs prometheus-client: pip install 'autodistill-search[monitor]'"
            ) from None
        self._run: RunFolder | None = None
        self._running = 1
        self._reading = threading.Lock()
        self._cache, self._cache_limit = cache / _OUTPUTS, cache_limit
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=HOST, registry=registry)
        except OverflowError:
            raise InputError(f"--metrics-port must be 0 to 65535, not {port}") from None
        except OSError as error:
            raise InputError(
                f"--metrics-port {port} cannot be listened on ({error.strerror}): stop what does, or give another port"
            ) from None
        self.port = int(self._server.server_port)

    def search_started(self, event: SearchStarted) -> None:
        """The search has a folder, whose log is read from now on."""
        self._run = RunFolder(event.run.parent, event.run.name)

    def search_finished(self, event: SearchFinished) -> None:
        """The search is at its end; its last figures stay."""
        self._running = 0

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self) -> Sequence[GaugeMetricFamily]:
        """Name no gauges beforehand: a registry would otherwise collect them to learn their names."""
        return ()

    def collect(self) -> list[GaugeMetricFamily]:
        """Return every gauge as the log has it at this moment."""
        with self._reading:  # each request has a thread of its own
            return list(self._gauges())

    def _gauges(self) -> Iterator[GaugeMetricFamily]:
        from prometheus_client.core import GaugeMetricFamily

        yield GaugeMetricFamily(
            "autodistill_search_running", "1 while the search runs, 0 once it has ended", self._running
        )
        if self._run is None:
            return
        asked, events = self._run.asked("metric", "direction"), self._run.events.all()
        for name, told, value in self._figures(asked, events):
            if value is not None and math.isfinite(value):
                yield GaugeMetricFamily(f"autodistill_search_{name}", told, value)
        metric = str(asked["metric"])
        best = GaugeMetricFamily(
            "autodistill_search_best", "Value of the metric that ranks, on validation text", labels=("metric", "of")
        )
        for of, row in self._leaders(asked, events).items():
            if row is not None and (value := row.figure(metric)) is not None:
                best.add_metric((metric, of), value)
        yield best
        trials = GaugeMetricFamily("autodistill_search_trials", "Trials by their state", labels=("state",))
        for state, count in _states(events).items():
            trials.add_metric((state,), count)
        yield trials

    def _figures(self, asked: dict[str, Any], events: Sequence[RunEvent]) -> Iterator[tuple[str, str, float | None]]:
        """Name, help and value of each gauge that has one value."""
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
        """The best row, and the best that needs no training, on validation text."""
        assert self._run is not None
        rows = [row for row in rows_of(events) if row.split == "validation"]
        untrained = [row for row in rows if row.kind in ("teacher", "initial")]
        metric, direction = asked["metric"], asked["direction"]
        return {
            "best": best_of(self._run, rows),
            "untrained": chosen(untrained, metric, direction, students_only=False),
        }


def _states(events: Sequence[RunEvent]) -> Counter[str]:
    """Trials by state; those that have not ended are running, or wait at a rung."""
    ends = {end.trial: end.status.value for end in of_kind(events, TrialEnded)}
    counts = Counter(dict.fromkeys(_STATES, 0))
    counts.update(ends.get(trial.trial, "running") for trial in of_kind(events, TrialAdded))
    return counts


def _final_share(asked: dict[str, Any], events: Sequence[RunEvent]) -> float:
    """Training seconds of what was trained beyond the plan's tokens, over the time budget, or else over all training.

    What is trained on so is the best student, in one trunk or several stages.
    """
    longer = {one.trial for one in of_kind(events, TrialAdded) if one.length > 1 and one.kind != "confirmation"}
    trained = [(rung.trial in longer, rung.seconds.get("train", 0.0)) for rung in of_kind(events, RungReached)]
    whole = (asked.get("box") or {}).get("seconds") or sum(seconds for _, seconds in trained)
    return sum(seconds for final, seconds in trained if final) / whole if whole else 0.0


def _size(folder: Path) -> int:
    """Bytes of the files below a folder, whose files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total

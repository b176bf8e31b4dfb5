"""The content of a page about a run: its records, read once, and every chart that they have enough data for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import Budget, read_budget
from autodistill.report.cascade_chart import cascade_charts, cascade_curve
from autodistill.report.charts import NLL, Against, altair_module, budget_curve, budget_points, importance
from autodistill.report.storage_chart import storage
from autodistill.report.training_charts import learning, phases, rungs
from autodistill.runs.events import RowAdded, RowTested, RunEvent, rows_of
from autodistill.runs.results.cascades import read_cascades
from autodistill.runs.results.gains import Gains
from autodistill.runs.results.leaderboard import Ranked, rank
from autodistill.runs.results.objectives import objectives_of, with_front
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import chosen, contenders, students_only
from autodistill.runs.run_folder import RunFolder
from autodistill.search.construction.construction import Construction
from autodistill.search.explain import Explanation, explain

if TYPE_CHECKING:
    import altair

AGAINST: tuple[Against, ...] = ("memory", "size", "latency")
MOST_ROWS = 500
"""Most rows in the page's table and charts, the best first. It keeps the page below 3 MB."""
BUDGET = "budget"
"""First part of the names of budget curve charts. The metric and the cost follow."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The records of a run that a page shows.

    Attributes:
        name: The run's name.
        state: "finished", "under way" or "stopped".
        settings: Its `search.json`.
        events: Its log.
        explanation: The explanation of its trials, or None before the first trial.
        cascades: The documents that `cascade` wrote, each about two of its rows.
    """

    name: str
    state: str
    settings: Mapping[str, Any]
    events: Sequence[RunEvent]
    explanation: Explanation | None
    cascades: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, run: RunFolder) -> Contents:
        """Read the records of a run, finished or under way.

        Raises:
            InputError: The records cannot be read.
        """
        settings, events = run.read_settings("metric", "direction", "budget"), run.events.all()
        whole = "plan" in settings and "space_definition" in settings
        explanation = explain(run) if whole and any(event.event == "trial" for event in events) else None
        given: dict[str, Any] = {"explanation": explanation, "cascades": read_cascades(run.path)}
        return cls(name=run.name, state=run.state, settings=settings, events=events, **given)

    @property
    def metric(self) -> str:
        """The metric that ranks the rows."""
        return str(self.settings["metric"])

    @property
    def direction(self) -> Direction:
        """Whether more or less of it is better."""
        direction: Direction = self.settings["direction"]
        return direction

    @property
    def budget(self) -> Budget:
        """The limits of a deployed student."""
        return read_budget(self.settings["budget"])

    @property
    def gains(self) -> Gains | None:
        """The gains of the exported student over its rivals, or None before the search has ended."""
        return Gains.from_json(self.settings)

    @cached_property
    def rows(self) -> list[Row]:
        """The run's rows of the validation split."""
        return [row for row in rows_of(self.events) if row.split != "test"]

    @cached_property
    def tested(self) -> list[Row]:
        """The rows of the test split at the end of the search."""
        found = {row.row_id: row for row in rows_of(self.events, (RowAdded, RowTested)) if row.split == "test"}
        return [found[name] for name in self.settings.get("test", found) if name in found]

    @cached_property
    def ranked(self) -> list[Ranked]:
        """The leaderboard of the run."""
        return with_front(rank(contenders(self.rows), self.metric, self.direction), objectives_of(self.settings))

    @cached_property
    def best(self) -> Row | None:
        """The exported row, or else the best one so far. None if no row is within the budget."""
        by_id = {row.row_id: row for row in self.rows}
        if self.gains is not None and self.gains.exported in by_id:
            return by_id[self.gains.exported]
        return chosen(self.rows, self.metric, self.direction, students_only=students_only(self.settings))

    @cached_property
    def solved(self) -> list[Construction]:
        """The constructions that were found within the budget before anything was trained."""
        return [Construction.from_json(one) for one in self.settings.get("constructions", ())]

    def metrics(self) -> dict[str, Direction]:
        """Return the metrics for which the budget curve can be drawn, the one that ranks first."""
        ways: dict[str, Direction] = {self.metric: self.direction, "accuracy": "max", NLL: "min", "kl": "min"}
        return ways


def charts_of(contents: Contents, against: Sequence[Against] = AGAINST) -> dict[str, altair.TopLevelMixin]:
    """Draw every chart of a run that its records have enough data for. The names can be names of files.

    Raises:
        MissingDependencyError: Altair is not installed.
    """
    altair_module()
    drawn = ((name, _drawn(draw)) for name, draw in _charts(contents, against))
    return {name: chart for name, chart in drawn if chart is not None}


def _charts(contents: Contents, against: Sequence[Against]) -> Iterator[tuple[str, Callable[[], Any]]]:
    metrics = contents.metrics()
    rows = [one.row for one in contents.ranked[:MOST_ROWS]]
    points = budget_points(rows, list(metrics))
    for metric, direction in metrics.items():
        for cost in against:
            draw = partial(budget_curve, rows, points, metric=metric, direction=direction, against=cost)
            name = f"{BUDGET}-{chart_file(metric)}-{cost}"
            yield name, partial(draw, budget=contents.budget, solved=contents.solved)
    best = contents.best
    if best is not None:
        yield "storage", lambda: storage(best)
    yield "learning", lambda: learning(contents.events)
    yield "rungs", lambda: rungs(contents.events, contents.metric)
    explanation = contents.explanation
    if explanation is not None:
        for objective in explanation.importance:
            yield chart_of_importance(objective), partial(importance, explanation, objective)
    for document in contents.cascades:
        for name, unit in cascade_charts(document):
            yield chart_file(name), partial(cascade_curve, document, unit)
    yield "phases", lambda: phases(contents.settings.get("seconds", {}))


def chart_of_importance(objective: str) -> str:
    """Return the name of the chart of what mattered for an objective."""
    return f"importance-{chart_file(objective)}"


def _drawn(draw: Callable[[], Any]) -> Any:
    """Return a chart, or None if the records lack data for it. Its section of the page then says so."""
    try:
        return draw()
    except InputError:
        return None


def chart_file(name: str) -> str:
    """Return a chart's name, changed so that a file can have it."""
    return "".join(letter if letter.isalnum() or letter in "_." else "-" for letter in name)

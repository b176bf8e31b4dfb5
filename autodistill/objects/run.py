"""A run as an object: its results, their display and export, and how to resume it."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.hardware.budget import Budget, read_budget
from autodistill.objects.html import facts, table
from autodistill.objects.plots import Plots
from autodistill.objects.student import Student
from autodistill.options import cache_folder, parsed
from autodistill.runs.events import RowAdded, RowTested
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of, leaderboard_of
from autodistill.search.prometheus import Endpoint
from autodistill.search.request.request import SearchRequest

if TYPE_CHECKING:
    import pandas as pd

    from autodistill.search.campaign.observer import Observer
    from autodistill.search.explain import Explanation


class Run:
    """A run on disk, finished or under way. Each property reads the files again.

    Attributes:
        name: The run's name.
        path: The run's folder.
    """

    def __init__(self, folder: RunFolder, *, cache: str | Path | None = None) -> None:
        self.name, self.path, self._cache = folder.name, folder.path, cache

    @property
    def _folder(self) -> RunFolder:
        """The folder, opened again: the run may have progressed, in this process or another."""
        return RunFolder.open(self.path.parent, self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run and its plan: the content of `search.json`."""
        return self._folder.read_settings()

    @property
    def state(self) -> str:
        """The state: "finished", "under way", or "stopped". `resume` continues a stopped run."""
        return self._folder.state

    @property
    def metric(self) -> str:
        """The metric that ranks the rows."""
        return str(self._folder.read_settings("metric")["metric"])

    @property
    def budget(self) -> Budget:
        """The limits that a deployed student must keep to."""
        return read_budget(self._folder.read_settings("budget")["budget"])

    @property
    def students(self) -> list[Student]:
        """All models evaluated on the validation split, also the teacher and untrained students, the best first."""
        folder = self._folder
        return [Student(one.row, folder) for one in leaderboard_of(folder)[0]]

    @property
    def best(self) -> Student | None:
        """The best student within the budget, or None if there is none yet."""
        folder = self._folder
        best = best_of(folder, folder.events.rows(split="validation"))
        return None if best is None else Student(best, folder)

    @property
    def test(self) -> list[Student]:
        """The models evaluated on the test split, with its figures: the exported one and those it is compared with."""
        folder = self._folder
        return [Student(row, folder) for row in folder.events.rows(RowAdded, RowTested, split="test")]

    @property
    def plot(self) -> Plots:
        """The charts of the run.

        They are `plot.pareto()`, `storage`, `learning`, `rungs`, `importance`, `phases` and `cascades`.
        """
        return Plots(self._folder)

    def write_page(self, out: str | Path | None = None) -> Path:
        """Write the page about the run, as a search does: one file, which opens from disk.

        Args:
            out: The file to write. By default `report.html` in the run's folder.

        Raises:
            InputError: The run's records cannot be read, or the file cannot be written.
        """
        from autodistill.report.writing import write_page

        return write_page(self._folder, None if out is None else Path(out))

    def to_dataframe(self) -> pd.DataFrame:
        """Return the leaderboard as a pandas DataFrame. A row has a student's metrics and its strategy's dimensions."""
        import pandas as pd

        return pd.DataFrame([_cells(place, student) for place, student in enumerate(self.students, start=1)])

    def explain(self) -> Explanation:
        """Say which dimensions mattered, what was stopped early, which limit binds and what to try next.

        Raises:
            InputError: There is no trial yet.
        """
        from autodistill.search.explain import explain

        return explain(self._folder)

    def reproduce(self, row: str, **moved: str | Path | None) -> dict[str, Any]:
        """Train and evaluate a row again, as its run did, and compare. Nothing is written into the run.

        If the run used a divergence or evaluator of a Python session, the same one must be registered.

        Args:
            row: The row's id, the `id` of a student.
            moved: Where the run's `teacher`, `data` or `general_text` is now, if it was moved.

        Returns:
            Plain data, as `autodistill reproduce --json` prints it. "verdict" is "identical", "within its error" or
            "different".

        Raises:
            InputError: There is no such row, or it is not made by training. Or the teacher, the data, or what was
                registered is missing or has changed.
        """
        from autodistill.advisor.origin import origin
        from autodistill.search.remake import remake

        found = origin(row, self.path.parent, self.name)
        return remake(found.run, found.row, cache_folder(self._cache), lines().line, **moved).to_json()

    def log(self, to: str) -> str:
        """Send the trials of the run to an experiment tracker, each as a run of its own.

        Args:
            to: "tensorboard", "mlflow" or "wandb". A place may follow, like "mlflow=http://localhost:5000".

        Returns:
            The command or the address that shows the trials.

        Raises:
            InputError: There is no such tracker or place, its package is not installed, or the run has no trial.
            AutoDistillError: The tracker did not accept the trials.
        """
        from autodistill.trackers.writing import send_run

        return send_run(self._folder, to)[1]

    def resume(
        self, time: str | float | None = None, *, observer: Observer | None = None, **options: Any
    ) -> SearchResult:
        """Continue the run: to its end if it was stopped, or for longer if it has finished.

        Args:
            time: More time, like "1h", or seconds. By default, what is left of the run's own time budget.
            observer: Is notified of progress. By default, lines are printed to stderr.
            options: Options of `search` that may change, such as `trials`, `confirm`, `runner` or `cache`.

        Raises:
            InputError: An option contradicts the run's settings, or another process is continuing the run.
        """
        stored = self._folder.read_settings()
        given = {"strategy": stored.get("strategy"), "runner": stored.get("runner", "ray"), "cache": self._cache}
        command = shlex.join(
            ["autodistill", "search", "--resume", "--name", self.name, "--runs", str(self.path.parent)]
        )
        named = {"name": self.name, "runs": self.path.parent, "command": command}
        return run_search(SearchRequest(resume=True, time=time, **{**given, **options, **named}), observer)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.state}, best {self.best!r}>"

    def _repr_html_(self) -> str:
        asked, best = self.settings, self.best
        lines = {
            **{name: asked.get(name, {}).get("name") for name in ("teacher", "data")},
            "budget": self.budget.describe(),
            "state": self.state,
            "folder": self.path,
        }
        metric = self.metric
        columns = ("", "name", "deployment", metric, "memory")
        rows = [
            (place, one.name, one.deployment.name, *(one.metrics.get(name, "") for name in (metric, "memory_bytes")))
            for place, one in enumerate(self.students[:10], start=1)
        ]
        shown = "" if best is None else best._repr_html_()
        return facts(f"Run {self.name}", lines) + shown + table("Leaderboard", columns, rows)


class SearchResult(Run):
    """The result of a search: its run, with the best student.

    Attributes:
        document: The whole result, as `autodistill search --json` prints it.
    """

    def __init__(self, folder: RunFolder, document: dict[str, Any], *, cache: str | Path | None = None) -> None:
        super().__init__(folder, cache=cache)
        self.document = document

    @property
    def best(self) -> Student:
        """The exported student: the best one within the budget."""
        wanted = self.document["best"]["row_id"]
        folder = self._folder
        return Student(next(row for row in folder.events.rows() if row.row_id == wanted), folder)

    @property
    def notes(self) -> list[str]:
        """Sentences about the result that the user must know."""
        return list(self.document["notes"])


def run_search(request: SearchRequest, observer: Observer | None = None) -> SearchResult:
    """Run the requested search, and return its result.

    Args:
        request: The request.
        observer: Is notified of progress. By default, lines are printed to stderr.

    Raises:
        InputError, NothingFitsError, InterruptedSearchError, VerificationError: For the same reasons as
            `search.search.search`.
    """
    if request.metrics_port is not None:
        return _shown(request, request.metrics_port, observer or lines())
    from autodistill.report.writing import Refresher
    from autodistill.search.search import search
    from autodistill.trackers.writing import Live

    page, trackers = Refresher(), Live((request.log,) if isinstance(request.log, str) else request.log or ())
    try:
        found = search(request, observer or lines(), (*request.callbacks, page, trackers))
    finally:
        page.close()
        trackers.close()
    folder = RunFolder.open(Path(request.runs), found.document["name"])
    return SearchResult(folder, dict(found.document), cache=request.cache)


def _shown(request: SearchRequest, port: int, observer: Observer) -> SearchResult:
    """Run a search with gauges for Prometheus on a port. The port is opened before any work, since it may be in use."""
    with closing(Endpoint(port, cache_folder(request.cache), parsed(request.cache_limit) or 0)) as endpoint:
        observer.line(f"gauges for Prometheus: {endpoint.url}")
        told = (*request.callbacks, endpoint)
        return run_search(replace(request, callbacks=told, metrics_port=None), observer)


def lines() -> Observer:
    """Return an observer that prints each phase and each line to stderr."""
    from autodistill.search.campaign.observer import Observer

    class Lines(Observer):
        """Prints phases and lines to stderr."""

        def phase(self, name: str) -> None:
            print(f"{name} ...", file=sys.stderr, flush=True)

        def line(self, text: str) -> None:
            print(text, file=sys.stderr, flush=True)

    return Lines()


def _cells(place: int, student: Student) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "place": place,
        "id": student.id,
        "name": student.name,
        "kind": student.kind,
        "deployment": student.deployment.name,
        "feasible": student.feasible,
    }
    for name, metric in student.metrics.items():
        cells[name] = metric.value
        if metric.stderr is not None:
            cells[f"{name}_stderr"] = metric.stderr
    return cells | ({} if student.strategy is None else _flat(student.strategy.to_json()))


def _flat(value: dict[str, Any], under: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names, which are the names of a space's dimensions."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{under}{name}.") if isinstance(item, dict) else {f"{under}{name}": item}
    return found

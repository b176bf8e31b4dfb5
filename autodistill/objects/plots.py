"""Charts of a run, drawn by Vega-Altair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autodistill.errors import InputError
from autodistill.hardware.budget import read_budget
from autodistill.runs.run_folder import RunFolder

if TYPE_CHECKING:
    import altair

    from autodistill.report.charts import Against


class Plots:
    """The charts of a run. A notebook shows them, and a chart's `save` writes it to a file."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def pareto(self, against: Against = "memory", *, metric: str | None = None) -> altair.LayerChart:
        """Draw a metric against memory, size or latency, with the budget and the Pareto front of the rows that fit.

        Args:
            against: "memory", "size" or "latency".
            metric: The metric on the vertical axis. By default, the metric that ranks.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: No row has both figures.
        """
        from autodistill.report.charts import pareto
        from autodistill.search.construction.construction import Construction

        asked = self._folder.read_settings("metric", "direction", "budget")
        ways = {**asked.get("directions", {}), asked["metric"]: asked["direction"]}
        drawn = metric or asked["metric"]
        return pareto(
            self._folder.events.rows(),
            metric=drawn,
            direction=ways.get(drawn, "min" if drawn in ("nll", "kl", "perplexity") else "max"),
            against=against,
            budget=read_budget(asked["budget"]),
            solved=[Construction.from_json(one) for one in asked.get("constructions", ())],
        )

    def storage(self) -> altair.Chart:
        """Draw how the bytes of the best student's weights are spread over its layers, by type.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: There is no best student yet.
        """
        from autodistill.report.contents import Contents
        from autodistill.report.storage_chart import storage

        best = Contents.of(self._folder).best
        if best is None:
            raise InputError("nothing keeps to the budget yet, so that there is no student to draw")
        return storage(best)

    def learning(self) -> altair.LayerChart:
        """Draw the training loss of the trials, and how each ended.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: No trial has reached a rung.
        """
        from autodistill.report.training_charts import learning

        return learning(self._folder.events.all())

    def rungs(self) -> altair.LayerChart:
        """Draw the metric that ranks at each rung that a trial reached.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: No trial has reached a rung.
        """
        from autodistill.report.training_charts import rungs

        return rungs(self._folder.events.all(), self._folder.read_settings("metric")["metric"])

    def phases(self) -> altair.Chart:
        """Draw the seconds of each phase of the search.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: The search has not ended.
        """
        from autodistill.report.training_charts import phases

        return phases(self._folder.read_settings().get("seconds", {}))

    def importance(self, objective: str | None = None) -> altair.Chart:
        """Draw which dimensions distinguish the better trials of the search.

        Args:
            objective: One of the search's objectives. By default, the metric that ranks.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: The search has no such objective, or too few trials for an answer.
        """
        from autodistill.report.charts import importance
        from autodistill.search.explain import explain

        return importance(explain(self._folder), objective)

    def cascades(self) -> dict[str, altair.LayerChart]:
        """Draw, for each cascade of the run, accuracy against the share that is deferred to the larger model.

        Returns:
            The charts by name: one for positions, and one for answers if there are any.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: The run has no cascade.
        """
        from autodistill.report.cascade_chart import cascade_charts, cascade_curve
        from autodistill.runs.results.cascades import read_cascades

        found = {
            name: cascade_curve(document, unit)
            for document in read_cascades(self._folder.path)
            for name, unit in cascade_charts(document)
        }
        if not found:
            raise InputError(f"the run {self._folder.name} has no cascade: autodistill cascade writes one")
        return found

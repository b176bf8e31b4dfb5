"""Charts of a run, drawn by Vega-Altair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autodistill.hardware.budget import read_budget
from autodistill.runs.run_folder import RunFolder

if TYPE_CHECKING:
    import altair

    from autodistill.report.charts import Against


class Plots:
    """The charts of a run; a notebook shows them, and `save` writes them to a file."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def pareto(self, against: Against = "memory", *, metric: str | None = None) -> altair.LayerChart:
        """Draw a metric against memory, size or latency, with the budget and the Pareto front of what fits.

        Args:
            against: "memory", "size" or "latency".
            metric: What is drawn upwards; what ranks, by default.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: No row has both figures.
        """
        from autodistill.report.charts import pareto

        asked = self._folder.asked("metric", "direction", "budget")
        ways = {**asked.get("directions", {}), asked["metric"]: asked["direction"]}
        drawn = metric or asked["metric"]
        return pareto(
            self._folder.events.rows(),
            metric=drawn,
            direction=ways.get(drawn, "max"),
            against=against,
            budget=read_budget(asked["budget"]),
        )

    def importance(self, objective: str | None = None) -> altair.Chart:
        """Draw which dimensions set the better trials of the search apart.

        Args:
            objective: One of the search's; what ranks, by default.

        Raises:
            MissingDependencyError: Altair is not installed.
            InputError: Another objective, or too few trials to tell.
        """
        from autodistill.report.charts import importance
        from autodistill.search.explain import explain

        return importance(explain(self._folder), objective)

"""The result of a search for several budgets: what it found, and the run of each budget."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.errors import NothingFitsError
from autodistill.objects.html import table
from autodistill.objects.run import Run, lines, run_search
from autodistill.runs.run_folder import RunFolder
from autodistill.search.budgets.request import BudgetsRequest

if TYPE_CHECKING:
    from autodistill.search.campaign.observer import Observer


class BudgetSearch:
    """The result of a search for several budgets, with a run for each.

    Attributes:
        name: Name of the search.
        path: The search's folder, with its report and the rows of all runs.
        document: The whole result, as `autodistill search --json` prints it.
    """

    def __init__(self, document: Mapping[str, Any], out: Path, *, cache: str | Path | None = None) -> None:
        self.document, self.name, self.path = dict(document), str(document["name"]), out / document["name"]
        self._out, self._cache = out, cache

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The run that serves each budget, by the budget's label. Budgets that nothing fits are left out."""
        served = ((one["label"], one["run"]) for one in self.document["budgets"] if one["run"])
        return {label: Run(RunFolder.open(self._out, run), cache=self._cache) for label, run in served}

    def __getitem__(self, budget: str) -> Run:
        """Return the run that serves a budget, like "150MB". Several budgets may share a run.

        Raises:
            NothingFitsError: Nothing fits this budget.
            KeyError: There is no such budget.
        """
        for one in self.document["budgets"]:
            if one["label"] == budget and one["run"] is None:
                raise NothingFitsError(f"{budget}: {one['nothing_fits']}")
        return self.runs[budget]

    def __repr__(self) -> str:
        return f"<BudgetSearch {self.name}: {', '.join(one['label'] for one in self.document['budgets'])}>"

    def _repr_html_(self) -> str:
        from autodistill.search.budgets.summary import HEAD, cells

        return table(f"Search {self.name}", HEAD, cells(self.document))


def run_budgets(request: BudgetsRequest, observer: Observer | None = None) -> BudgetSearch:
    """Search for each of several budgets, and return the result.

    Args:
        request: The request.
        observer: Is notified of progress. By default, lines are printed to stderr.

    Raises:
        InputError, NothingFitsError, InterruptedSearchError, VerificationError: For the same reasons as
            `search.budgets.run.search_budgets`.
    """
    from autodistill.search.budgets.run import search_budgets

    out = Path(request.runs)
    found = search_budgets(request, observer or lines(), run_search)
    _write_page(found, out)
    return BudgetSearch(found, out, cache=request.cache)


def _write_page(found: Mapping[str, Any], out: Path) -> None:
    """Write the page that compares the runs, if there are several."""
    from autodistill.report.writing import PAGE, write_comparison

    runs = dict.fromkeys(one["run"] for one in found["budgets"] if one["best"])
    if len(runs) < 2:
        return
    try:
        write_comparison([RunFolder.open(out, run) for run in runs], out / found["name"] / PAGE)
    except Exception as error:  # a failed page must not lose hours of training
        told = "report.html was not written (%s: %s)"
        logging.getLogger("autodistill").warning(told, type(error).__name__, error)

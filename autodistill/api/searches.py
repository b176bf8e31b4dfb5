"""`search`, `search_budgets`, `distill`, `plan` and `load_run`. All except `load_run` take the fields of a request."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from autodistill.api.parameters import takes
from autodistill.api.paths import run_folder
from autodistill.errors import InputError
from autodistill.hardware.budget import Price, parse_price
from autodistill.objects.budgets import BudgetSearch, run_budgets
from autodistill.objects.run import Run, SearchResult, lines, run_search
from autodistill.options import RUNS, options_of
from autodistill.search.budgets.request import BudgetsRequest
from autodistill.search.request.request import SearchRequest
from autodistill.strategy.strategy import Strategy

P = ParamSpec("P")
R = TypeVar("R", bound=SearchRequest)
Strategies: TypeAlias = str | Path | Strategy


@takes(SearchRequest, "search")
def search(**options: Any) -> SearchResult:
    """Find, export and verify the best student that fits a hardware budget."""
    return run_search(_request("search", options))


@takes(BudgetsRequest, "search")
def search_budgets(**options: Any) -> BudgetSearch:
    """Find, export and verify the best student for each of several budgets, or devices, in one search."""
    request = _request("search", options, BudgetsRequest)
    if not request.several:
        raise InputError("search_budgets takes budgets like ['1GB', '2GB'] or tiers: for one budget there is search")
    return run_budgets(request)


def _distill(strategy: Strategies, **options: Any) -> SearchResult:
    """Train, export and verify the student of one strategy, without a search."""
    return run_search(_request("distill", {"strategy": strategy, **options}))


def _concatenated(request: Callable[P, SearchRequest]) -> Callable[Concatenate[Strategies, P], SearchResult]:
    return takes(request, "distill")(_distill)  # type: ignore[return-value]


distill = _concatenated(SearchRequest)


@takes(SearchRequest, "plan")
def plan(price: str | Price | None = None, **options: Any) -> dict[str, Any]:
    """Say what a search would do: trials, tokens, disk, time, and its cost at a price an hour. Nothing is trained."""
    from autodistill.search.preview import plan_search

    hourly = parse_price(price) if isinstance(price, str) else price
    return plan_search(_request("plan", options), lines(), hourly)


def _request(verb: str, options: Mapping[str, Any], kind: type[R] = SearchRequest) -> R:  # type: ignore[assignment]
    """Make the checked request of a call, with the equivalent command line."""
    words = ["autodistill", verb]
    declared = options_of(kind)
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        if value is None or value is False or not all(isinstance(one, str | int | float | Path) for one in values):
            continue  # a command line cannot express it
        flag = [] if declared[name].argument else [f"--{name.replace('_', '-')}"]
        words += [word for one in values for word in (flag if value is True else [*flag, str(one)])]
    from autodistill.search.request.early_checks import check_early

    request = kind(**options, command=shlex.join(words))
    check_early(request)
    return request


def load_run(run: str | Path, *, runs: str | Path = RUNS) -> Run:
    """Open a run that is on disk, finished or under way, without training.

    Args:
        run: The run's folder, or its name.
        runs: Folder that holds the runs, if `run` is a name.

    Raises:
        InputError: There is no such run. The message lists the known ones.
    """
    return Run(run_folder(run, Path(runs)))

"""Charts of a run in Vega-Altair: the metric against what a student takes, and which dimensions mattered.

A chart holds its data, so that its specification is drawn anywhere: in a notebook, a page, or an SVG file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from autodistill.errors import InputError, MissingDependencyError
from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import NO_LIMIT, Budget, DeviceBudget
from autodistill.runs.report import INSTALL_PLOTS
from autodistill.runs.results.leaderboard import pareto as front_of
from autodistill.runs.results.row import Row
from autodistill.search.explain import FEWEST_RESULTS, Explanation
from autodistill.strategy.strategy import Strategy

if TYPE_CHECKING:
    import altair

Against = Literal["memory", "size", "latency"]
"""What the metric is drawn against."""


class _Cost(NamedTuple):
    """What a student takes: a row's field, its title with the unit, how many of the field's units that is, and it."""

    field: str
    title: str
    scale: float
    unit: str


_COSTS: Mapping[str, _Cost] = {
    "memory": _Cost("memory_bytes", "memory (MB)", 1e6, "MB"),
    "size": _Cost("size_bytes", "size of the weights (MB)", 1e6, "MB"),
    "latency": _Cost("latency_ms", "time per token, 95th percentile (ms)", 1.0, "ms"),
}
_KINDS = {"student": "student", "baseline": "baseline", "teacher": "teacher", "initial": "untrained student"}
_FITS, _OVER = "fits", "over the budget"
_WIDTH, _HEIGHT, _BAR = 480, 320, 22


def pareto(
    rows: Sequence[Row],
    *,
    metric: str = "accuracy",
    direction: Direction = "max",
    against: Against = "memory",
    budget: Budget | None = None,
) -> altair.LayerChart:
    """Draw the metric against memory, size or latency, with the budget and the Pareto front of what fits.

    Points are rows of the validation split that were trained in full or need no training, with their standard errors;
    over a point stands its strategy.

    Args:
        rows: Of a run.
        metric: What is drawn upwards.
        direction: Whether more or less of it is better.
        against: What is drawn to the right.
        budget: Its limit is a line, where it has one of what is drawn to the right.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: Another name, or no row has both figures.
    """
    if against not in _COSTS:
        raise InputError(f"against is {against!r}; it can be {', '.join(get_args(Against))}")
    alt, cost = _altair(), _COSTS[against]
    drawn = [row for row in rows if _is_drawn(row, metric, cost)]
    if not drawn:
        raise InputError(f"no row has both {metric} and {against}: choose another metric, or another figure")
    points = [_point(row, metric, cost) for row in drawn]
    x = alt.X("cost:Q", title=cost.title, scale=alt.Scale(zero=False, padding=20))
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False, padding=20))
    base = alt.Chart(alt.Data(values=points))
    best = front_of([row for row in drawn if row.feasible], {cost.field: "min", metric: direction})
    layers = [
        alt.Chart(alt.Data(values=[_place(row, metric, cost) for row in best]))
        .mark_line(interpolate="step-after", color="#888", strokeDash=[4, 2])
        .encode(x=x, y=y),
        base.transform_filter("isValid(datum.low)")
        .mark_rule()
        .encode(x=x, y=alt.Y("low:Q", title=metric), y2="high:Q", color=_color(alt)),
        base.mark_point(filled=True, size=70).encode(
            x=x,
            y=y,
            color=_color(alt),
            shape=alt.Shape("kind:N", title=None, scale=alt.Scale(domain=list(_KINDS.values()))),
            tooltip=[alt.Tooltip(f"{name}:N", title=name.replace("_", " ")) for name in points[0]["hover"]],
        ),
    ]
    limit = _limit(budget, against, cost)
    if limit is not None:
        layers += _limit_line(alt, limit, cost)
    chart: altair.LayerChart = alt.layer(*layers).properties(
        title=f"{metric} against {against}", width=_WIDTH, height=_HEIGHT
    )
    return chart


def importance(explanation: Explanation, objective: str | None = None) -> altair.Chart:
    """Draw which dimensions set the better trials of a search apart, as shares, by PED-ANOVA.

    Args:
        explanation: Of the run, as `explain` gives it.
        objective: One of the search's; its metric by default.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: Another objective, or too few trials.
    """
    alt, name = _altair(), objective or explanation.metric
    found = explanation.importance.get(name)
    if found is None:
        known = ", ".join(explanation.importance) or "none, as it tried one strategy alone"
        raise InputError(f"the search was not judged by {name}; its objectives are {known}")
    if not found.shares:
        raise InputError(
            f"{found.results} trials have reached the first rung, and it takes {FEWEST_RESULTS} with different "
            "strategies to tell which dimensions mattered: give the search more trials or time"
        )
    bars = [
        {"dimension": path, "share": item.share, "trials": item.trials, "hover": f"{item.share:.1%}"}
        for path, item in found.shares.items()
    ]
    chart: altair.Chart = (
        alt.Chart(alt.Data(values=bars))
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="share of what sets the better trials apart", axis=alt.Axis(format="%")),
            y=alt.Y("dimension:N", title=None, sort=[bar["dimension"] for bar in bars]),
            tooltip=[
                alt.Tooltip("dimension:N"),
                alt.Tooltip("hover:N", title="share"),
                alt.Tooltip("trials:Q", title="trials that have it"),
            ],
        )
        .properties(title=f"What mattered for {name}", width=_WIDTH, height=_BAR * len(bars))
    )
    return chart


def _altair() -> ModuleType:
    try:
        import altair
    except ImportError as error:
        raise MissingDependencyError(f"charts need Vega-Altair: {INSTALL_PLOTS}") from error
    return altair


def _is_drawn(row: Row, metric: str, cost: _Cost) -> bool:
    known = row.figure(metric) is not None and row.figure(cost.field) is not None
    return known and row.full and row.split != "test" and row.kind in _KINDS


def _place(row: Row, metric: str, cost: _Cost) -> dict[str, Any]:
    return {"cost": (row.figure(cost.field) or 0.0) / cost.scale, "value": row.figure(metric)}


def _point(row: Row, metric: str, cost: _Cost) -> dict[str, Any]:
    place, error = _place(row, metric, cost), row.figure(f"{metric}_stderr")
    value = place["value"]
    said = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
    hover = {
        "row": row.row_id,
        "name": row.name,
        "deployment": row.deployment_name,
        "metric": f"{metric} {said}",
        "needs": f"{place['cost']:,.4g} {cost.unit}",
        "limits": _FITS if row.feasible else row.reason or _OVER,
        "strategy": _said(row),
    }
    return {
        **place,
        "low": None if error is None else value - error,
        "high": None if error is None else value + error,
        "kind": _KINDS[row.kind],
        "state": _FITS if row.feasible else _OVER,
        "hover": list(hover),
        **hover,
    }


def _said(row: Row) -> str:
    """Describe the fields of a row's strategy that differ from their defaults."""
    if row.strategy is None:
        return "the teacher, unchanged"
    given: Any = row.strategy if isinstance(row.strategy, Mapping) else row.strategy.to_json()
    changed = [f"{path} {value}" for path, value in _changes(given, Strategy().to_json(), "")]
    return ", ".join(changed) or "all as by default"


def _changes(given: Any, usual: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the paths at which plain data differ from other such data, with their values."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            inner = usual.get(name) if isinstance(usual, Mapping) else None
            yield from _changes(value, inner, f"{path}.{name}" if path else name)
    elif given != usual:
        yield path, given


def _color(alt: ModuleType) -> Any:
    return alt.Color("state:N", title=None, scale=alt.Scale(domain=[_FITS, _OVER], range=["#1f77b4", "#aaaaaa"]))


def _limit(budget: Budget | None, against: str, cost: _Cost) -> float | None:
    """Return the budget's limit on the horizontal axis, in its unit; None without one."""
    if budget is None:
        return None
    if against == "memory":
        return None if budget.memory_bytes >= NO_LIMIT else budget.memory_bytes / cost.scale
    if against == "latency" and isinstance(budget, DeviceBudget):
        limits = [one for one in budget.latency if one.quantity == "tpot" and one.streams == 1]
        return min((one.seconds * 1000 for one in limits), default=None)
    return None


def _limit_line(alt: ModuleType, limit: float, cost: _Cost) -> list[Any]:
    base = alt.Chart(alt.Data(values=[{"cost": limit, "limit": f"budget: {limit:,.4g} {cost.unit}"}]))
    x = alt.X("cost:Q", title=cost.title)
    return [
        base.mark_rule(color="#d62728").encode(x=x),
        base.mark_text(align="left", dx=4, y=8, color="#d62728").encode(x=x, text="limit:N"),
    ]

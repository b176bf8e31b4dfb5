"""Charts of a run in Vega-Altair: the metric against a student's cost, and which dimensions mattered.

A chart holds its data, so that its specification can be drawn anywhere: in a notebook, a page, or an SVG file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from autodistill.errors import InputError, MissingDependencyError
from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import NO_LIMIT, Budget, DeviceBudget
from autodistill.runs.results.leaderboard import pareto as front_of
from autodistill.runs.results.row import SOLVED_TRIAL, Row
from autodistill.search.construction.construction import Construction
from autodistill.search.explain import FEWEST_RESULTS, Explanation
from autodistill.strategy.strategy import WHOLE, Strategy
from autodistill.units import format_bytes, format_duration, with_error

if TYPE_CHECKING:
    import altair

INSTALL_PLOTS = "pip install 'autodistill-search[plots]'"
Against = Literal["memory", "size", "latency"]
"""The costs that the metric can be drawn against."""
NLL = "nll"
"""The mean negative log-likelihood of a token in nats: the logarithm of a row's perplexity."""
WIDTH, HEIGHT = 480, 320
"""Size of a chart's plot, in pixels."""


class _Cost(NamedTuple):
    """A cost of a student: a row's field, the axis title, the field's units per shown unit, and the shown unit."""

    field: str
    title: str
    scale: float
    unit: str


_COSTS: Mapping[str, _Cost] = {
    "memory": _Cost("memory_bytes", "memory (MB)", 1e6, "MB"),
    "size": _Cost("size_bytes", "size of the weights (MB)", 1e6, "MB"),
    "latency": _Cost("latency_ms", "time per token, 95th percentile (ms)", 1.0, "ms"),
}
_TITLES = {NLL: "loss (nats a token)", "kl": "KL of the teacher (nats a token)"}
_WHOLE, _PACKED = "teacher", "quantised teacher"
_KINDS = {"student": "student", "baseline": "baseline", "teacher": _WHOLE, "initial": "untrained student"}
_FITS, _OVER, _PASSED = "fits", "over the budget", "passed over"
_WIDE = 4.0  # ratio of the largest to the smallest cost above which the horizontal axis is logarithmic
_BAR = 22
_HOVER = ("row", "name", "deployment", "limits", "strategy")


def pareto(
    rows: Sequence[Row],
    *,
    metric: str = "accuracy",
    direction: Direction = "max",
    against: Against = "memory",
    budget: Budget | None = None,
    solved: Sequence[Construction] = (),
) -> altair.LayerChart:
    """Draw the metric against memory, size or latency, with the budget and the Pareto front of the rows that fit.

    Points are validation rows that were trained in full or need no training, with their standard errors. The tooltip of
    a point has its strategy.

    Args:
        rows: Rows of a run.
        metric: The figure on the vertical axis: a figure of the rows, or "nll".
        direction: Whether more or less of it is better.
        against: The cost on the horizontal axis.
        budget: The budget. If it limits the cost, its limit is drawn as a line.
        solved: What was solved before training. Its Pareto front is drawn, of KL against memory as the solver measured
            them, and of other figures from the rows of what was also evaluated.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: `against` is unknown, or no row has both figures.
    """
    if against not in _COSTS:
        raise InputError(f"against is {against!r}; it can be {', '.join(get_args(Against))}")
    points = budget_points(rows, [metric])
    return budget_curve(rows, points, metric=metric, direction=direction, against=against, budget=budget, solved=solved)


def budget_points(rows: Sequence[Row], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return the points of charts against a budget, as plain data that several charts share.

    Args:
        rows: Rows of a run.
        metrics: Metrics for which each point has the value, the ends of its error bar, and a text with both.
    """
    return [_point(row, metrics) for row in rows if row.full and row.split != "test" and row.kind in _KINDS]


def budget_curve(
    rows: Sequence[Row],
    points: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    direction: Direction,
    against: Against,
    budget: Budget | None,
    solved: Sequence[Construction] = (),
) -> altair.LayerChart:
    """Draw the chart of `pareto` from points that may have further metrics."""
    alt, cost = altair_module(), _COSTS[against]
    drawn = [row for row in rows if _is_drawn(row, metric, cost)]
    if not drawn:
        raise InputError(f"no row has both {metric} and {against}: choose another metric, or another figure")
    title = _TITLES.get(metric, metric)
    limit = _limit(budget, against, cost)
    across = [(row.figure(cost.field) or 0.0) / cost.scale for row in drawn] + ([] if limit is None else [limit])
    x = alt.X(f"{against}:Q", title=cost.title, scale=_scale(alt, across))
    y = alt.Y(f"{_key(metric)}:Q", title=title, scale=alt.Scale(zero=False, padding=20))
    known = f"isValid(datum['{against}']) && isValid(datum['{_key(metric)}'])"
    base = alt.Chart(alt.Data(values=points)).transform_filter(known)
    color = _color(alt, [point["state"] for point in points])
    best = front_of([row for row in drawn if row.feasible], _objectives(cost, metric, direction))
    layers = [
        alt.Chart(alt.Data(values=[_place(row, metric, against) for row in best]))
        .mark_line(interpolate="step-after", color="#8a8f98", strokeDash=[4, 2])
        .encode(x=x, y=y),
        *_frontier(alt, _untrained(drawn, solved, metric, direction, against), _key(metric), x, y),
        base.transform_filter(f"isValid(datum['{_key(metric)}_low'])")
        .mark_rule()
        .encode(x=x, y=alt.Y(f"{_key(metric)}_low:Q", title=title), y2=f"{_key(metric)}_high:Q", color=color),
        base.mark_point(filled=True, size=70).encode(
            x=x,
            y=y,
            color=color,
            shape=_shape(alt, [point["kind"] for point in points]),
            tooltip=[
                *(alt.Tooltip(f"{name}:N", title=name) for name in _HOVER[:3]),
                alt.Tooltip(f"{_key(metric)}_said:N", title="metric"),
                alt.Tooltip(f"{against}_said:N", title="needs"),
                *(alt.Tooltip(f"{name}:N", title=name) for name in _HOVER[3:]),
            ],
        ),
    ]
    if limit is not None:
        layers += _limit_line(alt, x, limit, against, cost, right=limit >= max(across))
    chart: altair.LayerChart = alt.layer(*layers).properties(
        title=f"{metric} against {against}", width=WIDTH, height=HEIGHT
    )
    return chart


class _Untrained(NamedTuple):
    """The untrained students that the solver found, as points of a chart, and those of them on its Pareto front."""

    points: list[dict[str, Any]]
    front: list[dict[str, Any]]


def _untrained(
    rows: Sequence[Row], solved: Sequence[Construction], metric: str, direction: Direction, against: Against
) -> _Untrained:
    """Return what was solved, by KL and memory as the solver measured them, or by the figures of its rows."""
    if metric == "kl" and against == "memory":
        return _by_solver(solved)
    before = [row for row in rows if row.feasible and (row.kind == "teacher" or row.trial == SOLVED_TRIAL)]
    found = [(row, one) for row in before if (one := construction_of(row, solved)) is not None]
    points = [
        {
            **_place(row, metric, against),
            "row": row.row_id,
            "deployment": row.deployment_name,
            "said": one.describe(),
        }
        for row, one in found
    ]
    front = front_of([row for row, _ in found], _objectives(_COSTS[against], metric, direction))
    return _Untrained(points, [_place(row, metric, against) for row in front])


def construction_of(row: Row, solved: Sequence[Construction]) -> Construction | None:
    """Return the construction that a row's student has the shape and the storage of, or None if there is none."""
    init = WHOLE if row.strategy is None else row.strategy.init if isinstance(row.strategy, Strategy) else None
    return next((one for one in solved if (one.init, one.deployment) == (init, row.deployment)), None)


def _by_solver(solved: Sequence[Construction]) -> _Untrained:
    known = sorted((one for one in solved if one.kl is not None), key=lambda one: (one.bytes, one.kl))
    points = [
        {
            "memory": one.bytes / 1e6,
            "kl": one.kl,
            "row": f"{one.how}, untrained",
            "deployment": one.deployment.name,
            "said": one.describe(),
        }
        for one in known
    ]
    least, front = math.inf, []
    for point, one in zip(points, known, strict=True):
        if one.kl is not None and one.kl < least:
            least = one.kl
            front.append({"memory": point["memory"], "kl": point["kl"]})
    return _Untrained(points, front)


def _frontier(alt: ModuleType, untrained: _Untrained, figure: str, x: Any, y: Any) -> list[Any]:
    """Return layers with a mark for each untrained student and a line along their front, or none if there are none."""
    if not untrained.points:
        return []
    hover = [alt.Tooltip(f"{name}:N", title=name) for name in ("row", "deployment", "said")]
    hover.insert(2, alt.Tooltip(f"{figure}:Q", format=".4f", title="metric"))
    return [
        alt.Chart(alt.Data(values=untrained.front))
        .mark_line(interpolate="step-after", color="#2ca02c")
        .encode(x=x, y=y),
        alt.Chart(alt.Data(values=untrained.points))
        .mark_tick(thickness=3, size=16, color="#2ca02c", orient="vertical")
        .encode(x=x, y=y, tooltip=hover),
    ]


def importance(explanation: Explanation, objective: str | None = None) -> altair.Chart:
    """Draw which dimensions distinguish the better trials of a search, as shares, by PED-ANOVA.

    Args:
        explanation: The result of `explain` for the run.
        objective: One of the search's objectives. By default, its metric.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: The search has no such objective, or too few trials.
    """
    alt, name = altair_module(), objective or explanation.metric
    found = explanation.importance.get(name)
    if found is None:
        known = ", ".join(explanation.importance) or "none, as it tried one strategy alone"
        raise InputError(f"the search was not judged by {name}; its objectives are {known}")
    if not found.shares and found.left_out:
        raise InputError(found.lack(name))
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
            x=alt.X("share:Q", title="share of the whole", axis=alt.Axis(format="%")),
            y=alt.Y("dimension:N", title=None, sort=[bar["dimension"] for bar in bars]),
            tooltip=[
                alt.Tooltip("dimension:N"),
                alt.Tooltip("hover:N", title="share"),
                alt.Tooltip("trials:Q", title="trials that have it"),
            ],
        )
        .properties(title=f"What mattered for {name}", width=WIDTH, height=_BAR * len(bars))
    )
    return chart


def altair_module() -> ModuleType:
    """Return Vega-Altair.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import altair
    except ImportError as error:
        raise MissingDependencyError(f"charts need Vega-Altair: {INSTALL_PLOTS}") from error
    return altair


def _key(metric: str) -> str:
    """Return a metric's name as the name of a point's field. Vega would read brackets and dots as a path."""
    return "".join(letter if letter.isalnum() else "_" for letter in metric)


def _figure(row: Row, metric: str) -> tuple[float | None, float | None]:
    if metric != NLL:
        return row.figure(metric), row.figure(f"{metric}_stderr")
    perplexity, error = row.figure("perplexity"), row.figure("perplexity_stderr")
    if perplexity is None or perplexity <= 0:
        return None, None
    return math.log(perplexity), None if error is None else error / perplexity


def _objectives(cost: _Cost, metric: str, direction: Direction) -> dict[str, Direction]:
    return {cost.field: "min", "perplexity" if metric == NLL else metric: direction}


def _is_drawn(row: Row, metric: str, cost: _Cost) -> bool:
    known = _figure(row, metric)[0] is not None and row.figure(cost.field) is not None
    return known and row.full and row.split != "test" and row.kind in _KINDS


def _place(row: Row, metric: str, against: str) -> dict[str, Any]:
    cost = _COSTS[against]
    return {against: (row.figure(cost.field) or 0.0) / cost.scale, _key(metric): _figure(row, metric)[0]}


def _point(row: Row, metrics: Sequence[str]) -> dict[str, Any]:
    kind = _PACKED if row.kind == "teacher" and row.deployment.bits < 16 else _KINDS[row.kind]
    found: dict[str, Any] = {
        "row": row.row_id,
        "name": row.name,
        "deployment": row.deployment_name,
        "limits": _FITS if row.feasible else row.reason or _OVER,
        "strategy": _said(row),
        "kind": kind,
        "state": _FITS if row.feasible else _PASSED,
    }
    for against, cost in _COSTS.items():
        if (needs := row.figure(cost.field)) is not None:
            found |= {against: needs / cost.scale, f"{against}_said": f"{needs / cost.scale:,.4g} {cost.unit}"}
    for metric in metrics:
        value, error = _figure(row, metric)
        if value is not None:
            said = f"{metric} {with_error(value, error)}"
            found |= {_key(metric): value, f"{_key(metric)}_said": said}
            found |= (
                {} if error is None else {f"{_key(metric)}_low": value - error, f"{_key(metric)}_high": value + error}
            )
    return found


def _said(row: Row) -> str:
    """Describe the fields of a row's strategy that differ from their defaults."""
    if row.strategy is None:
        return "the teacher, unchanged"
    given: Any = row.strategy if isinstance(row.strategy, Mapping) else row.strategy.to_json()
    changed = [f"{path} {value}" for path, value in _changes(given, Strategy().to_json(), "")]
    return ", ".join(changed) or "all as by default"


def _changes(given: Any, usual: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the paths at which plain data differ from other plain data, with their values."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            inner = usual.get(name) if isinstance(usual, Mapping) else None
            yield from _changes(value, inner, f"{path}.{name}" if path else name)
    elif given != usual:
        yield path, given


def _shape(alt: ModuleType, kinds: Sequence[str]) -> Any:
    """Return a shape for each kind, the same in every chart. The legend only names the kinds that are drawn."""
    known = [*dict.fromkeys([*_KINDS.values(), _PACKED])]
    shapes = dict(zip(known, ("circle", "square", "diamond", "triangle-up", "triangle-down"), strict=True))
    here = [kind for kind in known if kind in kinds]
    return alt.Shape("kind:N", title=None, scale=alt.Scale(domain=here, range=[shapes[kind] for kind in here]))


def _color(alt: ModuleType, states: Sequence[str]) -> Any:
    """Return a color for each state, the same in every chart. The legend only names the states of the points."""
    colors = {_FITS: "#3987d6", _PASSED: "#8f96a0"}
    here = [state for state in colors if state in states]
    return alt.Color("state:N", title=None, scale=alt.Scale(domain=here, range=[colors[state] for state in here]))


def _limit(budget: Budget | None, against: str, cost: _Cost) -> float | None:
    """Return the budget's limit on the horizontal axis, in the axis's unit, or None if it has none."""
    if budget is None:
        return None
    if against == "memory":
        return None if budget.memory_bytes >= NO_LIMIT else budget.memory_bytes / cost.scale
    if against == "latency" and isinstance(budget, DeviceBudget):
        limits = [one for one in budget.latency if one.quantity == "tpot" and one.streams == 1]
        return min((one.seconds * 1000 for one in limits), default=None)
    return None


def _scale(alt: ModuleType, across: Sequence[float]) -> Any:
    """Return the scale of the horizontal axis. It is logarithmic if the budget is far from the students' costs."""
    if min(across) > 0 and max(across) > _WIDE * min(across):
        return alt.Scale(type="log", nice=False, padding=20)
    return alt.Scale(zero=False, padding=20)


def _limit_line(alt: ModuleType, x: Any, limit: float, against: str, cost: _Cost, *, right: bool) -> list[Any]:
    """Return the budget's line and its label. The label is left of the line if nothing is drawn further right."""
    said = format_duration(limit / 1e3) if against == "latency" else format_bytes(limit * cost.scale)
    base = alt.Chart(alt.Data(values=[{against: limit, "limit": f"budget: {said}"}]))
    side = {"align": "right", "dx": -4} if right else {"align": "left", "dx": 4}
    return [
        base.mark_rule(color="#e5534b").encode(x=x),
        base.mark_text(y=8, color="#e5534b", **side).encode(x=x, text="limit:N"),
    ]

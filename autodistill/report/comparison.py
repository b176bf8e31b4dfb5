"""The page about several runs: what each was asked and found, and budget curves of runs that are comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.report.charts import HEIGHT, WIDTH, altair_module
from autodistill.report.contents import Contents
from autodistill.report.document import document, specifications
from autodistill.report.html import Cell, paragraph, table, text
from autodistill.runs.results.leaderboard import UNTRAINED, rests_on
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import examples_of
from autodistill.units import format_bytes, format_duration

if TYPE_CHECKING:
    import altair

_COLORED = 10  # runs that colors still tell apart


def comparison(runs: Sequence[Contents]) -> str:
    """Return the page about several runs as HTML.

    Runs share a chart if they were measured on the same examples by the same metric. Latencies are listed with their
    machine, and are not drawn.

    Raises:
        InputError: There are fewer than two runs, or two have the same name.
    """
    names = [one.name for one in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the run {twice!r} is named twice: compare it with another one")
    if len(runs) < 2:
        raise InputError("compare takes two runs or more: name another one, or see `autodistill report`")
    groups = _groups(runs)
    drawn = specifications(lambda: {f"curve-{n}": _curve(group) for n, group in enumerate(groups) if _points(group)})
    head = f"<p class=found>{text(f'{len(runs)} runs: {_said(runs)}')}</p>"
    apart = (
        f"The runs stand in {len(groups)} charts, since they were measured on different examples or by different "
        "metrics, on which even the same model has other figures."
        if len(groups) > 1
        else ""
    )
    curves = paragraph(apart) + "".join(_drawn(number, group, drawn or {}) for number, group in enumerate(groups))
    sections = [("found", "What was asked and found", _found(runs)), ("budget", "Budget curves", curves)]
    return document("A comparison of runs", head, [*sections, ("seconds", "Seconds by phase", _seconds(runs))], drawn)


def _said(runs: Sequence[Contents]) -> str:
    counted = {
        "teacher": {str(run.settings.get("teacher", {}).get("name")) for run in runs},
        "text": {str(run.settings.get("data", {}).get("name")) for run in runs},
        "budget": {run.budget.describe() for run in runs},
    }
    return ", ".join(
        f"one {name} ({next(iter(found))})" if len(found) == 1 else f"{len(found)} {name}s"
        for name, found in counted.items()
    )


def _found(runs: Sequence[Contents]) -> str:
    titles = ["run", "teacher", "text", "budget", "best", "metric", "figure", "memory", "latency", "machine"]
    lines = [_line(run) for run in runs]
    return table(
        "What was asked and found", [*titles, "gain on test over the best that needs no training", "time"], lines
    )


def _line(run: Contents) -> list[Any]:
    asked, best, gains = run.settings, run.best, run.gains
    value = None if best is None else best.figure(run.metric)
    gain = gains.untrained if gains else None
    machine = (asked.get("machine") or {}).get("name") or (best.machine if best else None)
    total = asked.get("seconds", {}).get("total")
    late = best.latency_ms if best else None
    return [
        run.name,
        asked.get("teacher", {}).get("name", "-"),
        asked.get("data", {}).get("name", "-"),
        Cell(run.budget.describe(), float(run.budget.memory_bytes)),
        "nothing fits" if best is None else best.row_id,
        run.metric,
        Cell("-" if value is None else f"{value:.4f}", value),
        Cell("-" if best is None or best.memory_bytes is None else format_bytes(best.memory_bytes)),
        Cell("-" if late is None else format_duration(late / 1e3), late),
        machine or "not recorded",
        gain.shown(gains.unit) if gain and gains else "none: it is the best that needs no training" if gains else "-",
        Cell("-" if total is None else format_duration(total), total),
    ]


def _seconds(runs: Sequence[Contents]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings.get("seconds", {})))
    lines = [
        [
            run.name,
            *(f"{run.settings['seconds'][name]:,.1f}" if name in run.settings["seconds"] else "-" for name in names),
        ]
        for run in runs
        if run.settings.get("seconds")
    ]
    return table("Seconds by phase", ["run", *names], lines)


def _groups(runs: Sequence[Contents]) -> list[list[Contents]]:
    """Return groups of runs whose full rows were measured on the same examples, by the same metric."""
    found: dict[tuple[str, str], list[Contents]] = {}
    for run in runs:
        read = {examples_of(row.split, row.documents) for row in run.rows if row.full} - {None}
        key = next(iter(read)) if len(read) == 1 else f"of {run.name}"
        found.setdefault((run.metric, str(key)), []).append(run)
    return list(found.values())


def _points(runs: Sequence[Contents]) -> list[dict[str, Any]]:
    return [
        {
            "run": run.name,
            "row": row.row_id,
            "memory": row.memory_bytes / 1e6,
            "value": value,
            "kind": "untrained" if row.kind in UNTRAINED else "trained",
            "limits": "fits" if row.feasible else row.reason or "over the budget",
        }
        for run in runs
        for row in run.rows
        if row.full and row.memory_bytes and (value := row.figure(run.metric)) is not None and math.isfinite(value)
    ]


def _curve(runs: Sequence[Contents]) -> altair.LayerChart:
    alt, metric = altair_module(), runs[0].metric
    names = [run.name for run in runs]
    color = (
        alt.Color("run:N", title=None, scale=alt.Scale(domain=names, scheme="tableau10"))
        if len(names) <= _COLORED
        else alt.value("#3987d6")
    )
    x = alt.X("memory:Q", title="memory (MB)", scale=alt.Scale(zero=False, padding=20))
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False, padding=20))
    shapes = alt.Scale(domain=["trained", "untrained"], range=["circle", "triangle-down"])
    hover = [alt.Tooltip(f"{name}:N") for name in ("run", "row", "kind", "limits")]
    points = (
        alt.Chart(alt.Data(values=_points(runs)))
        .mark_point(filled=True, size=70)
        .encode(
            x=x,
            y=y,
            color=color,
            shape=alt.Shape("kind:N", title=None, scale=shapes),
            tooltip=[
                *hover,
                alt.Tooltip("memory:Q", format=",.4g"),
                alt.Tooltip("value:Q", format=".4f", title=metric),
            ],
        )
    )
    limits = [
        {"run": run.name, "memory": run.budget.memory_bytes / 1e6}
        for run in runs
        if run.budget.memory_bytes < _far(_points(runs))
    ]
    rules = alt.Chart(alt.Data(values=limits)).mark_rule(strokeDash=[3, 3]).encode(x=x, color=color)
    title = f"{metric} against memory"
    # Vega warns of a layer without data, which has no extent.
    layers = [rules, points] if limits else [points]
    chart: altair.LayerChart = alt.layer(*layers).properties(title=title, width=WIDTH, height=HEIGHT)
    return chart


def _far(points: Sequence[dict[str, Any]]) -> float:
    """Return the bytes above which a budget's line is not drawn, because it would press all points into a corner."""
    return 2e6 * max((point["memory"] for point in points), default=0.0)


def _drawn(number: int, runs: Sequence[Contents], drawn: dict[str, dict[str, Any]]) -> str:
    names = ", ".join(run.name for run in runs)
    rows: list[Row] = [row for run in runs for row in run.rows if row.full]
    said = paragraph(f"{runs[0].metric} of {names}. {rests_on(rows)}")
    if f"curve-{number}" not in drawn:
        return said
    caption = "Points are students and teachers; a dashed line is the budget of its run."
    place = f'<div class=chart data-chart="curve-{number}"></div>'
    return f"{said}<figure>{place}<figcaption>{text(caption)}</figcaption></figure>"

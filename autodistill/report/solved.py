"""The chart of what `solve` found: KL to the teacher against memory of the process, with plain storages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.report.charts import altair_module
from autodistill.units import format_bytes, with_error
from autodistill.utils.json_files import unwritable

if TYPE_CHECKING:
    import altair

ENDINGS = (".svg", ".png", ".html", ".json")
"""Endings of files that a chart can be written to. The last is for its Vega-Lite specification."""

_SOLVED, _OWN, _PLAIN, _MIXTURE, _FILE = "solved", "teacher's own codes", "plain format", "mixture of llama.cpp", "file"
_COLORS = {_SOLVED: "#d62728", _OWN: "#2ca02c", _PLAIN: "#1f77b4", _MIXTURE: "#9467bd", _FILE: "#8c564b"}
_WIDTH, _HEIGHT, _PADDING = 560, 340, 40
_LETTER, _LINE = 5.5, 12.0  # width and height of a label's letter, in pixels
_LINEAR_BELOW = 0.02  # nats: the vertical axis is linear below this, so that it can show a KL of 0


def curve(document: Mapping[str, Any]) -> altair.LayerChart:
    """Draw the KL of each solution against its memory, with the measured rivals that store the whole model.

    A storage that is a rival for several budgets is one point. Bars are standard errors.

    Args:
        document: The result of `solve`.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: Nothing was solved.
    """
    alt = altair_module()
    points = list(_points(document))
    if not any(one["what"] == _SOLVED for one in points):
        raise InputError("nothing was solved that a chart could show: solve for a --budget or a --sweep")
    points = _without_overlap(points)
    x = alt.X("memory:Q", title="memory of the process (MB)", scale=alt.Scale(zero=False, padding=_PADDING))
    title = "KL to the teacher (nats a token)"
    y = alt.Y("kl:Q", title=title, scale=alt.Scale(type="symlog", constant=_LINEAR_BELOW))
    shown = [what for what in _COLORS if any(one["what"] == what for one in points)]
    colors = alt.Scale(domain=shown, range=[_COLORS[what] for what in shown])
    color = alt.Color("what:N", title=None, scale=colors)
    base = alt.Chart(alt.Data(values=points))
    solved = base.transform_filter(f"datum.what == '{_SOLVED}'")
    teacher, text = document["teacher"]["name"], document["data"]["name"]
    told = f"{document['held_out_tokens']:,} held-out tokens of {text}, nothing trained"
    chart: altair.LayerChart = alt.layer(
        solved.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=color, order="memory:Q"),
        base.transform_filter("isValid(datum.low)")
        .mark_rule()
        .encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q", color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            x=x,
            y=y,
            color=color,
            tooltip=[alt.Tooltip("name:N"), alt.Tooltip("takes:N"), alt.Tooltip("told:N", title="KL")],
        ),
        base.transform_filter(f"datum.what != '{_SOLVED}'")
        .mark_text(align="left", dx=7, dy=-5, fontSize=10)
        .encode(x=x, y=y, color=color, text="label:N"),
    ).properties(title={"text": f"{teacher}, solved", "subtitle": told}, width=_WIDTH, height=_HEIGHT)
    return chart


def write_chart(chart: altair.LayerChart, path: Path) -> None:
    """Write a chart to a file, in the format of its ending.

    Raises:
        InputError: `check_chart` refuses the file, or it cannot be written.
        MissingDependencyError: A package that draws pictures is not installed.
    """
    check_chart(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        chart.save(path)
    except OSError as error:
        raise unwritable(path, error, "--plot") from error


def check_chart(path: Path) -> None:
    """Check, before any work, that a chart can be written to a file.

    Raises:
        InputError: The file has an ending that is not in `ENDINGS`.
        MissingDependencyError: Altair is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{path} ends with {path.suffix or 'nothing'!r}: name a chart like curve.svg or curve.png")
    altair_module()


def _points(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the points of solutions, and of rivals that were measured and are not cut students, each storage once."""
    seen: set[str] = set()
    for found in document["solutions"]:
        yield _point(_SOLVED, found["solution"])
    for found in document["solutions"]:
        for rival in found["rivals"]:
            if rival["kl"] is None or "init" in rival or rival["name"] in seen:
                continue
            seen.add(rival["name"])
            yield _point(_kind_of(rival["what"]), rival)


def _without_overlap(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points with the labels removed that would overlap others. Own codes come first, then by KL."""
    memories = [one["memory"] for one in points]
    across = (_WIDTH - 2 * _PADDING) / max(1e-9, max(memories) - min(memories))
    up = _HEIGHT / max(1e-9, *(math.log1p(one["kl"] / _LINEAR_BELOW) for one in points))
    taken: list[tuple[float, float, float]] = []
    kept = []
    for one in sorted(points, key=lambda one: (one["what"] != _OWN, one["kl"], one["memory"])):
        left, y = across * one["memory"], up * math.log1p(one["kl"] / _LINEAR_BELOW)
        right = left + _LETTER * len(one["label"])
        free = all(abs(y - at) >= _LINE or right < begin or end < left for begin, end, at in taken)
        if one["what"] != _SOLVED and free:
            taken.append((left, right, y))
        kept.append(one if free else {**one, "label": ""})
    return kept


def _kind_of(what: str) -> str:
    kinds = {_OWN: _OWN, "uniform": _PLAIN, "mixture of llama.cpp": _MIXTURE, "candidate": _FILE}
    return next(kind for begin, kind in kinds.items() if what.startswith(begin))


def _point(what: str, one: Mapping[str, Any]) -> dict[str, Any]:
    kl, error = one["kl"], one["kl_stderr"]
    return {
        "what": what,
        "name": one["name"],
        "label": one["name"].removeprefix("gguf-"),
        "memory": one["bytes"] / 1e6,
        "takes": format_bytes(one["bytes"]),
        "kl": kl,
        "low": None if error is None else max(0.0, kl - error),
        "high": None if error is None else kl + error,
        "told": with_error(kl, error),
    }

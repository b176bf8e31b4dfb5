"""The chart of a cascade: accuracy against the share that is deferred to the larger model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.report.charts import HEIGHT, WIDTH, altair_module
from autodistill.units import format_bytes, with_error

if TYPE_CHECKING:
    import altair

_CURVE, _CHANCE = "by confidence", "at random"


def cascade_curve(document: Mapping[str, Any], unit: str) -> altair.LayerChart:
    """Draw accuracy by the share deferred, with its standard error, and a line for deferring the same share at random.

    Args:
        document: The result of `search.cascade.cascade`.
        unit: "position" or "answer".

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: The cascade has no such items.
    """
    alt = altair_module()
    if unit not in document["units"]:
        raise InputError(f"this cascade has no curve by {unit}: it has one by {', '.join(document['units'])}")
    found = document["units"][unit]
    points = list(_points(found["curve"]))
    chance = [
        {"deferred": share, "accuracy": found[f"{name}_accuracy"], "how": _CHANCE}
        for share, name in ((0.0, "small"), (1.0, "large"))
    ]
    x = alt.X("deferred:Q", title="share deferred to the large model", axis=alt.Axis(format="%"))
    y = alt.Y("accuracy:Q", title=f"accuracy by {unit}", scale=alt.Scale(zero=False, padding=20))
    colors = alt.Scale(domain=[_CURVE, _CHANCE], range=["#3987d6", "#8f96a0"])
    color = alt.Color("how:N", title=None, scale=colors)
    base = alt.Chart(alt.Data(values=points))
    hover = [alt.Tooltip(f"{name}:N") for name in ("threshold", "share", "right", "gain", "needs")]
    chart: altair.LayerChart = alt.layer(
        alt.Chart(alt.Data(values=chance)).mark_line(strokeDash=[4, 2]).encode(x=x, y=y, color=color),
        base.transform_filter("isValid(datum.low)")
        .mark_area(opacity=0.2, color="#3987d6")
        .encode(x=x, y=alt.Y("low:Q", title=f"accuracy by {unit}"), y2="high:Q"),
        base.mark_line().encode(x=x, y=y, color=color, order="deferred:Q"),
        base.mark_point(filled=True, size=30).encode(x=x, y=y, color=color, tooltip=hover),
    ).properties(
        title=f"{document['small']['row_id']} deferring to {document['large']['row_id']}, by {unit}",
        width=WIDTH,
        height=HEIGHT,
    )
    return chart


def cascade_charts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each chart of a cascade, and its unit."""
    for unit in document["units"]:
        yield f"cascade-{document['small']['row_id']}-{document['large']['row_id']}-{unit}", unit


def _points(curve: Any) -> Iterator[dict[str, Any]]:
    for one in curve:
        error, gained = one["accuracy_stderr"], one.get("over_chance_stderr")
        needs = [] if one["latency_ms"] is None else [f"{one['latency_ms']:.4g} ms"]
        needs += [] if one["memory_bytes"] is None else [format_bytes(one["memory_bytes"])]
        yield {
            "how": _CURVE,
            "deferred": one["deferred"],
            "accuracy": one["accuracy"],
            "low": None if error is None else one["accuracy"] - error,
            "high": None if error is None else one["accuracy"] + error,
            "threshold": f"below {one['threshold']:.4f}",
            "share": f"{one['deferred']:.1%}",
            "right": with_error(one["accuracy"], error),
            "gain": f"{one['over_chance']:+.4f} over random" + ("" if gained is None else f" ± {gained:.4f}"),
            "needs": ", ".join(needs) or "not known",
        }

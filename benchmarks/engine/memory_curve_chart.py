"""The picture of loss by memory: above what nobody trained, as KL to the model, and below what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autodistill.report.charts import altair_module

if TYPE_CHECKING:
    import altair

LLAMA, AUTOROUND, OWN_FILES = "llama.cpp", "AutoRound", "AutoDistill"
_SOLVED, _OWN = "autodistill solve", "the model as it is packaged"
_SERIES = {
    _SOLVED: "#2ca02c",
    _OWN: "#000000",
    "llama.cpp, importance matrix": "#1f77b4",
    "AutoRound": "#ff7f0e",
    "a file of this project": "#9467bd",
}
_OF_TOOL = dict(zip((LLAMA, AUTOROUND, OWN_FILES), list(_SERIES)[2:], strict=True))
_ARMS = {
    "search": ("autodistill search: trained, 10 minutes", "#d62728"),
    "search-short": ("the same in 40% less time", "#ff9896"),
    "no-teacher": ("plain storage, trained on labels", "#7f7f7f"),
    "no-search": ("plain storage, distilled", "#17becf"),
    "untrained": ("autodistill solve: not trained", "#2ca02c"),
    "recipe": ("hand-designed recipe, trained", "#9467bd"),
    "minitron": ("pruned, distilled, quantised", "#8c564b"),
}
_WIDTH, _HEIGHT = 520, 250
_LINEAR_BELOW = 0.02  # nats: the axis of KL is linear below this, so that it can show 0
_HELD = {"f16": "16-bit cache", "q8_0": "8-bit cache", "q4_0": "keys in 8 bits, values in 4"}
_SHAPES = ["square", "circle", "diamond"]
# Where a file's name stands beside its point: alignment, and pixels to the right and down. In one place for all, the
# names of neighbours would lie on one another.
_PLACES = {"above": ("left", 7, -5), "below": ("left", 7, 11), "left": ("right", -7, 11)}
_PLACED = {
    (LLAMA, "Q3_K_M"): "below",
    (LLAMA, "IQ4_NL"): "left",
    (AUTOROUND, "Q4_K_M"): "below",
    (AUTOROUND, "Q4_0"): "below",
    (AUTOROUND, "Q3_K_M"): "left",
}


def picture(
    solved: Mapping[str, Any], files: Sequence[Mapping[str, Any]], trained: Mapping[str, Any]
) -> altair.VConcatChart:
    """Draw the two panels above each other, with the same axis of memory.

    Args:
        solved: What `solve` reports of several budgets.
        files: Lines of the files of other tools.
        trained: The record of a comparison of arms of training.
    """
    alt = altair_module()
    arms = list(_arms(trained))
    points = [*_solutions(solved), *map(_file, files)]
    reach = [one["memory"] for one in (*points, *arms)]
    scale = alt.Scale(domain=[min(reach) - 5, max(reach) + 9], nice=False)
    x = alt.X("memory:Q", title="memory of the process (MB)", scale=scale)
    chart: altair.VConcatChart = (
        alt.vconcat(_untrained(points, x, solved), _trained(arms, x))
        .resolve_scale(color="independent", shape="independent")
        .configure(background="white")
        .configure_legend(labelLimit=0, symbolSize=70)
        .configure_title(anchor="start")
    )
    return chart


def _untrained(points: Sequence[Mapping[str, Any]], x: altair.X, solved: Mapping[str, Any]) -> altair.LayerChart:
    alt = altair_module()
    y_scale = alt.Scale(type="symlog", constant=_LINEAR_BELOW)
    axis = alt.Axis(values=[0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], format="~g")
    y = alt.Y("kl:Q", title="KL to the model (nats a token)", scale=y_scale, axis=axis)
    shown = [name for name in _SERIES if any(one["series"] == name for one in points)]
    colors = alt.Scale(domain=shown, range=[_SERIES[name] for name in shown])
    color = alt.Color("series:N", legend=alt.Legend(title=None), scale=colors)
    base = alt.Chart(alt.Data(values=list(points)))
    held = alt.Shape(
        "cache:N",
        legend=alt.Legend(title=None),
        scale=alt.Scale(domain=[*_HELD.values()], range=_SHAPES),
    )
    point = {"x": x, "y": y, "color": color, "shape": held}
    theirs, ours = (base.transform_filter(f"datum.ours == {own}") for own in ("false", "true"))
    told = f"{solved['teacher']['name']}, {solved['held_out_tokens']:,} held-out tokens of {solved['data']['name']}"
    found: altair.LayerChart = alt.layer(
        base.transform_filter(f"datum.series == '{_SOLVED}'")
        .mark_line(strokeWidth=1.5)
        .encode(x=x, y=y, color=color, order="memory:Q"),
        base.mark_rule().encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color),
        # Our points are small and on top, so that a file in the same place is seen around them.
        theirs.mark_point(filled=True, size=90, opacity=1).encode(**point),
        ours.mark_point(filled=True, size=40, opacity=1).encode(**point),
        *(
            base.transform_filter(f"datum.place == '{place}'")
            .mark_text(align=align, dx=right, dy=down, fontSize=10)
            .encode(x=x, y=y, color=color, text="label:N")
            for place, (align, right, down) in _PLACES.items()
        ),
    ).properties(title={"text": "Without training", "subtitle": told}, width=_WIDTH, height=_HEIGHT)
    return found


def _trained(arms: Sequence[Mapping[str, Any]], x: altair.X) -> altair.LayerChart:
    alt = altair_module()
    title = "loss on unseen documents (nats a token)"
    mean, single = (alt.Y(field, title=title, scale=alt.Scale(zero=False)) for field in ("mean(nll):Q", "nll:Q"))
    shown = [pair for pair in _ARMS.values() if any(one["arm"] == pair[0] for one in arms)]
    names, colors = [name for name, _ in shown], [color for _, color in shown]
    color = alt.Color("arm:N", legend=alt.Legend(title=None), scale=alt.Scale(domain=names, range=colors))
    base = alt.Chart(alt.Data(values=list(arms)))
    told = "a lower loss than the model's own is what training adds; other documents of the same text"
    found: altair.LayerChart = alt.layer(
        base.mark_line(strokeWidth=1.5).encode(x=x, y=mean, color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=single, color=color),
    ).properties(title={"text": "With training, by budget", "subtitle": told}, width=_WIDTH, height=_HEIGHT)
    return found


def _solutions(solved: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for found in solved["solutions"]:
        types = found["solution"]["types"]
        yield _point(_SOLVED, "", types["cache_values"], found["solution"])
    codes = (one for found in solved["solutions"] for one in found["rivals"] if one["what"] == "teacher's own codes")
    if (own := next(codes, None)) is not None:
        yield _point(_OWN, "", "f16", own)


def _file(one: Mapping[str, Any]) -> dict[str, Any]:
    label = one["form"] if one["cache"] == "q8_0" else ""
    place = _PLACED.get((one["tool"], one["form"]), "above")
    return _point(_OF_TOOL[one["tool"]], label, one["cache"], one) | {"place": place}


def _point(series: str, label: str, kind: str, one: Mapping[str, Any]) -> dict[str, Any]:
    kl, error = one["kl"], one["kl_stderr"] or 0.0
    return {
        "series": series,
        "ours": series in (_SOLVED, _OWN),
        "label": label,
        "cache": _HELD[kind],
        "memory": one["bytes"] / 1e6,
        "kl": kl,
        "low": max(0.0, kl - error),
        "high": kl + error,
    }


def _arms(trained: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arms with figures of the blocks whose budget is a process's memory."""
    for rows in trained.values():
        for row in rows:
            if row.get("arm") in _ARMS and row.get("test") and row["fits"]:
                budget = row["budget"]["memory_bytes"] / 1e6
                yield {"arm": _ARMS[row["arm"]][0], "memory": budget, "nll": row["test"]["nll"][0]}

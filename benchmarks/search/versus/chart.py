"""The chart of a comparison: each arm's loss on unseen documents by its budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autodistill.report.charts import altair_module
from benchmarks.search.versus.blocks import Block
from benchmarks.search.versus.targets import MINE, QUICK, Row, has_figures

if TYPE_CHECKING:
    import altair

# The arms' names in the chart, the best known first.
_NAMES = {
    MINE: "autodistill search",
    QUICK: "the same in 40% less time",
    "no-teacher": "best plain storage, trained on labels",
    "no-search": "best plain storage, distilled",
    "untrained": "solved, without training",
    "recipe": "hand-designed recipe",
    "minitron": "pruned, distilled, quantised",
    "finetune": "trained, then quantised",
}
_COLORS = ("#d62728", "#ff9896", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")
_WIDTH, _HEIGHT = 560, 340


def curve(rows: Mapping[Block, Mapping[str, Row]]) -> altair.LayerChart | None:
    """Draw the blocks whose budget is a process's memory. Return None unless they have at least two budgets.

    Each row is a point, and lines go through the means over seeds. The chart has no error bars: the table has those of
    paired differences. An arm's own error comes almost only from differences between documents, which are the same for
    all.

    Args:
        rows: Rows by block and arm.
    """
    alt = altair_module()
    points = [_point(block, arm, row) for block, found in rows.items() for arm, row in _drawn(block, found).items()]
    if len({one["budget"] for one in points}) < 2:
        return None
    shown = [name for name in _NAMES.values() if any(one["arm"] == name for one in points)]
    colors = alt.Scale(domain=shown, range=[_COLORS[list(_NAMES.values()).index(name)] for name in shown])
    x = alt.X("budget:Q", title="budget: memory of the process (MB)", scale=alt.Scale(zero=False, padding=30))
    title = "loss on unseen documents (nats a token)"
    y = alt.Y("nll:Q", title=title, scale=alt.Scale(zero=False))
    # Without a limit of 0, Vega cuts long names off.
    color = alt.Color("arm:N", title=None, scale=colors, legend=alt.Legend(labelLimit=0))
    base = alt.Chart(alt.Data(values=points))
    first = next(iter(rows))
    told = f"{first.teacher}, {first.text}, {first.box / 60:g} minutes for each"
    chart: altair.LayerChart = alt.layer(
        base.mark_line(strokeWidth=1.5).encode(x=x, y=alt.Y("mean(nll):Q", title=title), color=color),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=color),
    ).properties(title={"text": "The search beside who does less", "subtitle": told}, width=_WIDTH, height=_HEIGHT)
    return chart


def _drawn(block: Block, found: Mapping[str, Row]) -> dict[str, Row]:
    known = {arm: row for arm, row in found.items() if arm in _NAMES and has_figures(row) and row["fits"]}
    return known if block.budget > 1 else {}


def _point(block: Block, arm: str, row: Row) -> dict[str, Any]:
    return {"arm": _NAMES[arm], "budget": block.budget / 1e6, "nll": row["test"]["nll"][0]}

"""Finalists: rows whose exported files were read by their runtimes, ranked by what they lose there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import RUNTIME_LOSS, Row
from autodistill.units import format_bytes, with_error

TITLES = ("finalist", "loss in torch", "loss in its runtime", "more than the best", "accuracy there", "memory")
"""The columns of `table`."""


def decided_in_runtime(metric: str) -> bool:
    """Return whether the loss in the runtime decides between finalists: it tells them apart by the text sooner."""
    return metric in ("accuracy", "perplexity")


def finalists_first(ranked: Sequence[Row], metric: str) -> list[Row]:
    """Return rows in the order in which they rank, but those that a runtime has read first, by their loss there.

    Of rows that their losses cannot tell apart, paired by document, the smallest comes first, as in `rank`. Metrics
    other than accuracy and perplexity have the last word themselves.
    """
    read = [row for row in ranked if row.figure(RUNTIME_LOSS) is not None]
    if not read or not decided_in_runtime(metric):
        return list(ranked)
    given = {row.row_id: row for row in read}
    # A student that stopped early was read like any other.
    whole = [row if row.full else replace(row, fidelity=1.0) for row in read]
    first = [given[one.row.row_id] for one in rank(whole, RUNTIME_LOSS, "min")]
    return [*first, *(row for row in ranked if row.row_id not in given)]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each finalist, the least loss in its runtime first, in nats a token of the same text."""
    ranked = rank([row for row in rows if row.figure(RUNTIME_LOSS) is not None], RUNTIME_LOSS, "min")
    lines = []
    for one in sorted(ranked, key=lambda one: one.row.figure(RUNTIME_LOSS) or 0.0):
        row = one.row
        loss, excess = row.figure(RUNTIME_LOSS) or 0.0, row.figure("runtime_excess")
        lines.append(
            [
                row.short_id + ("" if row.feasible else ", passed over"),
                "-" if excess is None else f"{loss - excess:.4f}",
                row.shown(RUNTIME_LOSS),
                with_error(one.difference, one.difference_stderr),
                row.shown("runtime_accuracy"),
                format_bytes(row.memory_bytes or 0),
            ]
        )
    return lines

"""Choice of the row to export: the best that fits the budget. Fully trained students go before others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.memory_correction import corrected, least_beyond
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import in_order
from autodistill.search.campaign.state import Question


def trained_rows(rows: Sequence[Row], metric: str, is_kept: Callable[[Row], bool]) -> list[Row]:
    """Return the rows of students at full fidelity whose students were kept. Rows without the metric are left out.

    Args:
        rows: Rows of one split.
        metric: The metric that ranks rows.
        is_kept: Returns whether a row's student was kept.
    """
    full = (row for row in rows if row.kind in DISTILLED and row.full and row.figure(metric) is not None)
    return [row for row in full if is_kept(row)]


def candidates(rows: Sequence[Row], metric: str, is_kept: Callable[[Row], bool]) -> list[Row]:
    """Return the rows of students that may be exported if they fit. See `trained_rows` for the arguments.

    If no fully trained student fits, kept students that stopped before the end are included.
    """
    full = trained_rows(rows, metric, is_kept)
    if any(row.feasible for row in full):
        return full
    short = (row for row in rows if row.kind in DISTILLED and not row.full and row.figure(metric) is not None)
    return [*full, *(row for row in short if row.feasible and is_kept(row))]


def next_candidate(
    rows: Sequence[Row], rejected: Sequence[Row], question: Question, container: str | None = None
) -> Row | None:
    """Return the best row that may still fit the budget when measured, given the rows that did not.

    A runtime takes about the same extra memory for each student: see `passed_over`. The choice equals that of a later
    reader of the log, in which the rejected rows do not fit.

    Args:
        rows: The rows that may be exported, and the rows that they are ranked with.
        rejected: Rejected rows, with what was measured.
        question: What was asked.
        container: The container of the row's deployment. None allows any.
    """
    out = {row.row_id: row for row in (*passed_over(rows, rejected, question.budget.memory_bytes), *rejected)}
    known = [out.get(row.row_id, row) for row in rows]
    ranked = in_order(known, question.metric, question.direction, students_only=question.students_only)
    return next((row for row in ranked if container in (None, container_of(row))), None)


def container_of(row: Row) -> str:
    """Return the container that the row's student is exported in."""
    return row.deployment.container


def passed_over(rows: Sequence[Row], rejected: Sequence[Row], limit: int) -> list[Row]:
    """Return the rows that would break the limit if their runtime took its extra memory again.

    The extra memory is the least that the runtime has taken so far beyond a prediction.

    Args:
        rows: Rows of students, untrained rows, and other rows. Other rows are never returned.
        rejected: Rejected rows, with what was measured. They are not returned.
        limit: Memory limit in bytes.

    Returns:
        The rows, marked as infeasible with the reason.
    """
    beyond = least_beyond(rejected)
    tried = {row.row_id for row in rejected}
    found = []
    for row in rows:
        need, runtime = corrected(row, beyond), row.deployment.runtime
        usable = row.kind in (*DISTILLED, *UNTRAINED) and row.feasible
        if usable and row.row_id not in tried and need > limit:
            reason = (
                f"memory: {row.memory_bytes} bytes predicted, {need} with the excess that {runtime} showed for another "
                f"student, {need - limit} over the budget of {limit}"
            )
            found.append(replace(row, feasible=False, reason=reason))
    return found

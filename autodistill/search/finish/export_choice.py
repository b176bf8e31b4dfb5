"""Which row is exported: the best that keeps to the budget, of students those trained to the end, or else furthest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.memory_correction import corrected, least_beyond
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import in_order
from autodistill.search.campaign.state import Question


def trained_rows(rows: Sequence[Row], metric: str, kept: Callable[[Row], bool]) -> list[Row]:
    """The rows of students at full fidelity that were kept; one without the metric says nothing of its student.

    Args:
        rows: Of one split.
        metric: What ranks.
        kept: Whether a row's student was.
    """
    full = (row for row in rows if row.kind in DISTILLED and row.full and row.figure(metric) is not None)
    return [row for row in full if kept(row)]


def candidates(rows: Sequence[Row], metric: str, kept: Callable[[Row], bool]) -> list[Row]:
    """The rows of students that may be exported, where they fit: see `trained_rows`.

    Where none of these fits, those of students that were kept short of the end are among them.
    """
    full = trained_rows(rows, metric, kept)
    if any(row.feasible for row in full):
        return full
    short = (row for row in rows if row.kind in DISTILLED and not row.full and row.figure(metric) is not None)
    return [*full, *(row for row in short if row.feasible and kept(row))]


def next_candidate(
    rows: Sequence[Row], rejected: Sequence[Row], question: Question, container: str | None = None
) -> Row | None:
    """The row to export: the chosen one of those that may keep to the budget when measured, given what did not.

    A runtime takes about as much more than predicted for one student as for another: see `passed_over`. It is chosen as
    whoever reads the log later will choose, where those rows do not fit.

    Args:
        rows: What may be exported, and whatever that ranks beside.
        rejected: Rows as they were measured.
        question: What was asked.
        container: Its deployment's; any by default.
    """
    out = {row.row_id: row for row in (*passed_over(rows, rejected, question.budget.memory_bytes), *rejected)}
    known = [out.get(row.row_id, row) for row in rows]
    ranked = in_order(known, question.metric, question.direction, students_only=question.students_only)
    return next((row for row in ranked if container in (None, container_of(row))), None)


def container_of(row: Row) -> str:
    """Return what its student is written as."""
    return row.deployment.container


def passed_over(rows: Sequence[Row], rejected: Sequence[Row], limit: int) -> list[Row]:
    """The rows that would break the limit with the least that their runtime took beyond the predictions so far.

    Args:
        rows: Of students, of what needs no training, and of whatever these rank beside, which is not returned.
        rejected: Rows as they were measured; these are not among what is returned.
        limit: Bytes of memory.

    Returns:
        Rows as infeasible, with the reason.
    """
    beyond = least_beyond(rejected)
    tried = {row.row_id for row in rejected}
    found = []
    for row in rows:
        need, runtime = corrected(row, beyond), row.deployment.runtime
        usable = row.kind in (*DISTILLED, *UNTRAINED) and row.feasible
        if usable and row.row_id not in tried and need > limit:
            reason = (
                f"memory: {row.memory_bytes} bytes predicted, {need} with what {runtime} took beyond that for another "
                f"student, {need - limit} over the budget of {limit}"
            )
            found.append(replace(row, feasible=False, reason=reason))
    return found

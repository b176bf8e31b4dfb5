"""Which student is exported: of those trained to the end, or else furthest, the best that keeps to the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autodistill.records.confirmation import Confirmation
from autodistill.records.leaderboard import DISTILLED, rank_students
from autodistill.records.recalibration import corrected, least_beyond
from autodistill.records.row import Row
from autodistill.search.trials import Question


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


def exportable(rows: Sequence[Row], confirmed: Sequence[Confirmation], question: Question) -> list[Row]:
    """What may be exported, the best first: the students that keep to the budget, as they rank beside all rows.

    What is best on several seeds goes first, in the best of its deployments.
    """
    ranked = [row for row in rank_students(rows, question.metric, question.direction) if row.feasible]
    if not confirmed:
        return ranked
    own = [row for row in rows if row.trial == confirmed[0].trial]
    first = [row for row in rank_students(own, question.metric, question.direction) if row.feasible]
    return [*first, *(row for row in ranked if row.trial != confirmed[0].trial)]


def next_candidate(ranked: Sequence[Row], rejected: Sequence[Row], limit: int) -> Row | None:
    """The best row that may keep to the budget when it is measured, given those that did not.

    A runtime takes about as much more than predicted for one student as for another: see `passed_over`.

    Args:
        ranked: Rows that keep to the budget so far, the best first.
        rejected: Rows as they were measured.
        limit: Bytes of memory.
    """
    out = {row.row_id for row in (*rejected, *passed_over(ranked, rejected, limit))}
    return next((row for row in ranked if row.row_id not in out), None)


def passed_over(ranked: Sequence[Row], rejected: Sequence[Row], limit: int) -> list[Row]:
    """The rows that would break the limit with the least that their runtime took beyond the predictions so far.

    Args:
        ranked: Rows that keep to the budget so far.
        rejected: Rows as they were measured; these are not among what is returned.
        limit: Bytes of memory.

    Returns:
        Rows as infeasible, with the reason.
    """
    beyond = least_beyond(rejected)
    tried = {row.row_id for row in rejected}
    found = []
    for row in ranked:
        need, runtime = corrected(row, beyond), row.deployment["runtime"]
        if row.row_id not in tried and need > limit:
            reason = (
                f"memory: {row.memory_bytes} bytes predicted, {need} with what {runtime} took beyond that for another "
                f"student, {need - limit} over the budget of {limit}"
            )
            found.append(replace(row, feasible=False, reason=reason))
    return found

"""Which student of a run is chosen: the one answer that export, explanation, report and summary give."""

from __future__ import annotations

from collections.abc import Sequence

from autodistill.contracts import Direction
from autodistill.records.confirmation import KIND, confirmations
from autodistill.records.leaderboard import rank_students
from autodistill.records.row import Row


def contenders(rows: Sequence[Row]) -> list[Row]:
    """The rows of the validation split that are ranked: a strategy counts once, not again for each further seed.

    Of several seeds the luckiest would be the first of them; these are compared by their means.
    """
    return [row for row in rows if row.split != "test" and row.kind != KIND]


def in_order(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """The students that keep to the budget and have the metric, the chosen one first.

    Chosen is what is best on several seeds, in the best of its deployments, where strategies were trained on these;
    else the student that ranks first beside all rows. The others follow as they rank.

    Args:
        rows: Of a run, those of further seeds among them.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
    """
    ranked = _feasible(contenders(rows), metric, direction)
    confirmed = confirmations([row for row in rows if row.split != "test"], metric, direction)
    if not confirmed:
        return ranked
    trial = confirmed[0].trial
    own = _feasible([row for row in contenders(rows) if row.trial == trial], metric, direction)
    return [*own, *(row for row in ranked if row.trial != trial)]


def chosen(rows: Sequence[Row], metric: str, direction: Direction) -> Row | None:
    """The first of `in_order`, or None where no student keeps to the budget."""
    return next(iter(in_order(rows, metric, direction)), None)


def _feasible(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    return [row for row in rank_students(rows, metric, direction) if row.feasible and row.figure(metric) is not None]

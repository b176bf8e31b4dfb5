"""Which row of a run is chosen: the one answer that export, explanation, report and summary give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autodistill.contracts import Direction
from autodistill.records.beginnings import worsened
from autodistill.records.confirmation import KIND, confirmations
from autodistill.records.leaderboard import DISTILLED, UNTRAINED, rank, rank_students
from autodistill.records.row import Row


def students_only(search: Mapping[str, Any]) -> bool:
    """Whether a run, by its `search.json`, chooses among trained students alone, as those of earlier versions did."""
    return bool(search.get("students_only", True))


def contenders(rows: Sequence[Row]) -> list[Row]:
    """The rows of the validation split that are ranked: a strategy counts once, not again for each further seed.

    Of several seeds the luckiest would be the first of them; these are compared by their means.
    """
    return [row for row in rows if row.split != "test" and row.kind != KIND]


def in_order(rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool) -> list[Row]:
    """The rows that keep to the budget and have the metric, the chosen one first, whether it was trained or not.

    Chosen is what ranks first. Of strategies that were trained on further seeds only the best by these stands for the
    students, in the best of its deployments; and where no student was trained to the end, the one that came furthest
    does, judged by its metric as any other. The others follow as they rank. A student that does worse than its own
    beginning is left out.

    Args:
        rows: Of a run, those of further seeds among them.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
        students_only: Whether only trained students are asked for: then all of them count, and nothing else does.
    """
    validation = [row for row in rows if row.split != "test"]
    if students_only:
        return _students(validation, metric, direction)
    worse = {row.row_id for row, _ in worsened(validation, metric, direction)}
    usable = [row for row in validation if row.row_id not in worse]
    students = _students(usable, metric, direction)
    untrained = untrained_in_order(usable, metric, direction)
    if students and (not students[0].full or confirmations(usable, metric, direction)):
        # A rung reads less than the end does, but a person judges a student short of the end by its figure.
        champion = replace(students[0], fidelity=1.0)
        beside = [one.row.row_id for one in rank([champion, *untrained], metric, direction)]
        place = beside.index(champion.row_id)
        before, after = beside[:place], beside[place + 1 :]
        by_id = {row.row_id: row for row in untrained}
        return [*map(by_id.__getitem__, before), *students, *map(by_id.__getitem__, after)]
    ranked = [one.row for one in rank(contenders(usable), metric, direction)]
    return [row for row in ranked if row.kind in (*DISTILLED, *UNTRAINED) and _counts(row, metric)]


def untrained_in_order(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """The rows that need no training, keep to the budget and have the metric, the best first."""
    ranked = rank([row for row in rows if row.split != "test" and row.kind in UNTRAINED], metric, direction)
    return [one.row for one in ranked if _counts(one.row, metric)]


def chosen(rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool) -> Row | None:
    """The first of `in_order`, or None where nothing keeps to the budget."""
    return next(iter(in_order(rows, metric, direction, students_only=students_only)), None)


def _students(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """The students, the best first: on several seeds where some were trained on these, else as they rank."""
    ranked = [row for row in rank_students(contenders(rows), metric, direction) if _counts(row, metric)]
    confirmed = confirmations(rows, metric, direction)
    if not confirmed:
        return ranked
    trial = confirmed[0].trial
    own = [row for row in contenders(rows) if row.trial == trial]
    best = [row for row in rank_students(own, metric, direction) if _counts(row, metric)]
    return [*best, *(row for row in ranked if row.trial != trial)]


def _counts(row: Row, metric: str) -> bool:
    return row.feasible and row.figure(metric) is not None

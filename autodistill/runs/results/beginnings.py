"""What a student was before its training, or part of the way through it in weights: which rows these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autodistill.evaluation.base import Direction
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row


def beginning_trial(trial: str) -> str:
    """Name under which a trial's student without its training has rows."""
    return f"{trial}i"


_WAY = "w"


def interpolated_trial(trial: str, share: float) -> str:
    """Name under which a trial's student has rows whose weights lie at a share of the way from beginning to end."""
    return f"{trial}{_WAY}{round(100 * share)}"


def trained_trial(row: Row) -> str:
    """Return the trial that trained a row's student: another one than the row's where that was interpolated."""
    return row.trial if row.interpolation is None else row.trial.rpartition(_WAY)[0]


def trained_row(row: Row) -> Row:
    """The row of an interpolated student as that of the trained one that it was made of, with none of its figures."""
    return replace(row, trial=trained_trial(row), interpolation=None)


def is_teacher(row: Row, teacher: Row) -> bool:
    """Return whether a row's student begins as the whole teacher, whose row is the other one."""
    begins = row.strategy is not None and row.strategy.init.source == "teacher" and row.strategy.codes is None
    return begins and row.shape is not None and row.shape == teacher.shape


def beginning_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of a student's own beginning in the same deployment: that of the teacher, where it begins as that.

    Args:
        row: Of a student.
        rows: Among which it is looked for, of the same split.
    """
    if row.strategy is None:
        return None
    packed = [one for one in rows if one.deployment == row.deployment and one.split == row.split]
    for one in packed:
        begins = one.kind == "initial" and one.strategy is not None and one.strategy.begins_as(row.strategy)
        if begins and one.seed == row.seed:
            return one
    return next((one for one in packed if one.kind == "teacher" and is_teacher(row, one)), None)


def worsened(rows: Sequence[Row], metric: str, direction: Direction) -> list[tuple[Row, Row]]:
    """The students that do worse than they began, each with the row of its beginning.

    Both are of the same tokens, so that the sign of the figures' difference is that of the one paired by document. Of a
    row of a rung that read fewer than its beginning nothing is said.

    Args:
        rows: Of the validation split.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
    """
    sign = 1.0 if direction == "max" else -1.0
    untrained = [row for row in rows if row.kind not in DISTILLED]
    found = []
    for row in rows:
        value = row.figure(metric) if row.kind in DISTILLED else None
        before = beginning_of(row, untrained) if value is not None else None
        known = before.figure(metric) if before is not None else None
        if value is None or before is None or known is None or not _read_alike(row, before):
            continue
        if sign * value < sign * known:
            found.append((row, before))
    return found


def _read_alike(row: Row, before: Row) -> bool:
    if row.documents is None or before.documents is None:
        return True
    return bool(sum(row.documents["count"]) == sum(before.documents["count"]))

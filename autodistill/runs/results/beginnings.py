"""Rows of students before their training, and of students whose weights are interpolated between start and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autodistill.evaluation.base import Direction
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row


def beginning_trial(trial: str) -> str:
    """Return the trial name in rows of a trial's untrained student."""
    return f"{trial}i"


_WAY = "w"


def interpolated_trial(trial: str, share: float) -> str:
    """Return the trial name in rows of a student with interpolated weights, at a share of the way from start to end."""
    return f"{trial}{_WAY}{round(100 * share)}"


def trained_trial(row: Row) -> str:
    """Return the trial that trained a row's student, also if the row's weights are interpolated."""
    return row.trial if row.interpolation is None else row.trial.rpartition(_WAY)[0]


def trained_row(row: Row) -> Row:
    """Return a row with trial and interpolation changed to those of the trained student; its figures do not apply."""
    return replace(row, trial=trained_trial(row), interpolation=None)


def is_teacher(row: Row, teacher: Row) -> bool:
    """Return whether a row's student begins as the whole teacher, given a row of the teacher."""
    begins = row.strategy is not None and row.strategy.init.source == "teacher" and row.strategy.codes is None
    return begins and row.shape is not None and row.shape == teacher.shape


def beginning_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row of a student before its training in the same deployment, or None if there is none.

    If the student begins as the whole teacher, it is the teacher's row.

    Args:
        row: Row of a student.
        rows: Rows to search. Only those of the same split are considered.
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
    """Return the students that are worse than before their training, each with the row from before it.

    Both rows must be measured on the same tokens, so that their difference has the sign of the difference paired by
    document. A row of a rung that read fewer tokens is therefore left out.

    Args:
        rows: Rows of the validation split.
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

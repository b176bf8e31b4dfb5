"""The standing of a run: its ranked rows, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autodistill.errors import InputError
from autodistill.runs.results.leaderboard import DISTILLED, Ranked, rank
from autodistill.runs.results.objectives import objectives_of, with_front
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import chosen, contenders, students_only
from autodistill.runs.run_folder import RunFolder


def leaderboard_of(run: RunFolder) -> tuple[list[Ranked], str]:
    """Return the ranked rows of a run's validation split, and the metric that ranks them.

    The run may still be under way.

    Raises:
        InputError: The run's records cannot be read.
    """
    asked = run.read_settings("metric", "direction")
    rows = contenders(run.events.rows())
    return with_front(rank(rows, asked["metric"], asked["direction"]), objectives_of(asked)), asked["metric"]


def best_of(run: RunFolder, rows: Sequence[Row]) -> Row | None:
    """Return the row that a run exports: the best one whose student is on disk, or None if nothing fits the budget.

    Args:
        run: The run.
        rows: Its rows of the validation split.
    """
    asked = run.read_settings("metric", "direction")
    # Few students that did not reach the end are kept, so the best row of all may have no student on disk.
    having = [row for row in rows if row.kind not in DISTILLED or row.full or trained_student(run, row).is_dir()]
    return chosen(having, asked["metric"], asked["direction"], students_only=students_only(asked))


def trained_student(run: RunFolder, row: Row) -> Path:
    """Return the folder of a row's student in float32, which may not exist."""
    # This import loads pyarrow, which commands that only list runs do not need.
    from autodistill.runs.students import kept_after, student_folder

    return student_folder(run.checkpoints / row.trial, kept_after(row))


def find_row(run: RunFolder, ranked: Sequence[Row], row_id: str | None) -> Row:
    """Return the row with an id, in full or shortened as in tables.

    Args:
        run: The run.
        ranked: Its rows of the validation split, in the order in which the error message lists them.
        row_id: The id, or None if the run has no best row.

    Raises:
        InputError: There is no such row, or no id was given. The message lists the rows whose models are on disk.
    """
    for row in ranked:
        if row_id in (row.row_id, row.short_id):
            return row
    ids = [row.row_id for row in ranked if row.kind == "teacher" or trained_student(run, row).is_dir()]
    listed = f"the rows that can be exported are {', '.join(ids)}" if ids else "it has no student on disk"
    if row_id is None:
        raise InputError(f"the run {run.name!r} has nothing that fits its budget to export: {listed}")
    raise InputError(
        f"the run {run.name!r} has no row {row_id!r} (autodistill leaderboard {run.name} shows its rows); {listed}"
    )


def find_pair(run: RunFolder, rows: str) -> tuple[Row, Row]:
    """Return the two rows of a cascade, the small one first.

    Args:
        run: The run.
        rows: Two ids with a comma between them. "teacher" means the teacher's row with the most bits.

    Raises:
        InputError: There are not two ids, there is no such row, or both are the same row.
    """
    names = [name.strip() for name in rows.split(",")]
    if len(names) != 2 or not all(names):
        raise InputError(f"--rows {rows!r} must name two rows: the small one, a comma, and the large one or teacher")
    ranked = [one.row for one in leaderboard_of(run)[0]]
    teachers = sorted((row for row in ranked if row.kind == "teacher"), key=lambda row: -row.deployment.bits)

    def named(name: str) -> Row:
        return teachers[0] if name == "teacher" and teachers else find_row(run, ranked, name)

    small, large = map(named, names)
    if small.row_id == large.row_id:
        raise InputError(f"--rows names {small.row_id} twice: a cascade takes two different rows")
    return small, large

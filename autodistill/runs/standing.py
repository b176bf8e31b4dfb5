"""How a run stands: its ranked rows, and the one of them that is its best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autodistill.runs.results.leaderboard import DISTILLED, Ranked, rank
from autodistill.runs.results.objectives import objectives_of, with_front
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import chosen, contenders, students_only
from autodistill.runs.run_folder import RunFolder


def leaderboard_of(run: RunFolder) -> tuple[list[Ranked], str]:
    """The ranked rows of a run's validation split, and the metric that ranks them; also of a run that is under way.

    Raises:
        InputError: Its records cannot be read.
    """
    asked = run.asked("metric", "direction")
    rows = contenders(run.events.rows())
    return with_front(rank(rows, asked["metric"], asked["direction"]), objectives_of(asked)), asked["metric"]


def best_of(run: RunFolder, rows: Sequence[Row]) -> Row | None:
    """The row that a run exports: the best whose student is on disk; None where nothing keeps to the budget.

    Args:
        run: The run.
        rows: Its rows of the validation split.
    """
    asked = run.asked("metric", "direction")
    # Of students short of the end few are kept, and the best of these need not be the best of all.
    having = [row for row in rows if row.kind not in DISTILLED or row.full or trained_student(run, row).is_dir()]
    return chosen(having, asked["metric"], asked["direction"], students_only=students_only(asked))


def trained_student(run: RunFolder, row: Row) -> Path:
    """The folder of a row's student in float32, if it is there."""
    # Imports pyarrow, which nobody needs who only lists what there is.
    from autodistill.runs.students import kept_after, student_folder

    return student_folder(run.checkpoints / row.trial, kept_after(row))

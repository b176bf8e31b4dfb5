"""What is said of a teacher once it is loaded."""

from __future__ import annotations

from pathlib import Path

from autodistill.distillation.teacher import Teacher
from autodistill.search.loading import _told_of_teacher


def test_a_teacher_whose_file_is_quantised_is_said_to_be() -> None:
    def notes(quantised: str | None) -> tuple[str, ...]:
        return _told_of_teacher(Teacher(folder=Path(), fingerprint="1", name="big", licence=None, quantised=quantised))

    assert notes(None) == ()
    (note,) = notes("Q4_1")
    assert note.startswith("the teacher's file is quantised (Q4_1) and was dequantised")

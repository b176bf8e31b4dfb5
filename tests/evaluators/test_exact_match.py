from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.exact_match import ExactMatch
from autodistill.inference.outputs import Answers


def test_only_full_marks_count_and_the_error_is_that_of_a_share(subject: Subject) -> None:
    marks = np.array([1.0] * 12 + [0.5] * 3 + [0.0] * 5)
    answers = Answers(texts=("",) * 20, marks=marks, documents=np.arange(20, dtype=np.int32), unasked=2)
    (measurement,) = ExactMatch().evaluate(replace(subject, answers=answers))
    assert measurement.value == 12 / 20
    # With one answer per document, this is the textbook error of a share, with n - 1.
    assert measurement.stderr == pytest.approx((0.6 * 0.4 / 19) ** 0.5)
    assert measurement.detail == {
        "split": "validation",
        "questions": 20,
        "unasked": 2,
        "mean_mark": pytest.approx(13.5 / 20),
    }

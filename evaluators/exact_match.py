"""Exact match: the share of questions whose written answer by the student is fully right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


def full_marks(marks: npt.NDArray[Any], documents: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Return the share of answers whose mark is 1, its standard error over questions, and the mean mark.

    Args:
        marks: [n], the mark of each answer, from 0 to 1.
        documents: [n], the question of each answer.
    """
    # float32, because earlier recorded figures were computed in it.
    marks = np.asarray(marks, np.float32)
    value, stderr = clustered_mean(marks >= 1, documents)
    return {"exact_match": value, "stderr": stderr, "mean_mark": float(np.mean(marks))}


class ExactMatch(Evaluator):
    """Measures "exact_match", a fraction. A task marks by its own rules, which may give partial marks.

    A question that does not fit the budget's context together with its answer counts as not answered.
    """

    name = "exact_match"
    needs: Needs = "answers"
    measures: Mapping[str, Quantity] = {"exact_match": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the share of full marks among the answers."""
        answers = subject.answers
        if answers is None:
            raise ValueError("exact_match is read from answers, and the subject has none")
        result = full_marks(answers.marks, answers.documents)
        return (
            Measurement(
                name="exact_match",
                value=result["exact_match"],
                unit="fraction",
                direction="max",
                source="simulated",
                stderr=result["stderr"],
                detail={
                    "split": subject.split,
                    "questions": answers.marks.size,
                    "unasked": answers.unasked,
                    "mean_mark": result["mean_mark"],
                },
                documents=per_document(answers.marks >= 1, answers.documents),
            ),
        )

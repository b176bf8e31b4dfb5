"""Exact match: the share of questions that the student answers rightly, in full, in writing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Measurement, Needs, Quantity, Subject
from autodistill.evaluation.offline_metric import compute
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.strategy.deployment import Deployment


class FullMarks(evaluate.Metric):
    """Share of answers with full marks, with its standard error over questions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of answers whose mark is 1, with a standard error clustered by document.",
            citation="",
            features=datasets.Features({"marks": datasets.Value("float64"), "documents": datasets.Value("int32")}),
            format="numpy",
        )

    def _compute(self, marks: npt.NDArray[np.float64], documents: npt.NDArray[np.int32]) -> dict[str, Any]:
        value, stderr = clustered_mean(marks >= 1, documents)
        return {"exact_match": value, "stderr": stderr, "mean_mark": float(np.mean(marks))}


class ExactMatch:
    """Measures "exact_match", a fraction; a task marks by its own rules, which may give a wrong answer a part.

    A question that does not fit the budget's context with its answer counts as not answered.
    """

    name = "exact_match"
    needs: Needs = "answers"
    measures: Mapping[str, Quantity] = {"exact_match": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Reads the marks of the answers."""
        answers = subject.answers
        if answers is None:
            raise ValueError("exact_match is read from answers, and the subject has none")
        result = compute(FullMarks, marks=answers.marks, documents=answers.documents)
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

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment can be simulated."""
        return True

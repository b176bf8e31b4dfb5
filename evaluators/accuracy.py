"""Next-token accuracy: the share of tokens that the student holds for the most likely one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from autodistill.evaluators.offline import compute

from autodistill.contracts import Measurement, Needs, Quantity, Subject
from autodistill.statistics import clustered_mean, per_document
from autodistill.strategy import Deployment


class NextTokenAccuracy(evaluate.Metric):
    """Share of correct tokens, with its standard error over documents."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of tokens predicted correctly, with a standard error clustered by document.",
            citation="",
            features=datasets.Features({"correct": datasets.Value("bool"), "documents": datasets.Value("int32")}),
            format="numpy",
        )

    def _compute(self, correct: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]) -> dict[str, Any]:
        value, stderr = clustered_mean(correct, documents)
        return {"accuracy": value, "stderr": stderr}


class Accuracy:
    """Measures "accuracy", a fraction; the standard error is `statistics.clustered_mean`'s, by document."""

    name = "accuracy"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"accuracy": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Reads the scores' correct tokens."""
        scores = subject.scores
        if scores is None:
            raise ValueError("accuracy is read from scores, and the subject has none")
        result = compute(NextTokenAccuracy, correct=scores.correct, documents=scores.documents)
        return (
            Measurement(
                name="accuracy",
                value=result["accuracy"],
                unit="fraction",
                direction="max",
                source="simulated",
                stderr=result["stderr"],
                detail={
                    "split": subject.split,
                    "tokens": scores.correct.size,
                    "documents": np.unique(scores.documents).size,
                },
                documents=per_document(scores.correct, scores.documents),
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment can be simulated."""
        return True

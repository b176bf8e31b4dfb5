"""Next-token accuracy: the share of tokens that the student holds for the most likely one."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
from autodistill.evaluators.offline import compute

from autodistill.contracts import Measurement, Needs, Subject
from autodistill.statistics import clustered_mean
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
                detail={"tokens": scores.correct.size, "documents": np.unique(scores.documents).size},
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment can be simulated."""
        return True

"""Agreement with the teacher: the share of tokens where both hold the same token for the most likely one."""

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


class TopTokenAgreement(evaluate.Metric):
    """Share of tokens on which student and teacher agree, with its standard error over documents."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of tokens whose most likely token is the teacher's, clustered by document.",
            citation="",
            features=datasets.Features({"agrees": datasets.Value("bool"), "documents": datasets.Value("int32")}),
            format="numpy",
        )

    def _compute(self, agrees: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]) -> dict[str, Any]:
        value, stderr = clustered_mean(agrees, documents)
        return {"agreement": value, "stderr": stderr}


class Agreement:
    """Measures "agreement", a fraction; the standard error is `statistics.clustered_mean`'s, by document."""

    name = "agreement"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"agreement": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Reads where the scores agree with the teacher's."""
        scores = subject.scores
        if scores is None:
            raise ValueError("agreement is read from scores, and the subject has none")
        result = compute(TopTokenAgreement, agrees=scores.agrees, documents=scores.documents)
        return (
            Measurement(
                name="agreement",
                value=result["agreement"],
                unit="fraction",
                direction="max",
                source="simulated",
                stderr=result["stderr"],
                detail={
                    "split": subject.split,
                    "tokens": scores.agrees.size,
                    "documents": np.unique(scores.documents).size,
                },
                documents=per_document(scores.agrees, scores.documents),
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment can be simulated."""
        return True

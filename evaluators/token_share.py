"""What accuracy and agreement share: of the predicted tokens those that hit, as a measurement."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluation.offline_metric import compute
from autodistill.evaluation.statistics import clustered_mean, per_document


class TokenShare(evaluate.Metric):
    """Share of tokens that hit, with its standard error over documents."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of tokens that hit, with a standard error clustered by document.",
            citation="",
            features=datasets.Features({"hits": datasets.Value("bool"), "documents": datasets.Value("int32")}),
            format="numpy",
        )

    def _compute(self, hits: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]) -> dict[str, Any]:
        value, stderr = clustered_mean(hits, documents)
        return {"share": value, "stderr": stderr}


def token_share(
    name: str, hits: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32], subject: Subject
) -> Measurement:
    """The share as a fraction of which more is better; the standard error is `statistics.clustered_mean`'s.

    Args:
        name: Of the measurement.
        hits: [n], of each predicted token whether it counts.
        documents: [n], each token's document.
        subject: Whose tokens they are.
    """
    result = compute(TokenShare, hits=hits, documents=documents)
    return Measurement(
        name=name,
        value=result["share"],
        unit="fraction",
        direction="max",
        source="simulated",
        stderr=result["stderr"],
        detail={"split": subject.split, "tokens": hits.size, "documents": np.unique(documents).size},
        documents=per_document(hits, documents),
    )

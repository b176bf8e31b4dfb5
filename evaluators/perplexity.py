"""Perplexity: the exponential of the mean negative log-likelihood of the true tokens."""

from __future__ import annotations

import math
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


class TokenPerplexity(evaluate.Metric):
    """exp(mean nll), with its standard error over documents by the delta method: perplexity * stderr of the mean."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exponential of the mean negative log-likelihood in nats, clustered by document.",
            citation="",
            features=datasets.Features({"nll": datasets.Value("float64"), "documents": datasets.Value("int32")}),
            format="numpy",
        )

    def _compute(self, nll: npt.NDArray[np.float64], documents: npt.NDArray[np.int32]) -> dict[str, Any]:
        mean, stderr = clustered_mean(nll, documents)
        perplexity = math.exp(mean)
        return {"perplexity": perplexity, "stderr": None if stderr is None else perplexity * stderr}


class Perplexity:
    """Measures "perplexity" over all predicted tokens of the split, each in the context of its own sequence alone.

    In the words of strided windows, the stride is the window, a sequence: its first tokens have little context, so that
    this is higher than a perplexity with a smaller stride, which a task file asks for. Paired differences are those of
    its logarithm, the mean negative log-likelihood in nats.
    """

    name = "perplexity"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"perplexity": Quantity("perplexity", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Reads the scores' log-likelihoods."""
        scores = subject.scores
        if scores is None:
            raise ValueError("perplexity is read from scores, and the subject has none")
        result = compute(TokenPerplexity, nll=scores.nll, documents=scores.documents)
        return (
            Measurement(
                name="perplexity",
                value=result["perplexity"],
                unit="perplexity",
                direction="min",
                source="simulated",
                stderr=result["stderr"],
                detail={
                    "split": subject.split,
                    "tokens": scores.nll.size,
                    "documents": np.unique(scores.documents).size,
                    # Each sequence is read once and on its own.
                    "window": scores.window,
                    "stride": scores.window,
                },
                documents={**per_document(scores.nll, scores.documents), "unit": "nats"},
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment can be simulated."""
        return True

"""Accuracy, perplexity and exact match as metrics of Hugging Face's `evaluate`, for programs that score with it.

No evaluator imports this file: importing `evaluate` and `datasets` takes 1.8 s and 150 MB, too much for each worker.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from autodistill.evaluation.statistics import clustered_mean
from autodistill.evaluators.exact_match import full_marks
from autodistill.evaluators.perplexity import perplexity

Documents = npt.NDArray[np.int32]


def _info(what: str, **column: str) -> evaluate.MetricInfo:
    """Return the description of a metric with one column of values and the document of each value."""
    features = {name: datasets.Value(kind) for name, kind in {**column, "documents": "int32"}.items()}
    return evaluate.MetricInfo(
        description=f"{what}, with its standard error over documents.",
        citation="",
        features=datasets.Features(features),
        format="numpy",
    )


class TokenShare(evaluate.Metric):
    """Share of tokens that count as hits, the figure of `accuracy` and `agreement`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of tokens that hit", hits="bool")

    def _compute(self, hits: npt.NDArray[np.bool_], documents: Documents) -> dict[str, Any]:
        value, stderr = clustered_mean(hits, documents)
        return {"share": value, "stderr": stderr}


class TokenPerplexity(evaluate.Metric):
    """Exponential of the mean negative log-likelihood in nats."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Exponential of the mean negative log-likelihood in nats", nll="float64")

    def _compute(self, nll: npt.NDArray[np.float64], documents: Documents) -> dict[str, Any]:
        value, stderr = perplexity(nll, documents)
        return {"perplexity": value, "stderr": stderr}


class FullMarks(evaluate.Metric):
    """Share of answers whose mark is 1, the figure of `exact_match`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of answers whose mark is 1", marks="float64")

    def _compute(self, marks: npt.NDArray[np.float64], documents: Documents) -> dict[str, Any]:
        return full_marks(marks, documents)

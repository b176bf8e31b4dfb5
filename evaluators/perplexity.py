"""Perplexity: the exponential of the mean negative log-likelihood of the true tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


def perplexity(nll: npt.NDArray[Any], documents: npt.NDArray[np.int32]) -> tuple[float, float | None]:
    """Return exp(mean nll), and its standard error by the delta method: perplexity * stderr of the mean.

    Args:
        nll: [n], negative log-likelihood of each token in nats.
        documents: [n], the document of each token.
    """
    # float32, because earlier recorded perplexities were computed in it.
    mean, stderr = clustered_mean(np.asarray(nll, np.float32), documents)
    value = math.exp(mean)
    return value, None if stderr is None else value * stderr


class Perplexity(Evaluator):
    """Measures "perplexity" over all predicted tokens of the split, each with only its own sequence as context.

    In terms of strided windows, the stride equals the window, which is a sequence. The first tokens of a sequence have
    little context, so the value is higher than with a smaller stride. A task file can ask for a smaller stride. Paired
    differences are those of the logarithm, the mean negative log-likelihood in nats.
    """

    name = "perplexity"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"perplexity": Quantity("perplexity", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the perplexity from the scores' log-likelihoods."""
        scores = subject.scores
        if scores is None:
            raise ValueError("perplexity is read from scores, and the subject has none")
        value, stderr = perplexity(scores.nll, scores.documents)
        return (
            Measurement(
                name="perplexity",
                value=value,
                unit="perplexity",
                direction="min",
                source="simulated",
                stderr=stderr,
                detail={
                    "split": subject.split,
                    "tokens": scores.nll.size,
                    "documents": np.unique(scores.documents).size,
                    # Each sequence is read once, on its own.
                    "window": scores.window,
                    "stride": scores.window,
                },
                documents={**per_document(scores.nll, scores.documents), "unit": "nats"},
            ),
        )

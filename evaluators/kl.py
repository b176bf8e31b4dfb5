"""Divergence from the teacher: the mean Kullback-Leibler divergence of the next-token distributions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


class Divergence(Evaluator):
    """Measures "kl", the mean of KL(teacher || student) over all predicted tokens, in nats.

    Only the teacher's likeliest tokens are kept. All other tokens are one outcome with the remaining probability. This
    gives a lower bound of the KL, by the data processing inequality. The detail states the number of outcomes. The
    standard error is that of `statistics.clustered_mean`, by document.
    """

    name = "kl"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"kl": Quantity("nats", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the mean of the scores' divergence."""
        scores = subject.scores
        if scores is None or scores.divergence is None:
            raise ValueError("kl is read from scores with the teacher's reference, and the subject has none")
        value, stderr = clustered_mean(scores.divergence, scores.documents)
        return (
            Measurement(
                name="kl",
                value=value,
                unit="nats",
                direction="min",
                source="simulated",
                stderr=stderr,
                detail={
                    "split": subject.split,
                    "tokens": scores.divergence.size,
                    "documents": np.unique(scores.documents).size,
                    "outcomes": scores.outcomes,
                },
                documents={**per_document(scores.divergence, scores.documents), "unit": "nats"},
            ),
        )

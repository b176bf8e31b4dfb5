"""Divergence from the teacher: the mean Kullback-Leibler divergence of the student's next-token distribution."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


class Divergence(Evaluator):
    """Measures "kl", the mean of KL(teacher || student) over all predicted tokens, in nats.

    What is kept of the teacher are its likeliest tokens; all others are one outcome, whose probability is the rest. By
    the data processing inequality that is a lower bound, and the detail states over how many outcomes it goes. The
    standard error is `statistics.clustered_mean`'s, by document.
    """

    name = "kl"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"kl": Quantity("nats", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Read the scores' divergence."""
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

"""Next-token accuracy: the share of tokens that the student predicts as the most likely one."""

from __future__ import annotations

from collections.abc import Mapping

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluators.token_share import token_share


class Accuracy(Evaluator):
    """Measures "accuracy", a fraction, by `token_share`."""

    name = "accuracy"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"accuracy": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the share of correct tokens in the scores."""
        scores = subject.scores
        if scores is None:
            raise ValueError("accuracy is read from scores, and the subject has none")
        return (token_share("accuracy", scores.correct, scores.documents, subject),)

"""Agreement with the teacher: the share of tokens where both predict the same token as the most likely one."""

from __future__ import annotations

from collections.abc import Mapping

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluators.token_share import token_share


class Agreement(Evaluator):
    """Measures "agreement", a fraction, by `token_share`."""

    name = "agreement"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"agreement": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the share of tokens where the scores agree with the teacher's."""
        scores = subject.scores
        if scores is None:
            raise ValueError("agreement is read from scores, and the subject has none")
        return (token_share("agreement", scores.agrees, scores.documents, subject),)

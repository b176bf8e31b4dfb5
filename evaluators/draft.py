"""The student as a draft of its teacher: how much of what it proposes is taken, and what time that saves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.speculative import PROPOSED, speculate, time_of
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.strategy.deployment import IN_16_BITS


class Draft(Evaluator):
    """Measures "draft_acceptance", the share of proposed tokens that the teacher takes, and "draft_time", the expected
    time of a token over that of the teacher alone: 0.5 is twice as fast.

    It is greedy speculative decoding with three proposals at once, followed along the held-out text, which goes on as
    it is where the teacher would have gone on otherwise. Along a teacher's own text the counts are llama.cpp's own. The
    time is expected and not measured: a token's time is taken to be that of reading the weights, the student's as they
    are packed and the teacher's in 16 bits, and a pass of the teacher over four tokens to last as long as one over a
    single one, as on a GPU at one stream. On few cores it lasts longer: `autodistill drafts` measures. What ranks is
    the time, by document in pairs.
    """

    name = "draft"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {
        "draft_time": Quantity("times", "min"),
        "draft_acceptance": Quantity("fraction", "max"),
    }

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Follow the documents of the scores."""
        scores, teacher = subject.scores, subject.teacher
        if scores is None or teacher is None:
            raise ValueError("a draft is read from scores beside its teacher, and the subject lacks one of both")
        drafted = speculate(scores.agrees, scores.documents)
        context, batch = subject.budget.context, subject.budget.batch
        student, whole = (
            memory(spec, deployment, context=context, batch=batch).weights_bytes
            for spec, deployment in ((subject.spec, subject.deployment), (teacher, IN_16_BITS))
        )
        cost = student / whole
        times = time_of(cost) * drafted.passes
        time, time_error = clustered_mean(times, scores.documents)
        # There is nothing to take of documents of one token.
        share, share_error = clustered_mean(drafted.taken, drafted.owners) if drafted.taken.size else (0.0, None)
        detail = {
            "split": subject.split,
            "tokens": scores.agrees.size,
            "documents": np.unique(scores.documents).size,
            "proposed": PROPOSED,
            "tokens_per_pass": drafted.tokens_per_pass,
            "cost": cost,
            "speed": 1 / time,
        }
        return (
            Measurement(
                name="draft_time",
                value=time,
                unit="times",
                direction="min",
                source="simulated",
                stderr=time_error,
                detail=detail,
                documents=per_document(times.astype(np.float64), scores.documents),
            ),
            Measurement(
                name="draft_acceptance",
                value=share,
                unit="fraction",
                direction="max",
                source="simulated",
                stderr=share_error,
                detail=detail,
            ),
        )

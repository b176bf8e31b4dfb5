"""The student as a draft for its teacher: the share of its proposals that is accepted, and the time that saves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.speculative import PROPOSED, speculate, time_of
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.strategy.deployment import IN_16_BITS


class Draft(Evaluator):
    """Measures the student as a draft in greedy speculative decoding, with three proposals at once.

    "draft_acceptance" is the share of proposed tokens that the teacher accepts. "draft_time" is the expected time per
    token relative to the teacher alone: 0.5 is twice as fast. Ranking uses the time, paired by document.

    The decoding follows the held-out text, even if the teacher would continue differently. On a teacher's own text, the
    counts equal llama.cpp's.

    The time is an estimate, not a measurement. It assumes that a token takes the time to read the weights: the packed
    weights of the student, and the teacher's in 16 bits. It also assumes that the teacher's pass over four tokens takes
    as long as over one, which holds on a GPU at one stream. On few cores it takes longer: `autodistill drafts` measures
    that.
    """

    name = "draft"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {
        "draft_time": Quantity("times", "min"),
        "draft_acceptance": Quantity("fraction", "max"),
    }

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Simulate speculative decoding along the documents of the scores."""
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
        # Documents of one token have no proposals.
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

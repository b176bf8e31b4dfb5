"""Strided perplexity: the perplexity of whole texts of any length, each token with a stated context."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autodistill.evaluation.base import Measurement, Quantity, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.evaluators.tasks.scoring import TaskEvaluator


@dataclass(frozen=True, kw_only=True)
class StridedPerplexity(TaskEvaluator):
    """Measures "task:NAME", a perplexity over the tokens of a task's texts, in windows that the task defines.

    The windows are as in Hugging Face's guide. Each window predicts the tokens that no earlier window predicted. They
    have at least window - stride tokens of context. The standard error is by text, with the delta method.
    """

    quantity = Quantity("perplexity", "min")

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the perplexity over all texts."""
        student, examples, texts = self.questions(subject)
        window, stride = min(self.task.window, student.context), min(self.task.stride, student.context)
        parts = student.rolling(texts, window, stride)
        documents = np.repeat(
            np.array([example.document for example in examples], dtype=np.int32), [len(part) for part in parts]
        )
        nll = np.concatenate(parts)
        mean, stderr = clustered_mean(nll, documents)
        return (
            Measurement(
                name=self.name,
                value=math.exp(mean),
                unit="perplexity",
                direction="min",
                source="simulated",
                stderr=None if stderr is None else math.exp(mean) * stderr,
                detail={
                    **self.read(student, examples),
                    "tokens": nll.size,
                    "window": window,
                    "stride": stride,
                },
                documents={**per_document(nll, documents), "unit": "nats"},
            ),
        )

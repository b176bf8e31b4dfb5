"""Strided perplexity: that of whole texts, longer than a window too, each token with a stated context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from autodistill.evaluators.marks import asked

from autodistill.contracts import Measurement, Needs, Quantity, Subject
from autodistill.statistics import clustered_mean, per_document
from autodistill.strategy import Deployment
from autodistill.task_files import TaskFile


@dataclass(frozen=True, kw_only=True)
class StridedPerplexity:
    """Measures "task:NAME", a perplexity over the tokens of a task's texts, in windows that the task states.

    The windows are those of Hugging Face's guide: each predicts what no window before it did, with at least
    window - stride tokens before it. The standard error is by text, by the delta method.
    """

    task: TaskFile
    needs: Needs = "student"

    @property
    def name(self) -> str:
        """That of its measurement."""
        return f"task:{self.task.name}"

    @property
    def measures(self) -> Mapping[str, Quantity]:
        """One perplexity."""
        return {self.name: Quantity("perplexity", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Reads every text."""
        student = asked(subject, self.name)
        examples = self.task.examples(student.split, student.share)
        window, stride = min(self.task.window, student.context), min(self.task.stride, student.context)
        parts = student.rolling([example.prompt for example in examples], window, stride)
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
                    "split": student.split,
                    "examples": len(examples),
                    "of": len(self.task.examples(student.split)),
                    "tokens": nll.size,
                    "window": window,
                    "stride": stride,
                    "task": self.task.fingerprint,
                },
                documents={**per_document(nll, documents), "unit": "nats"},
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment can be simulated."""
        return True

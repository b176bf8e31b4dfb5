"""Base classes of evaluators of tasks: the student, its questions, and the measurement of marks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from autodistill.data.task_files import Example, TaskFile
from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, SimulatedStudent, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document


def asked(subject: Subject, name: str) -> SimulatedStudent:
    """Return the simulated student of a subject.

    Raises:
        ValueError: The subject has none.
    """
    if subject.student is None:
        raise ValueError(f"{name} is asked of the simulated student, and the subject has none")
    return subject.student


@dataclass(frozen=True, kw_only=True)
class TaskEvaluator(Evaluator):
    """Measures "task:NAME" of a task in a task file. A subclass defines what is asked and how it is scored.

    Attributes:
        task: The task.
    """

    task: TaskFile
    needs: Needs = "student"
    quantity: ClassVar[Quantity] = Quantity("fraction", "max")

    @property
    def name(self) -> str:
        """The name of the task's measurement."""
        return f"task:{self.task.name}"

    @property
    def measures(self) -> Mapping[str, Quantity]:
        """The task's only figure."""
        return {self.name: self.quantity}

    def questions(self, subject: Subject) -> tuple[SimulatedStudent, tuple[Example, ...], list[str]]:
        """Return the student, the examples of its split, and their prompts, as chats if the task asks for it.

        Raises:
            ValueError: The subject has no student.
        """
        student = asked(subject, self.name)
        examples = self.task.examples(student.split, student.share)
        prompts = [example.prompt for example in examples]
        return student, examples, student.chats(prompts) if self.task.chat else prompts

    def read(self, student: SimulatedStudent, examples: Sequence[Example]) -> dict[str, Any]:
        """Return the part of a measurement's detail about the examples that were read."""
        return {
            "split": student.split,
            "examples": len(examples),
            "of": len(self.task.examples(student.split)),
            "context": student.context,
            "task": self.task.fingerprint,
        }


@dataclass(frozen=True, kw_only=True)
class MarkedTask(TaskEvaluator, ABC):
    """Measures the share of a task's questions that are answered rightly."""

    @abstractmethod
    def marks(
        self, student: SimulatedStudent, examples: Sequence[Example], prompts: Sequence[str]
    ) -> npt.NDArray[np.bool_]:
        """Return the marks of each answer, bool [n, marks]. The first mark says whether the answer is right."""

    @abstractmethod
    def detail(self, marks: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """Return the part of the measurement's detail that `read` does not give."""

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Return the share of right answers. The standard error is that of `statistics.clustered_mean`, by prompt."""
        student, examples, prompts = self.questions(subject)
        marks = self.marks(student, examples, prompts)

        right = marks[:, 0]
        documents = np.array([example.document for example in examples], dtype=np.int32)
        value, stderr = clustered_mean(right, documents)
        return (
            Measurement(
                name=self.name,
                value=value,
                unit="fraction",
                direction="max",
                source="simulated",
                stderr=stderr,
                detail={**self.read(student, examples), "metric": self.task.metric, **self.detail(marks)},
                documents=per_document(right, documents),
            ),
        )

"""What the evaluators of tasks share: the student that is asked, and the measurement of marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.contracts import Measurement, SimulatedStudent, Subject
from autodistill.statistics import clustered_mean, per_document
from autodistill.task_files import Example, TaskFile


def asked(subject: Subject, name: str) -> SimulatedStudent:
    """The simulated student of a subject.

    Raises:
        ValueError: It has none.
    """
    if subject.student is None:
        raise ValueError(f"{name} is asked of the simulated student, and the subject has none")
    return subject.student


def marked(
    task: TaskFile,
    student: SimulatedStudent,
    examples: Sequence[Example],
    right: npt.NDArray[np.bool_],
    detail: Mapping[str, Any],
) -> tuple[Measurement, ...]:
    """The share of right answers, with the standard error of `statistics.clustered_mean`, by prompt."""
    documents = np.array([example.document for example in examples], dtype=np.int32)
    value, stderr = clustered_mean(right, documents)
    return (
        Measurement(
            name=f"task:{task.name}",
            value=value,
            unit="fraction",
            direction="max",
            source="simulated",
            stderr=stderr,
            detail={
                "split": student.split,
                "examples": len(examples),
                "of": len(task.examples(student.split)),
                "metric": task.metric,
                "task": task.fingerprint,
                **detail,
            },
            documents=per_document(right, documents),
        ),
    )

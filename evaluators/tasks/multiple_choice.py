"""Multiple choice: the share of questions whose right choice has the highest length-normalised log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.data.task_files import Example
from autodistill.evaluation.base import SimulatedStudent
from autodistill.evaluators.tasks.scoring import MarkedTask


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(MarkedTask):
    """Measures "task:NAME", a fraction, of a task of multiple choice.

    A choice's log-likelihood, behind the prompt and a space, is divided by its length in characters, as lm-eval's
    `acc_norm` does, so that a long choice is not held for unlikely. The detail also states the accuracy without that.
    """

    def marks(
        self, student: SimulatedStudent, examples: Sequence[Example], prompts: Sequence[str]
    ) -> npt.NDArray[np.bool_]:
        """Ask the student for the likelihood of every choice; whether the likeliest is right, by length and by sum."""
        # A chat template ends where the answer begins; elsewhere a space parts it from the prompt.
        gaps = ["" if self.task.chat or prompt[-1:].isspace() else " " for prompt in prompts]
        pairs = [
            (prompt, gap + choice)
            for example, prompt, gap in zip(examples, prompts, gaps, strict=True)
            for choice in example.choices
        ]
        found = iter(student.likelihoods(pairs))
        marks = []
        for example in examples:
            sums = np.array([next(found).log_likelihood for _ in example.choices])
            lengths = np.array([len(choice) for choice in example.choices])
            marks.append([int(np.argmax(one)) == example.gold for one in (sums / lengths, sums)])
        return np.array(marks)

    def detail(self, marks: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """The accuracy by sums."""
        return {"accuracy_by_sum": float(np.mean(marks[:, 1]))}

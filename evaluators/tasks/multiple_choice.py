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
    """Measures "task:NAME", a fraction, of a multiple-choice task.

    The log-likelihood of a choice, after the prompt and a space, is divided by its length in characters. So a long
    choice does not count as unlikely. lm-eval's `acc_norm` does the same. The detail also has the accuracy without this
    division.
    """

    def marks(
        self, student: SimulatedStudent, examples: Sequence[Example], prompts: Sequence[str]
    ) -> npt.NDArray[np.bool_]:
        """Return for each question whether the likeliest choice is right, normalised by length and by the plain sum."""
        # A chat template ends where the answer begins. Otherwise a space separates the answer from the prompt.
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
        """Return the accuracy by plain sums."""
        return {"accuracy_by_sum": float(np.mean(marks[:, 1]))}

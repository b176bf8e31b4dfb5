"""Multiple choice: the share of questions whose right choice has the highest length-normalised log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from autodistill.evaluators.marks import TaskEvaluator

from autodistill.contracts import Measurement, Subject


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(TaskEvaluator):
    """Measures "task:NAME", a fraction, of a task of multiple choice.

    A choice's log-likelihood, behind the prompt and a space, is divided by its length in characters, as lm-eval's
    `acc_norm` does, so that a long choice is not held for unlikely. The detail also states the accuracy without that.
    """

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Asks the student for the likelihood of every choice."""
        student, examples, prompts = self.questions(subject)
        # A chat template ends where the answer begins; elsewhere a space parts it from the prompt.
        gaps = ["" if self.task.chat or prompt[-1:].isspace() else " " for prompt in prompts]
        pairs = [
            (prompt, gap + choice)
            for example, prompt, gap in zip(examples, prompts, gaps, strict=True)
            for choice in example.choices
        ]
        found = iter(student.likelihoods(pairs))
        normalised, plain = [], []
        for example in examples:
            sums = np.array([next(found).log_likelihood for _ in example.choices])
            lengths = np.array([len(choice) for choice in example.choices])
            normalised.append(int(np.argmax(sums / lengths)) == example.gold)
            plain.append(int(np.argmax(sums)) == example.gold)
        return self.marked(student, examples, np.array(normalised), {"accuracy_by_sum": float(np.mean(plain))})

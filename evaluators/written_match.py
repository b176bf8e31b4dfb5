"""Written match: the share of questions whose written answer is the expected one, once both are normalised."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass

import numpy as np
from autodistill.evaluators.marks import TaskEvaluator

from autodistill.contracts import Measurement, Subject

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation.replace("-", ""))


@dataclass(frozen=True, kw_only=True)
class WrittenMatch(TaskEvaluator):
    """Measures "task:NAME", a fraction, of a task of exact match: greedy answers, any of the expected ones counts."""

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Lets the student write an answer to every question."""
        student, examples, prompts = self.questions(subject)
        written = student.write(prompts, max_tokens=self.task.max_tokens, stops=self.task.stop)
        right = [
            normalised(text) in {normalised(answer) for answer in example.answers}
            for text, example in zip(written, examples, strict=True)
        ]
        detail = {"max_tokens": self.task.max_tokens, "normalisation": "case, articles, punctuation, spaces"}
        return self.marked(student, examples, np.array(right), detail)


def normalised(text: str) -> str:
    """The text without case, punctuation but for minus and decimal point, articles and further spaces.

    After SQuAD's evaluation (Rajpurkar et al., 2016, arXiv 1606.05250), whose removal of all punctuation would make
    "-5" of 5 and "3.5" of 35.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = re.sub(r"(?<=\d)\.(?=\d)", "\0", plain)  # a decimal point, kept
    plain = plain.translate(_PUNCTUATION).replace("\0", ".")
    return " ".join(_ARTICLES.sub(" ", plain).split())

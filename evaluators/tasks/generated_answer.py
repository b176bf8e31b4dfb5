"""Written match: the share of questions whose written answer is the expected one, once both are normalised."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.data.conversations import without_thoughts
from autodistill.data.task_files import Example
from autodistill.evaluation.base import SimulatedStudent
from autodistill.evaluators.tasks.scoring import MarkedTask

# An article stands before another word: the last word, an "A" of its own, is none.
_ARTICLE = re.compile(r"(?<![\w-])(?:a|an|the)\s+(?=\S*\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Signs that make another number or name: -5, x>=5, 1/2, 2^n, c++, c#.
_SIGNS = "+-<>=/^#"
_WRITING = re.escape("".join(mark for mark in string.punctuation if mark not in _SIGNS))
# Between digits any mark may do so (3.5, 10:30, 1,2), and a point before one (.5).
_PUNCTUATION = re.compile(rf"[{_WRITING}](?!\d)|(?<!\d)(?!\.)[{_WRITING}]")


@dataclass(frozen=True, kw_only=True)
class WrittenMatch(MarkedTask):
    """Measures "task:NAME", a fraction, of a task of exact match: greedy answers, any of the expected ones counts.

    What was thought before an answer is no part of it.
    """

    def marks(
        self, student: SimulatedStudent, examples: Sequence[Example], prompts: Sequence[str]
    ) -> npt.NDArray[np.bool_]:
        """Let the student write an answer to every question."""
        written = student.write(prompts, max_tokens=self.task.max_tokens, stops=self.task.stop)
        right = [
            normalized(without_thoughts(text)) in {normalized(answer) for answer in example.answers}
            for text, example in zip(written, examples, strict=True)
        ]
        return np.array(right)[:, None]

    def detail(self, marks: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """Return how answers were written and compared."""
        return {"max_tokens": self.task.max_tokens, "normalisation": "case, articles, punctuation, spaces"}


def normalized(text: str) -> str:
    """The text without case, articles, further spaces, and punctuation but for what belongs to a number or a name.

    After SQuAD's evaluation (Rajpurkar et al., 2016, arXiv 1606.05250), whose removal of all punctuation would make
    "-5" of 5, "1/2" of 12 and "C++" of C, and whose removal of all articles an empty text of the answer "A". A text of
    nothing else stays as it is, so that only a blank one is the same as no answer.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    kept = _PUNCTUATION.sub("", _THOUSANDS.sub("", _ARTICLE.sub("", plain)))
    return " ".join(kept.split()) or plain

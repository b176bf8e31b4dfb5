"""Written match: the share of questions whose written answer equals an expected one after normalisation."""

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

# An article is followed by another word. So the last word, such as the answer "A", is not an article.
_ARTICLE = re.compile(r"(?<![\w-])(?:a|an|the)\s+(?=\S*\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Signs that change a number or a name: -5, x>=5, 1/2, 2^n, c++, c#.
_SIGNS = "+-<>=/^#"
_WRITING = re.escape("".join(mark for mark in string.punctuation if mark not in _SIGNS))
# Any mark between digits also changes a number (3.5, 10:30, 1,2), and so does a point before a digit (.5).
_PUNCTUATION = re.compile(rf"[{_WRITING}](?!\d)|(?<!\d)(?!\.)[{_WRITING}]")


@dataclass(frozen=True, kw_only=True)
class WrittenMatch(MarkedTask):
    """Measures "task:NAME", a fraction, of an exact-match task. Answers are greedy, and any expected answer counts.

    Thoughts before an answer are not part of it.
    """

    def marks(
        self, student: SimulatedStudent, examples: Sequence[Example], prompts: Sequence[str]
    ) -> npt.NDArray[np.bool_]:
        """Let the student write an answer to each question, and mark it."""
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
    """Return the text without case, articles, extra spaces, and punctuation that is not part of a number or a name.

    This is based on SQuAD's evaluation (Rajpurkar et al., 2016, arXiv 1606.05250). SQuAD removes all punctuation, which
    would make "-5" equal to 5, "1/2" to 12 and "C++" to C. It also removes all articles, which would empty the answer
    "A". If nothing is left after normalisation, the text stays as it is, so only a blank text equals no answer.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    kept = _PUNCTUATION.sub("", _THOUSANDS.sub("", _ARTICLE.sub("", plain)))
    return " ".join(kept.split()) or plain

"""Model outputs as plain arrays: token scores, the teacher's reference, answers and likelihoods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autodistill.utils.durable import put


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The scores of every predicted token from one forward pass over a split.

    Attributes:
        nll: float64 [n], negative log-likelihood of the true token in nats.
        correct: bool [n], whether the most likely token is the true one.
        agrees: bool [n], whether the most likely token is also the teacher's most likely one.
        documents: int32 [n], the document of each predicted token.
        confidence: float64 [n], probability of the most likely token; None if it was not kept.
        divergence: float64 [n], KL(teacher || student) in nats over the reference's outcomes; None without a reference.
        window: Length of the sequences in tokens. Each was read on its own, so context and stride both equal this
            length.
        outcomes: Number of outcomes in the divergence: the teacher's likeliest tokens, and all others as one outcome.
        teacher_correct: bool [n], whether the teacher's most likely token is the true one; None without a reference.
    """

    nll: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    agrees: npt.NDArray[np.bool_]
    documents: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float64] | None = None
    divergence: npt.NDArray[np.float64] | None = None
    window: int | None = None
    outcomes: int | None = None
    teacher_correct: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherReference:
    """The stored part of the teacher's validation pass, for each predicted token.

    Attributes:
        top1: int32 [n], the teacher's most likely token.
        tokens: int32 [n, k], its k most likely tokens, in any order.
        log_probs: float32 [n, k], log-probabilities of these tokens over the whole vocabulary, in nats.
    """

    top1: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]

    def head(self, count: int) -> TeacherReference:
        """Return the reference of the first `count` predicted tokens."""
        return self.part(0, count)

    def part(self, start: int, stop: int) -> TeacherReference:
        """Return the reference of some predicted tokens."""
        return TeacherReference(
            top1=self.top1[start:stop], tokens=self.tokens[start:stop], log_probs=self.log_probs[start:stop]
        )

    def renamed(self, first: int, second: int) -> TeacherReference:
        """Return the reference with two token ids exchanged."""
        top1, tokens = (
            np.where(ids == first, second, np.where(ids == second, first, ids)).astype(np.int32)
            for ids in (self.top1, self.tokens)
        )
        return TeacherReference(top1=top1, tokens=tokens, log_probs=self.log_probs)

    def save(self, path: Path) -> None:
        """Write plain arrays, either completely or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, top1=self.top1, tokens=self.tokens, log_probs=self.log_probs)
            put(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> TeacherReference:
        """Read what `save` wrote, without pickles."""
        with np.load(path, allow_pickle=False) as found:
            return cls(top1=found["top1"], tokens=found["tokens"], log_probs=found["log_probs"])


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's greedy answers to the questions of a split.

    Attributes:
        texts: The answers, in the order of the questions, without special tokens.
        marks: float64 [n], 1 for a right answer; a task may give partial marks to a wrong answer.
        documents: int32 [n], the document of each question.
        unasked: Number of questions that do not fit the context with the expected answer; their text is "", their mark
            0.
        tokens: int32 [n], tokens written, including the one that ends an answer; 0 for an unasked question. None if not
            requested.
        confidence: float64 [n], geometric mean of the model's probabilities of the tokens that it wrote; 0 for an
            unasked question. None if not requested.
    """

    texts: tuple[str, ...]
    marks: npt.NDArray[np.float64]
    documents: npt.NDArray[np.int32]
    unasked: int = 0
    tokens: npt.NDArray[np.int32] | None = None
    confidence: npt.NDArray[np.float64] | None = None


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation in nats, its tokens, and whether greedy decoding writes it."""

    log_likelihood: float
    tokens: int
    greedy: bool

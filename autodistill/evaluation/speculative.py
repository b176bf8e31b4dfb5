"""What a draft saves its teacher: a simulation of greedy speculative decoding over positions that both have scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PROPOSED = 3
"""Number of tokens that a draft proposes at once, as in `serve --draft` and llama.cpp."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drafted:
    """The proposals of a draft, and which of them its teacher accepted.

    Attributes:
        taken: bool [proposals], whether a proposal was accepted: it and those before it are what the teacher would
            write.
        owners: int32 [proposals], the document of each proposal.
        passes: bool [n], whether the token of a position came from a pass of the teacher, not from a proposal.
    """

    taken: npt.NDArray[np.bool_]
    owners: npt.NDArray[np.int32]
    passes: npt.NDArray[np.bool_]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass of the teacher; 1 without a draft."""
        return float(1 / self.passes.mean())


def speculate(agrees: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32], proposed: int = PROPOSED) -> Drafted:
    """Simulate speculative decoding of each document as in llama.cpp.

    In each pass the draft proposes tokens. The teacher accepts those that it would write itself, and adds one more. If
    the text is the teacher's own greedy output, the counts are equal to llama.cpp's. For other text they are an
    estimate: the text continues as it is, although the teacher would have continued differently.

    Args:
        agrees: bool [n], whether the likeliest tokens of draft and teacher are the same, after the same tokens.
        documents: int32 [n], the document of each position; positions of one document follow each other.
        proposed: Number of tokens that are proposed at once. Near the end of a document, as many are proposed as
            remain, minus one.

    Raises:
        ValueError: There are no positions, or nothing is proposed.
    """
    if not agrees.size or proposed < 1:
        raise ValueError(f"{agrees.size} positions and {proposed} proposals at once give no draft")
    ends = np.flatnonzero(np.append(documents[1:] != documents[:-1], True)) + 1
    # For each position, the first position from there on at which the teacher disagrees.
    miss = np.minimum.accumulate(np.where(agrees, len(agrees), np.arange(len(agrees)))[::-1])[::-1]
    passes = np.zeros(len(agrees), bool)
    taken: list[bool] = []
    owners: list[int] = []
    at = 0
    for end in ends.tolist():
        while at < end:
            count = min(proposed, end - at - 1)
            right = min(count, int(miss[at]) - at)
            taken += [True] * right + [False] * (count - right)
            owners += [int(documents[at])] * count
            at += right + 1
            passes[at - 1] = True
    return Drafted(taken=np.array(taken, bool), owners=np.array(owners, np.int32), passes=passes)


def time_of(cost: float, proposed: int = PROPOSED) -> float:
    """Return the time of a teacher's pass together with the draft's proposals, relative to a pass alone.

    A pass over several tokens is assumed to take as long as a pass over one token. This holds if reading the weights
    takes most of the time (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8).

    Args:
        cost: Time of one token of the draft divided by that of one token of the teacher.
        proposed: Number of tokens that the draft proposes at once.
    """
    return 1 + proposed * cost

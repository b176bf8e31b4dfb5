"""What a draft saves its teacher: greedy speculative decoding, followed over positions that both have read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PROPOSED = 3
"""Tokens that a draft proposes at once, as `serve --draft` and llama.cpp have it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drafted:
    """What a draft proposed, and how far its teacher took that.

    Attributes:
        taken: bool [proposals], whether each was taken: it is what the teacher would write, and so are those before it.
        owners: int32 [proposals], the document of each.
        passes: bool [n], of each position whether a pass of the teacher gave it, and no proposal.
    """

    taken: npt.NDArray[np.bool_]
    owners: npt.NDArray[np.int32]
    passes: npt.NDArray[np.bool_]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that each pass of the teacher gives; 1 without a draft."""
        return float(1 / self.passes.mean())


def speculate(agrees: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32], proposed: int = PROPOSED) -> Drafted:
    """Follow each document as llama.cpp does: the draft proposes, the teacher takes what it would write and one more.

    Where the text is what the teacher writes by itself, the counts are llama.cpp's own. Of other text they are an
    estimate: it goes on as it is, where the teacher would have gone on in another way.

    Args:
        agrees: bool [n], whether the draft's likeliest token is the teacher's, after the same tokens.
        documents: int32 [n], the document of each position; positions of one document follow each other.
        proposed: Tokens that are proposed at once; no more than are still to be written but one.

    Raises:
        ValueError: No positions, or nothing is proposed.
    """
    if not agrees.size or proposed < 1:
        raise ValueError(f"{agrees.size} positions and {proposed} proposals at once give no draft")
    ends = np.flatnonzero(np.append(documents[1:] != documents[:-1], True)) + 1
    # Of each position, the first one from there on where the teacher disagrees.
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
    """Return how long a pass of the teacher takes together with the draft's proposals for it, over a pass alone.

    A pass over some tokens is taken to last as long as one over a single token, as it does where reading the weights
    takes the time (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8).

    Args:
        cost: Time of a token of the draft, over that of one of the teacher.
        proposed: Tokens that the draft proposes at once.
    """
    return 1 + proposed * cost

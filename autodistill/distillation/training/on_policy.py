"""A student goes on from the beginnings of training sequences, and what it writes is marked to be judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autodistill.data.dataset import TokenSet
from autodistill.inference.generation import Sampling, write
from autodistill.strategy.recipe import OnPolicy

SEVERAL_PROCESSES = (
    "distillation.on_policy lets a student write token by token, for which its weights must lie in one process, and "
    "here several train it together: leave on_policy out, or give a trial one GPU (--gpus-per-trial 1)"
)
"""Why a student that several processes train has no such phase."""


class Written(NamedTuple):
    """Some training sequences whose ends a student wrote.

    Attributes:
        data: The sequences. What the student wrote, and what follows it, belongs to no document and is no answer, so
            that losses of the text leave it out.
        own: bool [sequences, sequence_length], which tokens the student wrote.
    """

    data: TokenSet
    own: npt.NDArray[np.bool_]


class _Gap(NamedTuple):
    """Where a student goes on: from a place, for a number of tokens, or until one that ends it (None for none)."""

    start: int
    room: int
    end: int | None


def write_on(
    model: Any,
    data: TokenSet,
    indices: Sequence[int],
    phase: OnPolicy,
    *,
    seed: int,
    batch: int,
    device: str = "cpu",
) -> Written:
    """Let a student write the ends of some training sequences.

    What it draws in a sequence follows from the tokens before and the seed, whatever is written beside it.

    Args:
        model: The student, on `device`; it is left in the mode, training or evaluation, that it is in.
        data: Training sequences, as the student reads them.
        indices: Of those that it goes on from.
        phase: How much it writes, and how its tokens are drawn.
        seed: Of the draws.
        batch: Sequences that are written at once.
        device: Where the model lies.

    Raises:
        NotFiniteError: The student's outputs are not finite.
    """
    tokens, documents = data.tokens[indices].copy(), data.documents[indices].copy()
    answers = np.ones(tokens.shape, dtype=bool) if data.answers is None else data.answers[indices].copy()
    own = np.zeros(tokens.shape, dtype=bool)
    gaps = [_gap(data, index, phase.length) for index in indices]
    training = model.training
    try:
        written = write(
            model,
            [row[: gap.start].tolist() for row, gap in zip(tokens, gaps, strict=True)],
            stops=sorted({gap.end for gap in gaps if gap.end is not None}),
            max_tokens=max(gap.room for gap in gaps),
            sampling=Sampling(temperature=phase.temperature, seed=seed),
            batch=batch,
            device=device,
        )
        for row, found in written:
            start, room, _ = gaps[row]
            stop = start + min(room, len(found))
            tokens[row, start:stop] = found[: stop - start]
            tokens[row, stop:] = tokens[row, stop - 1]
            documents[row, start:], answers[row, start:], own[row, start:stop] = -1, False, True
    finally:
        model.train(training)
    return Written(TokenSet(tokens=tokens, documents=documents, answers=answers), own)


def _gap(data: TokenSet, index: int, length: int) -> _Gap:
    """Return the last tokens of a text, or the last answer of a sequence of conversations; a token at least is kept.

    Behind an answer there is another record, or padding; where there is neither, it may have been cut off, and nothing
    says which token would end it.
    """
    size = data.tokens.shape[1]
    if data.answers is None or not data.answers[index].any():
        start = max(1, size - length)
        return _Gap(start, size - start, None)
    counted = np.flatnonzero(data.answers[index])
    last = int(counted[-1])
    gaps = np.flatnonzero(~data.answers[index, :last])
    start = max(1, int(gaps[-1]) + 1 if len(gaps) else 0)
    end = int(data.tokens[index, last]) if last + 1 < size else None
    return _Gap(start, min(length, size - start), end)

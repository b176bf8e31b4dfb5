"""Lets a student write the ends of training sequences, and marks the tokens that it wrote."""

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
"""Error message for an on-policy phase with a student that several processes train."""


class Written(NamedTuple):
    """Some training sequences whose ends a student wrote.

    Attributes:
        data: The sequences. The student's tokens, and all tokens after them, belong to no document and no answer, so
            losses of the text leave them out.
        own: bool [sequences, sequence_length], which tokens the student wrote.
    """

    data: TokenSet
    own: npt.NDArray[np.bool_]


class _Gap(NamedTuple):
    """The part of a sequence that a student writes: its start, the most tokens, and the token that ends it or None."""

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

    The tokens sampled in a sequence depend only on the tokens before them and the seed, not on the rest of the batch.

    Args:
        model: The student, on `device`. Its mode, training or evaluation, is restored afterwards.
        data: Training sequences, as the student reads them.
        indices: Indices of the sequences whose ends it writes.
        phase: How much it writes, and how its tokens are sampled.
        seed: Seed of the sampling.
        batch: Sequences that are written at the same time.
        device: The model's device.

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
    """Return the part to write: the last tokens of a text, or the last answer in a sequence of conversations.

    At least one token stays before it. After a complete answer comes another record or padding. An answer at the very
    end of the sequence may have been cut off, so the token that would end it is unknown.
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

"""Predictions on a public text, as clients share them: the likeliest tokens of each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError

KEPT = 16
"""Tokens that are shared of each position."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a model, or several together, predict at each position of the public text.

    Attributes:
        tokens: int32 [positions, k], likely tokens, each once.
        probabilities: float16 [positions, k], theirs; what they lack of 1 is spread over all others.
    """

    tokens: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float16]

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """The arrays that are sent; nothing else is."""
        return [self.tokens, self.probabilities]

    @property
    def bytes(self) -> int:
        """Bytes of what is sent."""
        return int(self.tokens.nbytes + self.probabilities.nbytes)

    @classmethod
    def received(cls, arrays: Sequence[npt.NDArray[Any]], positions: int | None = None) -> Predictions:
        """Read what another process sent.

        Args:
            arrays: As of `arrays`.
            positions: Of the public text; None where any number is right.

        Raises:
            InputError: They are no predictions, or those of another text.
        """
        if len(arrays) != 2:
            raise InputError(f"predictions are two arrays, not {len(arrays)}: all take part with the same version")
        tokens, probabilities = arrays
        right = tokens.ndim == 2 and tokens.shape == probabilities.shape and tokens.dtype == np.int32
        if not (right and probabilities.dtype == np.float16 and (tokens >= 0).all()):
            raise InputError("predictions are token ids and probabilities of one shape: all take part with one version")
        if not (np.isfinite(probabilities).all() and (probabilities >= 0).all()):
            raise InputError("predictions are no probabilities: the model that made them has diverged")
        if positions is not None and len(tokens) != positions:
            raise InputError(
                f"predictions are of {len(tokens)} positions, and the public text has {positions}: give all "
                "the same text"
            )
        return cls(tokens=tokens.astype(np.int32), probabilities=probabilities.astype(np.float16))


def pool(predictions: Sequence[Predictions]) -> Predictions:
    """Return the mean of several clients' probabilities, its likeliest tokens alone; each client counts the same.

    A token that a client did not share counts as one of probability 0 there.

    Args:
        predictions: At least one, of the same positions.

    Raises:
        InputError: They are of other positions.
    """
    if len({one.tokens.shape[0] for one in predictions}) != 1:
        raise InputError("clients sent predictions of different texts: give all of them the same public text")
    tokens = np.concatenate([one.tokens for one in predictions], axis=1)
    shares = np.concatenate([one.probabilities.astype(np.float32) for one in predictions], axis=1) / len(predictions)
    order = np.argsort(tokens, axis=1, kind="stable")
    tokens, shares = np.take_along_axis(tokens, order, 1), np.take_along_axis(shares, order, 1)
    # Of equal tokens, which lie side by side now, the last has the sum and the others nothing.
    sums = np.cumsum(shares, axis=1)
    last = np.ones_like(tokens, dtype=bool)
    last[:, :-1] = tokens[:, 1:] != tokens[:, :-1]
    before = np.maximum.accumulate(np.where(last, sums, 0.0), axis=1)
    before = np.concatenate([np.zeros((len(tokens), 1), np.float32), before[:, :-1]], axis=1)
    totals = np.where(last, sums - before, -1.0)
    kept = np.argsort(-totals, axis=1, kind="stable")[:, : predictions[0].tokens.shape[1]]
    found = np.take_along_axis(totals, kept, 1).clip(0, 1)
    return Predictions(tokens=np.take_along_axis(tokens, kept, 1), probabilities=found.astype(np.float16))

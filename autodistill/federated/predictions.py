"""Predictions on a public text in the form that clients share: the likeliest tokens at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError

KEPT = 16
"""Number of tokens that are shared for each position."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of one model, or the pooled ones of several, at each position of the public text.

    Attributes:
        tokens: int32 [positions, k], likely tokens, each once.
        probabilities: float16 [positions, k], their probabilities. The rest up to 1 is spread over all other tokens.
    """

    tokens: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float16]

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """The arrays that are sent. Nothing else is sent."""
        return [self.tokens, self.probabilities]

    @property
    def bytes(self) -> int:
        """Number of bytes that are sent."""
        return int(self.tokens.nbytes + self.probabilities.nbytes)

    @classmethod
    def received(cls, arrays: Sequence[npt.NDArray[Any]], positions: int | None = None) -> Predictions:
        """Read what another process sent.

        Args:
            arrays: The arrays, as `arrays` returns them.
            positions: Number of positions of the public text; None accepts any number.

        Raises:
            InputError: They are not predictions, or they belong to another text.
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
    """Return the mean of several clients' probabilities for its likeliest tokens. All clients have the same weight.

    A token that a client did not share counts as having probability 0 for that client.

    Args:
        predictions: At least one, all of the same positions.

    Raises:
        InputError: They have different positions.
    """
    if len({one.tokens.shape[0] for one in predictions}) != 1:
        raise InputError("clients sent predictions of different texts: give all of them the same public text")
    tokens = np.concatenate([one.tokens for one in predictions], axis=1)
    shares = np.concatenate([one.probabilities.astype(np.float32) for one in predictions], axis=1) / len(predictions)
    order = np.argsort(tokens, axis=1, kind="stable")
    tokens, shares = np.take_along_axis(tokens, order, 1), np.take_along_axis(shares, order, 1)
    # Equal tokens are neighbours now. The last of them gets the sum, and the others are marked as unused.
    sums = np.cumsum(shares, axis=1)
    last = np.ones_like(tokens, dtype=bool)
    last[:, :-1] = tokens[:, 1:] != tokens[:, :-1]
    before = np.maximum.accumulate(np.where(last, sums, 0.0), axis=1)
    before = np.concatenate([np.zeros((len(tokens), 1), np.float32), before[:, :-1]], axis=1)
    totals = np.where(last, sums - before, -1.0)
    kept = np.argsort(-totals, axis=1, kind="stable")[:, : predictions[0].tokens.shape[1]]
    found = np.take_along_axis(totals, kept, 1).clip(0, 1)
    return Predictions(tokens=np.take_along_axis(tokens, kept, 1), probabilities=found.astype(np.float16))

"""Calibration: the gap between the student's confidence in its most likely token and how often that token is right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import binned_error, clustered_bootstrap

BINS = 15


class Calibration(Evaluator):
    """Measures "ece", the expected calibration error, with 15 bins of equal width over the confidence.

    The gap of a bin is the share of right tokens in it minus their mean confidence. The error is the mean absolute gap,
    weighted by the tokens in each bin (Guo et al., 2017, arXiv 1706.04599). It is not a mean over tokens, so its
    standard error is bootstrapped by document. Paired differences use the bins' sums by document, with the same draws
    for both rows. With few tokens the estimate is too large, because absolute gaps do not average out.
    """

    name = "calibration"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"ece": Quantity("fraction", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Compute the error from the scores' confidences and correct tokens."""
        scores = subject.scores
        if scores is None or scores.confidence is None:
            raise ValueError("calibration is read from scores with confidences, and the subject has none")
        ids, parts = _gaps(scores.confidence, scores.correct, scores.documents)
        return (
            Measurement(
                name="ece",
                value=float(binned_error(parts.sum(axis=0)[None])[0]),
                unit="fraction",
                direction="min",
                source="simulated",
                stderr=clustered_bootstrap(binned_error, parts),
                detail={
                    "split": subject.split,
                    "tokens": scores.confidence.size,
                    "documents": len(parts),
                    "bins": BINS,
                    "mean_confidence": float(scores.confidence.mean()),
                },
                bins={
                    "ids": ids.tolist(),
                    "count": parts[:, -1].astype(int).tolist(),
                    "bins": parts[:, :-1].round(6).tolist(),
                },
            ),
        )


def _gaps(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Return document ids, [documents], and sums by document, [documents, bins + 1].

    The sums are right tokens minus confidences in each bin. The last column is the number of tokens.
    """
    ids, owners = np.unique(documents, return_inverse=True)
    count = len(ids)
    if not count:
        raise ValueError("there is no calibration of no tokens")
    # Bins are open below and closed above, as in the paper. A confidence of 0 would be in the first bin.
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(owners * BINS + bins, weights=correct - confidence, minlength=count * BINS)
    return ids, np.column_stack([gaps.reshape(count, BINS), np.bincount(owners)])

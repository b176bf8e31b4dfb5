"""Calibration: by how much the student's confidence in its most likely token differs from how often it is right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Subject
from autodistill.evaluation.statistics import binned_error, clustered_bootstrap

BINS = 15


class Calibration(Evaluator):
    """Measures "ece", the expected calibration error, with 15 bins of equal width over the confidence.

    A bin's gap is the difference between the share of right tokens in it and their mean confidence, and the error is
    the mean of the gaps' sizes, weighted by the tokens in each bin (Guo et al., 2017, arXiv 1706.04599). Its standard
    error is bootstrapped by document: it is no mean over tokens, and paired differences are those of the bins' sums by
    document, drawn for both at once. Few tokens make it larger than it is, since a gap's
    size never averages out.
    """

    name = "calibration"
    needs: Needs = "scores"
    measures: Mapping[str, Quantity] = {"ece": Quantity("fraction", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Read the scores' confidence and where they are right."""
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
    """Return the ids [documents], and [documents, bins + 1]: in each bin right tokens less confidences, and at the end
    tokens.
    """
    ids, owners = np.unique(documents, return_inverse=True)
    count = len(ids)
    if not count:
        raise ValueError("there is no calibration of no tokens")
    # Bins are open below and closed above, as in the paper; a confidence of 0 would belong to the first.
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(owners * BINS + bins, weights=correct - confidence, minlength=count * BINS)
    return ids, np.column_stack([gaps.reshape(count, BINS), np.bincount(owners)])

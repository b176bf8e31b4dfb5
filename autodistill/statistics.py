"""Standard errors of figures over tokens that depend on each other within a document, and sums by document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


def clustered_mean(
    values: npt.NDArray[np.float64] | npt.NDArray[np.bool_], clusters: npt.NDArray[np.int32]
) -> tuple[float, float | None]:
    """Mean over all values, and its standard error where values within a cluster may depend on each other.

    The sandwich estimator of Liang and Zeger (Biometrika 73, 1986) for a mean, with the usual correction for few
    clusters: with e the values less their mean, G clusters and n values,

        variance = G / (G - 1) * sum over clusters of (sum of e in the cluster)^2 / n^2

    Args:
        values: [n].
        clusters: [n], the cluster of each value, here its document.

    Returns:
        The mean; the standard error, or None where there is but one cluster.
    """
    if values.size == 0:
        raise ValueError("there is no mean of no values")
    mean = float(np.mean(values, dtype=np.float64))
    _, inverse = np.unique(clusters, return_inverse=True)
    sums = np.bincount(inverse, weights=values - mean)
    count = sums.size
    if count < 2:
        return mean, None
    return mean, float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / values.size)


RESAMPLES = 1000


def clustered_bootstrap(
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    parts: npt.NDArray[np.float64],
    seed: int = 0,
) -> float | None:
    """Standard error of a figure that is a function of sums over clusters, by drawing clusters with replacement.

    The bootstrap of Efron and Tibshirani (1993), chapter 6, with the cluster as the unit that is drawn.

    Args:
        statistic: Of sums [draws, parts] the figure of each draw [draws].
        parts: [clusters, parts], what each cluster adds to the sums.
        seed: Of the draws.

    Returns:
        The standard error; None where there is but one cluster.
    """
    clusters = len(parts)
    if clusters < 2:
        return None
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES).astype(float)
    return float(statistic(weights @ parts).std(ddof=1))


def per_document(
    values: npt.NDArray[np.float64] | npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]
) -> dict[str, list[Any]]:
    """Ids, counts and sums of the values of each document, from arrays [n]; other sums than of bools are rounded."""
    ids, inverse = np.unique(documents, return_inverse=True)
    sums = np.bincount(inverse, weights=values)
    return {
        "ids": ids.tolist(),
        "count": np.bincount(inverse).tolist(),
        "sum": (sums.astype(int) if values.dtype == np.bool_ else sums.round(6)).tolist(),
    }

"""Standard errors of means over tokens that depend on each other within a document."""

from __future__ import annotations

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

"""Standard errors of figures over tokens that are dependent within a document, and sums by document."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 1000
_PAIRS = 256  # number of pairs whose differences are resampled at once
FEW_CLUSTERS = 20
"""With fewer clusters than this, the scatter of their sums cannot be estimated well."""
_ONE_ERROR = math.erf(1 / math.sqrt(2))  # probability that a normal variate is within one standard error


@lru_cache
def t_quantile(share: float, degrees: int) -> float:
    """Return the t above 0 for which |Student's t| <= t has probability `share`.

    Computed by bisection of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.

    Args:
        share: The probability.
        degrees: Degrees of freedom.

    Raises:
        ValueError: `share` is outside of (0, 1), or there is less than one degree of freedom.
    """
    if not 0 < share < 1 or degrees < 1:
        raise ValueError(f"there is no t that holds {share} at {degrees} degrees of freedom")
    # Search for the angle whose tangent is t / sqrt(degrees), since it is bounded.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < share else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Return the probability that |t| / sqrt(degrees) is at most the tangent of an angle."""
    if degrees == 1:
        return 2 / math.pi * angle
    cos, sin, odd = math.cos(angle), math.sin(angle), degrees % 2
    # The ratio of each term to the one before it is 1/2, 3/4, 5/6 ... for even degrees, 2/3, 4/5 ... for odd ones.
    steps = np.arange(1 + odd, degrees - 2 + odd, 2)
    series = sin * (1 + float(np.cumprod(steps / (steps + 1) * cos**2).sum()))
    return 2 / math.pi * (angle + cos * series) if odd else series


def widening(clusters: int) -> float:
    """Return the factor by which a standard error from few clusters must be widened to have its nominal coverage.

    It is the quantile of Student's t with `clusters` - 1 degrees of freedom divided by the normal quantile, which is 1,
    for the 68% of one standard error: 1.84 for two clusters, 1.20 for four, 1.03 for twenty.
    """
    return t_quantile(_ONE_ERROR, clusters - 1)


def clustered_mean(
    values: npt.NDArray[np.floating[Any]] | npt.NDArray[np.bool_], clusters: npt.NDArray[np.int32]
) -> tuple[float, float | None]:
    """Return the mean of all values, and its standard error if values within a cluster may depend on each other.

    A cluster is a document, or a block of sequences of one long text.

    The error is the sandwich estimator of Liang and Zeger (Biometrika 73, 1986) for a mean, with the usual correction
    for few clusters. With e the values minus their mean, G clusters and n values,

        variance = G / (G - 1) * sum over clusters of (sum of e in the cluster)^2 / n^2

    Below 20 clusters this is too uncertain, and often far too small. It is then widened by the quantile of Student's t.
    It is also never less than the error of independent values, since dependence hardly makes a mean more certain. If
    each value is a cluster of its own, the error is the ordinary one, for any number of values.

    Args:
        values: [n].
        clusters: [n], the cluster of each value, here its document.

    Returns:
        The mean, and the standard error or None if there is only one cluster.
    """
    if values.size == 0:
        raise ValueError("there is no mean of no values")
    mean = float(np.mean(values, dtype=np.float64))
    _, inverse = np.unique(clusters, return_inverse=True)
    sums = np.bincount(inverse, weights=values - mean)
    count = sums.size
    if count < 2:
        return mean, None
    stderr = float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / values.size)
    if count >= FEW_CLUSTERS or count == values.size:
        return mean, stderr
    independent = float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(values.size)
    return mean, max(widening(count) * stderr, independent)


def _draws(clusters: int) -> npt.NDArray[np.float64]:
    """Return how often each cluster is in each bootstrap draw, [draws, clusters].

    A draw has as many clusters as there are. The draws are always the same for the same number of clusters.
    """
    shares = np.full(clusters, 1 / clusters)
    return np.random.default_rng(0).multinomial(clusters, shares, size=_RESAMPLES).astype(float)


def clustered_bootstrap(
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    parts: npt.NDArray[np.float64],
) -> float | None:
    """Return the standard error of a figure that is a function of sums over clusters, by a bootstrap over clusters.

    It is the bootstrap of Efron and Tibshirani (1993), chapter 6. Clusters are drawn with replacement. For few clusters
    the error is corrected as `resampled` says.

    Args:
        statistic: Maps sums [draws, parts] to the figure of each draw [draws].
        parts: [clusters, parts], the contribution of each cluster to the sums.

    Returns:
        The standard error, or None if there is only one cluster.
    """
    errors = clustered_bootstraps(lambda sums: statistic(sums)[:, None], parts)
    return None if errors is None else float(errors[0])


def clustered_bootstraps(
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    parts: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64] | None:
    """Return the standard errors of several figures of the same sums over clusters; see `clustered_bootstrap`.

    Args:
        statistic: Maps sums [draws, parts] to the figures of each draw [draws, figures].
        parts: [clusters, parts], the contribution of each cluster to the sums.

    Returns:
        The standard errors [figures], or None if there is only one cluster.
    """
    clusters = len(parts)
    if clusters < 2:
        return None
    errors: npt.NDArray[np.float64] = resampled(clusters) * statistic(_draws(clusters) @ parts).std(axis=0, ddof=1)
    return errors


def binned_error(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the binned error of each draw: the sum of the absolute values of its bins, divided by its tokens.

    Args:
        sums: [draws, bins + 1], the sum of each bin; the last column has the number of tokens.
    """
    errors: npt.NDArray[np.float64] = np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
    return errors


def binned_difference(
    mine: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]
) -> tuple[float, float | None]:
    """Return the difference of two `binned_error`s over the same tokens, and its standard error.

    A bootstrap draw has the same documents for both. The result depends on this pair only.

    Args:
        mine, theirs: [documents, bins], the contribution of each document to the bins.
        counts: [documents], the number of tokens of each document.

    Returns:
        The difference `mine` - `theirs`, and its standard error or None for a single document.
    """
    bins = mine.shape[1]

    def differ(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        tokens = sums[:, -1:]
        first, second = (np.hstack([part, tokens]) for part in (sums[:, :bins], sums[:, bins:-1]))
        return binned_error(first) - binned_error(second)

    parts = np.hstack([mine, theirs, counts[:, None]])
    return float(differ(parts.sum(axis=0)[None])[0]), clustered_bootstrap(differ, parts)


def paired_bootstrap(
    gaps: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean difference per token for several pairs, and its standard error by a bootstrap over documents.

    It is the paired bootstrap of Efron and Tibshirani (1993), chapter 6. Documents are drawn with replacement, since
    tokens of one document depend on each other. For few documents the error is corrected as `resampled` says. All pairs
    use the same draws.

    Args:
        gaps: [pairs, documents], difference of the summed metric in each document.
        counts: [documents], number of tokens of each document.

    Returns:
        The differences [pairs] and their standard errors [pairs], in the metric's unit. The errors are NaN if there is
        only one document.
    """
    documents = len(counts)
    weights = _draws(documents)
    tokens = weights @ counts
    errors = [
        ((weights @ gaps[start : start + _PAIRS].T) / tokens[:, None]).std(axis=0, ddof=1)
        for start in range(0, len(gaps), _PAIRS)
    ]
    factor = resampled(documents) if documents > 1 else math.nan
    return gaps.sum(axis=1) / counts.sum(), factor * np.concatenate(errors)


def resampled(clusters: int) -> float:
    """Return the factor that corrects a bootstrapped error for a small number of clusters.

    Draws scatter around the mean of the clusters themselves, which the factor sqrt(G / (G - 1)) for G clusters
    corrects. Their scatter is itself uncertain, which `widening` corrects.
    """
    return math.sqrt(clusters / (clusters - 1)) * widening(clusters)


def per_document(
    values: npt.NDArray[np.float64] | npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]
) -> dict[str, list[Any]]:
    """Return ids, counts and sums of the values by document, from arrays [n]; sums of floats are rounded."""
    ids, inverse = np.unique(documents, return_inverse=True)
    sums = np.bincount(inverse, weights=values)
    return {
        "ids": ids.tolist(),
        "count": np.bincount(inverse).tolist(),
        "sum": (sums.astype(int) if values.dtype == np.bool_ else sums.round(6)).tolist(),
    }

"""Standard errors of figures over tokens that depend on each other within a document, and sums by document."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 1000
_PAIRS = 256  # whose differences are drawn at once
FEW_CLUSTERS = 20
"""Below so many, sums over clusters say little of how far they scatter."""
_ONE_ERROR = math.erf(1 / math.sqrt(2))  # how often a normal variate lies within one standard error


@lru_cache
def t_quantile(share: float, degrees: int) -> float:
    """The t above 0 with which |Student's t| <= t has probability `share`, at so many degrees of freedom.

    By halving intervals of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.

    Raises:
        ValueError: A share outside of (0, 1), or less than one degree of freedom.
    """
    if not 0 < share < 1 or degrees < 1:
        raise ValueError(f"there is no t that holds {share} at {degrees} degrees of freedom")
    # In the angle whose tangent is t / sqrt(degrees), which is bounded.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < share else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """The probability that |t| / sqrt(degrees) is no more than the tangent of an angle."""
    if degrees == 1:
        return 2 / math.pi * angle
    cos, sin, odd = math.cos(angle), math.sin(angle), degrees % 2
    # Each term over the one before it: 1/2, 3/4, 5/6 ... at even degrees, 2/3, 4/5 ... at odd ones.
    steps = np.arange(1 + odd, degrees - 2 + odd, 2)
    series = sin * (1 + float(np.cumprod(steps / (steps + 1) * cos**2).sum()))
    return 2 / math.pi * (angle + cos * series) if odd else series


def binomial_tail(hits: int, count: int, share: float) -> float:
    """The probability of at most so many hits in `count` independent trials, each of which hits with that share."""
    if hits >= count or share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    found = range(hits + 1)
    ways = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in found)
    logs = (way + k * math.log(share) + (count - k) * math.log1p(-share) for k, way in zip(found, ways, strict=True))
    return min(1.0, math.fsum(map(math.exp, logs)))


def binomial_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share that gave so many hits in `count` independent trials.

    The exact interval of Clopper and Pearson (Biometrika 26, 1934): the shares under which neither so few hits nor so
    many are rarer than in one of 40 cases. By halving.

    Raises:
        ValueError: No trials, or more hits than these.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits in {count} trials")
    rare = (1 - 0.95) / 2

    def highest(few: int) -> float:
        """The largest share under which so few hits are not rare."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if binomial_tail(few, count, middle) > rare else (low, middle)
        return low

    # Hits and misses change places.
    return 0.0 if hits == 0 else 1 - highest(count - hits), 1.0 if hits == count else highest(hits)


def widening(clusters: int) -> float:
    """Return the factor by which a standard error from few clusters must be widened to hold as often as it says.

    The quantile of Student's t for `clusters` - 1 over the normal one, which is 1, for the 68% of one standard error:
    1.84 for two clusters, 1.20 for four, 1.03 for twenty.
    """
    return t_quantile(_ONE_ERROR, clusters - 1)


def clustered_mean(
    values: npt.NDArray[np.floating[Any]] | npt.NDArray[np.bool_], clusters: npt.NDArray[np.int32]
) -> tuple[float, float | None]:
    """Mean over all values, and its standard error where values within a cluster may depend on each other.

    A cluster is a document, or of one long text a block of its sequences.

    The sandwich estimator of Liang and Zeger (Biometrika 73, 1986) for a mean, with the usual correction for few
    clusters: with e the values less their mean, G clusters and n values,

        variance = G / (G - 1) * sum over clusters of (sum of e in the cluster)^2 / n^2

    Below 20 clusters this is too uncertain, and often far too small. It is widened there by the quantile of Student's
    t, and is never less than the error of independent values, since dependence hardly makes a mean more certain. Values
    each of which is a cluster of its own have their ordinary error, however few they are.

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
    stderr = float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / values.size)
    if count >= FEW_CLUSTERS or count == values.size:
        return mean, stderr
    independent = float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(values.size)
    return mean, max(widening(count) * stderr, independent)


def _draws(clusters: int) -> npt.NDArray[np.float64]:
    """Return how often each of some clusters is in each draw of as many, [draws, clusters]: the same for the same
    number.
    """
    shares = np.full(clusters, 1 / clusters)
    return np.random.default_rng(0).multinomial(clusters, shares, size=_RESAMPLES).astype(float)


def clustered_bootstrap(
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    parts: npt.NDArray[np.float64],
) -> float | None:
    """Standard error of a figure that is a function of sums over clusters, by drawing clusters with replacement.

    The bootstrap of Efron and Tibshirani (1993), chapter 6, with the cluster as the unit that is drawn; for few
    clusters it is corrected as `resampled` says.

    Args:
        statistic: Of sums [draws, parts] the figure of each draw [draws].
        parts: [clusters, parts], what each cluster adds to the sums.

    Returns:
        The standard error; None where there is but one cluster.
    """
    errors = clustered_bootstraps(lambda sums: statistic(sums)[:, None], parts)
    return None if errors is None else float(errors[0])


def clustered_bootstraps(
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    parts: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64] | None:
    """Standard errors of several figures that are functions of the same sums over clusters, as `clustered_bootstrap`.

    Args:
        statistic: Of sums [draws, parts] the figures of each draw [draws, figures].
        parts: [clusters, parts], what each cluster adds to the sums.

    Returns:
        The standard errors [figures]; None where there is but one cluster.
    """
    clusters = len(parts)
    if clusters < 2:
        return None
    errors: npt.NDArray[np.float64] = resampled(clusters) * statistic(_draws(clusters) @ parts).std(axis=0, ddof=1)
    return errors


def binned_error(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the binned error of each draw: the absolute sums of its bins, over its tokens.

    Args:
        sums: [draws, bins + 1], of each bin; the last one has the tokens.
    """
    errors: npt.NDArray[np.float64] = np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
    return errors


def binned_difference(
    mine: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]
) -> tuple[float, float | None]:
    """Return the difference of two `binned_error`s over the same tokens, and its standard error.

    Both are drawn at once: a draw has the same documents of either. A pair's figures depend on nothing but the pair.

    Args:
        mine, theirs: [documents, bins], what each document adds to the bins.
        counts: [documents], tokens of each.

    Returns:
        The difference, mine less theirs; its standard error, or None of a single document.
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
    """Mean difference per token of several pairs, and its standard error over documents drawn with replacement.

    The paired bootstrap of Efron and Tibshirani (1993), chapter 6, with the document as the unit that is drawn, since
    tokens of one document depend on each other; for few documents corrected as `resampled` says. All pairs
    see the same draws.

    Args:
        gaps: [pairs, documents], difference of the summed metric in each document.
        counts: [documents], tokens of each document.

    Returns:
        The differences [pairs] and their standard errors [pairs], in the metric's unit; the errors are NaN where there
        is but one document.
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
    """Return what a bootstrapped error is multiplied by for being one of few clusters.

    Draws scatter about the clusters' own mean, for which sqrt(G / (G - 1)) of G clusters makes up, and what they
    scatter by is uncertain: see `widening`.
    """
    return math.sqrt(clusters / (clusters - 1)) * widening(clusters)


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

"""The effect of a cascade: a small model answers, and defers to a larger one when it is not confident enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.statistics import clustered_bootstraps, paired_bootstrap
from autodistill.utils.plain_dataclass import ToJson

Floats = npt.NDArray[np.float64]

_STEPS = 100  # steps between deferring nothing and deferring everything, at equal shares of the items


@dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """Items that both models have answered: predicted tokens, or questions with their answers.

    Attributes:
        documents: int32 [n], the document of each item; items of one document may depend on each other.
        confidence: float64 [n], the small model's confidence, 0 to 1. Items with low confidence are deferred.
        small, large: float64 [n], whether each model is right about an item: 1 or 0.
        small_ms, large_ms: float64 [n], milliseconds that each model takes for an item, or None if they are unknown.
    """

    documents: npt.NDArray[np.int32]
    confidence: Floats
    small: Floats
    large: Floats
    small_ms: Floats | None = None
    large_ms: Floats | None = None

    def part(self, chosen: npt.NDArray[np.bool_]) -> Items:
        """Return some of the items."""
        return Items(
            documents=self.documents[chosen],
            confidence=self.confidence[chosen],
            small=self.small[chosen],
            large=self.large[chosen],
            small_ms=None if self.small_ms is None else self.small_ms[chosen],
            large_ms=None if self.large_ms is None else self.large_ms[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Point(ToJson):
    """The figures of a cascade at one threshold.

    Standard errors are bootstrapped by document, and those of differences are paired.

    Attributes:
        threshold: Items with less confidence than this are deferred.
        deferred, deferred_stderr: Share of the items that are deferred.
        accuracy, accuracy_stderr: Share of the items that are right in the end.
        over_small, over_small_stderr: Accuracy minus that of the small model alone.
        over_large, over_large_stderr: Accuracy minus that of the large model alone.
        over_chance, over_chance_stderr: Accuracy minus the expected accuracy if the same number of items were deferred
            at random. It is 0 if the confidence carries no information.
        latency_ms, latency_stderr: Expected milliseconds per item. The error only reflects which items are deferred.
            None if the models' speed is unknown.
        memory_bytes: Memory of the models that must be loaded, or None if it is unknown.
    """

    threshold: float
    deferred: float
    deferred_stderr: float | None
    accuracy: float
    accuracy_stderr: float | None
    over_small: float
    over_small_stderr: float | None
    over_large: float
    over_large_stderr: float | None
    over_chance: float
    over_chance_stderr: float | None
    latency_ms: float | None = None
    latency_stderr: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Suggestion(ToJson):
    """A threshold that is good enough, and its effect on documents that were not used to choose it.

    Attributes:
        threshold: The lowest threshold at which the cascade is at most one standard error below the large model alone,
            paired by document.
        deferred, deferred_stderr, accuracy, accuracy_stderr, over_large, over_large_stderr: As in `Point`, if each half
            of the documents is routed by the threshold from the other half. None for a single document.
    """

    threshold: float
    deferred: float | None = None
    deferred_stderr: float | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    over_large: float | None = None
    over_large_stderr: float | None = None


def thresholds(confidence: Floats) -> list[float]:
    """Return thresholds from one that defers nothing to one that defers everything, at equal shares of the items."""
    if confidence.size == 0:
        raise ValueError("there is no threshold for no items")
    between = np.quantile(confidence, np.arange(1, _STEPS) / _STEPS, method="higher")
    last = np.nextafter(confidence.max(), math.inf)
    return np.unique([0.0, *between, last]).tolist()


def curve(items: Items, memory: tuple[int, int] | None = None) -> list[Point]:
    """Return the cascade's figures at each of `thresholds`, from deferring nothing to deferring everything.

    Args:
        items: The items; at least one.
        memory: Bytes for serving the small and the large model, or None.
    """
    return at(items, thresholds(items.confidence), memory)


def at(items: Items, limits: Sequence[float], memory: tuple[int, int] | None = None) -> list[Point]:
    """Return the cascade's figures at some thresholds, in ascending order; see `curve`."""
    return _points(items, [items.confidence < limit for limit in limits], limits, memory)


def suggest(items: Items) -> Suggestion:
    """Return the lowest threshold that is good enough, and an estimate of how well it works on other documents.

    For the estimate the documents are divided into two halves. Each half is routed by the threshold from the other
    half, so that no item is judged by a threshold that it helped to choose.
    """
    chosen = _least(items)
    ids, places = np.unique(items.documents, return_inverse=True)
    if len(ids) < 2:
        return Suggestion(threshold=chosen)
    odd = places % 2 == 1
    limit = np.where(odd, _least(items.part(~odd)), _least(items.part(odd)))
    (found,) = _points(items, [items.confidence < limit], [chosen], None)
    return Suggestion(
        threshold=chosen,
        deferred=found.deferred,
        deferred_stderr=found.deferred_stderr,
        accuracy=found.accuracy,
        accuracy_stderr=found.accuracy_stderr,
        over_large=found.over_large,
        over_large_stderr=found.over_large_stderr,
    )


def _least(items: Items) -> float:
    """Return the lowest threshold at which the cascade is at most one standard error below the large model."""
    limits = thresholds(items.confidence)
    gaps = [np.where(items.confidence < limit, 0.0, items.small - items.large) for limit in limits]
    # The last threshold defers everything: the cascade is then the large model, so a threshold is always found.
    return next(limit for limit, (gap, error) in zip(limits, _means(items, gaps), strict=True) if gap >= -(error or 0))


def _means(items: Items, values: Sequence[Floats]) -> list[tuple[float, float | None]]:
    """Return means over the items, and their standard errors over the same draws of documents."""
    _, places = np.unique(items.documents, return_inverse=True)
    count = np.bincount(places).astype(float)
    found, errors = paired_bootstrap(np.array([np.bincount(places, weights=one) for one in values]), count)
    return [(float(a), None if np.isnan(b) else float(b)) for a, b in zip(found, errors, strict=True)]


def _points(
    items: Items, deferred: Sequence[npt.NDArray[np.bool_]], limits: Sequence[float], memory: tuple[int, int] | None
) -> list[Point]:
    """Return a point for each way to route the items; all ways use the same draws of documents."""
    right = [np.where(one, items.large, items.small) for one in deferred]
    columns = {
        "deferred": _means(items, [one.astype(float) for one in deferred]),
        "accuracy": _means(items, right),
        "over_small": _means(items, [one - items.small for one in right]),
        "over_large": _means(items, [one - items.large for one in right]),
        "over_chance": _over_chance(items, right, deferred),
    }
    if items.small_ms is not None and items.large_ms is not None:
        # If everything is deferred, the small model is not asked first.
        taken = [items.large_ms if one.all() else items.small_ms + one * items.large_ms for one in deferred]
        columns["latency"] = _means(items, taken)
    points = []
    for place, limit in enumerate(limits):
        figures: dict[str, Any] = {}
        for name, column in columns.items():
            value, error = column[place]
            figures |= {"latency_ms" if name == "latency" else name: value, f"{name}_stderr": error}
        loaded = _memory(memory, deferred[place])
        points.append(Point(threshold=float(limit), memory_bytes=loaded, **figures))
    return points


def _over_chance(
    items: Items, right: Sequence[Floats], deferred: Sequence[npt.NDArray[np.bool_]]
) -> list[tuple[float, float | None]]:
    """Return the gains over deferring the same number of items at random, and their standard errors."""
    _, places = np.unique(items.documents, return_inverse=True)
    ways = len(right)

    def gains(sums: Floats) -> Floats:
        """Return the gains [draws, ways] for sums [draws, ways + ways + (small, large, items)]."""
        small, large, count = sums[:, -3:, None].transpose(1, 0, 2)
        share = sums[:, ways : 2 * ways] / count
        found: Floats = (sums[:, :ways] - (1 - share) * small - share * large) / count
        return found

    columns = [*right, *deferred, items.small, items.large, np.ones(len(items.small))]
    parts = np.stack([np.bincount(places, weights=one) for one in columns], axis=1).astype(np.float64)
    errors = clustered_bootstraps(gains, parts)
    values = gains(parts.sum(axis=0)[None])[0]
    return [(float(one), None if errors is None else float(errors[place])) for place, one in enumerate(values)]


def _memory(memory: tuple[int, int] | None, deferred: npt.NDArray[np.bool_]) -> int | None:
    """Return the memory of the models that must be loaded: one if nothing or everything is deferred, else both."""
    if memory is None:
        return None
    small, large = memory
    return small if not deferred.any() else large if deferred.all() else small + large

"""Order candidates by several costs: front by front, and within a front those first that lie far from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Costs = Sequence[float]


def best_first(costs: Mapping[str, Costs]) -> list[str]:
    """Return the names from the best to the worst. With a single cost this is ascending order, ties by name.

    Args:
        costs: Costs of each candidate: finite, lower is better.
    """
    return [name for front in fronts(costs) for name in spread({name: costs[name] for name in front})]


def fronts(costs: Mapping[str, Costs]) -> list[list[str]]:
    """Return the non-dominated fronts: a candidate is in the first front of which no member beats it.

    One candidate beats another if it is no worse in any cost and better in one. In lexicographic order, a candidate can
    only be beaten by one before it. If a front beats it, so does each front before that one, so the search for its
    front is a bisection (Zhang et al., 2015, doi:10.1109/TEVC.2014.2308305).

    Args:
        costs: As for `best_first`.
    """
    found: list[list[str]] = []
    for name in sorted(costs, key=lambda name: (*costs[name], name)):
        low, high = 0, len(found)
        while low < high:
            middle = (low + high) // 2
            if any(_beats(costs[other], costs[name]) for other in found[middle]):
                low = middle + 1
            else:
                high = middle
        if low == len(found):
            found.append([])
        found[low].append(name)
    return found


def spread(costs: Mapping[str, Costs]) -> list[str]:
    """Return the best by the first cost, and then each time the candidate that is farthest from all before it.

    This is how MO-ASHA orders a front (its epsilon-net; Schmucker et al., 2021, arXiv:2106.12639). Each cost is divided
    by the range that the candidates have in it. Candidates that are equally far are ordered by their costs, the first
    cost first.

    Args:
        costs: Costs of candidates that do not beat each other.
    """
    order = sorted(costs, key=lambda name: (*costs[name], name))
    columns = list(zip(*costs.values(), strict=True))
    # Half ranges are used: the full range of two values may exceed what floats hold. The range of a single value is
    # zero.
    scales = [max(column) / 2 - min(column) / 2 or math.inf for column in columns]
    scaled = {name: [cost / scale for cost, scale in zip(costs[name], scales, strict=True)] for name in order}
    chosen, left = order[:1], order[1:]
    nearest = dict.fromkeys(left, math.inf)
    while left:
        for name in left:
            nearest[name] = min(nearest[name], math.dist(scaled[name], scaled[chosen[-1]]))
        # If several are equal, `max` takes the first.
        farthest = max(left, key=lambda name: nearest[name])
        left.remove(farthest)
        chosen.append(farthest)
    return chosen


def _beats(one: Costs, other: Costs) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

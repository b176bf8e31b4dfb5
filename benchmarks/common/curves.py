"""What an arm of a comparison knew after how much compute, when it caught up with another, and the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from autodistill.evaluation.statistics import paired_bootstrap

# A search's target is a script's compute, divided by this number.
FIFTH = 5


class Knowledge(Protocol):
    """A student, and what had been spent when it was known.

    Attributes:
        operations: Operations spent on everything so far.
        value: Accuracy on validation, or None if the work made no student.
    """

    @property
    def operations(self) -> float:
        """Operations that were spent until then."""
        ...

    @property
    def value(self) -> float | None:
        """The score of the best student that was known then, or None before the first."""
        ...


One = TypeVar("One", bound=Knowledge)


def at(curve: Sequence[One], spent: float, what: str = "operations") -> One | None:
    """Return the best student that is known after this many operations, or this much of another expense."""
    found = [one for one in curve if getattr(one, what) <= spent and one.value is not None]
    return max(found, key=lambda one: one.value or 0.0, default=None)


def passes(curve: Sequence[Knowledge], value: float, what: str = "operations") -> float:
    """Return the operations (or another expense) after which a student beat this value. Infinite if none did."""
    better = (float(getattr(one, what)) for one in curve if one.value is not None and one.value > value + 1e-12)
    return next(better, float("inf"))


def speedup(
    mine: Sequence[Sequence[Knowledge]],
    theirs: Sequence[Sequence[Knowledge]],
    value: float,
    ends: Sequence[float],
    what: str = "operations",
) -> str:
    """Return how many times the first's compute the second takes to pass a value, by the medians over seeds.

    Args:
        mine: Curves of the first, one for each seed.
        theirs: Curves of the second.
        value: Accuracy on validation.
        ends: Operations, or the other expense, up to which each curve of the second was followed.
        what: The expense that is counted.
    """
    first, second = (float(np.median([passes(curve, value, what) for curve in curves])) for curves in (mine, theirs))
    if not np.isfinite(first):
        return "not held: the median search does not pass it in its box."
    if not np.isfinite(second):
        followed = [min(passes(curve, value, what), end) for curve, end in zip(theirs, ends, strict=True)]
        least = float(np.median(followed)) / first
        return f"{'held' if least >= FIFTH else 'not shown'}: more than {least:.1f} times, where it was given up."
    return f"{'held' if second / first >= FIFTH else 'not held'}: {second / first:.1f} times."


def gap(found: Sequence[Mapping[str, Any]], other: Mapping[str, Any], what: str, count: str) -> tuple[float, float]:
    """Return the mean difference in percentage points and its standard error, from a paired bootstrap by document.

    Args:
        found: Sums of each document, by name: one mapping for each seed. Their mean counts.
        other: The same sums of the case compared with.
        what: Name of the sums.
        count: Name of the number of terms in each sum.
    """
    mine = np.mean([one[what] for one in found], axis=0)
    counts = np.asarray(other[count], float)
    values, errors = paired_bootstrap((mine - np.asarray(other[what]))[None], counts)
    return 100 * float(values[0]), 100 * float(errors[0])


def difference(found: Sequence[Mapping[str, Any]], other: Mapping[str, Any], what: str, count: str) -> str:
    """Return the result of `gap` as text."""
    value, error = gap(found, other, what, count)
    return f"{value:+.2f} ± {error:.2f}"

"""Decides from learning rates that were tried briefly which rate to try next, and which to train with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autodistill.evaluation.statistics import paired_bootstrap
from autodistill.utils.plain_dataclass import PlainDataclass

FACTOR = 10**0.5
"""Factor between neighbouring rates."""

# How far rates go below and above the first one, in steps of `FACTOR`.
_LOWEST, _HIGHEST = -6, 4
_LARGEST = 1.0  # largest rate that a recipe accepts
# Standard errors by which one rate must be better than another to be clearly better.
_CLEAR = 2.0
HORIZON, HORIZON_OF_SCALES = -0.35, 0.0
"""The best rate for weights falls with the length of the training, as the steps to this power. The best rate for scales
of fixed codes does not fall."""


@dataclass(frozen=True, kw_only=True)
class TriedRate(PlainDataclass):
    """A learning rate that was tried.

    Attributes:
        rate: The peak rate.
        gain: Nats per held-out token that the training gained over the untrained student, paired by document. It is
            negative for a loss. None if loss, gradient or likelihoods were not finite, which is worse than any number.
        stderr: Standard error of the gain, or None if the held-out text is one document.
        sums: Nats of each held-out document after the training; empty if they are not finite.
        seconds: Time that it took.
    """

    rate: float
    gain: float | None
    stderr: float | None
    sums: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RangeTest(PlainDataclass):
    """The outcome of a range test.

    Attributes:
        first: The rate that it began with.
        steps: Optimiser steps at each rate; 0 if there was no time for any.
        horizon: Steps of the training that a rate is chosen for.
        counts: Predicted tokens of each held-out document.
        sums: Nats of each document before any training.
        tried: The rates, in the order in which they were tried.
        chosen: The rate to train with; `first` if none was tried.
    """

    first: float
    steps: int
    horizon: int
    counts: tuple[int, ...]
    sums: tuple[float, ...]
    tried: tuple[TriedRate, ...]
    chosen: float

    @property
    def ordered(self) -> tuple[TriedRate, ...]:
        """The tried rates, the smallest first."""
        return tuple(sorted(self.tried, key=lambda one: one.rate))

    @property
    def best(self) -> TriedRate | None:
        """The rate with the largest gain, or None if no training stayed finite."""
        finite = [one for one in self.ordered if one.gain is not None]
        return max(finite, key=lambda one: one.gain or 0.0, default=None)

    @property
    def beats_beginning(self) -> bool:
        """Whether some rate is better than the untrained student, regardless of the standard error."""
        return self.best is not None and (self.best.gain or 0.0) > 0

    def difference(self, one: TriedRate, other: TriedRate) -> tuple[float, float | None]:
        """Return by how many nats per token one rate beats another, paired by document, and the standard error.

        Raises:
            ValueError: One of the two has no figures.
        """
        if not (one.sums and other.sums):
            raise ValueError("a training that was not finite has no difference")
        return paired(self.counts, other.sums, one.sums)

    def describe(self) -> str:
        """Describe the outcome in one sentence."""
        if not self.tried:
            return f"the learning rate was not tested, for lack of time: the prior's, {self.chosen:.3g}, is used"
        figures = ", ".join(_figure(one) for one in self.ordered)
        verdict = f"{self.chosen:.3g} is used"
        if not self.beats_beginning and self.chosen == self.first and self.first == self.ordered[-1].rate:
            verdict = f"the known one does no clear harm, so {verdict}"
        elif not self.beats_beginning:
            verdict = f"none beats the untrained student, so the safest, {self.chosen:.3g}, is used"
        elif self.best is not None and self.best.rate < self.chosen in {one.rate for one in self.tried}:
            verdict = f"no lower one is clearly better, so {verdict}"
        return f"learning rates, by the gain in nats per held-out token after {self.steps} steps: {figures}; {verdict}"


def _figure(one: TriedRate) -> str:
    if one.gain is None:
        return f"{one.rate:.3g} not finite"
    return f"{one.rate:.3g} {one.gain:+.4f}" + ("" if one.stderr is None else f" ± {one.stderr:.4f}")


def paired(counts: Sequence[int], before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None]:
    """Return the gain in nats per token, and its standard error over documents (None for a single one).

    Args:
        counts: Tokens of each document.
        before, after: Nats of each document.
    """
    gaps = np.asarray(before, float) - np.asarray(after, float)
    if len(counts) < 2:
        return float(gaps.sum() / sum(counts)), None
    means, errors = paired_bootstrap(gaps[None], np.asarray(counts, float))
    return float(means[0]), float(errors[0])


def next_rate(first: float, tried: Sequence[TriedRate], counts: Sequence[int]) -> float | None:
    """Return the rate to try next, or None if the rates so far are enough.

    Args:
        first: The rate to begin with.
        tried: The rates so far.
        counts: Tokens of each held-out document.
    """
    if not tried:
        return first
    places = {round(math.log(one.rate / first, FACTOR)): one for one in tried}
    low, high = min(places), max(places)
    best = max(places, key=lambda place: (_gain(places[place]), -place))

    def clear(neighbor: int) -> bool:
        """Return whether the best is clearly better than a neighbour. True if the neighbour has not been tried."""
        other = places.get(neighbor)
        if other is None or not (other.sums and places[best].sums):
            return True
        gap, error = paired(counts, other.sums, places[best].sums)
        return gap > _CLEAR * (error or 0.0)

    if _gain(places[best]) <= 0:
        # All rates harm the student, so differences between them do not matter. Go down until training changes nothing.
        smallest = places[low]
        error = smallest.stderr or 0.0
        if len(tried) > 1 and _gain(smallest) >= -error:
            return None
        return _at(first, low - 2 if _gain(smallest) < -_CLEAR * error else low - 1) or _at(first, low - 1)
    if low == high:
        # If a rate already gains clearly, a smaller one seldom gains more.
        wins = _gain(tried[0]) > _CLEAR * (tried[0].stderr or 0.0)
        return (_at(first, high + 1) if wins else None) or _at(first, low - 1)
    if best == low and clear(low + 1):
        return _at(first, low - 1)
    if best == high:
        return _at(first, high + 1)
    return _at(first, best + 1) if best < high and best + 1 not in places else None


def next_rate_of_many(first: float, tried: Sequence[TriedRate], counts: Sequence[int]) -> float | None:
    """Return the rate to try next for a training with many tokens per weight, or None. Arguments as `next_rate`.

    Rates go up while the highest one would be used, and down only while all rates clearly harm the student.
    """
    if not tried:
        return first
    places = {round(math.log(one.rate / first, FACTOR)): one for one in tried}
    chosen = rate_of_many(first, tried, counts)
    if chosen is None:
        return _at(first, min(places) - 1)
    top = max(places)
    return _at(first, top + 1) if top >= 0 and chosen == places[top].rate else None


def rate_of_many(first: float, tried: Sequence[TriedRate], counts: Sequence[int]) -> float | None:
    """Return the rate for a training with many tokens per weight, or None if all rates clearly harm the student.

    Such a training goes on long after the test, and most of its gains come later. So the known rate stays unless it
    clearly harms. A higher one is used if it gains, and if the lower ones are not better by more than an error. For a
    model of two million weights, lower rates that seemed better after twelve steps ended 0.03 nats worse, and so did a
    higher one that gained less than the known rate.

    Args:
        first: The known rate.
        tried: The rates that were tried.
        counts: Tokens of each held-out document.
    """
    safe = sorted((one for one in tried if not _harms(one)), key=lambda one: one.rate)
    chosen = next((one for one in safe if one.rate == first), safe[-1] if safe else None)
    if chosen is None:
        return None

    def better(lower: TriedRate, one: TriedRate) -> bool:
        gap, error = paired(counts, one.sums, lower.sums)
        return gap > (error or 0.0)

    for one in safe:
        lower = [other for other in safe if first <= other.rate < one.rate]
        if one.rate > chosen.rate and _gain(one) > 0 and not any(better(other, one) for other in lower):
            chosen = one
    return chosen.rate


def _harms(one: TriedRate) -> bool:
    """Return whether a rate clearly harms the student."""
    return _gain(one) < -_CLEAR * (one.stderr or 0.0)


def _at(first: float, place: int) -> float | None:
    """Return the rate so many factors above the first one, or None if it is too far."""
    rate = first * FACTOR**place
    return rate if _LOWEST <= place <= _HIGHEST and rate <= _LARGEST else None


def choose(tried: Sequence[TriedRate], step_ratio: float, power: float = HORIZON) -> float:
    """Return the rate to train with for `step_ratio` times as many steps as in the test.

    A parabola is put through the gains of the best rate and its neighbours, over the logarithm of the rate. Its top is
    the best rate for the steps of the test. For weights the best rate falls with the number of steps, and the result is
    at most the best rate that was tried. If no rate beats the untrained student, the result is the smallest rate that
    stayed finite, or a rate below all if none did.

    Args:
        tried: At least one rate.
        step_ratio: Steps of the longer training divided by those of the test.
        power: Exponent of `step_ratio` with which the best rate falls.
    """
    ordered = sorted(tried, key=lambda one: one.rate)
    best = max(range(len(ordered)), key=lambda place: (_gain(ordered[place]), -place))
    rate = ordered[best].rate
    if _gain(ordered[best]) <= 0:
        return min((one.rate for one in ordered if one.gain is not None), default=ordered[0].rate / FACTOR)
    if 0 < best < len(ordered) - 1:
        near = ordered[best - 1 : best + 2]
        rate = _top([math.log(one.rate) for one in near], [_gain(one) for one in near]) or rate
    most = ordered[best].rate if power < 0 else rate  # the top may lie above the best rate that was tried
    return min(most, max(ordered[0].rate, rate * max(1.0, step_ratio) ** power))


def _top(places: Sequence[float], gains: Sequence[float]) -> float | None:
    """Return e to the position of the top of a parabola through three ascending points, or None if it has no top."""
    if not all(map(math.isfinite, gains)):
        return None
    below, above = places[1] - places[0], places[2] - places[1]
    rise, fall = (gains[1] - gains[0]) / below, (gains[1] - gains[2]) / above
    if rise + fall <= 0:
        return None
    return math.exp(places[1] + (rise * above - fall * below) / (2 * (rise + fall)))


def _gain(one: TriedRate) -> float:
    return -math.inf if one.gain is None else one.gain

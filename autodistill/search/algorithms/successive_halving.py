"""Asynchronous successive halving with pause and promotion: reports in, decisions out; and its rungs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autodistill.evaluation.base import Direction
from autodistill.runs.results.row import Decision
from autodistill.search.algorithms.pareto import best_first


class SuccessiveHalving:
    """Pauses trials at rungs and says which of them goes on.

    Nothing is kept but what was told, so that the same reports and discards rebuild the same scheduler. A trial counts
    as promoted from a rung once it is in flight again or has reported further up. Promotion before all reports are in
    follows ASHA (Li et al., 2020, arXiv:1810.05934): the best share of those that reported so far. Of several values
    the best are those of the first fronts, as `best_first` orders them.

    Args:
        trials: Number that will be proposed.
        rungs: Training tokens at which a trial reports, ascending.
        keep: How many trials may go past each rung but the last.
        direction: Whether more or less of the reported value is better.
        further: The same of each further value that is reported, where several count.

    Raises:
        ValueError: Rungs, `keep` and `trials` do not match.
    """

    def __init__(
        self,
        *,
        trials: int,
        rungs: Sequence[int],
        keep: Sequence[int],
        direction: Direction = "max",
        further: Sequence[Direction] = (),
    ) -> None:
        if not rungs or list(rungs) != sorted(set(rungs)):
            raise ValueError(f"rungs must ascend, not {list(rungs)}")
        if len(keep) != len(rungs) - 1:
            raise ValueError(f"{len(rungs)} rungs need {len(rungs) - 1} numbers of trials to keep, not {len(keep)}")
        arriving = (trials, *keep)
        if list(arriving) != sorted(arriving, reverse=True) or arriving[-1] < 0:
            raise ValueError(f"of {trials} trials fewer and fewer may be kept, not {list(keep)}")
        self.rungs = tuple(rungs)
        self.keep = tuple(keep)
        self.direction = direction
        self._arriving = arriving
        self._signs = [-1.0 if way == "max" else 1.0 for way in (direction, *further)]
        # At each rung what every trial costs, or None where a value is missing.
        self._reports: list[dict[str, tuple[float, ...] | None]] = [{} for _ in rungs]
        self._discarded: set[str] = set()
        # Of each rung, until a report or a discard changes it: each ask reads it many times.
        self._ranks: dict[int, list[str]] = {}

    @property
    def last(self) -> int:
        """Index of the last rung."""
        return len(self.rungs) - 1

    def report(
        self,
        trial_id: str,
        rung: int,
        value: float | None,
        feasible: bool = True,
        further: Sequence[float | None] = (),
    ) -> Decision:
        """Take the value of a trial at a rung: STOP when it is complete, else PAUSE.

        Args:
            trial_id: Any name.
            rung: Index of the rung.
            value: Of the metric; a missing or non-finite one is never promoted.
            feasible: Whether some deployment of the trial keeps to the budget; one without is never promoted.
            further: The further values, where several count; a missing one counts as a missing `value`.

        Raises:
            ValueError: No such rung, the trial skipped one, or more or fewer values than directions.
        """
        if not 0 <= rung <= self.last:
            raise ValueError(f"there is no rung {rung}: there are {len(self.rungs)}")
        if rung > 0 and trial_id not in self._reports[rung - 1]:
            raise ValueError(f"trial {trial_id} reports at rung {rung} but never did at rung {rung - 1}")
        known = [item for item in (value, *further) if item is not None and math.isfinite(item)]
        if 1 + len(further) != len(self._signs):
            raise ValueError(f"{len(self._signs)} directions need as many values, not {1 + len(further)}")
        usable = feasible and len(known) == len(self._signs)
        costs = tuple(sign * item for sign, item in zip(self._signs, known, strict=False))
        self._reports[rung][trial_id] = costs if usable else None
        self._ranks.pop(rung, None)
        return Decision.STOP if rung == self.last else Decision.PAUSE

    def discard(self, trial_id: str) -> None:
        """Take a trial out that failed or was stopped: it is not promoted, and the place it took is free again."""
        self._discarded.add(trial_id)
        self._ranks.clear()

    def next_to_promote(self, in_flight: Collection[str], all_proposed: bool, extra: bool = False) -> str | None:
        """The paused trial to take to its next rung, from the highest rung that has one, or None.

        A rung is closed when no further trial can arrive at it; then its best ones go on until `keep` is used up.
        Before, one goes on only while it is among the best keep / (trials expected) of those that reported.

        Args:
            in_flight: Trials that are training, or were chosen to.
            all_proposed: Whether no further trial will be started.
            extra: Whether a trial beyond `keep` may go on where nothing else is to be done, as when time is left over.
        """
        for rung in reversed(range(self.last)):
            closed = all_proposed and self._arrivals_over(rung, in_flight)
            chosen = self._candidate(rung, in_flight, closed)
            if chosen is not None:
                return chosen
        return self.furthest(in_flight) if extra and all_proposed else None

    def furthest(self, in_flight: Collection[str]) -> str | None:
        """The best of the trials that wait at the highest rung of those where any does, or None."""
        waiting = (self._waiting(rung, in_flight) for rung in reversed(range(self.last)))
        return next((trials[0] for trials in waiting if trials), None)

    def promotable(self, in_flight: Collection[str]) -> set[str]:
        """Return the trials that wait at a rung with a place left above it for them, as the reports stand."""
        found: set[str] = set()
        for rung in range(self.last):
            places = self.keep[rung] - len(self._moved_on(rung, in_flight))
            found.update(self._waiting(rung, in_flight)[: max(0, places)])
        return found

    def _ranked(self, rung: int) -> list[str]:
        """Usable trials at a rung, the best first, ties by name."""
        if rung not in self._ranks:
            reports = self._reports[rung].items()
            self._ranks[rung] = best_first(
                {trial: costs for trial, costs in reports if costs is not None and trial not in self._discarded}
            )
        return self._ranks[rung]

    def _moved_on(self, rung: int, in_flight: Collection[str]) -> set[str]:
        """Return the trials that left a rung upwards, discarded ones not counted."""
        left = set(self._reports[rung + 1]) | (set(in_flight) & set(self._reports[rung]))
        return left - self._discarded

    def _waiting(self, rung: int, in_flight: Collection[str]) -> list[str]:
        moved = self._moved_on(rung, in_flight)
        return [trial for trial in self._ranked(rung) if trial not in moved]

    def _candidate(self, rung: int, in_flight: Collection[str], closed: bool) -> str | None:
        waiting = self._waiting(rung, in_flight)
        if not waiting or len(self._moved_on(rung, in_flight)) >= self.keep[rung]:
            return None
        if closed:
            return waiting[0]
        share = len(self._reports[rung]) * self.keep[rung] // self._arriving[rung]
        return waiting[0] if waiting[0] in self._ranked(rung)[:share] else None

    def _arrivals_over(self, rung: int, in_flight: Collection[str]) -> bool:
        """Whether, with all trials proposed, none is under way to `rung` or may yet be promoted towards it."""
        here = set(self._reports[rung])
        if any(trial not in here for trial in in_flight):
            return False
        return all(self._candidate(below, in_flight, closed=True) is None for below in range(rung))


REDUCTION = 3
"""Each rung has so many times the tokens of the one below."""

DECAY = 0.2
"""Share of a rung's tokens over which the learning rate falls before it is judged."""

_FINALISTS = 2

# A rung of fewer optimiser steps takes longer beside its training than in it, and its order says little.
_LEAST_STEPS = 4

CONFIRMED = 3  # students that are trained on further seeds, where that is asked for
BEST = 3  # trials that are trained on further, and whose checkpoints are never removed


def rung_tokens(tokens: int, batch: int) -> tuple[int, ...]:
    """Geometric rungs in whole steps: a ninth and a third of the tokens, each if it is four steps, and all."""
    inner = {round(tokens / batch / REDUCTION**level) for level in (1, 2)}
    return (*sorted(steps * batch for steps in inner if steps >= _LEAST_STEPS and steps * batch < tokens), tokens)


def kept_at_rungs(trials: int, rungs: int) -> tuple[int, ...]:
    """Return how many trials go past each rung: half of them past each of two, a third past a single one; two at
    least.
    """
    keep = []
    left = trials
    for _ in range(rungs - 1):
        left = -(-left // (REDUCTION if rungs == 2 else 2))
        keep.append(min(trials, max(left, _FINALISTS)))
    return tuple(keep)


def confirmed(trials: int, keep: Sequence[int], baselines: int) -> int:
    """Return how many strategies are trained on each further seed: the best few and the best baseline."""
    return min(CONFIRMED, keep[-1] if keep else trials) + min(1, baselines)

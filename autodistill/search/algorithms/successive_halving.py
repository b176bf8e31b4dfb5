"""Asynchronous successive halving with pause and promotion: reports go in, decisions come out. Also its rungs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autodistill.evaluation.base import Direction
from autodistill.runs.results.row import Decision
from autodistill.search.algorithms.pareto import best_first


class SuccessiveHalving:
    """Pauses trials at rungs and says which of them go on.

    It keeps only what was reported, so the same reports and discards give the same scheduler again. A trial counts as
    promoted from a rung once it is in flight again or has reported further up. Promotion before all reports are in
    follows ASHA (Li et al., 2020, arXiv:1810.05934): it takes the best share of those that have reported so far. With
    several values, the best are those of the first fronts, in the order of `best_first`.

    Args:
        trials: Number of trials that will be proposed.
        rungs: Training tokens at which a trial reports, ascending.
        keep: How many trials may go past each rung except the last.
        direction: Whether more or less of the reported value is better.
        further: The direction of each further value that is reported, if there are several.

    Raises:
        ValueError: Rungs, `keep` and `trials` do not fit together.
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
        # For each rung, the costs of every trial, or None if a value is missing.
        self._reports: list[dict[str, tuple[float, ...] | None]] = [{} for _ in rungs]
        self._discarded: set[str] = set()
        # The order at each rung, kept until a report or a discard changes it: each call reads it many times.
        self._ranks: dict[int, list[str]] = {}

    @property
    def last(self) -> int:
        """Index of the last rung."""
        return len(self.rungs) - 1

    def report(self, trial_id: str, rung: int, value: float | None, further: Sequence[float | None] = ()) -> Decision:
        """Take the value of a trial at a rung. Return STOP if the trial is complete, else PAUSE.

        Args:
            trial_id: Any name.
            rung: Index of the rung.
            value: The metric. A trial with a missing or non-finite value is never promoted.
            further: The further values, if there are several. A missing one counts as a missing `value`.

        Raises:
            ValueError: There is no such rung, the trial skipped one, or the number of values differs from that of
                directions.
        """
        if not 0 <= rung <= self.last:
            raise ValueError(f"there is no rung {rung}: there are {len(self.rungs)}")
        if rung > 0 and trial_id not in self._reports[rung - 1]:
            raise ValueError(f"trial {trial_id} reports at rung {rung} but never did at rung {rung - 1}")
        known = [item for item in (value, *further) if item is not None and math.isfinite(item)]
        if 1 + len(further) != len(self._signs):
            raise ValueError(f"{len(self._signs)} directions need as many values, not {1 + len(further)}")
        usable = len(known) == len(self._signs)
        costs = tuple(sign * item for sign, item in zip(self._signs, known, strict=False))
        self._reports[rung][trial_id] = costs if usable else None
        self._ranks.pop(rung, None)
        return Decision.STOP if rung == self.last else Decision.PAUSE

    def discard(self, trial_id: str) -> None:
        """Take out a trial that failed or was stopped: it is not promoted, and its place is free again."""
        self._discarded.add(trial_id)
        self._ranks.clear()

    def next_to_promote(self, in_flight: Collection[str], all_proposed: bool, extra: bool = False) -> str | None:
        """Return the paused trial to take to its next rung, from the highest rung that has one, or None.

        A rung is closed when no further trial can arrive at it. Then its best trials go on until `keep` is used up.
        Before that, a trial goes on only if it is among the best keep / (trials expected) of those that have reported.

        Args:
            in_flight: Trials that are training, or were chosen for it.
            all_proposed: Whether no further trial will be started.
            extra: Whether a trial beyond `keep` may go on if there is nothing else to do, as when time is left.
        """
        for rung in reversed(range(self.last)):
            closed = all_proposed and self._arrivals_over(rung, in_flight)
            chosen = self._candidate(rung, in_flight, closed)
            if chosen is not None:
                return chosen
        return self.furthest(in_flight) if extra and all_proposed else None

    def furthest(self, in_flight: Collection[str]) -> str | None:
        """Return the best of the trials that wait at the highest rung where any waits, or None."""
        waiting = (self._waiting(rung, in_flight) for rung in reversed(range(self.last)))
        return next((trials[0] for trials in waiting if trials), None)

    def promotable(self, in_flight: Collection[str]) -> set[str]:
        """Return the waiting trials for which the rung's limit still has a place, given the reports so far."""
        found: set[str] = set()
        for rung in range(self.last):
            places = self.keep[rung] - len(self._moved_on(rung, in_flight))
            found.update(self._waiting(rung, in_flight)[: max(0, places)])
        return found

    def _ranked(self, rung: int) -> list[str]:
        """Return the usable trials at a rung, the best first, ties by name."""
        if rung not in self._ranks:
            reports = self._reports[rung].items()
            self._ranks[rung] = best_first(
                {trial: costs for trial, costs in reports if costs is not None and trial not in self._discarded}
            )
        return self._ranks[rung]

    def _moved_on(self, rung: int, in_flight: Collection[str]) -> set[str]:
        """Return the trials that went up from a rung, without discarded ones."""
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
        """Return whether no trial is on its way to `rung` or may be promoted towards it, once all are proposed."""
        here = set(self._reports[rung])
        if any(trial not in here for trial in in_flight):
            return False
        return all(self._candidate(below, in_flight, closed=True) is None for below in range(rung))


REDUCTION = 3
"""Each rung has this many times the tokens of the one below."""

DECAY = 0.2
"""Share of a rung's tokens over which the learning rate falls before it is judged."""

_FINALISTS = 2

# A rung with fewer optimiser steps takes more time outside its training than in it, and its order says little.
_LEAST_STEPS = 4

CONFIRMED = 3  # students that are trained on further seeds, if the user asks for that
BEST = 3  # trials that are trained further, and whose checkpoints are never removed


def rung_tokens(tokens: int, batch: int) -> tuple[int, ...]:
    """Return geometric rungs in whole steps: a ninth and a third of the tokens, if each has four steps, and all."""
    inner = {round(tokens / batch / REDUCTION**level) for level in (1, 2)}
    return (*sorted(steps * batch for steps in inner if steps >= _LEAST_STEPS and steps * batch < tokens), tokens)


def kept_at_rungs(trials: int, rungs: int) -> tuple[int, ...]:
    """Return how many trials go past each rung: half past each of two, or a third past a single one; at least two."""
    keep = []
    left = trials
    for _ in range(rungs - 1):
        left = -(-left // (REDUCTION if rungs == 2 else 2))
        keep.append(min(trials, max(left, _FINALISTS)))
    return tuple(keep)


def confirmed(trials: int, keep: Sequence[int], baselines: int) -> int:
    """Return how many strategies are trained on each further seed: the best few and the best baseline."""
    return min(CONFIRMED, keep[-1] if keep else trials) + min(1, baselines)

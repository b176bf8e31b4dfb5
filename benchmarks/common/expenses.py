"""The cost of each part of a search on the recorded table, both in operations and in seconds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autodistill.distillation.student.check import student_spec
from autodistill.models.spec import ModelSpec
from autodistill.strategy.strategy import Strategy
from benchmarks.common.math_search import QUESTIONS, RUNG_QUESTIONS, TOKENS
from benchmarks.common.math_table import RUNGS, Line
from benchmarks.common.math_teacher import LENGTH
from benchmarks.common.prepared import Costs, learns_from_teacher
from benchmarks.common.timed_parts import Parts

# Mean number of tokens that an evaluation of the table read. The last rung reads more than the others.
TIMED_TOKENS = ((len(RUNGS) - 1) * RUNG_QUESTIONS + QUESTIONS) * LENGTH / len(RUNGS)


@dataclass(frozen=True, kw_only=True)
class Expense:
    """What a piece of work takes.

    Attributes:
        operations: 6 for each weight and trained token, 2 for each weight and token that is read.
        seconds: CPU time of one thread, at the speed of the machine that recorded the table.
    """

    operations: float = 0
    seconds: float = 0.0

    def __add__(self, other: Expense) -> Expense:
        return Expense(operations=self.operations + other.operations, seconds=self.seconds + other.seconds)

    def __mul__(self, times: float) -> Expense:
        return Expense(operations=self.operations * times, seconds=self.seconds * times)

    def covers(self, other: Expense) -> bool:
        """Return whether this is at least as much as another, in operations and in seconds."""
        return self.operations >= other.operations and self.seconds >= other.seconds


class Clock:
    """Estimates the seconds of work at the speed of the machine that recorded the table.

    Students of one shape that learn in the same way do the same work, whatever their learning rate. Their recorded
    times differ by up to half, because the machine also did other work. So each kind takes the median of its records. A
    shape that was not recorded takes the median of all, in proportion to its parameters.

    Args:
        lines: Recorded students.
        parts: The parts that were timed separately, on any machine.
        recipe: The strategy that these parts were timed with.
        teacher: The teacher's shape.
    """

    def __init__(self, lines: Iterable[Line], parts: Parts, recipe: Strategy, teacher: ModelSpec) -> None:
        self._parts, self._recipe, self._teacher = parts, recipe, teacher
        recorded = [(Strategy.from_json(line.strategy), line) for line in lines]
        trained = [(_training_kind(strategy), line.train_seconds) for strategy, line in recorded]
        read = [(strategy.init, line.evaluate_seconds / TIMED_TOKENS) for strategy, line in recorded]
        self._train, self._read = _medians(trained), _medians(read)
        sizes = [self._parameters(strategy) for strategy, _ in recorded]
        self._train_by_size = _by_size([seconds for _, seconds in trained], sizes)
        self._read_by_size = _by_size([seconds for _, seconds in read], sizes)

    def _parameters(self, strategy: Strategy) -> int:
        return student_spec(strategy, self._teacher).parameters

    def train(self, strategy: Strategy, tokens: int) -> float:
        """Return the seconds of training a strategy's student on this many tokens."""
        known = self._train.get(_training_kind(strategy))
        return tokens * (self._train_by_size * self._parameters(strategy) if known is None else known)

    def evaluation(self, strategy: Strategy, tokens: int) -> float:
        """Return the seconds of evaluating a strategy's student on this many tokens."""
        known = self._read.get(strategy.init)
        return tokens * (self._read_by_size * self._parameters(strategy) if known is None else known)

    def online(self, tokens: int) -> float:
        """Return the seconds of running the teacher during this many tokens of training."""
        return self._parts.live_over_training * self.train(self._recipe, tokens)

    @property
    def cache(self) -> float:
        """Seconds of writing the teacher's cache."""
        return self._parts.cache_over_training * self.train(self._recipe, TOKENS)

    @property
    def teacher_rows(self) -> float:
        """Seconds of the teacher's score and all its rows."""
        return self._parts.rows_over_evaluation * self.evaluation(self._recipe, QUESTIONS * LENGTH)


def _training_kind(strategy: Strategy) -> tuple[Any, bool]:
    return strategy.init, learns_from_teacher(strategy)


def _medians(found: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    groups: dict[Any, list[float]] = {}
    for kind, seconds in found:
        groups.setdefault(kind, []).append(seconds)
    return {kind: statistics.median(values) for kind, values in groups.items()}


def _by_size(seconds: list[float], sizes: list[int]) -> float:
    return statistics.median(one / size for one, size in zip(seconds, sizes, strict=True))


class Expenses:
    """Counts the work of a search in operations and in seconds at the same time.

    Args:
        costs: Operations, by the search's plan.
        clock: Seconds.
        deployments: Number of deployments; the teacher has a row under each.
    """

    def __init__(self, costs: Costs, clock: Clock, deployments: int) -> None:
        self.costs = costs
        self._clock = clock
        self._rows = 1 + deployments

    def train(self, strategy: Strategy, tokens: int, *, live: bool = False) -> Expense:
        """Return the expense of training on this many tokens, with a `live` teacher or with a cache."""
        alone = Expense(operations=self.costs.train(strategy, tokens), seconds=self._clock.train(strategy, tokens))
        if not live or not learns_from_teacher(strategy):
            return alone
        return alone + Expense(operations=self.costs.online(tokens), seconds=self._clock.online(tokens))

    def evaluation(self, strategy: Strategy, tokens: int) -> Expense:
        """Return the expense of an evaluation on this many tokens."""
        return Expense(
            operations=self.costs.evaluation(strategy, tokens), seconds=self._clock.evaluation(strategy, tokens)
        )

    def whole(self, strategy: Strategy, *, live: bool = False) -> Expense:
        """Return the expense of a strategy from its beginning to the end, with its last evaluation."""
        last = len(self.costs.rungs) - 1
        read = self.evaluation(strategy, self.costs.read_at(last))
        return self.train(strategy, self.costs.rungs[last], live=live) + read

    @property
    def cache(self) -> Expense:
        """Expense of writing the teacher's cache."""
        return Expense(operations=self.costs.cache, seconds=self._clock.cache)

    @property
    def teacher_rows(self) -> Expense:
        """Expense of the teacher's score and all its rows."""
        return Expense(operations=self._rows * self.costs.teacher_rows, seconds=self._clock.teacher_rows)

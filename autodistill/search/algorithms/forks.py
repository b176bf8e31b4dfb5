"""Proposals that fork: a good trial's stable training, continued from its checkpoint, with another finishing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from autodistill.evaluation.base import Direction
from autodistill.runs.results.row import Status
from autodistill.search.algorithms.optuna_study import Observation
from autodistill.strategy.dimension import Dimension, Point
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy

EVERY = 4  # proposals of which one is a fork
FROM = 11  # the first that is one, the last of a dozen: before, little is known to be good, and a fresh one says more
FEW = 3  # best trials that are forked, and whose checkpoints are always kept
_DRAWS = 32  # of a finishing, before another trial is taken


def is_fork(number: int) -> bool:
    """Whether proposal `number`, counted from 0, is to be a fork where there is anything to be forked."""
    return number >= FROM and (number - FROM) % EVERY == 0


def forks(
    space: Space, observations: Sequence[Observation], direction: Direction, source: random.Random
) -> Iterator[Point]:
    """Points that differ in their finishing alone from one of the best few trials whose stage is on disk.

    A grid narrower than the widest that the budget allows their student is not finished on: it loses, and binds nobody.

    Values are compared whatever their fidelity, as a neighbour's are: they rise with training.

    Args:
        space: Its finishing dimensions are drawn anew, with those that count under them.
        observations: Of all trials so far.
        direction: Whether more or less of the metric is better.
        source: Of the draws; which of the few comes first is drawn too.
    """
    sign = 1.0 if direction == "max" else -1.0
    usable = [item for item in observations if item.forkable and item.state not in (Status.REJECTED, Status.FAILED)]
    valued = [(item.value, item) for item in usable if item.value is not None and math.isfinite(item.value)]
    best = sorted(valued, key=lambda pair: (-sign * pair[0], -pair[1].fidelity))
    few = [item for _, item in best[:FEW]]
    for parent in source.sample(few, len(few)):
        stage = space.strategy(parent.point).stable_id
        for _ in range(_DRAWS):
            point = _finished_anew(space, parent, source)
            strategy = space.strategy(point)
            if point != dict(parent.point) and strategy.stable_id == stage and _may_gain(strategy, parent):
                yield point


def finishing(dimension: Dimension) -> bool:
    """Whether a dimension is of the finishing."""
    return dimension.path.split(".")[0] == "finishing"


def _finished_anew(space: Space, parent: Observation, source: random.Random) -> Point:
    point: Point = {}
    for dimension in space.dimensions:
        if not dimension.active(point):
            continue
        if finishing(dimension) or dimension.path not in parent.point:
            point[dimension.path] = dimension.domain.at(source.random())
        else:
            point[dimension.path] = parent.point[dimension.path]
    return point


def _may_gain(strategy: Strategy, parent: Observation) -> bool:
    """Whether a finishing could do better than what the budget allows the student anyway: no narrower grid does."""
    return strategy.finishing is None or strategy.finishing.bits >= parent.bits

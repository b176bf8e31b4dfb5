"""Proposes the next point of a space from what was observed, the same one whenever and wherever it is asked again."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from autodistill.contracts import Direction, Status
from autodistill.domains import Choices, Range, Value
from autodistill.errors import InputError
from autodistill.space import Dimension, Point, Space

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

SAMPLERS = ("tpe", "random")
_STARTUP = 6  # proposals spread over the space before anything is inferred from results
_NEAR = 4  # draws of which a neighbour takes the nearest
_ASKS = 8  # draws of the model before a duplicate is replaced by a random point
_DRAWS = 200  # random draws before a space is searched for its last unseen points
_FIDELITY_STEPS = 10**6  # Optuna counts fidelity in whole steps


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known of an earlier proposal, or of a baseline that lies in the space.

    Attributes:
        point: Where it lies.
        state: A `Status`, or "running", or "paused" at a rung.
        value: Of the metric, at the highest fidelity seen; None where there is none.
        fidelity: Fraction of the plan's tokens after which `value` was taken.
        constraint: Smallest log(need / limit) over the deployments, above 0 where none fits; None where it is unknown.
    """

    point: Mapping[str, Value]
    state: Status | Literal["running", "paused"]
    value: float | None = None
    fidelity: float = 0.0
    constraint: float | None = None

    def __post_init__(self) -> None:
        if self.state == Status.REJECTED and not (self.constraint or 0.0) > 0:
            raise ValueError("a rejected proposal has a constraint above 0")


class Sampler:
    """Proposes points: the space's starts, then by a tree-structured Parzen estimator by turns with neighbours of the
    best, or at random.

    Args:
        space: What may be proposed.
        name: "tpe" or "random".
        seed: Every proposal follows from it, the number asked for and the observations; nothing is kept between calls.
        direction: Whether more or less of the metric is better.

    Raises:
        InputError: An unknown name.
    """

    def __init__(self, space: Space, *, name: str = "tpe", seed: int = 0, direction: Direction = "max") -> None:
        if name not in SAMPLERS:
            raise InputError(f"there is no sampler {name!r}; the samplers are {', '.join(SAMPLERS)}")
        self.space = space
        self.name = name
        self.seed = seed
        self.direction = direction

    def propose(self, number: int, observations: Sequence[Observation] = ()) -> Point | None:
        """The point to try as proposal `number`, counted from 0, or None where the space holds no other strategy.

        Args:
            number: Of the proposal.
            observations: Of all others so far, in the order of their trials.
        """
        seen = {self.space.strategy(observation.point).id for observation in observations}
        for point in self._candidates(number, observations):
            if self.space.strategy(point).id not in seen:
                return point
        return None

    def _candidates(self, number: int, observations: Sequence[Observation]) -> Iterator[Point]:
        if number < len(self.space.starts):
            start = self.space.point(list(self.space.starts.values())[number])
            assert start is not None  # a space holds its starts
            yield start
        source = random.Random(f"{self.seed}/{number}")  # text seeds through SHA-512, alike in every process
        if self.name == "tpe":
            if number % 2 == 0:
                yield from self._neighbours(number // 2, source, observations)
            if number < _STARTUP:
                yield self._spread(number)
            else:
                yield from islice(self._modelled(source.getrandbits(32), observations), _ASKS)
        for _ in range(_DRAWS):
            yield self._draw(lambda dimension: source.random())
        if all(dimension.domain.grid is not None for dimension in self.space.dimensions):
            yield from self.space.points(lambda dimension: dimension.domain.grid or ())

    def _draw(self, quantile: Callable[[Dimension], float]) -> Point:
        point: Point = {}
        for dimension in self.space.dimensions:
            if dimension.active(point):
                point[dimension.path] = dimension.domain.at(quantile(dimension))
        return point

    def _spread(self, number: int) -> Point:
        """A row of a Latin hypercube: over the first proposals each dimension visits each part of its domain once."""

        def quantile(dimension: Dimension) -> float:
            source = random.Random(f"{self.seed}/{dimension.path}")
            parts = source.sample(range(_STARTUP), _STARTUP)
            offsets = [source.random() for _ in parts]
            return (parts[number] + offsets[number]) / _STARTUP

        return self._draw(quantile)

    def _neighbours(self, turn: int, source: random.Random, observations: Sequence[Observation]) -> Iterator[Point]:
        """The best point so far with one dimension drawn anew, each in its turn, in the order of the space.

        A dozen trials tell a model little, and a hand-designed baseline is where they begin well.
        """
        best = self._best(observations)
        if best is None:
            return
        active = [dimension for dimension in self.space.dimensions if dimension.path in best]
        for step in range(len(active)):
            changed = active[(turn + step) % len(active)]
            value = _step(changed, best[changed.path], source)
            if value is None:
                continue
            point: Point = {}
            for dimension in self.space.dimensions:
                if not dimension.active(point):
                    continue
                if dimension is changed:
                    point[dimension.path] = value
                elif dimension.path in best:
                    point[dimension.path] = best[dimension.path]
                else:
                    point[dimension.path] = dimension.domain.at(source.random())
            yield point

    def _best(self, observations: Sequence[Observation]) -> Mapping[str, Value] | None:
        """The point of the best value, whatever its fidelity; the first one while none has a value.

        Values rise with training, so that an early one above a late one says all the more. Ranking by fidelity first
        would keep a search beside its baseline, which alone is trained to the end at once.
        """
        sign = 1.0 if self.direction == "max" else -1.0
        usable = [item for item in observations if item.state not in (Status.REJECTED, Status.FAILED)]
        valued = [item for item in usable if item.value is not None and math.isfinite(item.value)]
        if valued:
            return max(valued, key=lambda item: (sign * (item.value or 0.0), item.fidelity)).point
        return usable[0].point if usable else None

    def _modelled(self, seed: int, observations: Sequence[Observation]) -> Iterator[Point]:
        """Draws of Optuna's estimator. Each stays in the study as running, so that the next one lies elsewhere."""
        with _quiet():
            # `group` splits the space by which dimensions occur together, which conditional ones need.
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=_STARTUP, multivariate=True, group=True, constant_liar=True
            )
            study = optuna.create_study(
                sampler=sampler, direction="maximize" if self.direction == "max" else "minimize"
            )
            study.add_trials([self._as_trial(observation) for observation in observations])
        while True:
            with _quiet():
                point = self._ask(study.ask())
            yield point

    def _ask(self, trial: optuna.Trial) -> Point:
        point: Point = {}
        for dimension in self.space.dimensions:
            if dimension.active(point):
                drawn = _suggest(trial, dimension.path, _distribution(dimension))
                point[dimension.path] = drawn if isinstance(dimension.domain, Choices) else dimension.domain.snap(drawn)
        return point

    def _as_trial(self, observation: Observation) -> FrozenTrial:
        """An earlier proposal as Optuna is to see it.

        A trial that was not taken to the end is told as pruned, with its value at its fidelity: the estimator ranks
        such trials by fidelity first, so that an early value is never compared with a late one.
        """
        value = observation.value if observation.value is not None and math.isfinite(observation.value) else None
        state = _state(observation, value)
        step = round(observation.fidelity * _FIDELITY_STEPS)
        distributions: dict[str, BaseDistribution] = {
            dimension.path: _distribution(dimension)
            for dimension in self.space.dimensions
            if dimension.path in observation.point
        }
        constraint = observation.constraint
        return optuna.trial.create_trial(
            state=state,
            params=dict(observation.point),
            distributions=distributions,
            value=value if state == TrialState.COMPLETE else None,
            intermediate_values={step: value} if state == TrialState.PRUNED and value is not None else {},
            constraints=None if constraint is None else {"budget": constraint},
        )


def _step(dimension: Dimension, value: Value, source: random.Random) -> Value | None:
    """Another value of a dimension: of numbers the nearest of a few draws; None where there is no other."""
    domain = dimension.domain
    draws = [domain.at(source.random()) for _ in range(_NEAR if isinstance(domain, Range) else _ASKS)]
    others = [draw for draw in draws if draw != value]
    if not others:
        return None
    if not isinstance(domain, Range):
        return others[0]
    scale = math.log if domain.log else float
    return min(others, key=lambda other: abs(scale(float(other)) - scale(float(value))))


def _state(observation: Observation, value: float | None) -> TrialState:
    if observation.state == Status.FAILED:
        return TrialState.FAIL
    if observation.state == "running" and value is None:
        return TrialState.RUNNING
    if observation.state == Status.COMPLETED:
        return TrialState.FAIL if value is None else TrialState.COMPLETE
    # Running past a rung, paused, stopped or rejected: of use through its value so far, or as a warning of the budget.
    infeasible = (observation.constraint or 0.0) > 0
    return TrialState.FAIL if value is None and not infeasible else TrialState.PRUNED


def _distribution(dimension: Dimension) -> Distribution:
    domain = dimension.domain
    if isinstance(domain, Choices):
        return CategoricalDistribution(domain.grid)
    if domain.integer:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def _suggest(trial: optuna.Trial, name: str, distribution: Distribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna from logging each proposal and from warning that its groups are experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)

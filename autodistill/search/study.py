"""Optuna's samplers: what is known of a search goes in as a study, made anew each time, and points come out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from autodistill.contracts import Direction, Status
from autodistill.domains import Choices, Value
from autodistill.space import Dimension, Point, Space

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

_POPULATION = 8  # of a generation: searches have tens of trials, not thousands
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
        forkable: Whether its stable training is on disk, so that others may go on from there.
    """

    point: Mapping[str, Value]
    state: Status | Literal["running", "paused"]
    value: float | None = None
    fidelity: float = 0.0
    constraint: float | None = None
    forkable: bool = False

    def __post_init__(self) -> None:
        if self.state == Status.REJECTED and not (self.constraint or 0.0) > 0:
            raise ValueError("a rejected proposal has a constraint above 0")


def _tpe(seed: int, startup: int) -> BaseSampler:
    # `group` splits the space by which dimensions occur together, which conditional ones need.
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


def _gp(seed: int, startup: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)


def _nsga2(seed: int, startup: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=_POPULATION)


MODELS: Mapping[str, Callable[[int, int], BaseSampler]] = {"tpe": _tpe, "gp": _gp, "nsga2": _nsga2}


def modelled(
    name: str, seed: int, space: Space, observations: Sequence[Observation], direction: Direction, *, startup: int
) -> Iterator[Point]:
    """Draws of one of Optuna's samplers. Each stays in the study as running, so that the next one lies elsewhere.

    Args:
        name: Of `MODELS`.
        seed: Of the draws.
        space: What may be drawn.
        observations: Of all trials so far, in their order.
        direction: Whether more or less of the metric is better.
        startup: Results before which a model is not fitted.
    """
    with _quiet():
        study = optuna.create_study(
            sampler=MODELS[name](seed, startup), direction="maximize" if direction == "max" else "minimize"
        )
        study.add_trials(_told(name, space, observations, direction))
    while True:
        with _quiet():
            point = _ask(study.ask(), space)
        yield point


def importance(space: Space, results: Sequence[Observation], direction: Direction) -> dict[str, float]:
    """Share of what sets the better results apart that each dimension accounts for, the largest first.

    PED-ANOVA (Watanabe et al., 2023, arXiv:2304.10255), of the dimensions that vary and that every result has: one
    under a condition has no value where that does not hold.

    Args:
        space: Of the results.
        results: Finished, all at the same fidelity.
        direction: Whether more or less of the metric is better.
    """
    common = set.intersection(*(set(item.point) for item in results)) if results else set()
    varied = {path for path in common if len({str(item.point[path]) for item in results}) > 1}
    if not varied:
        return {}
    with _quiet():
        study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
        study.add_trials([_as_trial(space, item) for item in results])
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=sorted(varied))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _told(name: str, space: Space, observations: Sequence[Observation], direction: Direction) -> Iterator[FrozenTrial]:
    """The observations as suits a sampler.

    TPE ranks pruned trials by fidelity first, so that an early value is never compared with a late one. The others
    know finished trials only: there a trial that was stopped counts as finished, no better than the worst that was
    trained to the end, since that is what it lost against.
    """
    if name == "tpe":
        yield from (_as_trial(space, observation) for observation in observations)
        return
    completed = (item.value for item in observations if item.state == Status.COMPLETED)
    ends = [value for value in completed if value is not None and math.isfinite(value)]
    worst = (min if direction == "max" else max)(ends) if ends else None
    finished = 0
    for observation in observations:
        told = observation
        if observation.state in (Status.STOPPED, "paused") and _finite(observation.value):
            assert observation.value is not None
            limit = observation.value if worst is None else worst
            value = (min if direction == "max" else max)(observation.value, limit)
            told = Observation(
                point=observation.point,
                state=Status.COMPLETED,
                value=value,
                fidelity=1.0,
                constraint=observation.constraint,
            )
        trial = _as_trial(space, told)
        if name == "nsga2" and trial.state == TrialState.COMPLETE:
            # It breeds from whole generations, which it would have numbered itself.
            trial.system_attrs[NSGAIISampler._get_generation_key()] = finished // _POPULATION
            finished += 1
        yield trial


def _ask(trial: optuna.Trial, space: Space) -> Point:
    point: Point = {}
    for dimension in space.dimensions:
        if dimension.active(point):
            drawn = _suggest(trial, dimension.path, _distribution(dimension))
            point[dimension.path] = drawn if isinstance(dimension.domain, Choices) else dimension.domain.snap(drawn)
    return point


def _as_trial(space: Space, observation: Observation) -> FrozenTrial:
    """An earlier proposal as Optuna is to see it; one that was not taken to the end is pruned, at its fidelity."""
    value = observation.value if _finite(observation.value) else None
    state = _state(observation, value)
    step = round(observation.fidelity * _FIDELITY_STEPS)
    distributions: dict[str, BaseDistribution] = {
        dimension.path: _distribution(dimension)
        for dimension in space.dimensions
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


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


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

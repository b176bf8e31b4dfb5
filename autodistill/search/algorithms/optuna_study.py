"""Optuna's samplers: what is known of a search goes in as a study, made anew each time, and points come out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from autodistill.evaluation.base import Direction
from autodistill.runs.results.objectives import Objective
from autodistill.runs.results.row import Status
from autodistill.strategy.dimension import Dimension, Point
from autodistill.strategy.domains import Choices, Value
from autodistill.strategy.space import Space

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

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
        further: Of each further objective, in their order, where a search has several; what follows from shape and
            packing is known before any training.
        repeatable: Whether its point may be proposed again: it was seen in an earlier run, short of full fidelity.
    """

    point: Mapping[str, Value]
    state: Status | Literal["running", "paused"]
    value: float | None = None
    fidelity: float = 0.0
    constraint: float | None = None
    further: tuple[float | None, ...] = ()
    repeatable: bool = False

    @property
    def values(self) -> tuple[float, ...] | None:
        """The values of all objectives; None if one is missing or not finite."""
        found = tuple(value for value in (self.value, *self.further) if value is not None and math.isfinite(value))
        return found if len(found) == 1 + len(self.further) else None

    def __post_init__(self) -> None:
        if self.state == Status.REJECTED and not (self.constraint or 0.0) > 0:
            raise ValueError("a rejected proposal has a constraint above 0")


def modeled(
    seed: int,
    space: Space,
    observations: Sequence[Observation],
    direction: Direction,
    further: Sequence[Objective] = (),
    *,
    startup: int,
) -> Iterator[Point]:
    """Draw points from Optuna's tree-structured Parzen estimator; each stays in its study, so that the next differs.

    Args:
        seed: Of the draws.
        space: What may be drawn.
        observations: Of all trials so far, in their order.
        direction: Whether more or less of the metric is better.
        further: The objectives beside the metric.
        startup: Results before which a model is not fitted.
    """
    ways = (direction, *(objective.direction for objective in further))
    with _quiet():
        study = optuna.create_study(
            # `group` splits the space by which dimensions occur together, which conditional ones need.
            sampler=TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True),
            directions=["maximize" if way == "max" else "minimize" for way in ways],
        )
        study.add_trials(_told(space, observations, direction, further))
    while True:
        with _quiet():
            point = _ask(study.ask(), space)
        yield point


@dataclass(frozen=True, kw_only=True)
class Told:
    """A trial as a person is told of it.

    Attributes:
        observation: What it came to.
        notes: By name: its id, what it is, why it ended.
        rungs: The metric by training tokens.
    """

    observation: Observation
    notes: Mapping[str, Any]
    rungs: Mapping[int, float]


def write_journal(path: Path, name: str, space: Space, trials: Sequence[Told], direction: Direction) -> None:
    """Write trials as a study into a journal file, which optuna-dashboard opens.

    Args:
        path: The file, which is not there yet.
        name: Of the study.
        space: Of the trials.
        trials: In their order.
        direction: Whether more or less of the metric is better.
    """
    distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
    with _quiet():
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=name,
            direction="maximize" if direction == "max" else "minimize",
        )
        for told in trials:
            trial = _as_trial(distributions, told.observation)
            trial.user_attrs = dict(told.notes)
            trial.intermediate_values = dict(told.rungs)
            study.add_trial(trial)


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of a dimension in what sets the better results apart, and the trials that have the dimension."""

    share: float
    trials: int


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Which dimensions set the better results apart.

    Attributes:
        results: How many there were.
        shares: By path: of the dimensions that all results have, the largest first, and then of those under a
            condition. Empty where there were too few results.
        left_out: Other dimensions of the space, and why nothing is said of them.
    """

    results: int
    shares: Mapping[str, Share]
    left_out: Mapping[str, str]


def importance(space: Space, results: Sequence[Observation], direction: Direction, *, least: int) -> Importance:
    """Return what sets the better results apart, by PED-ANOVA (Watanabe et al., 2023, arXiv:2304.10255).

    A dimension under a condition is judged by the results that have it, among all that these have: its share is of
    what sets the better of these apart. (Optuna's own account of conditions weighs it by how many of the best tenth
    have it, which of some tens of results are one or two.)

    Args:
        space: Of the results.
        results: Finished, all at the same fidelity.
        direction: Whether more or less of the metric is better.
        least: Results below which nothing is said.
    """
    if len(results) < least:
        return Importance(results=len(results), shares={}, left_out={})
    left_out: dict[str, str] = {}
    together: dict[tuple[int, ...], list[str]] = {}
    for path in (dimension.path for dimension in space.dimensions):
        places = tuple(place for place, item in enumerate(results) if path in item.point)
        if len(places) < least:
            left_out[path] = f"{len(places)} of {len(results)} trials have it"
        elif len({str(results[place].point[path]) for place in places}) == 1:
            left_out[path] = "it is the same in all that have it"
        else:
            together.setdefault(places, []).append(path)
    found: dict[str, Share] = {}
    for places, paths in sorted(together.items(), key=lambda item: -len(item[0])):
        among = _shares(space, [results[place] for place in places], direction)
        ordered = sorted(paths, key=lambda path: -among[path])
        found |= {path: Share(share=among[path], trials=len(places)) for path in ordered}
    return Importance(results=len(results), shares=found, left_out=left_out)


def _shares(space: Space, results: Sequence[Observation], direction: Direction) -> dict[str, float]:
    """Shares of the dimensions that all of some results have and that vary among them; they sum to 1."""
    common = set.intersection(*(set(item.point) for item in results))
    varied = {path for path in common if len({str(item.point[path]) for item in results}) > 1}
    with _quiet():
        study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
        distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
        study.add_trials([_as_trial(distributions, item) for item in results])
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=sorted(varied))


def _told(
    space: Space,
    observations: Sequence[Observation],
    direction: Direction,
    further: Sequence[Objective],
) -> Iterator[FrozenTrial]:
    """The observations as suits the estimator.

    It ranks pruned trials by fidelity first, so that an early value is never compared with a late one. With several
    objectives it knows no early values, since Optuna has intermediate ones of a single objective alone: there a trial
    that was stopped counts as finished, in what training decides no better than the worst that was trained to the end,
    since that is what it lost against. Of what breaks a limit it is told as pruned.
    """
    distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
    if further:
        ways = [direction, *(one.direction for one in further)]
        observations = _finished(observations, ways, [True, *(one.trained for one in further)])
    yield from (_as_trial(distributions, observation) for observation in observations)


def _finished(
    observations: Sequence[Observation], ways: Sequence[Direction], trained: Sequence[bool]
) -> list[Observation]:
    """The observations with those that were stopped as finished, and without early values of those that run."""
    ends = [item.values for item in observations if item.state == Status.COMPLETED and item.values is not None]
    found = []
    for observation in observations:
        values = observation.values
        if observation.state in (Status.STOPPED, "paused") and values is not None:
            # What follows from shape and packing is as true of a stopped trial as of any.
            value, *others = (
                _worst(way, [value, *(end[place] for end in ends if learnt)])
                for place, (value, way, learnt) in enumerate(zip(values, ways, trained, strict=True))
            )
            observation = replace(observation, state=Status.COMPLETED, value=value, further=tuple(others), fidelity=1.0)
        elif observation.state == "running":
            observation = replace(observation, value=None)
        found.append(observation)
    return found


def _worst(way: Direction, values: Sequence[float]) -> float:
    return min(values) if way == "max" else max(values)


def _ask(trial: optuna.Trial, space: Space) -> Point:
    point: Point = {}
    for dimension in space.dimensions:
        if dimension.active(point):
            drawn = _suggest(trial, dimension.path, _distribution(dimension))
            point[dimension.path] = drawn if isinstance(dimension.domain, Choices) else dimension.domain.snap(drawn)
    return point


def _as_trial(distributions: Mapping[str, BaseDistribution], observation: Observation) -> FrozenTrial:
    """An earlier proposal as Optuna is to see it; one that was not taken to the end is pruned, at its fidelity."""
    values = observation.values
    state = _state(observation, values)
    step = round(observation.fidelity * _FIDELITY_STEPS)
    return optuna.trial.create_trial(
        state=state,
        params=dict(observation.point),
        distributions={path: domain for path, domain in distributions.items() if path in observation.point},
        values=values if state == TrialState.COMPLETE else None,
        # Optuna has none where a study has several objectives.
        intermediate_values={step: values[0]} if state == TrialState.PRUNED and values and len(values) == 1 else {},
        # The Gaussian process wants one of every trial; an unknown one warns of nothing.
        constraints={"budget": observation.constraint or 0.0},
    )


def _state(observation: Observation, values: tuple[float, ...] | None) -> TrialState:
    if observation.state == "running" and values is None:
        return TrialState.RUNNING
    if observation.state == Status.COMPLETED:
        return TrialState.FAIL if values is None else TrialState.COMPLETE
    # Running past a rung, paused or stopped: of use through its values so far. Rejected, or failed by what it asked of
    # the machine: as a warning of a limit.
    infeasible = (observation.constraint or 0.0) > 0
    useless = values is None or observation.state == Status.FAILED
    return TrialState.FAIL if useless and not infeasible else TrialState.PRUNED


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
    """Keep Optuna from logging each proposal and from warning that its groups are experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)

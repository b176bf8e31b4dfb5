"""Optuna's samplers: what a search knows goes in as a study, which is made anew each time, and points come out."""

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
    """What is known about an earlier proposal, or a baseline that lies in the space.

    Attributes:
        point: Its place in the space.
        state: A `Status`, or "running", or "paused" at a rung.
        value: The metric at the highest fidelity seen; None if there is none.
        fidelity: Fraction of the plan's tokens after which `value` was taken.
        constraint: Smallest log(need / limit) over the deployments, above 0 if none fits; None if unknown.
        further: The further objectives in their order, if a search has several. Those that follow from shape and
            packing are known before any training.
        repeatable: Whether its point may be proposed again: an earlier run saw it, but not at full fidelity.
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
    """Draw points from Optuna's tree-structured Parzen estimator.

    Each point stays in its study, so that the next one differs.

    Args:
        seed: Seed of the draws.
        space: What may be drawn.
        observations: Those of all trials so far, in their order.
        direction: Whether more or less of the metric is better.
        further: The objectives in addition to the metric.
        startup: Number of results from which on a model is fitted.
    """
    ways = (direction, *(objective.direction for objective in further))
    with _quiet():
        study = optuna.create_study(
            # `group` splits the space by which dimensions occur together, which conditional ones need.
            sampler=TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True),
            directions=["maximize" if way == "max" else "minimize" for way in ways],
        )
        study.add_trials(_frozen_trials(space, observations, direction, further))
    while True:
        with _quiet():
            point = _ask(study.ask(), space)
        yield point


@dataclass(frozen=True, kw_only=True)
class ShownTrial:
    """A trial as it is shown to the user.

    Attributes:
        observation: Its outcome.
        notes: Notes by name: its id, what it is, why it ended.
        rungs: The metric by training tokens.
    """

    observation: Observation
    notes: Mapping[str, Any]
    rungs: Mapping[int, float]


def write_journal(path: Path, name: str, space: Space, trials: Sequence[ShownTrial], direction: Direction) -> None:
    """Write trials as a study into a journal file that optuna-dashboard can open.

    Args:
        path: The file, which must not exist yet.
        name: Name of the study.
        space: Space of the trials.
        trials: The trials in their order.
        direction: Whether more or less of the metric is better.
    """
    distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
    with _quiet():
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=name,
            direction="maximize" if direction == "max" else "minimize",
        )
        for shown in trials:
            trial = _as_trial(distributions, shown.observation)
            trial.user_attrs = dict(shown.notes)
            trial.intermediate_values = dict(shown.rungs)
            study.add_trial(trial)


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of what sets the better results apart is due to a dimension, and how many trials have the dimension."""

    share: float
    trials: int


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Which dimensions set the better results apart.

    Attributes:
        results: Number of results.
        shares: By path: first the dimensions that all results have, the largest share first, then conditional ones.
            Empty if there were too few results, or all are the same.
        left_out: The other dimensions of the space, each with the reason why it has no share.
    """

    results: int
    shares: Mapping[str, Share]
    left_out: Mapping[str, str]

    def lack(self, objective: str) -> str:
        """Say why no dimension has a share of what sets results apart in an objective."""
        if not self.left_out:
            return f"There are too few results ({self.results}) to tell which dimensions mattered for {objective}."
        why = "; ".join(f"{path}: {reason}" for path, reason in self.left_out.items())
        return f"The {self.results} results do not tell which dimensions mattered for {objective} ({why})."


def importance(
    space: Space, results: Sequence[Observation], direction: Direction, *, fewest_results: int
) -> Importance:
    """Return what sets the better results apart, by PED-ANOVA (Watanabe et al., 2023, arXiv:2304.10255).

    A conditional dimension is judged among the results that have it, together with all dimensions that these have. Its
    share is of what sets the better of these results apart. (Optuna itself weighs such a dimension by how many of the
    best tenth have it. Of some tens of results, that is one or two.)

    Args:
        space: Space of the results.
        results: Finished results, all at the same fidelity.
        direction: Whether more or less of the metric is better.
        fewest_results: Number of results below which nothing is said.
    """
    if len(results) < fewest_results:
        return Importance(results=len(results), shares={}, left_out={})
    left_out: dict[str, str] = {}
    together: dict[tuple[int, ...], list[str]] = {}
    for path in (dimension.path for dimension in space.dimensions):
        places = tuple(place for place, item in enumerate(results) if path in item.point)
        if len(places) < fewest_results:
            left_out[path] = f"{len(places)} of {len(results)} trials have it"
        elif len({str(results[place].point[path]) for place in places}) == 1:
            left_out[path] = "it is the same in all that have it"
        elif len({results[place].value for place in places}) == 1:
            left_out[path] = "all that have it have the same result"
        else:
            together.setdefault(places, []).append(path)
    found: dict[str, Share] = {}
    for places, paths in sorted(together.items(), key=lambda item: -len(item[0])):
        among = _shares(space, [results[place] for place in places], direction)
        ordered = sorted(paths, key=lambda path: -among[path])
        found |= {path: Share(share=among[path], trials=len(places)) for path in ordered}
    return Importance(results=len(results), shares=found, left_out=left_out)


def _shares(space: Space, results: Sequence[Observation], direction: Direction) -> dict[str, float]:
    """Return the shares of the dimensions that all these results have and that vary among them; they sum to 1."""
    common = set.intersection(*(set(item.point) for item in results))
    varied = {path for path in common if len({str(item.point[path]) for item in results}) > 1}
    with _quiet():
        study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
        distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
        study.add_trials([_as_trial(distributions, item) for item in results])
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=sorted(varied))


def _frozen_trials(
    space: Space,
    observations: Sequence[Observation],
    direction: Direction,
    further: Sequence[Objective],
) -> Iterator[FrozenTrial]:
    """Yield the observations in a form that suits the estimator.

    It ranks pruned trials by fidelity first, so an early value is never compared with a late one. With several
    objectives it cannot use early values, because Optuna has intermediate values only for a single objective. A stopped
    trial then counts as finished. In objectives that training decides, it gets a value no better than the worst trial
    that was trained to the end, because it lost against those. What breaks a limit is reported as pruned.
    """
    distributions = {dimension.path: _distribution(dimension) for dimension in space.dimensions}
    if further:
        ways = [direction, *(one.direction for one in further)]
        observations = _finished(observations, ways, [True, *(one.trained for one in further)])
    yield from (_as_trial(distributions, observation) for observation in observations)


def _finished(
    observations: Sequence[Observation], ways: Sequence[Direction], trained: Sequence[bool]
) -> list[Observation]:
    """Return the observations with stopped trials as finished, and running trials without early values."""
    ends = [item.values for item in observations if item.state == Status.COMPLETED and item.values is not None]
    found = []
    for observation in observations:
        values = observation.values
        if observation.state in (Status.STOPPED, "paused") and values is not None:
            # What follows from shape and packing is as valid for a stopped trial as for any other.
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
    """Return an earlier proposal as Optuna should see it. One that did not reach the end is pruned, at its fidelity."""
    values = observation.values
    state = _state(observation, values)
    step = round(observation.fidelity * _FIDELITY_STEPS)
    return optuna.trial.create_trial(
        state=state,
        params=dict(observation.point),
        distributions={path: domain for path, domain in distributions.items() if path in observation.point},
        values=values if state == TrialState.COMPLETE else None,
        # Optuna has no intermediate values if a study has several objectives.
        intermediate_values={step: values[0]} if state == TrialState.PRUNED and values and len(values) == 1 else {},
        # The Gaussian process needs a constraint for every trial. An unknown one is 0, which warns of nothing.
        constraints={"budget": observation.constraint or 0.0},
    )


def _state(observation: Observation, values: tuple[float, ...] | None) -> TrialState:
    if observation.state == "running" and values is None:
        return TrialState.RUNNING
    if observation.state == Status.COMPLETED:
        return TrialState.FAIL if values is None else TrialState.COMPLETE
    # A trial that runs past a rung, is paused or was stopped is useful through its values so far. One that was
    # rejected, or failed because of what it needed from the machine, is useful as a warning of a limit.
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

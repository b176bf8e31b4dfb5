"""Forks: every fourth proposal, of one of the best few whose stage is on disk, in its finishing alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autodistill.runs.results.row import Status
from autodistill.search.algorithms.forks import EVERY, FEW, FROM, finishing, forks, is_fork
from autodistill.search.algorithms.optuna_study import Observation
from autodistill.search.algorithms.sampler import Sampler
from autodistill.strategy.space import Space, load_space

SPACE = load_space("declared")
CHANGED = {dimension.path for dimension in SPACE.dimensions if finishing(dimension)}


def observed(number: int, **fields: object) -> Observation:
    point = Sampler(SPACE, name="random", seed=21).propose(number)
    assert point is not None
    known = {"state": "paused", "value": number / 100, "fidelity": 0.1, "forkable": True}
    return Observation(point=point, **(known | fields))  # type: ignore[arg-type]


OBSERVATIONS = [observed(number) for number in range(6)]


def stage(point: object) -> str:
    return SPACE.strategy(point).stable_id  # type: ignore[arg-type]


def test_a_quarter_of_the_proposals_fork_once_something_is_known_to_be_good() -> None:
    assert [number for number in range(24) if is_fork(number)] == [11, 15, 19, 23]
    assert (EVERY, FROM) == (4, 11)


@pytest.mark.parametrize(("bits", "drawn"), [(0, {None, 8, 4}), (4, {None, 8, 4}), (8, {None, 8}), (16, {None})])
def test_no_grid_is_finished_on_that_is_narrower_than_what_the_budget_allows(bits: int, drawn: set[int | None]) -> None:
    observations = [replace(item, bits=bits) for item in OBSERVATIONS]
    found = [SPACE.strategy(point).finishing for point in forks(SPACE, observations, "max", random.Random(0))]
    assert {finishing and finishing.bits for finishing in found} == drawn


@pytest.mark.parametrize("name", ["tpe", "gp", "nsga2", "random"])
def test_a_fork_differs_from_one_of_the_best_few_in_its_finishing_alone(name: str) -> None:
    few = {stage(item.point): item for item in OBSERVATIONS[-FEW:]}
    parents = set()
    for seed in range(20):
        point = Sampler(SPACE, name=name, seed=seed).propose(11, OBSERVATIONS)
        assert point is not None
        parent = few[stage(point)]
        parents.add(stage(point))
        different = {path for path in {*point, *parent.point} if point.get(path) != parent.point.get(path)}
        assert different
        assert different <= CHANGED
    assert parents == set(few)


def test_dimensions_under_a_condition_are_drawn_with_their_finishing() -> None:
    drawn = list(forks(SPACE, OBSERVATIONS, "max", random.Random(0)))
    for point in drawn:
        assert ("finishing.bits" in point) == (point["finishing"] == "compressed-tensors")
    values = {(point.get("finishing.bits"), point.get("finishing.group_size")) for point in drawn}
    assert values == {(None, None), (8, 32), (8, 64), (4, 32), (4, 64)}


def test_less_is_better_where_the_metric_says_so() -> None:
    worst = {stage(item.point) for item in OBSERVATIONS[:FEW]}
    assert {stage(point) for point in forks(SPACE, OBSERVATIONS, "min", random.Random(0))} == worst


def test_only_what_is_on_disk_and_has_a_value_is_forked() -> None:
    observations = [
        observed(0),
        observed(1, forkable=False),
        observed(2, value=None),
        observed(3, value=float("nan")),
        observed(4, state=Status.FAILED),
        observed(5, state=Status.REJECTED, constraint=0.1),
    ]
    assert {stage(point) for point in forks(SPACE, observations, "max", random.Random(0))} == {
        stage(observations[0].point)
    }


def test_forks_never_propose_a_strategy_again_and_end_in_the_samplers_own_proposals() -> None:
    """A space of three finishings and nothing else: two forks, and then nothing is left to fork."""
    deployment = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    grids = {name: {"format": name, "bits": int(name[6]), "group_size": 32} for name in ("gguf-q8_0", "gguf-q4_0")}
    space = Space.from_json(
        {
            "dimensions": {
                "init.depth": {"low": 0.5, "high": 0.75, "step": 0.25},
                "finishing": {"choices": {"none": None, **grids}},
            },
            "deployments": [deployment],
        }
    )
    sampler = Sampler(space, seed=4)
    first = {"init.depth": 0.5, "finishing": "none"}
    observations = [Observation(point=first, state="paused", value=0.5, fidelity=0.1, forkable=True)]
    for _ in range(2):
        point = sampler.propose(11, observations)
        assert point is not None
        assert point["init.depth"] == 0.5
        observations.append(Observation(point=point, state="running"))
    point = sampler.propose(11, observations)
    assert point is not None
    assert point["init.depth"] == 0.75


def test_without_forking_the_sampler_proposes_as_if_nothing_were_on_disk() -> None:
    gone = [observed(number, forkable=False) for number in range(6)]
    for number in (11, 15):
        expected = Sampler(SPACE, seed=2).propose(number, gone)
        assert Sampler(SPACE, seed=2, forking=False).propose(number, OBSERVATIONS) == expected
    assert Sampler(SPACE, seed=2).propose(6, OBSERVATIONS) == Sampler(SPACE, seed=2).propose(6, gone)

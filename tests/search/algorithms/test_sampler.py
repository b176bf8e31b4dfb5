"""The sampler: it proposes the same in every process, never proposes a point twice, and follows the observations."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import optuna
import pytest

from autodistill.errors import InputError
from autodistill.runs.results.objectives import OBJECTIVES
from autodistill.runs.results.row import Status
from autodistill.search.algorithms.optuna_study import Observation
from autodistill.search.algorithms.sampler import Sampler
from autodistill.strategy.space import Space, load_space

HUGGINGFACE = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}


def space_of(**dimensions) -> Space:
    return Space.from_json({"dimensions": dimensions, "deployments": [HUGGINGFACE]})


def history(space: Space, count: int = 12) -> list[Observation]:
    """Return completed, paused, rejected, failed and running observations at random points."""
    sampler = Sampler(space, name="random", seed=11)
    observations = []
    for number in range(count):
        point = sampler.propose(number)
        kinds = (
            {"state": Status.COMPLETED, "value": number / 10, "fidelity": 1.0, "constraint": -0.5},
            {"state": "paused", "value": number / 20, "fidelity": 0.25},
            {"state": Status.STOPPED, "value": float("nan"), "fidelity": 0.25},
            {"state": Status.REJECTED, "constraint": 0.3},
            {"state": Status.FAILED},
            {"state": "running"},
        )
        observations.append(Observation(point=point, **kinds[number % len(kinds)]))
    return observations


PROGRAM = """
import json, sys
sys.modules["scipy"] = None
sys.path.insert(0, "tests/search/algorithms")
from test_sampler import history, load_space, Sampler
space = load_space("declared")
print(json.dumps([Sampler(space, name=name, seed=3).propose(number, history(space))
                  for name in ("tpe", "random") for number in (2, 14)]))
"""


def test_another_process_proposes_the_same():
    """The other process has no scipy, which Optuna imports for other samplers but does not declare."""
    space = load_space("declared")
    here = [
        Sampler(space, name=name, seed=3).propose(number, history(space))
        for name in ("tpe", "random")
        for number in (2, 14)
    ]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == here


def test_one_sampler_keeps_nothing_between_calls():
    space = load_space("declared")
    sampler = Sampler(space, seed=5)
    first = sampler.propose(9, history(space))
    sampler.propose(10, history(space))
    assert sampler.propose(9, history(space)) == first
    assert Sampler(space, seed=6).propose(9, history(space)) != first


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_proposals_lie_in_the_space_and_differ(name):
    space = load_space("declared")
    observations = history(space)
    ids = {space.strategy(observation.point).id for observation in observations}
    for number in range(len(observations), len(observations) + 8):
        point = Sampler(space, name=name).propose(number, observations)
        ids.add(space.strategy(point).id)  # raises if it lies outside the space
        observations.append(Observation(point=point, state="running"))  # the next proposal comes before its result
    assert len(ids) == len(observations)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_finite_space_is_used_up_and_then_ends(name):
    space = space_of(
        **{
            "init.layers": {"choices": ["even", "contiguous"]},
            "distillation.temperature.shape": {"choices": ["constant", "linear"]},
            "distillation.temperature.end": {
                "low": 2.0,
                "high": 4.0,
                "step": 1.0,
                "when": {"distillation.temperature.shape": ["linear"]},
            },
        }
    )
    observations: list[Observation] = []
    while (point := Sampler(space, name=name).propose(len(observations), observations)) is not None:
        value = float(len(observations))
        observations.append(Observation(point=point, state=Status.COMPLETED, value=value, fidelity=1.0))
    assert len(observations) == 2 * (1 + 3)


@pytest.mark.parametrize("starts", [0, 1, 2])
def test_what_is_spread_of_the_first_proposals_visits_each_part_of_a_domain_once(starts: int) -> None:
    """Of six proposals, those that are neither starts nor neighbours form a Latin hypercube of as many rows."""
    space = space_of(
        **{
            "init.depth": {"low": 0.2, "high": 0.8},
            "distillation.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        }
    )
    first = [
        space.strategy({"init.depth": 0.3 + 0.1 * start, "distillation.learning_rate": 1e-3}) for start in range(2)
    ]
    space = replace(space, starts={str(place): first[place] for place in range(starts)})
    observations = [observed(0.5, point={"init.depth": 0.5, "distillation.learning_rate": 1e-4}, value=0.5)]
    points = []
    for number in range(6):
        point = Sampler(space, seed=1).propose(number, observations)
        assert point is not None
        observations.append(Observation(point=point, state="running"))
        points.append(point)
    drawn = [point for point in points[starts:] if len(set(point.items()) & set(observations[0].point.items())) == 0]
    assert len(drawn) == (6 - starts) // 2
    rates = [(math.log10(point["distillation.learning_rate"]) + 5) / 3 for point in drawn]
    for shares in ([(point["init.depth"] - 0.2) / 0.6 for point in drawn], rates):
        assert sorted(int(share * len(drawn)) for share in shares) == list(range(len(drawn)))


def test_of_a_dozen_trials_one_changes_the_shape_of_the_best_and_one_its_finishing() -> None:
    """This holds whichever shape is best: a default search tries more than learning rates and temperatures."""
    space = load_space("declared")
    for start in space.starts.values():
        best = Observation(point=space.point(start) or {}, state=Status.COMPLETED, value=0.5, fidelity=1.0)
        observations, changed = [best], []
        for number in range(2, 12):
            point = Sampler(space, seed=3).propose(number, observations)
            assert point is not None
            if number % 2 == 0:
                differs = [path for path in {*point, *best.point} if point.get(path) != best.point.get(path)]
                changed.append({path.split(".")[0] for path in differs})
            observations.append(Observation(point=point, state=Status.STOPPED, value=0.1, fidelity=0.1))
        assert [{"init"}, {"distillation"}, {"finishing"}] == changed[:3]


def test_every_other_proposal_changes_one_dimension_of_the_best_in_turn():
    space = load_space("declared")
    known = space.point(space.baselines["hand_designed"])
    worse = Sampler(space, name="random").propose(5)
    other = worse | {"distillation.learning_rate": 7e-4}
    observations = [
        Observation(point=space.point(space.starts["narrow"]), state=Status.FAILED),
        Observation(point=worse, state="paused", value=0.35, fidelity=0.1),
        Observation(point=known, state=Status.COMPLETED, value=0.4, fidelity=1.0),
        Observation(point=other, state=Status.COMPLETED, value=0.3, fidelity=1.0),
    ]
    paths = [
        "init",
        "distillation.learning_rate",
        "finishing",
        "init.depth",
        "distillation.divergence_weight",
        "init.layers",
        "distillation.temperature.shape",
        "distillation.temperature.start",
        "distillation.temperature.end",
        "distillation.alignment",
        "distillation.alignment.projection",
        "distillation.alignment.weight",
    ]
    assert sorted(paths) == sorted(known)
    for turn, path in enumerate(paths):
        # The first two proposals are the space's own starts.
        point = Sampler(space).propose(2 + 2 * turn, observations)
        strange = {other for other in point if other in known and point[other] != known[other]}
        assert strange == {path}
        gone = {other for other in known if other not in point}
        new = {other for other in point if other not in known}
        # Other dimensions appear or vanish only because they depend on the changed one.
        assert all(path in dict(d.when) or gone | new for d in space.dimensions if d.path in gone | new)
    falling = Sampler(space, direction="min").propose(2, observations)
    assert falling["distillation.learning_rate"] == 7e-4


WEIGHT = "distillation.divergence_weight"
RATE = {"distillation.divergence_weight": {"low": 0.0, "high": 1.0}}


def proposals(observations, direction="max", count=20) -> list[float]:
    """Return the weights that samplers propose which differ only in their seed."""
    samplers = [Sampler(space_of(**RATE), seed=seed, direction=direction) for seed in range(count)]
    # With TPE, one of two proposals is a neighbour of the best, and the other comes from the model.
    points = [sampler.propose(number, observations) for sampler in samplers for number in (50, 51)]
    return [point["distillation.divergence_weight"] for point in points]


def observed(weight: float, **fields) -> Observation:
    fields = {"state": Status.COMPLETED, "fidelity": 1.0, "point": {"distillation.divergence_weight": weight}} | fields
    return Observation(**fields)


def mean(values) -> float:
    return sum(values) / len(values)


WEIGHTS = [index / 20 for index in range(21)]


@pytest.mark.parametrize(("direction", "low", "high"), [("max", 0.7, 1.0), ("min", 0.0, 0.3)])
def test_it_goes_where_values_are_better(direction, low, high):
    proposed = proposals([observed(weight, value=weight) for weight in WEIGHTS], direction)
    assert low < mean(proposed) < high


def heard(monkeypatch: pytest.MonkeyPatch) -> list[optuna.trial.FrozenTrial]:
    """Return a list that collects all trials given to a study from now on."""
    told: list[optuna.trial.FrozenTrial] = []
    real = optuna.study.Study.add_trials
    monkeypatch.setattr(
        optuna.study.Study, "add_trials", lambda self, trials: told.extend(trials := list(trials)) or real(self, trials)
    )
    return told


def pulled(weight: float) -> dict:
    """Return fields for a weight: the metric rises with the weight, but nothing above 0.5 fits the budget."""
    if weight > 0.5:
        return {"state": Status.REJECTED, "value": None, "fidelity": 0.0, "constraint": weight}
    return {"value": weight, "constraint": -0.1}


def test_rejected_proposals_drive_it_away():
    observations = [observed(weight, **pulled(weight)) for weight in WEIGHTS]
    found = proposals(observations)
    assert mean(found) < 0.6
    assert mean(proposals([observed(weight, value=weight) for weight in WEIGHTS])) > 0.7
    # A trial that ran out of memory was rejected by the machine instead of by the estimate. It counts the same.
    failed = [item if item.values else replace(item, state=Status.FAILED) for item in observations]
    assert proposals(failed) == found


def test_values_of_low_fidelity_do_not_outrank_complete_ones():
    # Trials paused early with higher values, as for a metric that falls during training.
    early = [observed(weight, state="paused", value=10 + weight, fidelity=0.1) for weight in WEIGHTS if weight > 0.5]
    complete = [observed(weight, value=1 - weight) for weight in WEIGHTS if weight <= 0.5]
    assert mean(proposals(complete + early)) < 0.4


def test_bad_use():
    with pytest.raises(InputError, match="tpe, random"):
        Sampler(space_of(**RATE), name="annealing")
    with pytest.raises(InputError, match="the sampler nsga2 was removed: take tpe"):
        Sampler(space_of(**RATE), name="nsga2")
    with pytest.raises(ValueError, match="above 0"):
        observed(0.5, state=Status.REJECTED, constraint=-0.1)


def test_it_is_quiet(logged):
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Sampler(load_space("declared")).propose(12, history(load_space("declared")))
    finally:
        root.setLevel(level)
    assert not logged


def test_a_strategy_is_worked_out_once_for_all_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    space = load_space("declared")
    observations = history(space, 12)
    sampler = Sampler(space, seed=5)
    expected = [sampler.propose(number, observations) for number in (12, 13)]
    asked: list[dict] = []
    real = Space.strategy
    monkeypatch.setattr(Space, "strategy", lambda self, point: asked.append(dict(point)) or real(self, point))
    assert [sampler.propose(number, observations) for number in (12, 13)] == expected
    assert not [point for point in asked if point in [item.point for item in observations]]


def test_the_starts_of_a_space_are_proposed_first_and_once():
    space = load_space("declared")
    first = space.point(space.starts["narrow"])
    for name in ("tpe", "random"):
        sampler = Sampler(space, name=name, seed=5)
        assert sampler.propose(0) == first
        seen = [Observation(point=first, state="running")]
        assert sampler.propose(0, seen) != first
        assert sampler.propose(1, seen) != first


def test_neighbors_follow_the_best_value_whatever_its_fidelity():
    """A trial that beats the baseline at an early rung is the better centre, though it is not fully trained."""
    space = space_of(**{"init.depth": {"low": 0.1, "high": 0.9}})
    observations = [
        Observation(point={"init.depth": 0.2}, state=Status.COMPLETED, value=0.4, fidelity=1.0),
        Observation(point={"init.depth": 0.8}, state="paused", value=0.5, fidelity=0.1),
    ]
    # A neighbour is the nearest of four draws, so most lie nearer to the better observation.
    proposals = [Sampler(space, seed=seed).propose(8, observations)["init.depth"] for seed in range(12)]
    assert sum(abs(value - 0.8) < abs(value - 0.2) for value in proposals) >= 10


def test_a_neighbor_of_another_shape_keeps_the_most_that_the_shape_can():
    space = space_of(
        **{
            "init": {"choices": {"shallow": {"ffn": 1.0}, "narrow": {"depth": 1.0}}},
            "init.depth": {"low": 0.5, "high": 0.8, "step": 0.1, "when": {"init": ["shallow"]}},
            "init.ffn": {"low": 0.2, "high": 0.6, "step": 0.1, "when": {"init": ["narrow"]}},
        }
    )
    for kind, size, most in (("shallow", "init.ffn", 0.6), ("narrow", "init.depth", 0.8)):
        own = "init.depth" if kind == "shallow" else "init.ffn"
        best = Observation(point={"init": kind, own: 0.5}, state=Status.COMPLETED, value=0.4, fidelity=1.0)
        for seed in range(8):
            found = Sampler(space, seed=seed).propose(0, [best])  # the first turn changes the first dimension
            assert found["init"] != kind
            assert found[size] == pytest.approx(most)


MEMORY = OBJECTIVES["memory"]
PERPLEXITY = OBJECTIVES["perplexity"]


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_several_objectives_suit_every_sampler(name):
    """The trials are in every state, some without a value. Asking again gives the same proposal."""
    space = load_space("declared")
    observations = [
        replace(item, further=(None if item.value is None else 1e6 * (7 - place % 5), 10.0))
        for place, item in enumerate(history(space, 24))
    ]
    observations[0] = replace(observations[0], further=(float("nan"), 10.0))
    sampler = Sampler(space, name=name, seed=3, further=(MEMORY, PERPLEXITY))
    point = sampler.propose(25, observations)
    assert sampler.propose(25, observations) == point
    space.strategy(point)  # raises if it lies outside the space
    assert sampler.propose(24, observations) is not None  # a neighbour of the front, with TPE


def test_the_model_is_told_the_values_of_all_objectives(monkeypatch):
    told = heard(monkeypatch)
    known = {"state": Status.COMPLETED, "fidelity": 1.0}
    observations = [
        observed(0.1, value=0.5, further=(100.0, 9.0), **known),
        observed(0.2, value=0.4, further=(50.0, 12.0), **known),
        observed(0.3, value=0.9, further=(10.0, 5.0), state="paused", fidelity=0.1),
        observed(0.4, value=0.9, further=(None, 5.0), **known),
        observed(0.5, value=0.9, further=(10.0, 5.0), state="running", fidelity=0.1),
        observed(0.6, value=None, further=(70.0, None), state=Status.REJECTED, fidelity=0.0, constraint=0.2),
        observed(0.7, value=0.6, further=(None, 8.0), state=Status.FAILED, fidelity=0.1, constraint=0.1),
        observed(0.8, value=None, further=(60.0, None), state=Status.FAILED, fidelity=0.0, constraint=-0.3),
    ]
    Sampler(space_of(**RATE), further=(MEMORY, PERPLEXITY)).propose(9, observations)
    states = [*["COMPLETE"] * 3, "FAIL", "RUNNING", "PRUNED", "PRUNED", "FAIL"]
    assert [trial.state.name for trial in told] == states
    assert [trial.constraints["budget"] for trial in told[5:7]] == [0.2, 0.1]
    # A stopped trial lost to the finished ones, so what training decides gets their worst value. Its memory stays.
    assert told[2].values == [0.4, 10.0, 12.0]
    assert told[0].values == [0.5, 100.0, 9.0]


def test_proposals_of_several_objectives_lie_on_both_ends_of_the_front():
    """Accuracy is best at one end of the range and memory at the other. Between them neither is good."""
    space = space_of(**RATE)
    path = "distillation.divergence_weight"
    observations = [
        observed(weight, value=abs(weight - 0.5) if weight > 0.5 else 0.0, further=(weight if weight < 0.5 else 1.0,))
        for weight in (index / 24 for index in range(24))
    ]
    proposed = [Sampler(space, seed=seed, further=(MEMORY,)).propose(25, observations)[path] for seed in range(24)]
    assert sum(weight < 0.3 or weight > 0.7 for weight in proposed) > 0.7 * len(proposed)


def test_neighbors_of_several_objectives_take_the_front_in_turn():
    space = space_of(**{"init.depth": {"low": 0.1, "high": 0.9}})
    known = {"state": Status.COMPLETED, "fidelity": 1.0}
    observations = [
        Observation(point={"init.depth": 0.2}, value=0.4, further=(10.0,), **known),
        Observation(point={"init.depth": 0.5}, value=0.3, further=(90.0,), **known),  # beaten by both
        Observation(point={"init.depth": 0.8}, value=0.5, further=(80.0,), **known),
    ]
    for turn, low in ((4, False), (5, True)):
        samplers = [Sampler(space, seed=seed, further=(MEMORY,)) for seed in range(12)]
        depths = [sampler.propose(2 * turn, observations)["init.depth"] for sampler in samplers]
        assert sum((depth < 0.5) == low for depth in depths) >= 10


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_space_without_dimensions_has_nothing_to_propose(name: str) -> None:
    """The strategy that `distill` trains is a baseline. The default strategy is not proposed: nobody asked for it."""
    assert Sampler(replace(space_of(**RATE), dimensions=()), name=name).propose(0) is None

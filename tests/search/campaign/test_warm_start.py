"""Earlier leaderboards as observations: which value counts at which fidelity, what is refused, and what is proposed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.distillation.student.check import student_spec
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Measurement
from autodistill.evaluation.evaluate import Evaluation
from autodistill.hardware.budget import Budget
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import resized
from autodistill.runs.results.objectives import OBJECTIVES
from autodistill.runs.results.row import Status
from autodistill.runs.run_folder import RunFolder
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.state import Question
from autodistill.search.campaign.warm_start import WarmStart, warm_start
from autodistill.search.request.earlier_runs import (
    check_asked,
    check_fingerprints,
    check_space,
    parse_runs,
    steps_differ,
)
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import RungReport
from autodistill.strategy.space import load_space
from autodistill.testing import save_tiny_teacher, small_plan, tiny_text
from autodistill.utils.json_files import write_json
from tests.search.campaign.test_campaign import PLAN, question


def worker(assignment: Assignment) -> RungReport:
    """Report an accuracy that depends on the trial's number in a fixed disorder and rises with the rung."""
    number = int(assignment.task.id[1:4])
    values = {"accuracy": 0.2 + (number * 7 % 9) / 100 + assignment.rung / 1000, "memory_bytes": 1e6}
    found = {
        name: Measurement(name=name, value=value, unit="", direction="max", source="simulated")
        for name, value in values.items()
    }
    deployment = assignment.deployment or assignment.task.probe
    return RungReport(
        rung=assignment.rung,
        tokens=PLAN.rungs[assignment.rung],
        evaluation=Evaluation(deployment=deployment, measurements=found, documents={"ids": [], "count": [], "sum": []}),
        params=1000,
        seconds={"train": 1.0, "evaluate": 0.5, "other": 0.1},
        steps=(),
    )


def earlier(out: Path, name: str, asked: Question | None = None, **search: Any) -> RunFolder:
    """Create a run of the fake worker, in which t002 ran out of memory and the worker of t003 died twice."""
    asked = asked or question()
    with RunFolder.create(out, name) as run:
        stored = {
            "space_hash": asked.space.hash,
            "space_definition": asked.space.to_json(),
            "teacher": {"fingerprint": "t", "reference": "teacher"},
            "data": {"fingerprint": "d", "reference": "data"},
        }
        write_json(run.search_file, stored | search)
        made = Campaign(asked, sampler=Sampler(asked.space), log=run.events, checkpoints=run.checkpoints)
        causes = {"t002": "out-of-memory", "t003": "worker-died"}
        while (assignment := made.next()) is not None:
            if assignment.task.id in causes:
                made.fail(assignment, causes[assignment.task.id], "so")
            else:
                made.report(assignment, worker(assignment))
        made.close()
    return run


def by_trial(found: WarmStart, run: RunFolder) -> dict[str, Any]:
    points = {event["trial"]: event["point"] for event in run.events.read() if event["event"] == "trial"}
    known = {json.dumps(dict(item.point), sort_keys=True): item for item in found.observations}
    return {trial: known.get(json.dumps(point, sort_keys=True)) for trial, point in points.items()}


def test_trials_come_with_their_value_and_fidelity(tmp_path: Path) -> None:
    run = earlier(tmp_path, "run")
    found = by_trial(warm_start(tmp_path, ["run"], question()), run)
    rungs = {event["trial"]: event for event in run.events.read() if event["event"] == "rung"}  # the last of each trial
    assert {rung["rung"] for rung in rungs.values()} == {0, 1, 2}
    for trial, rung in rungs.items():
        if trial == "b000":
            assert found[trial] is None  # this search runs it itself
            continue
        item = found[trial]
        assert item.value == rung["value"]
        assert item.fidelity == pytest.approx(rung["tokens"] / PLAN.tokens)
        full = rung["rung"] == 2
        assert item.state == (Status.COMPLETED if full else Status.STOPPED)
        assert item.repeatable is not full
    assert found["t002"].state == Status.FAILED
    assert found["t003"] is None


def test_the_best_of_each_run_is_proposed_first(tmp_path: Path) -> None:
    run = earlier(tmp_path, "run")
    found = warm_start(tmp_path, ["run"], question())
    ends = [event for event in run.events.read() if event["event"] == "rung" and event["rung"] == 2]
    best = max((event for event in ends if event["trial"] != "b000"), key=lambda event: event["value"])
    points = {event["trial"]: event["point"] for event in run.events.read() if event["event"] == "trial"}
    assert list(found.first) == [points[best["trial"]]]


def test_a_plan_of_other_tokens_sees_other_fidelities(tmp_path: Path) -> None:
    run = earlier(tmp_path, "run")
    rungs: dict[str, list[dict[str, Any]]] = {}
    for event in run.events.read():
        if event["event"] == "rung":
            rungs.setdefault(event["trial"], []).append(event)
    longer = replace(question(), plan=small_plan(tokens=18432, rungs=(2048, 6144, 18432)))
    shorter = replace(question(), plan=small_plan(tokens=4608, rungs=(512, 1536, 4608)))
    for trial, item in by_trial(warm_start(tmp_path, ["run"], longer), run).items():
        if item is not None and item.value is not None:
            assert item.fidelity == pytest.approx(rungs[trial][-1]["tokens"] / 18432)
            assert item.repeatable
    for trial, item in by_trial(warm_start(tmp_path, ["run"], shorter), run).items():
        if item is not None and item.value is not None:
            within = [event for event in rungs[trial] if event["tokens"] <= 4608]
            assert (item.value, item.fidelity) == (within[-1]["value"], pytest.approx(within[-1]["tokens"] / 4608))


@pytest.mark.parametrize(
    ("tokens", "level", "whole"),
    [
        (9216, 9216, True),
        (8448, 9216, True),
        (7424, 9216, True),
        (11520, 9216, True),
        (11776, 9216, False),
        # The plan's end lies between two rungs and near neither, so the earlier one counts.
        (7168, 3072, False),
        (3328, 3072, True),
        (2560, 3072, True),
        (900, 1024, True),
    ],
)
def test_what_ended_about_where_this_plan_ends_is_finished(
    tmp_path: Path, tokens: int, level: int, whole: bool
) -> None:
    """Two runs of one command may plan a few percent apart. Each still counts what the other finished."""
    run = earlier(tmp_path, "run")
    ends = {
        event["trial"]: event["value"] for event in run.events.read() if event["event"] == "rung" and event["rung"] == 2
    }
    values = {
        event["trial"]: event["value"]
        for event in run.events.read()
        if event["event"] == "rung" and event["trial"] in ends and event["tokens"] == level
    }
    found = by_trial(warm_start(tmp_path, ["run"], replace(question(), plan=small_plan(tokens=tokens))), run)
    for trial in set(values) - {"b000"}:
        item = found[trial]
        assert (item.value, item.repeatable) == (values[trial], not whole)
        assert item.state == (Status.COMPLETED if whole else Status.STOPPED)
        assert item.fidelity == pytest.approx(min(1.0, level / tokens))
    assert set(values) - {"b000"}


def test_a_tighter_budget_knows_what_cannot_fit_and_values_of_what_can(tmp_path: Path) -> None:
    earlier(tmp_path, "run")
    teacher, deployments = question().teacher_spec, question().deployments
    smaller, larger = (
        min(memory(resized(teacher, range(layers)), one, context=2048, batch=1).total_bytes for one in deployments)
        for layers in (12, 16)
    )
    limit = (smaller + larger) // 2
    tight = replace(question(), budget=Budget(memory_bytes=limit))
    found = warm_start(tmp_path, ["run"], tight)
    rejected = [item for item in found.observations if item.state == Status.REJECTED]
    assert all((item.constraint or 0) > 0 for item in rejected)
    for item in found.observations:
        strategy = tight.space.strategy(item.point)
        spec = student_spec(strategy, tight.teacher_spec)
        least = min(memory(spec, one, context=2048, batch=1).total_bytes for one in tight.deployments)
        assert (item.state == Status.REJECTED) == (least > limit)
    assert rejected


def test_further_objectives_are_worked_out_for_this_search(tmp_path: Path) -> None:
    earlier(tmp_path, "run")
    asked = replace(
        question(),
        further=(OBJECTIVES["memory"], OBJECTIVES["latency"], OBJECTIVES["size"]),
        served_on=find_device("pi 5", devices()),
        budget=Budget(memory_bytes=10**9, context=4096),
    )
    items = [item for item in warm_start(tmp_path, ["run"], asked).observations if item.value is not None]
    assert items
    for item in items:
        spec = student_spec(asked.space.strategy(item.point), asked.teacher_spec)
        possible = [memory(spec, one, context=4096, batch=1).total_bytes for one in asked.deployments]
        assert item.further[0] in possible  # for another context than the earlier run's
        assert all(value is not None and value > 0 for value in item.further)
    tight = replace(asked, budget=Budget(memory_bytes=10**6, context=4096))
    rejected = warm_start(tmp_path, ["run"], tight).observations
    assert {item.state for item in rejected} == {Status.REJECTED}
    assert all(item.further[0] is not None and item.further[0] > 10**6 for item in rejected)


def test_what_is_finished_is_not_proposed_again_and_what_is_not_may_be(tmp_path: Path) -> None:
    earlier(tmp_path, "run")
    found = warm_start(tmp_path, ["run"], question())
    space = question().space
    finished = {space.strategy(item.point).id for item in found.observations if not item.repeatable}
    sampler = Sampler(space, seed=1, earlier=found.observations, first=found.first)
    observations: list[Any] = []
    ids = []
    for number in range(20):
        point = sampler.propose(number, observations)
        assert point is not None
        ids.append(space.strategy(point).id)
        observations.append(replace(found.observations[0], point=point, state="running", value=None, repeatable=False))
    assert ids[0] == space.strategy(found.first[0]).id
    assert not finished & set(ids[1:])
    assert len(set(ids)) == 20
    # The proposal is not part of an even spread over the space: the model knows the results of the earlier run.
    assert sampler.propose(3, observations[:3]) != Sampler(space, seed=1).propose(3, observations[:3])


def test_it_is_the_same_after_being_written_down(tmp_path: Path) -> None:
    earlier(tmp_path, "one")
    earlier(tmp_path, "two", replace(question(), plan=small_plan(seed=1)))
    found = warm_start(tmp_path, ["one", "two"], question())
    assert WarmStart.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_another_space_teacher_or_data_is_refused_by_name(tmp_path: Path) -> None:
    space = load_space("declared")
    rate = next(item for item in space.dimensions if item.path == "distillation.learning_rate")
    wider = replace(rate, domain=replace(rate.domain, high=0.5))
    dimensions = tuple(wider if item is rate else item for item in space.dimensions)
    earlier(tmp_path, "other", replace(question(), space=replace(space, dimensions=dimensions)))
    earlier(tmp_path, "run")
    check_space(tmp_path, ["run"], space)
    with pytest.raises(InputError, match=r"'other' cannot warm-start.*, in distillation.learning_rate;"):
        check_space(tmp_path, ["run", "other"], space)
    with pytest.raises(InputError, match="search the same --space, or leave it out"):
        check_space(tmp_path, ["other"], space)
    # Other baselines, other starts and another order of dimensions do not change which strategy a point stands for.
    check_space(tmp_path, ["run"], replace(space, baselines={}, starts={}, dimensions=space.dimensions[::-1]))
    with pytest.raises(InputError, match="there is no run 'nobody'"):
        check_space(tmp_path, ["nobody"], space)
    check_fingerprints(tmp_path, ["run"], {"teacher": "t", "data": "d"})
    for part, now in (("teacher", {"teacher": "x", "data": "d"}), ("data", {"teacher": "t", "data": "x"})):
        with pytest.raises(InputError, match=rf"its {part} is a different one \({part}, {part[0]}, here x\)"):
            check_fingerprints(tmp_path, ["run"], now)


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (["command"], {"command": "b.sh"}, r"its command is a different one \(a.sh, min, here b.sh, min\)"),
        (["command"], {"command_direction": "max"}, r"its command is a different one \(a.sh, min, here a.sh, max\)"),
        (
            ["accuracy", "task:miller"],
            {"fingerprints": {"miller": "x"}},
            r"its task:miller is a different one \(m, here x\)",
        ),
        (["accuracy"], {"command": "b.sh", "fingerprints": {"miller": "x"}}, None),
        (["task:other"], {"fingerprints": {"other": "x"}}, None),
        (["command", "task:miller"], {"command_seconds": 5.0, "tasks": ["/moved/tasks.yaml"]}, None),
    ],
)
def test_figures_of_one_name_that_mean_another_thing_are_refused(
    tmp_path: Path, names: list[str], change: dict[str, Any], said: str | None
) -> None:
    """Otherwise, scores for which less is better would mix with scores for which more is.

    The worst would rank first.
    """
    asked = {"tasks": ["tasks.yaml"], "fingerprints": {"miller": "m"}, "command": "a.sh", "command_direction": "min"}
    earlier(tmp_path, "run", asked=None)
    file = tmp_path / "run" / "search.json"
    write_json(file, json.loads(file.read_text()) | {"asked": asked})
    if said is None:
        check_asked(tmp_path, ["run"], asked | change, names)
        return
    with pytest.raises(InputError, match=said):
        check_asked(tmp_path, ["run"], asked | change, names)


def test_steps_of_another_size_are_told(tmp_path: Path) -> None:
    for name, tokens in (("same", 256), ("other", 512)):
        earlier(tmp_path, name, plan={"batch_tokens": tokens})
    (note,) = steps_differ(tmp_path, ["same", "other"], 256)
    assert "'other' trained in steps of 512 tokens, this search in 256" in note
    assert note.endswith("--step-tokens 512 makes them equal")


@pytest.mark.parametrize("text", ["", "a,,b", "a,b,a"])
def test_names_are_read_and_refused(text: str) -> None:
    assert parse_runs("a, b") == ("a", "b")
    with pytest.raises(InputError, match="names of runs"):
        parse_runs(text)


def test_a_warm_start_from_a_killed_run_is_of_what_it_had(tmp_path: Path) -> None:
    run = earlier(tmp_path, "run")
    events = run.events.read()
    with RunFolder.create(tmp_path, "cut") as cut:
        write_json(cut.search_file, json.loads(run.search_file.read_text()))
        for event in events[: len(events) // 3]:
            cut.events.append(event)
    whole, some = (warm_start(tmp_path, [name], question()) for name in ("run", "cut"))
    assert 0 < len(some.observations) < len(whole.observations)


def test_bad_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    asked = SearchRequest(
        budget=Budget(memory_bytes=10**9, context=256),
        space="declared",
        teacher=str(save_tiny_teacher(tmp_path / "teacher", layers=5)),
        data=str(tiny_text(tmp_path / "text")),
        runs=tmp_path,
        runner="inline",
    )
    with pytest.raises(InputError, match="no run 'nobody'"):
        check_request(replace(asked, warm_start="nobody"))

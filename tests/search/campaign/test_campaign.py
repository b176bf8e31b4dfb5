"""A campaign without models: a fake worker answers each assignment, and a second campaign needs nothing but the log."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.step_record import StepRecord
from autodistill.errors import AutoDistillError
from autodistill.estimates.fit import fits
from autodistill.evaluation.base import Direction, Measurement
from autodistill.evaluation.evaluate import Evaluation
from autodistill.hardware.budget import Budget
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import resized, spec_from_config
from autodistill.quantization.formats import weights_bytes
from autodistill.runs.checkpoints import open_stages
from autodistill.runs.events import SessionBegan, read_events
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.objectives import OBJECTIVES
from autodistill.runs.results.row import Status
from autodistill.runs.run_log import RunLog
from autodistill.runs.savings import saved
from autodistill.search.algorithms.optuna_study import Observation
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.agenda import observation
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.state import Question
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.plan import extend
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.failures import KILLED
from autodistill.search.worker.messages import RungReport
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.strategy.space import Space, load_space
from autodistill.strategy.strategy import Finishing, Strategy
from autodistill.testing import small_plan
from autodistill.units import format_bytes
from autodistill.utils.storage import Storage
from tests.thinned import thinned

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 20,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PLAN = small_plan()
SPEED = Speed(cache=1e6, score=1e6, worker_train=1e6, worker_score=1e6)
Worker = Callable[[Assignment], RungReport]


@cache
def declared() -> Space:
    """Return the space, which is read only once for all tests."""
    return load_space("declared")


def question(memory: int = 10**9) -> Question:
    space = declared()
    return Question(
        space=space,
        deployments=space.deployments,
        budget=Budget(memory_bytes=memory),
        plan=PLAN,
        speed=SPEED,
        teacher_spec=spec_from_config(CONFIG),
        teacher_accuracy=0.5,
        metric="accuracy",
        direction="max",
    )


def campaign(folder: Path, asked: Question, limit: int | None = None, **more: Any) -> Campaign:
    folder.mkdir(exist_ok=True)
    return Campaign(
        asked,
        sampler=Sampler(asked.space, seed=0),
        log=RunLog(folder / "trials.jsonl"),
        checkpoints=folder / "checkpoints",
        checkpoint_limit=limit,
        **more,
    )


def measured(deployment: Deployment, accuracy: float) -> Evaluation:
    values = {"accuracy": (accuracy, "fraction", "max"), "memory_bytes": (1e6, "bytes", "min")}
    return Evaluation(
        deployment=deployment,
        measurements={
            name: Measurement(name=name, value=value, unit=unit, direction=direction, source="simulated")
            for name, (value, unit, direction) in values.items()
        },
        documents={"ids": [1, 2], "count": [500, 500], "sum": [int(500 * accuracy)] * 2},
    )


def worker(assignment: Assignment) -> RungReport:
    """Report an accuracy that depends on the trial's number in a fixed disorder and rises with the rung."""
    number = int(assignment.task.id[1:4])
    accuracy = 0.2 + (number * 7 % 9) / 100 + assignment.rung / 1000
    return RungReport(
        rung=assignment.rung,
        tokens=PLAN.tokens_of(assignment.task.length) if assignment.rung == 2 else PLAN.rungs[assignment.rung],
        evaluation=measured(assignment.deployment or assignment.task.probe, accuracy),
        params=1000,
        seconds={"train": 1.0, "evaluate": 0.5, "other": 0.1},
        steps=(),
    )


def drive(search: Campaign, answer: Worker = worker) -> list[tuple[str, int]]:
    """Run the search and return what was trained, in order."""
    done = []
    while (assignment := search.next()) is not None:
        if assignment.deployment is None:
            done.append((assignment.task.id, assignment.rung))
        search.report(assignment, answer(assignment))
    assert search.finished
    search.close()
    return done


def keeping(folder: Path) -> Worker:
    """Return a worker that leaves checkpoints of 100 bytes, as a trial would, and resumes from those that it finds."""

    def answer(assignment: Assignment) -> RungReport:
        report = worker(assignment)
        if assignment.deployment is not None:
            return report
        store, task = open_stages(folder / "checkpoints"), assignment.task
        points = [branch_point(tokens, PLAN.decay, PLAN.batch_tokens) for tokens in PLAN.rungs[: assignment.rung + 1]]
        if task.length > 1:
            points.append(branch_point(PLAN.tokens_of(task.length), task.decay or PLAN.decay, PLAN.batch_tokens))
        found = store.find(task.stage, points[-1])
        start = found[1].tokens if found else 0
        for point in points:
            if point > start:
                store.save(task.stage, point, lambda path: path.write_bytes(b"x" * 100) and None)
        before = points[-2] if assignment.rung > 0 and not task.straight else 0
        return replace(report, trained=report.tokens - start, shared=max(0, start - before))

    return answer


@pytest.fixture(autouse=True)
def _early_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consider early students although the time budgets here are short. `test_trunk` tests when there are any."""
    monkeypatch.setattr("autodistill.search.campaign.trunk._SHORT", 0.0)


def test_the_baseline_runs_first_and_straight_to_the_end(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    done = drive(search)
    assert done[0] == ("b000", 2)
    assert sum(trial == "b000" for trial, _ in done) == 1


def test_trials_are_stopped_at_rungs_and_the_best_reach_the_end(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    done = drive(search)
    by_rung = [sorted(trial for trial, rung in done if rung == level and trial != "b000") for level in range(3)]
    assert by_rung[0] == [f"t{number:03d}" for number in range(9)]
    assert len(by_rung[1]) == 4
    assert len(by_rung[2]) == 2
    best = max(range(9), key=lambda number: number * 7 % 9)
    assert f"t{best:03d}" in by_rung[2]
    states = {trial: state.status for trial, state in search.trials.items()}
    assert [states[trial] for trial in by_rung[2]] == [Status.COMPLETED] * 2
    assert sum(status is Status.STOPPED for status in states.values()) == 7


def test_what_cannot_fit_is_recorded_with_its_reason_and_never_trained(tmp_path: Path) -> None:
    asked = question()
    needs = [
        min(fit.need for fit in fits(resized(asked.teacher_spec, range(layers)), asked.deployments, asked.budget))
        for layers in (12, 16)
    ]
    limit = sum(needs) // 2  # between the smallest and the largest student of the space
    search = campaign(tmp_path, question(memory=limit))
    done = drive(search)
    rejected = [trial for trial in search.trials.values() if trial.status is Status.REJECTED]
    assert rejected
    assert not {trial.task.id for trial in rejected} & {trial for trial, _ in done}
    assert all(f"over the {format_bytes(limit)} budget" in (trial.reason or "") for trial in rejected)
    written = {
        event["trial"]: event for event in RunLog(tmp_path / "trials.jsonl").read() if event["event"] == "status"
    }
    for trial in rejected:
        miss, need = written[trial.task.id]["miss"], min(fit.need for fit in trial.candidate.fits)
        assert miss == {"limit": "memory", "slack": pytest.approx(math.log(need / limit))}
    assert not any("miss" in event for event in written.values() if event["status"] != "rejected")
    assert sum(trial.number is not None and trial not in rejected for trial in search.trials.values()) == 9
    for trial in search.trials.values():
        assert all(fit.need <= limit for fit in trial.candidate.fits if fit.deployment in trial.task.deployments)


def test_one_failure_never_ends_a_search(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    while (assignment := search.next()) is not None:
        if assignment.task.id in ("b000", "t003"):
            search.fail(assignment, "nan", "loss was not finite")
        else:
            search.report(assignment, worker(assignment))
    search.close()
    assert search.trials["t003"].status is Status.FAILED
    assert search.trials["t003"].reason == "nan: loss was not finite"
    assert sum(trial.status is Status.COMPLETED for trial in search.trials.values()) == 2


def test_a_missing_value_is_never_promoted(tmp_path: Path) -> None:
    def half_blind(assignment: Assignment) -> RungReport:
        report = worker(assignment)
        if assignment.task.id == "t005":
            return replace(report, evaluation=replace(report.evaluation, measurements={}))
        return report

    search = campaign(tmp_path, question())
    assert ("t005", 1) not in drive(search, half_blind)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a search that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    drive(campaign(folder, question()))
    return folder


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_search_cut_off_after_any_event_ends_with_the_same_rows(whole: Path, tmp_path: Path, kept: int) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    events = RunLog(whole / "trials.jsonl").read()
    for event in events[:kept]:
        RunLog(cut / "trials.jsonl").append(event)
    again = campaign(cut, question())
    again.replay(RunLog(cut / "trials.jsonl").all())
    drive(again)
    rows, expected = (
        {row.row_id: replace(row, train_seconds=None) for row in RunLog(path / "trials.jsonl").rows()}
        for path in (cut, whole)
    )
    assert rows == expected


def test_proposals_do_not_depend_on_how_often_a_search_was_resumed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pieces"
    for _ in range(40):
        search = campaign(folder, question())
        log = RunLog(folder / "trials.jsonl")
        search.replay(log.all() if log.path.exists() else [])
        assignment = search.next()
        if assignment is None:
            break
        search.report(assignment, worker(assignment))
    strategies = [
        [event["strategy_id"] for event in RunLog(path / "trials.jsonl").read() if event["event"] == "trial"]
        for path in (whole, folder)
    ]
    assert strategies[0] == strategies[1]


def test_nothing_starts_that_the_box_cannot_hold(tmp_path: Path) -> None:
    slow = replace(question(), speed=Speed(cache=1.0, score=1.0, worker_train=10.0, worker_score=10.0))
    search = campaign(tmp_path, slow, deadline=time.monotonic() + 5)
    assignment = search.next()
    assert assignment is not None
    assert assignment.task.id == "b000"  # the baseline is always reserved first, whatever the time budget
    search.report(assignment, worker(assignment))
    assert search.next() is None
    assert search.finished


@pytest.mark.parametrize("begun", [False, True])
def test_a_resumed_search_trains_no_baseline_that_its_box_cannot_hold_and_says_so(tmp_path: Path, begun: bool) -> None:
    """The same holds if it had begun: 9,216 tokens at 100 a second take over a minute, a rung only some seconds."""
    slow = replace(question(), speed=Speed(cache=1e6, score=1e6, worker_train=100.0, worker_score=1e6))
    first = campaign(tmp_path, slow)
    if begun:
        assert first.next() is not None
    events = RunLog(tmp_path / "trials.jsonl").all() or [SessionBegan(time=0.0)]
    said: list[str] = []
    search = campaign(tmp_path, slow, deadline=time.monotonic() + 40, notify=said.append)
    search.replay(events)

    def as_expected(assignment: Assignment) -> RungReport:
        took = search.time_budget.expected(assignment, search.trials[assignment.task.id].rung)
        return replace(worker(assignment), seconds={"train": took, "evaluate": 0.0, "other": 0.0})

    trained = {trial for trial, _ in drive(search, as_expected)}
    assert "b000" not in trained
    assert trained, "what the box holds is trained all the same"
    assert search.untrained_baselines() == ["hand_designed"]
    assert begun or any("b000 hand_designed is left out: its training is expected to take 1m" in line for line in said)
    # If the time is enough, it comes first.
    again = campaign(tmp_path, slow, deadline=time.monotonic() + 10**6)
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    assignment = again.next()
    assert assignment is not None
    assert assignment.task.id == "b000"


class Slow:
    """A clock that only advances during work, which takes a worker `slowness` times as long as expected.

    It gives back the work that the end of the time budget interrupts, as a worker in this process does.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, slowness: float) -> None:
        self.now, self.slowness, self.answer = 0.0, slowness, keeping(folder)
        patch.setattr("autodistill.search.campaign.time_budget.time", self)

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def drive(self, search: Campaign) -> list[Assignment]:
        """Run a search and return what was trained, in order."""
        done = []
        while (assignment := search.next()) is not None:
            report = self.answer(assignment)
            took = self.slowness * (
                search.time_budget.evaluation() if assignment.deployment else 1.1 * report.trained / 100
            )
            self.now += took
            if assignment.deployment is None:
                done.append(assignment)
            if self.now > (search.time_budget.deadline or math.inf) and not assignment.keep:
                search.abandon(assignment)
            else:
                search.report(assignment, replace(report, seconds={"train": took, "evaluate": 0.0, "other": 0.0}))
        assert search.finished
        search.close()
        return done


def slow_question(baselines: bool = True) -> Question:
    """Return a question with 9,216 tokens per trial at 100 a second: about 20 s to the first rung, 100 s to the end."""
    asked = replace(question(), speed=Speed(cache=1e6, score=1e6, worker_train=100.0, worker_score=1e6))
    return asked if baselines else replace(asked, space=replace(asked.space, baselines={}))


@pytest.mark.parametrize(("slowness", "most"), [(1.0, 9), (3.0, 7), (4.0, 5), (5.0, 2)])
def test_on_a_slower_machine_fewer_trials_begin_and_one_reaches_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowness: float, most: int
) -> None:
    """The time budget holds nine trials without a baseline. Four should reach the second rung, and two the end."""
    search = campaign(tmp_path, slow_question(baselines=False), deadline=600.0)
    done = Slow(monkeypatch, tmp_path, slowness).drive(search)
    assert any(trial.status is Status.COMPLETED for trial in search.trials.values())
    assert sum(assignment.rung == 0 for assignment in done) <= most
    assert not any(assignment.keep for assignment in done)


def test_a_box_that_no_trial_reaches_the_end_of_takes_one_as_far_as_it_holds_and_keeps_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = campaign(tmp_path, slow_question(baselines=False), deadline=150.0)
    done = Slow(monkeypatch, tmp_path, 3.0).drive(search)
    assert not any(trial.status is Status.COMPLETED for trial in search.trials.values())
    judged = {(one.task.id, one.rung) for one in done[:-1]}
    assert max(rung for _, rung in judged) == 1
    kept = done[-1]
    assert (kept.keep, kept.rung) == (True, 1)
    best = max((search.trials[trial].value or 0.0, trial) for trial, rung in judged if rung == 1)[1]
    assert kept.task.id == best
    # The log has the row a second time, but no second rung. A resumed search therefore starts from the same state.
    log = RunLog(tmp_path / "trials.jsonl").read()
    assert len([event for event in log if event["event"] == "rung"]) == len(judged)
    again = campaign(tmp_path, slow_question(baselines=False))
    again.replay(read_events(log))
    assert (again.trials[kept.task.id].rung, again.trials[kept.task.id].kept) == (1, True)
    done = Slow(monkeypatch, tmp_path, 1.0).drive(again)
    assert not any(one.keep for one in done)
    assert any(trial.status is Status.COMPLETED for trial in again.trials.values())


def test_where_one_cannot_be_kept_the_next_best_is(tmp_path: Path) -> None:
    search = campaign(tmp_path, slow_question(baselines=False), deadline=time.monotonic() + 1000)
    answer = keeping(tmp_path)
    kept = []
    while (assignment := search.next()) is not None:
        if assignment.keep:
            kept.append(assignment.task.id)
            if len(kept) <= 2:
                search.fail(assignment, "worker-died", "it ended")
                continue
        search.report(assignment, answer(assignment))
        if len(search.trials) == 2:
            search.time_budget.close()
    values = {trial.task.id: trial.value or 0.0 for trial in search.trials.values()}
    # A worker's death may not be the student's fault, so the student is tried once more.
    best, next_best = sorted(values, key=lambda trial: -values[trial])
    assert kept == [best, best, next_best]
    assert search.trials[kept[0]].status is None, "what it was judged by stands"
    assert search.finished


def test_a_baseline_that_the_box_ended_before_is_judged_where_it_got_to(tmp_path: Path) -> None:
    search = campaign(tmp_path, slow_question(), deadline=time.monotonic() + 1000)
    first = search.next()
    assert first is not None
    assert (first.task.id, first.task.straight) == ("b000", True)
    # It left checkpoints at the points where the decays of two rungs branch off.
    store = open_stages(tmp_path / "checkpoints")
    for tokens in PLAN.rungs[:2]:
        point = branch_point(tokens, PLAN.decay, PLAN.batch_tokens)
        store.save(first.task.stage, point, lambda path: path.write_bytes(b"x" * 100) and None)
    search.abandon(first)
    kept = search.next()
    assert kept is not None
    assert (kept.task.id, kept.rung, kept.keep) == ("b000", 1, True)
    search.report(kept, worker(kept))
    assert search.next() is None
    search.close()
    (row,) = RunLog(tmp_path / "trials.jsonl").rows()
    assert (row.kind, row.train_tokens, row.full) == ("baseline", 3072, False)
    # A longer search goes on from the later checkpoint.
    (left,) = store.checkpoints()
    assert left.tokens == branch_point(PLAN.rungs[1], PLAN.decay, PLAN.batch_tokens)


def test_without_a_checkpoint_nothing_is_kept(tmp_path: Path) -> None:
    search = campaign(tmp_path, slow_question(baselines=False), deadline=time.monotonic() + 100)
    assignment = search.next()
    assert assignment is not None
    search.abandon(assignment)
    assert search.next() is None
    assert search.finished


def test_a_second_baseline_begins_where_the_box_still_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = slow_question()
    (strategy,) = asked.space.baselines.values()
    other = replace(strategy, init=replace(strategy.init, depth=0.5))
    asked = replace(asked, space=replace(asked.space, baselines={"one": strategy, "other": other}))
    search = campaign(tmp_path, asked, deadline=250.0)
    done = Slow(monkeypatch, tmp_path, 2.0).drive(search)
    assert [one.task.id for one in done if one.task.straight] == ["b000"]
    assert search.untrained_baselines() == ["other"]


def test_trained_students_are_evaluated_under_every_deployment_the_best_first(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    later = []
    while (assignment := search.next()) is not None:
        if assignment.deployment is not None:
            later.append((assignment.task.id, assignment.deployment.name))
        search.report(assignment, worker(assignment))
    trained = sorted(trial for trial, state in search.trials.items() if state.status is Status.COMPLETED)
    rows = RunLog(tmp_path / "trials.jsonl").rows()
    for trial in trained:
        names = {deployment.name for deployment in search.trials[trial].task.deployments}
        assert len(names) > 3
        assert {row.deployment_name for row in rows if row.trial == trial and row.full} == names
        assert sum(one == trial for one, _ in later) == len(names) - 1  # the probe's row already existed
    values = {trial: search.trials[trial].value or 0.0 for trial in trained}
    order = list(dict.fromkeys(trial for trial, _ in later))
    # The last two ended when nothing was left to train. Of these, the better one is evaluated first.
    assert order[-2:] == sorted(order[-2:], key=lambda trial: -values[trial])


def test_an_evaluation_that_fails_leaves_the_trained_student_standing(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    failed = None
    while (assignment := search.next()) is not None:
        if assignment.deployment is not None and failed in (None, assignment):
            failed = assignment
            search.fail(assignment, "worker-died", "gone")
        else:
            search.report(assignment, worker(assignment))
    assert failed is not None
    assert failed.deployment is not None
    assert search.trials[failed.task.id].status is Status.COMPLETED
    again = campaign(tmp_path, question())
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert again.next() is None  # it is not retried for ever
    rows = RunLog(tmp_path / "trials.jsonl").rows()
    held = {row.deployment_name for row in rows if row.trial == failed.task.id}
    assert {deployment.name for deployment in failed.task.deployments} - held == {failed.deployment.name}


def test_an_evaluation_that_succeeded_on_its_second_try_is_not_done_again(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    failed = False
    while (assignment := search.next()) is not None:
        if assignment.deployment is not None and not failed:
            failed = True
            search.fail(assignment, "worker-died", "gone")
        else:
            search.report(assignment, worker(assignment))
    assert failed
    again = campaign(tmp_path, question())
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert {name: trial.settled for name, trial in again.trials.items()} == {
        name: trial.settled for name, trial in search.trials.items()
    }
    assert again.next() is None


def test_an_evaluation_given_back_is_done_when_the_search_goes_on(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    while (assignment := search.next()) is not None:
        if assignment.deployment is not None:
            search.abandon(assignment)
            break
        search.report(assignment, worker(assignment))
    assert assignment is not None
    assert search.next() is None
    again = campaign(tmp_path, question())
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    drive(again)
    rows = RunLog(tmp_path / "trials.jsonl").rows()
    names = {row.deployment_name for row in rows if row.trial == assignment.task.id}
    assert names == {deployment.name for deployment in assignment.task.deployments}


def test_a_finishing_is_also_evaluated_on_its_own_grid(tmp_path: Path) -> None:
    """The space lists no deployment of this grid. A grid that the teacher cannot be cut into is rejected."""
    own = Finishing(format="compressed-tensors", bits=2, group_size=0, symmetric=False, keep=("attention",))
    impossible = Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False, keep=("layers.77",))
    space = replace(
        declared(),
        dimensions=(),
        starts={},
        baselines={name: Strategy(finishing=finishing) for name, finishing in (("own", own), ("not", impossible))},
    )
    asked = replace(question(10**10), space=space)
    running = campaign(tmp_path, asked)
    running.next()
    trials = {trial.name: trial for trial in running.trials.values()}
    task = trials["own"].task
    assert task.deployments[:-1] == asked.deployments
    assert task.probe == task.deployments[-1]
    assert task.probe == Deployment(
        runtime="transformers",
        format="compressed-tensors",
        bits=2,
        group_size=0,
        symmetric=False,
        keep=("attention",),
    )
    running.next()
    rejected = next(trial for trial in running.trials.values() if trial.name == "not")
    assert rejected.status is Status.REJECTED
    assert "keep names layers.77" in str(rejected.reason)
    assert rejected.miss is None


def test_the_best_few_and_the_baseline_are_trained_on_further_seeds_before_one_is_chosen(tmp_path: Path) -> None:
    asked = replace(question(), plan=replace(PLAN, keep=(6, 4)), confirm=2)
    search = campaign(tmp_path, asked)
    done = drive(search)
    again = [(trial, rung) for trial, rung in done if "s" in trial]
    assert done[-len(again) :] == again  # they come after everything else
    ended = {trial: state for trial, state in search.trials.items() if state.status is Status.COMPLETED}
    students = sorted((t for t in ended if ended[t].kind == "student"), key=lambda t: -(ended[t].value or 0))
    assert len(students) == 4
    expected = {(f"{trial}s{seed}", 2) for trial in (*students[:3], "b000") for seed in (1, 2)}
    assert set(again) == expected
    assert {search.trials[trial].task.seed for trial, _ in again} == {1, 2}
    rows = RunLog(tmp_path / "trials.jsonl").rows()
    assert {row.kind for row in rows if "s" in row.trial} == {"confirmation"}
    resumed = campaign(tmp_path, asked)
    resumed.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert resumed.next() is None


def test_confirmations_go_on_after_a_kill(tmp_path: Path) -> None:
    asked = replace(question(), confirm=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cut.mkdir()
    drive(campaign(whole, asked))
    events = RunLog(whole / "trials.jsonl").read()
    begun = next(index for index, event in enumerate(events) if event["event"] == "trial" and "s" in event["trial"])
    for event in events[: begun + 1]:
        RunLog(cut / "trials.jsonl").append(event)
    again = campaign(cut, asked)
    again.replay(RunLog(cut / "trials.jsonl").all())
    drive(again)
    rows, expected = (
        {row.row_id: replace(row, train_seconds=None) for row in RunLog(path / "trials.jsonl").rows()}
        for path in (cut, whole)
    )
    assert rows == expected


@pytest.mark.parametrize("cause", ["worker-died", "disk-full", "error"])
@pytest.mark.parametrize("rung", [0, 1, 2])
def test_what_another_worker_may_do_better_is_tried_once_more(tmp_path: Path, cause: str, rung: int) -> None:
    search = campaign(tmp_path, question())
    failures = 0
    done = []
    while (assignment := search.next()) is not None:
        if assignment.deployment is None and assignment.rung == rung and assignment.task.id != "b000" and not failures:
            failures, failed = 1, assignment
            search.fail(assignment, cause, "gone")
        else:
            done.append(assignment)
            search.report(assignment, worker(assignment))
    search.close()
    assert failed in done
    assert search.trials[failed.task.id].status is not Status.FAILED
    (event,) = (event for event in RunLog(tmp_path / "trials.jsonl").read() if event["event"] == "retry")
    assert (event["trial"], event["rung"], event["cause"], event["reason"]) == (failed.task.id, rung, cause, "gone")


def test_a_second_failure_is_recorded_however_often_the_search_was_resumed(tmp_path: Path) -> None:
    """Each failure meets another driver, which knows the first failure only from the log."""
    causes = []
    for _ in range(60):
        search = campaign(tmp_path, question())
        search.replay(RunLog(tmp_path / "trials.jsonl").all())
        assignment = search.next()
        if assignment is None:
            break
        if assignment.task.id == "t002":
            causes.append("worker-died")
            search.fail(assignment, "worker-died", "gone")
        else:
            search.report(assignment, worker(assignment))
    assert causes == ["worker-died"] * 2
    assert search.trials["t002"].status is Status.FAILED
    assert (search.trials["t002"].reason, search.trials["t002"].cause) == ("worker-died: gone", "worker-died")
    assert sum(trial.status is Status.COMPLETED for trial in search.trials.values()) == 3


@pytest.mark.parametrize("cause", ["nan", "out-of-memory", "refused"])
def test_what_would_come_again_is_not_tried_again(tmp_path: Path, cause: str) -> None:
    search = campaign(tmp_path, question())
    seen = []
    while (assignment := search.next()) is not None:
        if assignment.task.id == "t001":
            seen.append(assignment.rung)
            search.fail(assignment, cause, "so")
        else:
            search.report(assignment, worker(assignment))
    assert seen == [0]
    assert search.trials["t001"].status is Status.FAILED


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
def test_a_trial_goes_on_with_as_many_sequences_at_once_as_its_memory_held(tmp_path: Path, resumed: bool) -> None:
    asked = replace(question(), plan=replace(PLAN, micro_batch=4))
    step = StepRecord(**dict.fromkeys((field.name for field in fields(StepRecord)), 0))  # type: ignore[arg-type]
    given: dict[str, list[int | None]] = {}

    def tight(assignment: Assignment) -> RungReport:
        """Report that the best trial ran out of memory in its first rung."""
        if assignment.deployment is None:
            given.setdefault(assignment.task.id, []).append(assignment.task.micro_batch)
        held = 2 if assignment.task.id == "t005" else 4
        return replace(worker(assignment), steps=tuple(replace(step, micro_batch=most) for most in (4, held)))

    search = campaign(tmp_path, asked)
    while (assignment := search.next()) is not None:
        search.report(assignment, tight(assignment))
        if resumed:
            search = campaign(tmp_path, asked)
            search.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert given.pop("t005") == [None, 2, 2]
    assert {most for each in given.values() for most in each} == {None}


def test_out_of_memory_is_told_to_the_sampler_as_a_limit_that_was_broken(tmp_path: Path) -> None:
    class Listening(Sampler):
        """Keeps the observations that it got last."""

        told: Sequence[Observation] = ()

        def propose(self, number: int, observations: Sequence[Observation] = ()) -> Point | None:
            """Propose as any sampler does."""
            self.told = observations
            return super().propose(number, observations)

    asked = question()
    sampler = Listening(asked.space)
    folder = tmp_path
    search = Campaign(asked, sampler=sampler, log=RunLog(folder / "trials.jsonl"), checkpoints=folder)
    causes = {"t001": "out-of-memory", "t002": "nan"}
    while (assignment := search.next()) is not None:
        if assignment.task.id in causes:
            search.fail(assignment, causes[assignment.task.id], "so")
        else:
            search.report(assignment, worker(assignment))
    points = {trial: dict(search.trials[trial].point or {}) for trial in causes}
    by_point = {json.dumps(dict(item.point)): item for item in sampler.told}
    exceeding, broken = (by_point[json.dumps(points[trial])] for trial in causes)
    assert exceeding.state == broken.state == Status.FAILED
    assert (exceeding.constraint or 0) > 0
    assert (broken.constraint or 0) <= 0
    again = campaign(folder, asked)
    again.replay(RunLog(folder / "trials.jsonl").all())
    assert again.trials["t001"].cause == "out-of-memory"


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_missing_or_endless_value_is_never_promoted_nor_the_best(
    tmp_path: Path, direction: Direction, missing: float | None
) -> None:
    """This holds for both directions. t004 has no finite value at any rung."""
    metric = {"max": "accuracy", "min": "perplexity"}[direction]

    def half_blind(assignment: Assignment) -> RungReport:
        report = worker(assignment)
        found = dict(report.evaluation.measurements)
        value = found["accuracy"].value if direction == "max" else 10 - found["accuracy"].value
        found[metric] = Measurement(name=metric, value=value, unit="", direction=direction, source="simulated")
        if assignment.task.id == "t004" and missing is None:
            del found[metric]
        elif assignment.task.id == "t004":
            found[metric] = replace(found[metric], value=float(missing or 0.0))
        return replace(report, evaluation=replace(report.evaluation, measurements=found))

    search = campaign(tmp_path, replace(question(), metric=metric, direction=direction))
    done = drive(search, half_blind)
    assert [rung for trial, rung in done if trial == "t004"] == [0]
    assert len({trial for trial, rung in done if rung == 2}) == 3
    rows = RunLog(tmp_path / "trials.jsonl").rows()
    assert rank(rows, metric, direction)[0].row.trial != "t004"
    again = campaign(tmp_path, replace(question(), metric=metric, direction=direction))
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert again.next() is None


def test_a_row_of_unknown_memory_does_not_fit(tmp_path: Path) -> None:
    def weightless(assignment: Assignment) -> RungReport:
        report = worker(assignment)
        found = dict(report.evaluation.measurements)
        if assignment.task.id == "t003":
            del found["memory_bytes"]
        elif assignment.task.id == "t004":
            found["memory_bytes"] = replace(found["memory_bytes"], value=math.nan)
        return replace(report, evaluation=replace(report.evaluation, measurements=found))

    search = campaign(tmp_path, question())
    done = drive(search, weightless)
    assert {trial for trial, rung in done if rung > 0} & {"t003", "t004"} == set()
    rows = {row.trial: row for row in RunLog(tmp_path / "trials.jsonl").rows()}
    for trial in ("t003", "t004"):
        assert not rows[trial].feasible
        assert rows[trial].reason == "memory: it was not measured"


@pytest.mark.parametrize("further", [("memory",), ("memory", "latency"), ("perplexity", "size")])
def test_several_objectives_survive_a_kill_after_any_event(tmp_path: Path, further: tuple[str, ...]) -> None:
    asked = replace(
        question(),
        further=tuple(OBJECTIVES[name] for name in further),
        served_on=find_device("pi 5", devices()) if "latency" in further else None,
    )

    def rich(assignment: Assignment) -> RungReport:
        """Report memory, perplexity and size that vary independently of each other."""
        report, number = worker(assignment), int(assignment.task.id[1:4])
        more = {
            "memory_bytes": 1e6 * (1 + number % 4),
            "perplexity": 10.0 + number % 3,
            "size_bytes": 1e5 * (9 - number),
        }
        found = report.evaluation.measurements | {
            name: Measurement(name=name, value=value, unit="", direction="min", source="simulated")
            for name, value in more.items()
        }
        return replace(report, evaluation=replace(report.evaluation, measurements=found))

    def made(folder: Path) -> Campaign:
        folder.mkdir(exist_ok=True)
        sampler = Sampler(asked.space, further=asked.further)
        return Campaign(asked, sampler=sampler, log=RunLog(folder / "trials.jsonl"), checkpoints=folder)

    whole = tmp_path / "whole"
    done = drive(made(whole), rich)
    assert len({trial for trial, rung in done if rung == 1}) == 4
    events = RunLog(whole / "trials.jsonl").read()
    expected = {row.row_id: replace(row, train_seconds=None) for row in RunLog(whole / "trials.jsonl").rows()}
    for kept in range(3, len(events), 34):
        cut = tmp_path / f"cut{kept}"
        cut.mkdir()
        for event in events[:kept]:
            RunLog(cut / "trials.jsonl").append(event)
        again = made(cut)
        again.replay(RunLog(cut / "trials.jsonl").all())
        drive(again, rich)
        rows = RunLog(cut / "trials.jsonl").rows()
        assert {row.row_id: replace(row, train_seconds=None) for row in rows} == expected


def test_a_log_that_cannot_be_written_ends_the_search_and_what_it_held_is_kept(tmp_path: Path) -> None:
    """`/dev/full` answers a write like a full disk."""
    log = tmp_path / "trials.jsonl"
    search = campaign(tmp_path, question())
    for _ in range(4):
        assignment = search.next()
        assert assignment is not None
        search.report(assignment, worker(assignment))
    before = log.read_bytes()
    assignment = search.next()
    assert assignment is not None
    kept = log.rename(tmp_path / "kept")
    log.symlink_to("/dev/full")
    with pytest.raises(AutoDistillError, match=r"No space left on device; what it held is kept.*--resume"):
        search.report(assignment, worker(assignment))
    assert search.next() is None
    assert search.broken is not None
    log.unlink()
    kept.rename(log)
    assert log.read_bytes() == before
    again = campaign(tmp_path, question())
    again.replay(RunLog(log).all())
    assert again.next() == assignment


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in RunLog(folder / "trials.jsonl").read() if event["event"] in kinds]


def sharing() -> Question:
    """Return a search whose first two proposals differ only in their finishing."""
    asked = question()
    plain = replace(asked.space.starts["narrow"], finishing=None)
    grid = Finishing(format="gguf-q8_0", bits=8, group_size=32)
    starts = {"plain": plain, "on_a_grid": replace(plain, finishing=grid)}
    return replace(asked, space=replace(asked.space, starts=starts))


def test_a_trial_that_shares_a_stage_trains_its_decays_alone(tmp_path: Path) -> None:
    search = campaign(tmp_path, sharing())
    drive(search, keeping(tmp_path))
    assert search.trials["t001"].task.stage == search.trials["t000"].task.stage
    first = next(event for event in events(tmp_path, "rung") if event["trial"] == "t001")
    assert (first["shared"], first["trained"]) == (768, 1024 - 768)
    assert len({state.task.strategy.id for state in search.trials.values()}) == len(search.trials)
    total = saved(RunLog(tmp_path / "trials.jsonl").all(), PLAN)
    assert total.shared_tokens == sum(event["shared"] for event in events(tmp_path, "rung"))
    assert total.sharing >= 1


def test_without_sharing_every_stage_is_a_trials_own(tmp_path: Path) -> None:
    search = campaign(tmp_path, replace(sharing(), sharing=False))
    drive(search)
    assert {state.task.stage for state in search.trials.values()} == {""}


def test_a_strategy_of_its_own_has_a_stage_where_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The further training starts where the trial's decay branched off, and uses all the time that is left."""
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    asked = resting()
    alone = replace(
        asked,
        space=replace(asked.space, dimensions=(), starts={}, baselines={"own": asked.space.starts["narrow"]}),
        plan=replace(asked.plan, trials=0, keep=(0,) * len(asked.plan.keep)),
    )
    search = campaign(tmp_path, alone, deadline=700.0)
    done = clock.drive(search)
    assert [one.task.id for one in done] == ["b000", "b000x", "b000xx"]
    assert len({one.task.stage for one in done}) == 1
    assert done[0].task.stage
    # If nothing is trained on, no other trial would start from this stage.
    fixed = replace(alone, plan=replace(alone.plan, longest=1.0))
    other = campaign(tmp_path / "fixed", fixed)
    other.next()
    assert other.trials["b000"].task.stage == ""


def test_a_limit_is_held_and_the_end_keeps_the_best_few(tmp_path: Path) -> None:
    search = campaign(tmp_path, question(), limit=600)
    most = 0

    def answer(assignment: Assignment) -> RungReport:
        nonlocal most
        most = max(most, len(open_stages(tmp_path / "checkpoints").checkpoints()))
        return keeping(tmp_path)(assignment)

    drive(search, answer)
    # Each of the best few has up to three checkpoints. Each trial that may be promoted has one.
    assert most <= 3 * 3 + 4 + 1
    held = open_stages(tmp_path / "checkpoints").checkpoints()
    valued = [state for state in search.trials.values() if state.value is not None]
    # Two trials that differ only in their finishing share a stage.
    best = dict.fromkeys(state.task.stage for state in sorted(valued, key=lambda state: -(state.value or 0.0)))
    assert {checkpoint.stage for checkpoint in held} == set(list(best)[:3])
    collected = events(tmp_path, "collected")
    assert sum(event["bytes"] for event in collected) == 100 * sum(len(event["checkpoints"]) for event in collected)


@pytest.mark.parametrize("kept", thinned(range(3, 60, 14)))
def test_shared_stages_and_collections_are_the_same_after_a_kill(tmp_path: Path, kept: int) -> None:
    """The search is cut off after any event, with the disk as it was then."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cut.mkdir()
    search = campaign(whole, sharing(), limit=500)
    log = RunLog(whole / "trials.jsonl")
    answer = keeping(whole)
    while (assignment := search.next()) is not None:
        search.report(assignment, answer(assignment))
        if not (cut / "checkpoints").exists() and len(log.read()) >= kept:
            (cut / "trials.jsonl").write_bytes(log.path.read_bytes())
            shutil.copytree(whole / "checkpoints", cut / "checkpoints")
    search.close()
    again = campaign(cut, sharing(), limit=500)
    again.replay(RunLog(cut / "trials.jsonl").all())
    drive(again, keeping(cut))
    kinds = ("trial", "rung", "collected", "status", "row")
    assert [without_times(event) for event in events(cut, *kinds)] == [
        without_times(event) for event in events(whole, *kinds)
    ]
    held, expected = (open_stages(path / "checkpoints").checkpoints() for path in (cut, whole))
    assert held == expected


def test_what_a_kill_left_of_a_rung_is_collected_before_anything_is_proposed(tmp_path: Path) -> None:
    """The log has the rung, but not yet the removals that follow it, as if a kill fell between the two events."""
    whole = tmp_path / "whole"
    search, log, answer = campaign(whole, sharing(), limit=500), RunLog(whole / "trials.jsonl"), keeping(whole)
    cuts = 0
    while (assignment := search.next()) is not None:
        # A segment leaves its files on the disk before it is reported.
        before, report = len(log.read()), answer(assignment)
        cut = tmp_path / f"cut{before}"
        shutil.copytree(whole, cut)
        search.report(assignment, report)
        added = log.read()[before:]
        if added[-1]["event"] != "collected":
            shutil.rmtree(cut)
            continue
        for event in added[:-1]:
            RunLog(cut / "trials.jsonl").append(event)
        cuts += 1
    search.close()
    assert cuts > 2
    for cut in tmp_path.glob("cut*"):
        again = campaign(cut, sharing(), limit=500)
        again.replay(RunLog(cut / "trials.jsonl").all())
        drive(again, keeping(cut))
        kinds = ("trial", "rung", "collected", "status", "row")
        assert [without_times(event) for event in events(cut, *kinds)] == [
            without_times(event) for event in events(whole, *kinds)
        ]


def without_times(event: dict[str, Any]) -> dict[str, Any]:
    row = event.get("row")
    return {**event, "time": None, "row": row and {**row, "train_seconds": None}}


def test_a_checkpoint_that_could_not_be_written_is_recorded(tmp_path: Path) -> None:
    def full(assignment: Assignment) -> RungReport:
        return replace(worker(assignment), unsaved="the disk is full")

    said: list[str] = []
    search = campaign(tmp_path, question(), notify=said.append)
    drive(search, full)
    assert {event["unsaved"] for event in events(tmp_path, "rung")} == {"the disk is full"}
    assert "b000: the disk is full" in said


def test_two_workers_do_not_train_one_stage_at_once(tmp_path: Path) -> None:
    """While one worker takes a stage to a rung, no other worker is given the same segment."""
    search = campaign(tmp_path, question())
    answer = keeping(tmp_path)
    under_way: list[Assignment] = []
    while True:
        while len(under_way) < 3 and (assignment := search.next()) is not None:
            same = [other for other in under_way if other.task.stage == assignment.task.stage]
            if assignment.deployment is None and assignment.rung > 0:
                # A trial that has passed this rung has left its checkpoint there.
                reached = [(search.trials[one.task.id].rung, one.rung) for one in same if one.deployment is None]
                assert not [one for one in reached if one[0] < assignment.rung <= one[1]]
            under_way.append(assignment)
        if not under_way:
            break
        done = under_way.pop(0)
        search.report(done, answer(done))
    assert search.finished


def test_the_best_few_and_the_baseline_are_trained_on_where_the_space_asks_for_it(tmp_path: Path) -> None:
    asked = replace(question(), plan=replace(PLAN, keep=(6, 4), lengths=(1.0, 1.5, 2.0)), confirm=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    search = campaign(whole, asked)
    drive(search)
    longer = {trial: state for trial, state in search.trials.items() if state.task.length > 1}
    plain = [state for state in search.trials.values() if state.status is Status.COMPLETED and state.task.length == 1]
    own = [state for state in plain if state.kind == "student"]
    best = sorted(own, key=lambda state: (-(state.value or 0.0), state.task.id))[:3]
    names = [state.task.id for state in best] + ["b000"]
    assert [trial for trial in longer if "s" not in trial] == [f"{name}x{x}" for x in ("1.5", "2") for name in names]
    for trial, state in longer.items():
        parent = search.trials[trial.partition("x")[0]]
        assert state.task.strategy == parent.task.strategy
        assert state.task.straight
        assert state.task.stage == ("" if "s" in trial else parent.task.stage)
        assert state.point is None  # a result with more tokens is not a result of the point at the plan's tokens
    rows = {row.trial: row for row in RunLog(whole / "trials.jsonl").rows()}
    assert (rows["b000x2"].train_tokens, rows["b000x2"].fidelity, rows["b000x2"].kind) == (18432, 2.0, "baseline")
    assert (rows["b000"].train_tokens, rows["b000"].fidelity) == (9216, 1.0)
    # If it is cut off after the first of them began, the search goes on to the same trials.
    cut.mkdir()
    log = RunLog(whole / "trials.jsonl").read()
    begun = next(index for index, event in enumerate(log) if event["event"] == "trial" and event["length"] > 1)
    for event in log[: begun + 1]:
        RunLog(cut / "trials.jsonl").append(event)
    again = campaign(cut, asked)
    again.replay(RunLog(cut / "trials.jsonl").all())
    drive(again)
    assert list(again.trials) == list(search.trials)
    left, expected = ({row.row_id for row in RunLog(path / "trials.jsonl").rows()} for path in (cut, whole))
    assert left == expected


def test_without_lengths_nothing_is_trained_beyond_the_plan(tmp_path: Path) -> None:
    search = campaign(tmp_path, question())
    drive(search)
    assert {state.task.length for state in search.trials.values()} == {1.0}
    assert max(row.fidelity or 0.0 for row in RunLog(tmp_path / "trials.jsonl").rows()) == 1.0


def resting(alone: int = 2, workers: int = 2) -> Question:
    """Return a question at 100 tokens a second. Half of its time, at most 300 s, trains the best on, up to fourfold."""
    asked = slow_question()
    plan = replace(PLAN, longest=4.0, alone=alone, workers=workers, seconds={**PLAN.seconds, "longer": 300.0})
    return replace(asked, plan=plan, explore=0.5)


def lasting(clock: Slow, folder: Path) -> Worker:
    """Return a worker that trains on in whole steps until its time ends, and reports a better value."""
    answer = keeping(folder)

    def work(assignment: Assignment) -> RungReport:
        task = assignment.task
        if assignment.until is not None:
            found = open_stages(folder / "checkpoints").find(task.stage, PLAN.tokens_of(task.length))
            trained = int((assignment.until.at - clock.now) / clock.slowness * 100 / 1.1) // 256 * 256
            tokens = min((found[1].tokens if found else 0) + trained, PLAN.tokens_of(task.length))
            assignment = replace(assignment, task=replace(task, length=tokens / PLAN.tokens))
        report = answer(assignment)
        if task.length > 1:
            report = replace(report, evaluation=measured(assignment.deployment or task.probe, 0.4))
        return report

    return work


def test_the_best_is_trained_on_alone_for_what_the_box_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    search = campaign(tmp_path, resting(), deadline=700.0)
    done = clock.drive(search)
    longer = [one for one in done if one.task.length > 1]
    plain = [state for state in search.trials.values() if state.task.length == 1]
    best = max(plain, key=lambda state: (state.rung, state.value or 0.0))
    branch, first = longer
    assert done[-len(longer) :] == longer
    assert [one.task.id for one in longer] == [f"{best.task.id}x", f"{best.task.id}xx"]
    for one in longer:
        assert (one.task.strategy, one.task.stage, one.threads) == (best.task.strategy, best.task.stage, 2)
    assert all(one.threads == 0 for one in done if one.task.length == 1)
    # A decay branches off half-way. At a quarter, the student is not worth its time. Both are decided before training.
    (decided,) = events(tmp_path, "trunk")
    (half,) = decided["branches"]
    assert (decided["trial"], half["share"], half["kept"]) == (best.task.id, 0.5, True)
    assert half["cost"] < 0.08
    assert (branch.task.decay, first.task.decay) == (0.08, None)
    assert PLAN.tokens_of(branch.task.length) == half["tokens"]
    assert branch_point(half["tokens"], 0.08, 256) == pytest.approx(decided["tokens"] / 2, abs=128)
    written = [event for event in RunLog(tmp_path / "trials.jsonl").read() if event["event"] in ("trunk", "trial")]
    assert [event["event"] for event in written[-3:]] == ["trunk", "trial", "trial"]
    assert [row.train_tokens for row in search.log.rows() if row.trial == branch.task.id] == [half["tokens"]]
    # Its length is what it reached, and its rows have that many tokens. It is no result at the plan's tokens.
    trial = search.trials[first.task.id]
    rows = [row for row in RunLog(tmp_path / "trials.jsonl").rows() if row.trial == first.task.id]
    assert 2.0 < trial.task.length < 4.0
    assert {row.train_tokens for row in rows} == {round(trial.task.length * PLAN.tokens)}
    assert len(rows) == len(trial.task.deployments), "time was left for each of them"
    assert trial.point is None
    assert clock.now <= 700.0
    again = campaign(tmp_path, resting())
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert again.trials[first.task.id].task == trial.task
    assert list(again._agenda._further_training.trunks) == [best.task.id]


def test_what_trains_alone_waits_for_evaluations_and_no_more_are_given_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    search = campaign(tmp_path, resting(), deadline=700.0)
    training: list[Assignment] = []
    evaluation = None
    while evaluation is None:
        assignment = search.next()
        if assignment is not None and assignment.deployment is not None:
            evaluation = assignment
        elif assignment is not None:
            training.append(assignment)
        # Two train at a time, as with two workers.
        if len(training) == 2 or (assignment is None and training):
            clock.now += 10.0
            first = training.pop(0)
            search.report(first, replace(clock.answer(first), seconds={"train": 10.0, "evaluate": 0.0, "other": 0.0}))
    assert training, "the last trial trains beside it"
    while training:
        first = training.pop()
        search.report(first, clock.answer(first))
        assignment = search.next()
        if assignment is not None:
            assert assignment.deployment is None
            assert assignment.task.length == 1
            training.append(assignment)
    assert search.next() is None
    assert not search.finished
    search.report(evaluation, clock.answer(evaluation))
    longer = search.next()
    assert longer is not None
    assert (longer.threads, longer.task.length > 1) == (2, True)


@pytest.mark.parametrize("better", [True, False])
def test_a_finished_search_that_goes_on_without_a_box_trains_on_its_best_alone_and_as_far_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    first = campaign(tmp_path, resting(), deadline=700.0)
    clock.drive(first)
    _, before = [state.task for state in first.trials.values() if state.task.length > 1]

    def answer(assignment: Assignment) -> RungReport:
        found = lasting(clock, tmp_path)(assignment)
        if assignment.task.id != "t011" or not better:
            return found
        return replace(found, evaluation=measured(assignment.deployment or assignment.task.probe, 0.35))

    clock.answer = answer
    asked = resting()
    again = campaign(tmp_path, replace(asked, plan=extend(asked.plan, 14)))
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    done = clock.drive(again)
    assert {"t009", "t010", "t011", "t012", "t013"} <= {one.task.id for one in done}
    longer = [one.task for one in done if one.task.length > 1]
    assert [task.id for task in longer] == (["t011x"] if better else [])
    assert all(task.length == before.length for task in longer)


@pytest.mark.parametrize(("slowness", "least"), [(1.5, 2.0), (2.0, 1.25), (3.0, None)])
def test_on_a_slower_machine_a_student_reaches_the_end_and_has_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowness: float, least: float | None
) -> None:
    clock = Slow(monkeypatch, tmp_path, slowness)
    clock.answer = lasting(clock, tmp_path)
    search = campaign(tmp_path, resting(), deadline=900.0)
    done = clock.drive(search)
    whole = [state for state in search.trials.values() if state.status is Status.COMPLETED]
    assert any(state.kind == "student" for state in whole)
    longer = [state for state in whole if state.task.length > 1]
    assert [state.kind for state in longer] == ["student"] * len(longer)
    if least is not None:
        assert max(state.task.length for state in longer) > least
    assert sum(one.rung == 0 for one in done) < 9
    assert clock.now <= 900.0


def test_beside_a_trial_that_has_all_threads_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for alone, count in ((2, 1), (0, 3)):
        folder = tmp_path / str(alone)
        clock = Slow(monkeypatch, folder, 1.0)
        search = campaign(folder, resting(alone, workers=4), deadline=900.0)
        answer = keeping(folder)
        while (assignment := search.next()) is not None and assignment.task.length == 1:
            search.report(assignment, answer(assignment))
        begun = [assignment]
        while len(begun) < 4 and (assignment := search.next()) is not None:
            begun.append(assignment)
        trained = [one for one in begun if one is not None and one.task.length > 1]
        assert len(trained) == count
        # With alone=0, the next best trials train at the same time, but never two of one stage.
        assert len({one.task.stage for one in trained}) == count
        assert clock.now == 0


def until_the_best(search: Campaign, answer: Worker) -> Assignment:
    """Run a search up to the point where the best is to be trained on, and return that assignment."""
    while (assignment := search.next()) is not None and assignment.task.length == 1:
        search.report(assignment, answer(assignment))
    assert assignment is not None
    return assignment


def test_what_was_being_trained_on_goes_on_for_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    search = campaign(tmp_path, resting(), deadline=900.0)
    killed = until_the_best(search, clock.answer)
    clock.now, log = 0.0, RunLog(tmp_path / "trials.jsonl").all()

    def resumed(deadline: float) -> Assignment | None:
        folder = tmp_path / f"{deadline:g}"
        shutil.copytree(tmp_path / "checkpoints", folder / "checkpoints")
        again = campaign(folder, resting(), deadline=deadline)
        again.replay(log)
        while (found := again.next()) is not None and found.deployment is not None:
            again.report(found, worker(found))
        assert found is not None or again.finished
        return found

    found = resumed(200.0)
    assert found is not None
    assert (found.task.id, found.threads, found.task.stage) == (killed.task.id, 2, killed.task.stage)
    assert found.until is not None
    assert found.until.at < 200.0
    assert resumed(30.0) is None
    # It had a checkpoint after 2.5 times the plan's tokens. Its decay adds a quarter as many tokens, in 64 s. Training
    # from the plan's end would not get that far in 64 s.
    far = 256 * 90
    open_stages(tmp_path / "checkpoints").save(killed.task.stage, far, lambda path: path.write_bytes(b"x") and None)
    found = resumed(70.0)
    assert found is not None
    assert branch_point(PLAN.tokens_of(found.task.length), PLAN.decay, PLAN.batch_tokens) >= far
    # With less time than the decay needs, the search does not go on from that checkpoint.
    found = resumed(60.0)
    assert found is not None
    assert branch_point(PLAN.tokens_of(found.task.length), PLAN.decay, PLAN.batch_tokens) < far


def test_where_the_end_of_the_box_interrupts_the_best_it_stands_as_it_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    search = campaign(tmp_path, resting(), deadline=900.0)
    assignment = until_the_best(search, clock.answer)
    search.abandon(assignment)
    assert search.next() is None
    assert search.finished
    search.close()
    assert search.trials[assignment.task.id].status is Status.STOPPED
    assert search.trials[assignment.task.id.removesuffix("x")].status is Status.COMPLETED


def test_what_fails_while_it_is_trained_on_leaves_the_box_to_the_next_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    search = campaign(tmp_path, resting(), deadline=900.0)
    first = until_the_best(search, clock.answer)
    search.fail(first, "nan", "not finite")
    second = search.next()
    assert second is not None
    assert second.task.length > 1
    assert second.task.id != first.task.id
    search.report(second, clock.answer(second))
    clock.drive(search)
    assert search.trials[first.task.id].status is Status.FAILED


def test_of_one_stage_one_trial_is_trained_on_at_once_and_others_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the trials have the same training and differ only in their grids; a third trial is trained otherwise."""
    clock = Slow(monkeypatch, tmp_path, 1.0)
    search = campaign(tmp_path, resting(alone=0, workers=4), deadline=900.0)
    first = until_the_best(search, clock.answer)
    whole = [state for state in search.trials.values() if state.status is Status.COMPLETED and state.task.length == 1]
    others = [state for state in whole if state.task.id != first.task.id.removesuffix("x")]
    second = max(others, key=lambda state: state.value or 0.0)
    second.task = replace(second.task, stage=first.task.stage)
    begun = [search.next() for _ in range(2)]
    longer = [one.task.id for one in begun if one is not None and one.task.length > 1]
    assert longer
    assert f"{second.task.id}x" not in longer


def test_a_space_that_has_no_more_closes_its_rungs_before_the_best_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Slow(monkeypatch, tmp_path, 1.0)
    clock.answer = lasting(clock, tmp_path)
    asked = resting()
    few = replace(asked.space, dimensions=asked.space.dimensions, baselines={})
    search = campaign(tmp_path, replace(asked, space=few), deadline=900.0)
    proposed = iter(range(5))
    propose = search._agenda._sampler.propose
    search._agenda._sampler.propose = lambda number, seen: (  # type: ignore[method-assign]
        propose(number, seen) if next(proposed, None) is not None else None
    )
    done = clock.drive(search)
    assert sum(one.rung == 0 for one in done) == 5
    plain = [one for one in done if one.task.length == 1]
    assert sum(one.rung == 2 for one in plain) == PLAN.keep[-1]
    assert done.index(next(one for one in done if one.task.length > 1)) == len(plain)


def test_nothing_is_trained_on_where_all_of_the_box_was_for_trials(tmp_path: Path) -> None:
    search = campaign(tmp_path, slow_question(), deadline=time.monotonic() + 10**6)
    drive(search)
    assert {state.task.length for state in search.trials.values()} == {1.0}


def test_a_storage_that_fails_for_a_moment_ends_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are collected after a later rung. Until then, the search assumes that the storage is unchanged."""
    shared = Storage(f"file://{tmp_path}/shared")
    failing, said = [False], list[str]()
    listed, removed = Storage.list, Storage.remove

    def check() -> None:
        if failing[0]:
            raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr(Storage, "list", lambda self, below="": (check(), listed(self, below))[1])
    monkeypatch.setattr(Storage, "remove", lambda self, key: (check(), removed(self, key))[1])
    search = campaign(tmp_path, question(), limit=250, storage=shared, notify=said.append)
    store, done = open_stages(tmp_path / "checkpoints", shared), 0
    while (assignment := search.next()) is not None:
        report = worker(assignment)
        if assignment.deployment is None:
            failing[0] = False
            tokens = branch_point(report.tokens, PLAN.decay, PLAN.batch_tokens)
            store.save(assignment.task.stage, tokens, lambda path: path.write_bytes(b"x" * 100) and None)
            done += 1
        failing[0] = done in (4, 6)
        search.report(assignment, report)
    failing[0] = True
    search.close()
    assert search.finished
    assert sum("no checkpoints could be collected this time: AWS Error ACCESS_DENIED" in line for line in said) >= 3
    assert sum(trial.status is Status.COMPLETED for trial in search.trials.values()) == 3
    assert any(event["event"] == "collected" for event in RunLog(tmp_path / "trials.jsonl").read())


def resumed(folder: Path, **more: Any) -> Campaign:
    """Return the campaign as it is after a kill at the end of the log."""
    search = campaign(folder, question(), **more)
    search.replay(RunLog(folder / "trials.jsonl").all())
    return search


@pytest.mark.parametrize(("kills", "times", "cause"), [(3, 5, "worker-died"), (4, 2, "out-of-memory")])
def test_what_the_search_is_killed_with_each_time_is_not_begun_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, times: int, cause: str
) -> None:
    """Within one process, the kernel ends the search together with the trial, and each `--resume` would begin it again.

    Two kills are enough if the kernel has counted another kill for memory since. If not, whoever runs the machine may
    have killed the search.
    """
    monkeypatch.setattr("autodistill.search.campaign.campaign.killed_for_memory", lambda: kills)
    search = campaign(tmp_path, question())
    for _ in range(times):
        assignment = search.next()
        assert assignment is not None
        assert assignment.task.id == "b000"
        search.begin(assignment, 3)
        search = resumed(tmp_path)
    assert search.trials["b000"].status is Status.FAILED
    assert search.trials["b000"].cause == cause
    assert f"the search was killed {times} times while it was under way" in (search.trials["b000"].reason or "")
    # The failure is remembered, and the other trials are trained. No count is kept for trials that have ended.
    search = resumed(tmp_path)
    while (assignment := search.next()) is not None:
        assert assignment.task.id != "b000"
        search.begin(assignment, 3)
        search.report(assignment, worker(assignment))
    assert sum(trial.status is Status.COMPLETED for trial in search.trials.values()) == 2
    assert not any(trial.begun for trial in resumed(tmp_path).trials.values())


def test_an_evaluation_that_the_search_is_killed_with_twice_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autodistill.search.campaign.campaign.killed_for_memory", lambda: 1)
    search = campaign(tmp_path, question())
    while (assignment := search.next()) is not None and assignment.deployment is None:
        search.report(assignment, worker(assignment))
    again = None
    for _ in range(2):
        assert assignment is not None
        assert assignment.deployment is not None
        assert again in (None, assignment.deployment.name)
        again = assignment.deployment.name
        search.begin(assignment, 0)
        search = resumed(tmp_path)
        assignment = search.next()
    assert assignment is not None
    assert assignment.deployment is not None
    assert assignment.deployment.name != again
    (left,) = [event for event in RunLog(tmp_path / "trials.jsonl").read() if event["event"] == "unevaluated"]
    assert left["deployment"] == again
    assert search.trials[left["trial"]].status is Status.COMPLETED


def test_work_that_was_given_back_may_be_begun_as_often_as_one_likes(tmp_path: Path) -> None:
    """Ctrl-C gives work back, for example."""
    search = campaign(tmp_path, question())
    for _ in range(6):
        assignment = search.next()
        assert assignment is not None
        assert assignment.task.id == "b000"
        search.begin(assignment, 0)
        search.abandon(assignment, trained=256)
        search = resumed(tmp_path)
    assert search.trials["b000"].lost == 6 * 256


def test_a_trial_whose_worker_is_killed_for_memory_twice_is_out_of_memory(tmp_path: Path) -> None:
    """The first kill may be another process's fault. The second is reported to the sampler."""
    search, tries = campaign(tmp_path, question()), 0
    while (assignment := search.next()) is not None:
        if assignment.task.id == "t003":
            tries += 1
            search.take(assignment, {"failure": (KILLED, "the machine's memory was short"), "trained": 512})
        else:
            search.report(assignment, worker(assignment))
    assert tries == 2
    assert (search.trials["t003"].status, search.trials["t003"].cause) == (Status.FAILED, "out-of-memory")
    assert observation(search.trials["t003"], search.question).constraint > 0
    found = saved(RunLog(tmp_path / "trials.jsonl").all(), PLAN)
    assert found.trained_tokens == 2 * 512


def test_what_a_group_lost_before_it_reached_a_rung_is_counted(tmp_path: Path) -> None:
    """1,000 tokens were trained before memory ran out. The trial went on from a checkpoint at 600."""
    search = campaign(tmp_path, question())
    assignment = search.next()
    assert assignment is not None
    report = replace(worker(assignment), trained=9216 - 600, resumed=600)
    search.take(assignment, {"report": report, "lost": 1000})
    log = RunLog(tmp_path / "trials.jsonl").read()
    assert [event["trained"] for event in log if event["event"] == "lost"] == [1000]
    assert saved(read_events(log), PLAN).trained_tokens == 1000 + 9216 - 600
    assert search.trials["b000"].trained_tokens == 1000 + 9216 - 600
    again = resumed(tmp_path)
    assert (again.trials["b000"].trained_tokens, again.trials["b000"].status) == (1000 + 9216 - 600, Status.COMPLETED)


def test_what_an_interrupted_attempt_left_is_counted_once(tmp_path: Path) -> None:
    """A kill reports nothing, so the checkpoint shows what was trained. A failed attempt has reported it already."""
    for told, trained in ((0, 700), (600, 700), (900, 1000)):
        folder = tmp_path / str(told)
        search = campaign(folder, question())
        assignment = search.next()
        assert assignment is not None
        if told:
            search.take(assignment, {"failure": ("error", "so"), "trained": told})
            assignment = search.next()
            assert assignment is not None
        search.report(assignment, replace(worker(assignment), trained=100, resumed=600))
        log = RunLog(folder / "trials.jsonl").read()
        assert saved(read_events(log), PLAN).trained_tokens == trained
        assert search.trials["b000"].trained_tokens == resumed(folder).trials["b000"].trained_tokens == trained


def test_a_space_of_which_nothing_fits_is_exhausted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the search is killed, it rejects as many proposals as without kills."""
    most = 40
    monkeypatch.setattr("autodistill.search.campaign.agenda.REJECTIONS_IN_A_ROW", most)
    asked = question(memory=1)
    search = campaign(tmp_path, asked)
    for _ in range(2):
        while (assignment := search.next()) is not None:
            search.fail(assignment, "nan", "so")
        rejected = [trial for trial in search.trials.values() if trial.number is not None]
        assert (len(rejected), search.exhausted) == (most, True)
        search = campaign(tmp_path, asked)
        search.replay(RunLog(tmp_path / "trials.jsonl").all())
    cut = tmp_path / "cut"
    cut.mkdir()
    for event in RunLog(tmp_path / "trials.jsonl").read()[: 3 * most // 2]:
        RunLog(cut / "trials.jsonl").append(event)
    search = campaign(cut, asked)
    search.replay(RunLog(cut / "trials.jsonl").all())
    assert search.next() is None
    assert sum(trial.number is not None for trial in search.trials.values()) == most


def test_what_was_trained_is_not_rejected_by_another_estimate(tmp_path: Path) -> None:
    """The other estimate may come from another version, which finds that the student needs more memory."""
    drive(campaign(tmp_path, question()))
    events = RunLog(tmp_path / "trials.jsonl").read()
    rung = next(place for place, event in enumerate(events) if event["event"] == "rung" and event["trial"] == "t001")
    asked = question()
    small = replace(asked, budget=replace(asked.budget, memory_bytes=1))
    again = campaign(tmp_path / "again", small)
    again.replay(read_events(events[: rung + 1]))
    assert again.trials["t001"].reason is not None
    assert again.trials["t001"].status is None


def test_what_follows_from_the_shape_of_a_rejected_strategy_is_told(tmp_path: Path) -> None:
    """Its memory is reported although nobody trained it. Values that training decides stay unknown."""
    asked = question()
    layers = [resized(asked.teacher_spec, range(count)) for count in (12, 16)]
    needs = [min(fit.need for fit in fits(spec, asked.deployments, asked.budget)) for spec in layers]
    further = (OBJECTIVES["memory"], OBJECTIVES["perplexity"], OBJECTIVES["size"])
    asked = replace(question(memory=sum(needs) // 2), further=further)
    search = campaign(tmp_path, asked)
    drive(search)
    rejected = [trial for trial in search.trials.values() if trial.status is Status.REJECTED and trial.point]
    assert rejected
    for trial in rejected:
        told = observation(trial, asked)
        spec = student_spec(trial.task.strategy, asked.teacher_spec)
        (judged,) = (fit for fit in fits(spec, asked.deployments, asked.budget) if fit.deployment == trial.task.probe)
        size = weights_bytes(spec.tensors, trial.task.probe)
        assert told.further == (judged.need, None, size)
        assert judged.need > asked.budget.memory_bytes
        assert told.values is None


@pytest.mark.parametrize(("ahead", "first"), [(0.001, "t000"), (0.5, "t001")])
def test_what_a_race_cannot_tell_apart_is_decided_by_what_was_proposed_first(
    tmp_path: Path, ahead: float, first: str
) -> None:
    """The second trial leads the first by less than documents differ, or by far more. All other trials are behind."""
    noise = np.random.default_rng(0).normal(scale=0.05, size=(2, 8))
    noise -= noise.mean(axis=1, keepdims=True)

    def likelihood(assignment: Assignment) -> RungReport:
        report, number = worker(assignment), int(assignment.task.id[1:4])
        kind = assignment.task.id[0]
        nll = 3.0 + (noise[number] if number < 2 else noise[0] + 0.2) - (ahead if number == 1 else 0.0)
        nll = nll if kind == "t" else nll + 1
        shared = {"ids": list(range(8)), "count": [100] * 8}
        told = {"sum": [50] * 8, **shared, "others": {"perplexity": {**shared, "sum": (100 * nll).tolist()}}}
        value = float(np.exp(nll.mean()))
        known = {**report.evaluation.measurements}
        known["perplexity"] = replace(known["accuracy"], name="perplexity", value=value, unit="", direction="min")
        evaluation = replace(report.evaluation, measurements=known, documents=told)
        return replace(report, tokens=PLAN.tokens, evaluation=evaluation)

    search = campaign(tmp_path, replace(question(), raced=True, plan=replace(PLAN, rungs=(PLAN.tokens,), keep=())))
    drive(search, likelihood)
    agenda = search._agenda
    assert agenda._trained()[0].task.id == "t001"
    assert agenda._believed_first()[0].task.id == first
    assert sorted(one.task.id for one in agenda._believed_first()) == sorted(one.task.id for one in agenda._trained())
    # After a kill and a resume it decides the same, whatever rows of other deployments came after those of the race.
    again = campaign(tmp_path, search.question)
    again.replay(RunLog(tmp_path / "trials.jsonl").all())
    assert again._agenda._believed_first()[0].task.id == first

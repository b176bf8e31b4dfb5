"""The time budget: what it holds, against values computed by hand, and how it adapts to a slower machine."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from typing import Any

import pytest

from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.search.campaign.state import Question
from autodistill.search.campaign.time_budget import TimeBudget
from autodistill.search.planning.durations import Speed
from autodistill.search.worker.attempt import Assignment, OutOfTime, step_guard
from autodistill.search.worker.messages import TrialTask
from autodistill.strategy.space import load_space
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan
from autodistill.utils import clock as moments
from autodistill.utils.clock import Moment, now

SPACE = load_space("declared")
SPEC = spec_from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 512,
    }
)
PLAN = small_plan(
    tokens=9000,
    rungs=(1000, 3000, 9000),
    keep=(2, 1),
    rung_eval_tokens=500,
    eval_tokens=1000,
    seconds={"export": 20.0, "test": 10.0},
)
# 100 tokens a second in training and in scoring. The model is so small that its size adds less than a millisecond.
SPEED = Speed(cache=100.0, score=100.0, worker_train=100.0, worker_score=100.0)
QUESTION = Question(
    space=SPACE,
    deployments=SPACE.deployments,
    budget=Budget(memory_bytes=10**9),
    plan=PLAN,
    speed=SPEED,
    teacher_spec=SPEC,
    teacher_accuracy=0.5,
    metric="accuracy",
    direction="max",
)
TASK = TrialTask(id="t000", strategy=Strategy(), seed=0, deployments=SPACE.deployments[:2], probe=SPACE.deployments[0])


def box(seconds: float) -> TimeBudget:
    return TimeBudget(QUESTION, time.monotonic() + seconds)


def test_what_work_is_expected_to_take() -> None:
    found = box(1000)
    # Expected are the tokens since the previous rung's decay branched off, in a tenth more time, and the evaluation.
    assert found.expected(Assignment(task=TASK, rung=0), -1) == pytest.approx(1.1 * 10 + 5, rel=1e-3)
    assert found.expected(Assignment(task=TASK, rung=1), 0) == pytest.approx(1.1 * (30 - 5.12) + 5, rel=1e-3)
    assert found.expected(Assignment(task=TASK, rung=2), 1) == pytest.approx(1.1 * (90 - 23.04) + 10, rel=1e-3)
    assert found.expected(Assignment(task=TASK, rung=2), -1) == pytest.approx(1.1 * 90 + 10, rel=1e-3)
    later = Assignment(task=TASK, rung=2, deployment=TASK.deployments[1])
    assert found.expected(later, 2) == found.evaluation() == pytest.approx(10, rel=1e-3)
    assert found.first_segment() == found.expected(Assignment(task=TASK, rung=0), -1)


def test_the_way_to_a_rung_is_its_stretches() -> None:
    found = box(1000)
    segments = [found.expected(Assignment(task=TASK, rung=rung), rung - 1) for rung in range(3)]
    assert found.up_to(TASK, -1, 2) == pytest.approx(sum(segments))
    assert found.up_to(TASK, 0, 1) == segments[1]
    assert found.up_to(TASK, 1, 1) == 0


def test_a_longer_trial_is_expected_to_go_on_from_its_stage() -> None:
    found = box(1000)
    own = replace(TASK, straight=True, length=2.0)
    shared = replace(own, stage="stage")
    # 18,000 tokens are 17,920 in steps of 256. The decay to 9,000 tokens branches off after 28 of its 35 steps.
    assert found.expected(Assignment(task=own, rung=2), -1) == pytest.approx(1.1 * 179.2 + 10, rel=1e-3)
    assert found.expected(Assignment(task=shared, rung=2), -1) == pytest.approx(1.1 * (179.2 - 71.68) + 10, rel=1e-3)


def test_work_is_compared_with_what_was_expected_of_the_tokens_it_trained_on() -> None:
    found = box(100)
    # The rung was expected to train 1,000 tokens. This trial shares a stage: it trained 200 and was evaluated, in
    # exactly the time expected for that. This does not mean that the machine is fast.
    found.learn(Assignment(task=TASK, rung=0), -1, 1.1 * 2 + 5, trained=200)
    assert found.holds(99)
    assert not found.holds(101)


def test_a_worker_that_was_slow_to_begin_makes_no_slow_machine() -> None:
    found = box(100)
    work = Assignment(task=TASK, rung=0)
    found.learn(work, -1, found.expected(work, -1), other_seconds=20.0)
    # The next piece may take as long to begin. Training and evaluation still take as long as measured.
    assert found.holds(79)
    assert not found.holds(81)
    until = found.until(10.0)
    assert until is not None
    assert until.left == pytest.approx(70, abs=1)
    rest = found.trained_in(0.0, alone=False)
    assert rest == pytest.approx(box(80).trained_in(0.0, alone=False), rel=0.02)
    # Once workers begin at once, the delay is soon forgotten.
    for _ in range(4):
        found.learn(work, -1, found.expected(work, -1), other_seconds=0.0)
    assert found.holds(98)


def test_a_box_holds_what_ends_in_time_and_nothing_once_closed() -> None:
    found = box(100)
    assert found.holds(99)
    assert not found.holds(101)
    found.close()
    assert not found.holds(1)
    assert TimeBudget(QUESTION, None).holds(1e9)


def test_a_slower_machine_holds_less_and_what_follows_the_trials_takes_longer_too() -> None:
    found = box(100)
    work = Assignment(task=TASK, rung=0)
    found.learn(work, -1, 2 * found.expected(work, -1))
    # Work took twice as long: 16 s more, in addition to 30 s that count as expected. The 30 s for export and test are
    # therefore expected to take 62 / 46 times as long.
    left = (100 - 30 * 16 / 46) / 2
    assert found.holds(left - 0.5)
    assert not found.holds(left + 0.5)


def test_a_box_recovers_slowly() -> None:
    found = box(100)
    work = Assignment(task=TASK, rung=0)
    found.learn(work, -1, 2 * found.expected(work, -1))
    found.learn(work, -1, found.expected(work, -1))
    # Trials are 0.8 x 2 + 0.2 x 1 times as slow. For what follows them, 30 + 0.8 x 16 + 16 s took 0.8 x 16 s more.
    left = (100 - 30 * 12.8 / 58.8) / 1.8
    assert found.holds(left - 0.5)
    assert not found.holds(left + 0.5)


def test_what_follows_the_trials_is_not_told_by_the_shortest_of_them() -> None:
    """A segment of a few seconds is often far slower than expected, for reasons that do not apply to longer work."""
    found = box(1000)
    short, long = Assignment(task=TASK, rung=0), Assignment(task=replace(TASK, straight=True), rung=2)
    found.learn(long, -1, 1.1 * found.expected(long, -1))
    found.learn(short, -1, 2 * found.expected(short, -1))
    # 109 s took 120 s, and later 16 s took 32 s: (30 + 0.8 x 120 + 32) / (30 + 0.8 x 109 + 16) = 1.186.
    until = found.until(50.0)
    assert until is not None
    assert until.left == pytest.approx(1000 - 30 * 0.186 - 50 * 1.186, abs=0.6)
    assert found.left() == pytest.approx((1000 - 30 * 0.186) / 2, abs=0.6)


def test_the_best_metric_is_the_largest_or_the_smallest() -> None:
    assert QUESTION.best([1, 2]) == 2
    assert replace(QUESTION, direction="min").best([1, 2]) == 1


def sharing(seconds: float, **changes: Any) -> TimeBudget:
    """Return a time budget that plans 60 s for the best, and sets aside at most half of what is left for it."""
    plan = replace(PLAN, longest=4.0, alone=2, seconds={"export": 20.0, "test": 10.0, "longer": 60.0})
    asked = replace(QUESTION, **{"plan": plan, "explore": 0.5, "speed": replace(SPEED, alone=160.0)} | changes)
    return TimeBudget(asked, time.monotonic() + seconds)


def test_what_is_set_aside_for_the_best_is_for_nothing_else() -> None:
    found = sharing(200)
    assert found.left(whole=True) == pytest.approx(200, abs=0.1)
    assert found.left() == pytest.approx(140, abs=0.1)
    assert not found.holds(150)
    assert found.holds(150, whole=True)
    # Less time is left than planned, so both parts get less.
    assert sharing(80).left() == pytest.approx(40, abs=0.1)
    # Work takes twice as long as expected. The time set aside stays the same, whatever happens in it.
    found.learn(Assignment(task=TASK, rung=0), -1, 32.0)
    assert found.left() == pytest.approx((140 - 30 * 16 / 46) / 2, abs=0.1)
    assert found.left(whole=True) == pytest.approx((200 - 30 * 16 / 46) / 2, abs=0.1)
    assert box(200).left() == pytest.approx(200, abs=0.1)


def test_when_training_must_end_leaves_time_for_what_follows_it_as_slow_as_it_is() -> None:
    def left(box: TimeBudget) -> float:
        until = box.until(25.0)
        assert until is not None
        return until.left

    found = sharing(200)
    assert left(found) == pytest.approx(175, abs=0.1)
    found.learn(Assignment(task=TASK, rung=0), -1, 32.0)
    assert left(found) == pytest.approx(200 - 30 * 16 / 46 - 25 * 62 / 46, abs=0.1)
    assert TimeBudget(QUESTION, None).until(25.0) is None


def test_one_that_has_all_threads_is_expected_to_train_as_fast_as_was_measured_of_one() -> None:
    found = sharing(1000)
    work = Assignment(task=replace(TASK, straight=True, length=2.0), rung=2)
    assert found.expected(work, -1) == pytest.approx(1.1 * 179.2 + 10, rel=1e-3)
    assert found.expected(replace(work, threads=2), -1) == pytest.approx(1.1 * 112 + 10, rel=1e-3)
    found.learn(replace(work, threads=2), -1, 1.1 * 80 + 10, trained=12_800)
    assert found.left(whole=True) == pytest.approx(1000, abs=0.1)


def test_one_that_reads_nothing_of_the_teacher_is_expected_to_train_as_fast_as_without_it() -> None:
    found = sharing(1000, speed=replace(SPEED, alone=160.0).with_teacher_beside())
    recipe = replace(TASK.strategy.distillation, divergence_weight=0.0)
    labels = replace(TASK, strategy=replace(TASK.strategy, distillation=recipe))
    assert found.expected(Assignment(task=TASK, rung=0), -1) == pytest.approx(1.1 * 20 + 5, rel=1e-3)
    assert found.expected(Assignment(task=labels, rung=0), -1) == pytest.approx(1.1 * 10 + 5, rel=1e-3)
    alone = replace(labels, straight=True, length=2.0)
    assert found.expected(Assignment(task=alone, rung=2, threads=2), -1) == pytest.approx(1.1 * 112 + 10, rel=1e-3)
    assert found.training(8000, alone=True, task=labels) == pytest.approx(1.1 * 50 + 10, rel=1e-3)
    assert found.trained_in(0.0, alone=True, task=labels) == pytest.approx(990 * 160 / 1.1, rel=1e-3)
    assert found.trained_in(0.0, alone=True) == pytest.approx(990 / (1 / 160 + 1 / 100) / 1.1, rel=1e-3)
    # A trial that is not known yet may read the teacher's outputs.
    assert found.first_segment() == pytest.approx(1.1 * 20 + 5, rel=1e-3)


def test_one_that_has_all_threads_is_expected_to_be_read_with_them_too() -> None:
    found = sharing(1000, speed=replace(SPEED, alone=160.0, score=200.0))
    assert found.evaluation() == pytest.approx(10, rel=1e-3)
    assert found.evaluation(alone=True) == pytest.approx(5, rel=1e-3)
    assert found.training(8000, alone=True) == pytest.approx(1.1 * 50 + 5, rel=1e-3)
    assert found.trained_in(0.0, alone=True) - found.trained_in(0.0, alone=False) > 0.6 * 995 * 100 / 1.1


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_system_clock_that_is_set_neither_ends_a_search_nor_makes_it_longer(
    monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    found, clock = box(100), time.time
    began = now()
    until, guard, late = found.until(10.0), step_guard(Moment.after(60.0)), step_guard(Moment.after(-1.0))
    assert until is not None
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    assert found.left() == pytest.approx(100, abs=1)
    assert until.left == pytest.approx(90, abs=1)
    assert pickle.loads(pickle.dumps(until)).left == pytest.approx(90, abs=1)
    step: Any = None
    guard(step)
    with pytest.raises(OutOfTime):
        late(step)
    # Times in events still increase by the time that has passed.
    assert 0 <= now() - began < 5
    again = found.until(10.0)
    assert again is not None
    assert again.left == pytest.approx(90, abs=1)


def test_a_moment_is_as_far_off_on_another_node_whose_clock_runs_from_another_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = pickle.dumps(Moment.after(100.0))
    runs = time.monotonic
    monkeypatch.setattr(moments, "_machine", lambda: "another")
    monkeypatch.setattr(time, "monotonic", lambda: runs() + 5000)
    assert pickle.loads(sent).left == pytest.approx(100, abs=1)

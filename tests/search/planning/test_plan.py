"""A plan keeps to its time budget, and to everything that the user fixed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.search.algorithms.successive_halving import rung_tokens
from autodistill.search.planning.durations import (
    Speed,
    evaluated_tokens,
    evaluation_seconds,
    trained_in,
    trial_seconds,
)
from autodistill.search.planning.plan import (
    ENOUGH_STEPS,
    check_time_budget,
    extend,
    make_plan,
    more_trials,
    step_sequences,
)
from tests.search.planned import DEMAND, SPEED, WORKERS


def test_ten_minutes_on_two_cores_hold_a_dozen_trials_of_which_six_go_past_the_first_rung() -> None:
    plan = make_plan(DEMAND, SPEED, WORKERS)
    assert plan.trials == 12
    assert plan.keep == (6, 3)
    assert sum(plan.seconds.values()) <= 600
    assert plan.notes == ()


@given(
    box=st.floats(200, 100_000),
    pace=st.floats(0.5, 50),
    train=st.integers(1_000, 10**7),
    trials=st.one_of(st.none(), st.integers(1, 60)),
)
def test_a_plan_keeps_to_its_box_or_says_that_it_cannot(
    box: float, pace: float, train: int, trials: int | None
) -> None:
    speed = Speed(**{name: value * pace for name, value in vars(SPEED).items()})
    plan = make_plan(replace(DEMAND, box_seconds=box, train_tokens=train, trials=trials), speed, WORKERS)
    over = sum(plan.seconds.values()) > box
    assert over == any("longer than the time budget" in note for note in plan.notes)
    assert plan.tokens == plan.rungs[-1]
    assert list(plan.rungs) == sorted(set(plan.rungs))
    assert all(rung % plan.batch_tokens == 0 for rung in plan.rungs)
    assert len(plan.keep) == len(plan.rungs) - 1
    assert all(count <= plan.trials for count in plan.keep)
    assert plan.tokens <= max(train, 3 * plan.batch_tokens)
    assert trials is None or plan.trials == trials


def test_a_larger_box_holds_more_of_the_same() -> None:
    small, large = (make_plan(replace(DEMAND, box_seconds=box), SPEED, WORKERS) for box in (600.0, 3600.0))
    assert large.tokens > small.tokens
    assert large.eval_tokens > small.eval_tokens
    days = make_plan(replace(DEMAND, box_seconds=86_400.0), SPEED, WORKERS)
    assert days.tokens == 90_000 // 256 * 256  # one pass over the data
    assert days.trials > 100


def test_a_second_container_adds_half_of_what_an_export_takes() -> None:
    """By hand: three models, two of them packed, read general text at 400 tokens a second.

    What is written is served once.
    """
    once, twice = (make_plan(replace(DEMAND, exports=count), SPEED, WORKERS) for count in (1, 2))
    written = 2.5 + 1.5e-7 * 134e6
    assert once.seconds["export"] == pytest.approx(
        3 * once.eval_tokens / 400 + 2 * 1.5e-8 * 134e6 + written + 1 + 6e-8 * 134e6
    )
    assert twice.seconds["export"] - once.seconds["export"] == pytest.approx(written / 2)
    assert twice.tokens < once.tokens
    assert sum(twice.seconds.values()) <= 600


def test_a_budget_that_leaves_few_deployments_leaves_more_for_training() -> None:
    tight, loose = (make_plan(replace(DEMAND, deployments=count), SPEED, WORKERS) for count in (2, 8))
    assert tight.tokens > loose.tokens


def test_fixed_trials_and_tokens_are_kept_and_need_no_box() -> None:
    plan = make_plan(replace(DEMAND, box_seconds=None, trials=4, tokens=5000), SPEED, WORKERS)
    assert (plan.trials, plan.tokens, plan.box_seconds) == (4, 4864, None)
    assert plan.rungs == (1536, 4864)
    alone = make_plan(replace(DEMAND, box_seconds=None, trials=0, tokens=5000), SPEED, WORKERS)
    assert alone.trials == 0
    assert (
        "has 4,864 tokens instead of the 5,000 that were asked for: it takes whole optimiser steps of 256"
        in alone.notes[0]
    )
    exact = make_plan(replace(DEMAND, box_seconds=None, trials=4, tokens=4864), SPEED, WORKERS)
    assert exact.notes == ()


def test_what_a_short_box_cannot_hold_is_said() -> None:
    plan = make_plan(replace(DEMAND, box_seconds=230.0), SPEED, WORKERS)
    assert any("trials" in note for note in plan.notes)


def test_a_box_that_does_not_hold_the_baselines_training_is_refused_with_one_that_does() -> None:
    """By hand at these speeds, for 768 tokens: caching takes 1.8 s and scoring 2.6 s.

    Eight rows of the teacher take 8 * (2.6 + 1.1) s, workers 15 s, export 10 + 13.4 s, general text and serving 3 * 2.6
    + 2 * 2.0 + 8.7 s, test 7 * (5.1 + 4.7) s, the untrained student 2.6 + 4.7 s, training 4.7 + 3.1 + 5.4 s. 15 s are
    already spent.
    """
    least = 15 + 1.8 + 2.6 + 8 * 3.7 + 15 + 23.4 + 20.5 + 7 * 9.8 + 7.3 + 13.2
    for box in (1.0, 0.98 * least):
        with pytest.raises(InputError, match="is too short for the training of the baseline") as caught:
            check_time_budget(replace(DEMAND, box_seconds=box), SPEED, WORKERS)
        advised = int(re.search(r"--time (\d+)s or more$", str(caught.value))[1])  # type: ignore[index]
        assert 1.05 * least < advised < 1.15 * least
    check_time_budget(replace(DEMAND, box_seconds=1.02 * least), SPEED, WORKERS)
    check_time_budget(replace(DEMAND, box_seconds=None), SPEED, WORKERS)


def test_a_time_that_no_float_tells_seconds_of_is_advised_and_not_looked_for_without_end() -> None:
    with pytest.raises(InputError, match=r"--time \d+m or more, or fewer --tokens"):
        check_time_budget(replace(DEMAND, box_seconds=300.0, tokens=256 * 10**18), SPEED, WORKERS)


def test_tokens_that_were_asked_for_are_those_that_a_box_must_hold() -> None:
    asked = replace(DEMAND, box_seconds=300.0)
    check_time_budget(asked, SPEED, WORKERS)
    with pytest.raises(InputError, match=r"--time \d+m or more, or fewer --tokens"):
        check_time_budget(replace(asked, tokens=90_000), SPEED, WORKERS)
    # Trials after the first do not start if they do not fit the time budget.
    check_time_budget(replace(asked, trials=50), SPEED, WORKERS)


def test_rungs_are_a_ninth_a_third_and_all() -> None:
    assert rung_tokens(9 * 2560, 256) == (2560, 7680, 23040)
    # A rung of three steps, one of them decay, says little.
    assert rung_tokens(8 * 256, 256) == (8 * 256,)
    assert rung_tokens(13 * 256, 256) == (4 * 256, 13 * 256)
    assert rung_tokens(24 * 256, 256) == (8 * 256, 24 * 256)
    assert rung_tokens(36 * 256, 256) == (4 * 256, 12 * 256, 36 * 256)


PLENTY = 1000 * ENOUGH_STEPS


@pytest.mark.parametrize(
    ("rates", "tokens", "expected"),
    [
        ({1: 100.0}, PLENTY, 1),
        ({1: 100.0, 2: 110.0}, PLENTY, 1),
        ({1: 100.0, 2: 190.0, 4: 350.0, 8: 390.0}, PLENTY, 4),
        # Memory or the trial's tokens ended the measurement.
        ({1: 100.0, 2: 190.0, 4: 350.0}, PLENTY, 4),
        # Sizes beyond one that is not worth it do not count.
        ({1: 100.0, 2: 114.0, 4: 400.0}, PLENTY, 1),
        ({1: 100.0, 2: 190.0, 4: 350.0}, 4 * ENOUGH_STEPS, 4),
        ({1: 100.0, 2: 190.0, 4: 350.0}, 4 * ENOUGH_STEPS - 1, 2),
        ({1: 100.0, 2: 190.0, 4: 350.0}, ENOUGH_STEPS, 1),
        ({1: 100.0, 2: 190.0, 4: 350.0}, 3, 1),
    ],
)
def test_a_step_grows_while_that_is_worth_it_and_leaves_steps_enough(
    rates: dict[int, float], tokens: int, expected: int
) -> None:
    assert step_sequences(rates, lambda size: tokens // size) == expected


def test_the_first_rung_of_enough_steps_can_tell_strategies_apart() -> None:
    assert rung_tokens(ENOUGH_STEPS * 256, 256)[0] == 24 * 256


def test_a_plan_is_extended_by_trials_that_can_be_compared_with_the_earlier_ones() -> None:
    plan = make_plan(DEMAND, SPEED, WORKERS)
    longer = extend(plan, 40)
    assert (longer.tokens, longer.rungs, longer.eval_tokens) == (plan.tokens, plan.rungs, plan.eval_tokens)
    assert (longer.trials, longer.keep) == (40, (20, 10))
    assert extend(plan, plan.trials) == plan
    # Nine of twelve trials went on, then five, because time was left. Added trials get further places.
    assert extend(plan, plan.trials + 1, (9, 5)).keep == (10, 6)
    assert extend(plan, plan.trials + 8, (9, 5)).keep == (13, 7)
    # If no more trials went on than planned, the shares are those of a longer plan.
    assert extend(plan, 40, plan.keep).keep == (20, 10)
    # Another version made this plan. A run without more trials keeps its places.
    earlier = replace(plan, keep=(6, 2))
    assert extend(earlier, plan.trials) == earlier


def test_more_time_holds_as_many_more_trials_as_their_shares_of_the_rungs_cost() -> None:
    plan = replace(
        make_plan(DEMAND, SPEED, WORKERS),
        tokens=9000,
        rungs=(1000, 3000, 9000),
        keep=(6, 2),
        rung_eval_tokens=1000,
        eval_tokens=2000,
        workers=2,
        seconds={"export": 20.0, "test": 30.0, "workers": 10.0},
    )
    speed = Speed(cache=1.0, score=1.0, worker_train=100.0, worker_score=200.0)
    # Half of the trials pass the first rung, and half of these the second. The teacher is too small to matter.
    each = (1.1 * 12 + 5) + (1.1 * 24 + 5) / 2 + (1.1 * 60 + 10) / 4
    assert more_trials(plan, 1, speed, 1000.0) == int((0.93 * 1000 - 60) * 2 / each)
    assert more_trials(plan, 1, speed, 30.0) == 0


def test_a_kept_student_is_evaluated_for_less_than_a_stretch_of_training_takes_beside_its_steps() -> None:
    """Measured on two servers: 15 ns a weight for packing, and 25 ns for building, restoring and saving."""
    speed = Speed(cache=1.0, score=1.0, worker_train=110.0, worker_score=200.0, asked=3.0)
    assert evaluation_seconds(2000, 10**9, speed) == pytest.approx(10 + 15 + 3)
    assert trial_seconds(1000, 2000, 10**9, speed, judged=False) == pytest.approx(10 + 10 + 40 + 3)
    assert trained_in(153.0, 2000, 10**9, 110.0, speed) == pytest.approx(10_000, abs=1)


def shared(box: float, explore: float = 0.5, **changes: Any) -> tuple[Plan, Plan]:
    """Return a plan that trains its best on, and one that does not. A worker alone is half as fast again."""
    asked = replace(DEMAND, box_seconds=box, **changes)
    workers, speed = replace(WORKERS, alone=2), replace(SPEED, alone=270.0)
    return make_plan(replace(asked, explore=explore), speed, workers), make_plan(asked, speed, workers)


@pytest.mark.parametrize("box", [600.0, 1200.0, 1800.0])
def test_half_of_the_time_for_training_is_for_the_best(box: float) -> None:
    plan, without = shared(box, train_tokens=10**6)
    assert without.longest == 1
    assert without.alone == 0
    assert "longer" not in without.seconds
    assert plan.alone == 2
    assert plan.tokens <= without.tokens
    assert sum(plan.seconds.values()) <= 0.93 * box
    # Trials and steps must be whole, so a little more may be left.
    assert 0.9 * plan.seconds["trials"] <= plan.seconds["longer"] <= 1.3 * plan.seconds["trials"]
    # By hand: training starts where the decay branched off, at the rate of one worker alone, and has one evaluation.
    seconds = plan.seconds["longer"] - plan.eval_tokens / 330.0 - 4e-8 * 134e6
    branch = (plan.tokens // 256 - round(plan.tokens // 256 * plan.decay)) * 256
    expected = branch + seconds * 270.0 / 1.1
    assert plan.most_tokens == pytest.approx(expected, abs=1)
    assert plan.most_tokens > 1.1 * without.tokens
    # If trials leave more time, the text is read again.
    assert plan.longest * plan.tokens == pytest.approx(2 * expected, abs=1)
    assert plan.expected * plan.tokens == pytest.approx(expected, abs=1)


def test_the_best_is_expected_to_get_further_where_it_learns_from_the_labels_alone() -> None:
    beside = replace(SPEED, alone=270.0).with_teacher_beside()
    asked = replace(DEMAND, train_tokens=10**6, caches=False, explore=0.5)
    plan = make_plan(asked, beside, replace(WORKERS, alone=2))
    # By hand: the same checkpoint and time, at the rate measured for a step without the teacher.
    branch = (plan.tokens // 256 - round(plan.tokens // 256 * plan.decay)) * 256
    seconds = plan.seconds["longer"] - plan.eval_tokens / 330.0 - 4e-8 * 134e6
    assert plan.expected * plan.tokens == pytest.approx(branch + seconds * beside.alone / 1.1, abs=1)
    assert plan.by_labels * plan.tokens == pytest.approx(branch + seconds * 270.0 / 1.1, abs=256)
    assert plan.by_labels > 1.5 * plan.expected
    # Otherwise there is only one case, or the plan has no time left for the best.
    for speed, explore in ((replace(SPEED, alone=270.0), 0.5), (beside, 1.0)):
        assert make_plan(replace(asked, explore=explore), speed, replace(WORKERS, alone=2)).by_labels == 0


def test_the_speed_beside_a_teacher_keeps_what_it_is_without() -> None:
    speed = replace(SPEED, alone=270.0)
    beside = speed.with_teacher_beside()
    assert beside.worker_train == pytest.approx(1 / (1 / 180.0 + 1 / 330.0))
    assert (beside.by_labels().worker_train, beside.by_labels().alone) == (180.0, 270.0)
    assert speed.by_labels() == speed
    # 256 tokens take a second longer, whatever the teacher takes.
    slower = beside.with_steps_longer(1.0, 256)
    assert slower.worker_train == pytest.approx(256 / (256 / beside.worker_train + 1))
    assert slower.by_labels().worker_train == pytest.approx(256 / (256 / 180.0 + 1))
    assert speed.with_steps_longer(1.0, 256).by_labels().worker_train == pytest.approx(256 / (256 / 180.0 + 1))
    divided = beside.with_side_by_side(2)
    assert divided.alone == pytest.approx(max(beside.alone, 2 * beside.worker_train))
    assert divided.by_labels().alone == 360.0
    assert speed.with_side_by_side(2) == replace(speed, alone=360.0)


def test_where_nothing_is_cached_a_machine_that_turns_out_faster_reads_on_in_the_text() -> None:
    plan, _ = shared(600.0, caches=False, train_tokens=10**6)
    assert plan.longest == pytest.approx(8 * plan.expected)
    # No text is read twice.
    assert plan.most_tokens == pytest.approx(plan.longest * plan.tokens, abs=256)


def test_plans_of_before_expected_half_of_what_they_allowed() -> None:
    stored = shared(600.0)[0].to_json()
    del stored["expected"]
    assert Plan.from_json(stored).expected == stored["longest"] / 2


def test_the_teachers_outputs_are_cached_as_far_as_the_best_may_get() -> None:
    plan, _ = shared(600.0)
    assert plan.seconds["cache"] == pytest.approx(1.4 * plan.most_tokens / 600 + plan.eval_tokens / 400)
    assert Plan.from_json(plan.to_json()) == plan


def test_repeated_data_are_read_four_times_at_most() -> None:
    plan, without = shared(36_000.0, train_tokens=20_000)
    assert plan.tokens == without.tokens == 20_000 // 256 * 256
    assert plan.most_tokens == plan.tokens
    assert 3.9 < plan.longest <= 4.01
    assert plan.seconds["longer"] < 0.05 * plan.seconds["trials"]
    assert plan.trials > 0.9 * without.trials


def test_where_not_even_three_trials_have_enough_steps_as_many_run_as_have_half_of_them() -> None:
    plan, _ = shared(480.0)
    assert 12 <= plan.tokens // 256 < 24
    assert 3 < plan.trials < 12
    three, _ = shared(480.0, trials=3)
    assert plan.tokens < three.tokens < 24 * 256
    assert any("hardly tell strategies apart" in note for note in plan.notes)


def test_a_box_too_short_to_choose_in_is_all_for_trials() -> None:
    plan, without = shared(260.0)
    assert plan == replace(without, seconds=plan.seconds)


def test_of_what_the_cache_may_hold_the_text_is_read_and_read_again() -> None:
    free, _ = shared(1800.0)
    held, _ = shared(1800.0, train_tokens=30_000, cached_tokens=30_000)
    assert free.most_tokens > 40_000
    assert held.most_tokens == 30_000 // 256 * 256
    assert held.most_tokens < held.longest * held.tokens < 4 * 30_000
    # Trials get the tokens that were asked for. The best gets no more text than the cache holds.
    asked, _ = shared(1800.0, tokens=10_240, cached_tokens=5_000)
    assert asked.most_tokens == asked.tokens == 10_240
    assert asked.longest > 1.25


def test_all_threads_are_no_use_where_they_train_no_faster() -> None:
    plan = make_plan(replace(DEMAND, explore=0.5), replace(SPEED, alone=170.0), replace(WORKERS, alone=2))
    assert plan.longest > 1
    assert plan.alone == 0


@pytest.mark.parametrize(("box", "at_once"), [(3600.0, 4), (1000.0, 2), (400.0, 1)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_has_as_many_sequences_as_are_read_faster_at_once_where_enough_steps_are_left(
    box: float, at_once: int, count: int
) -> None:
    """At least 216 steps of 256, 512 or 1,024 tokens are left.

    A single worker always has all threads; only wider steps say so.
    """
    asked = replace(DEMAND, explore=0.5, trials=2, tokens=2560, train_tokens=10**6, caches=False, box_seconds=box)
    plan = make_plan(asked, replace(SPEED, alone=270.0, at_once=4), replace(WORKERS, count=count, alone=2))
    steps = plan.expected * plan.tokens / 256
    assert {4: steps >= 864, 2: 432 <= steps < 864, 1: steps < 432}[at_once]
    assert plan.at_once == at_once
    assert plan.alone == (2 if at_once > 1 or count > 1 else 0)


@pytest.mark.parametrize("explore", [0.2, 0.8])
def test_the_share_of_trials_is_what_was_asked_for(explore: float) -> None:
    plan, _ = shared(7200.0, explore, train_tokens=10**6)
    share = plan.seconds["trials"] / (plan.seconds["trials"] + plan.seconds["longer"])
    assert share == pytest.approx(explore, abs=0.06)


def test_without_a_box_nothing_is_left_for_the_best() -> None:
    plan = make_plan(replace(DEMAND, box_seconds=None, trials=4, tokens=4864, explore=0.5), SPEED, WORKERS)
    assert (plan.longest, plan.most_tokens) == (1, 4864)


def test_with_many_workers_one_trials_way_to_the_end_bounds_its_tokens_and_more_are_tried() -> None:
    few, many = (make_plan(DEMAND, SPEED, replace(WORKERS, count=count, device="cuda")) for count in (2, 16))
    assert few.trials == 12
    assert many.trials > 24
    # By hand: the training to each rung with its decay, at a tenth more time than measured.
    segments = zip(many.rungs, (0, *many.rungs), strict=False)
    trained = sum((rung - before) * (1.0 if rung == many.tokens else 1.2) for rung, before in segments)
    assert 1.1 * trained / 180.0 < many.seconds["trials"]
    assert sum(many.seconds.values()) <= 600


def test_a_search_that_is_extended_leaves_the_best_as_long_as_was_planned_at_most() -> None:
    plan, _ = shared(1800.0)

    def more(seconds: float, explore: float) -> int:
        return more_trials(plan, DEMAND.parameters, SPEED, seconds, explore)

    assert more(1000.0, 0.5) == pytest.approx(more(1000.0, 1.0) / 2, abs=1)
    longer = plan.seconds["longer"]
    assert more(20_000.0, 0.5) == pytest.approx(more(20_000.0 - longer / 0.93, 1.0), abs=1)


def test_of_a_race_that_could_tell_nothing_apart_what_is_believed_runs_alone() -> None:
    asked = replace(DEMAND, arms=3, made_up=3, explore=0.2, caches=False, baselines=0)
    raced = make_plan(replace(asked, box_seconds=1800.0), SPEED, WORKERS)
    assert raced.trials >= 3
    assert raced.tokens >= 8 * 256
    alone = make_plan(replace(asked, box_seconds=420.0), SPEED, WORKERS)
    assert alone.trials == 1
    assert alone.seconds["codes"] == pytest.approx(raced.seconds["codes"] / 3)
    assert any("holds no race" in note for note in alone.notes)
    assert sum(alone.seconds.values()) <= 420


def test_a_trial_that_nothing_is_compared_with_is_short_and_leaves_its_time_to_the_trunk() -> None:
    """The space has one construction, and one trial is asked for.

    It has eight steps, half of them warm-up, and no rung.
    """
    asked = replace(DEMAND, trials=1, baselines=0, explore=0.2)
    plan = make_plan(asked, SPEED, WORKERS)
    assert plan.rungs == (8 * 256,)
    assert plan.warmup_tokens == 4 * 256
    raced = make_plan(replace(asked, trials=2), SPEED, WORKERS)
    assert raced.tokens > 8 * 256
    assert plan.tokens * plan.expected > raced.tokens * raced.expected
    assert sum(plan.seconds.values()) <= 600
    # Tokens that the user asked for stay. If nothing is trained on, the trial gets all of the time.
    assert make_plan(replace(asked, tokens=5120), SPEED, WORKERS).tokens == 5120
    assert make_plan(replace(asked, explore=1.0), SPEED, WORKERS).tokens > raced.tokens


def test_what_runs_alone_stays_so_though_other_workers_are_free() -> None:
    """Further arms could train at the same time, but finding their codes takes longer than their training."""
    asked = replace(DEMAND, arms=2, made_up=2, explore=0.5, caches=False, baselines=0)
    one = make_plan(replace(asked, box_seconds=420.0, arms=1, made_up=1), SPEED, WORKERS).seconds["codes"]
    for seconds in range(240, 660, 30):
        plan = make_plan(replace(asked, box_seconds=float(seconds)), SPEED, WORKERS)
        assert plan.seconds["codes"] == pytest.approx(min(plan.trials, 2) * one)


def test_what_is_read_has_an_end() -> None:
    """A fast model could read more text than a choice needs, and take time from training."""
    fast = replace(SPEED, score=1e5, worker_score=1e5)
    asked = replace(DEMAND, box_seconds=600.0, validation_tokens=10**6, test_tokens=10**6)
    assert evaluated_tokens(asked, fast) == (8192, 16384, 32768)


def test_in_a_short_time_the_race_is_of_constructions_alone() -> None:
    """The time of proposals goes to the best. Each construction gets as many tokens as if proposals ran too."""
    asked = replace(DEMAND, baselines=0, arms=3, explore=0.2, train_tokens=10**6, caches=False)
    fast = replace(SPEED, worker_train=5e3, score=2e4, worker_score=1e4)
    beside, alone = (make_plan(replace(asked, proposed=proposed), fast, WORKERS) for proposed in (True, False))
    assert (beside.trials > 3, alone.trials) == (True, 3)
    assert alone.tokens == beside.tokens
    assert alone.expected > beside.expected
    held = replace(asked, box_seconds=120.0, proposed=False)
    assert make_plan(held, SPEED, WORKERS).trials == 1

"""A training that ends at a given moment: it uses the time that it has, and not more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from autodistill.distillation.training.learning_rate import end_of
from autodistill.distillation.training.step_record import StepRecord
from autodistill.search.worker.timed_training import TimedTraining
from autodistill.strategy.strategy import Finishing, Strategy
from autodistill.testing import small_plan
from autodistill.utils.clock import Moment

BATCH = 256
PLAN = small_plan(tokens=8 * BATCH, rungs=(8 * BATCH,), keep=(), batch_tokens=BATCH, decay=0.2, longest=100.0)
BY_SCALES = Strategy(finishing=Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False, scales="alone"))
BY_WEIGHTS = Strategy(finishing=Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False))


def record(tokens: int, seconds: float) -> StepRecord:
    return StepRecord(
        tokens=tokens,
        loss=1.0,
        divergence=0.0,
        cross_entropy=1.0,
        alignment=0.0,
        attention=0.0,
        divergence_weight=0.0,
        teacher_share=1.0,
        temperature=1.0,
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens_per_second=BATCH / seconds,
        micro_batch=1,
    )


def left_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
    strategy: Strategy,
    slower: float,
    *,
    on_grid: float | None = 0.0,
    each: Callable[[int], float] = lambda step: 1.0,
) -> float:
    """Return what is left of 500 s after a training. Its steps take `each`, and `slower` times that in the decay."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("autodistill.utils.clock.time", SimpleNamespace(monotonic=lambda: clock.now))
    until = Moment(500.0)
    timed = TimedTraining(until, PLAN, strategy, PLAN.decay, writing=0.0, on_grid=on_grid, sharding=None)
    steps: list[StepRecord] = []
    while not steps or not timed.must_decay(steps):
        took = each(len(steps))
        clock.now += took
        steps.append(record((len(steps) + 1) * BATCH, took))
    end, decay = end_of(steps[-1].tokens, PLAN.decay, BATCH), list[StepRecord]()
    while steps[-1].tokens + len(decay) * BATCH < end:
        took = slower * each(len(steps) + len(decay))
        clock.now += took
        decay.append(record(steps[-1].tokens + (len(decay) + 1) * BATCH, took))
        end = timed.end(decay, end)
    return until.left


def test_a_decay_whose_steps_take_as_long_as_those_before_it_leaves_little_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The decay takes a hundred seconds, and three percent of that are kept in reserve.
    assert 0 <= left_at_the_end(monkeypatch, BY_SCALES, 1.0) < 5
    assert 0 <= left_at_the_end(monkeypatch, Strategy(), 1.0) < 5
    # For steps on a grid, the training knows how much slower they are, or assumes that they are slower.
    assert 0 <= left_at_the_end(monkeypatch, BY_WEIGHTS, 1.6, on_grid=0.6) < 10
    assert left_at_the_end(monkeypatch, BY_WEIGHTS, 1.25, on_grid=None) > 5


def test_weights_that_are_on_the_grid_in_half_of_the_decay_take_half_as_much_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert BY_WEIGHTS.finishing is not None
    late = replace(BY_WEIGHTS, finishing=replace(BY_WEIGHTS.finishing, start=0.5))
    assert 0 <= left_at_the_end(monkeypatch, late, 1.3, on_grid=0.6) < 10


@pytest.mark.slow
def test_moments_in_which_the_machine_is_slow_end_no_training_early(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three steps of each hundred take four times as long, as if something else ran for a moment. A worker's first step
    # takes a hundred times as long.
    def each(step: int) -> float:
        return 10.0 if step == 0 else 0.4 if step % 100 < 3 else 0.1

    for strategy in (BY_SCALES, BY_WEIGHTS):
        assert 0 <= left_at_the_end(monkeypatch, strategy, 1.0, each=each) < 15


@pytest.mark.parametrize("slower", [1.02, 1.04, 1.08, 1.15, 1.5, 3.0])
def test_one_that_turns_out_slower_ends_in_time_all_the_same(monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    for strategy, on_grid in ((BY_SCALES, 0.0), (BY_WEIGHTS, None), (BY_WEIGHTS, 0.1), (Strategy(), 0.0)):
        assert left_at_the_end(monkeypatch, strategy, slower, on_grid=on_grid) > -slower

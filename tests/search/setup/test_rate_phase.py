"""Where learning rates are tested before a search: where the time holds a test that tells, or the family is new."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.models.config import spec_from_config
from autodistill.search.planning.durations import Demand, Speed
from autodistill.search.planning.placement import Workers
from autodistill.search.planning.plan import RATES
from autodistill.search.setup.rate_phase import share_for, to_test
from autodistill.testing import tiny_config

WORKERS = Workers(count=1, threads=2, bf16=True, device="cpu")
DEMAND = Demand(
    box_seconds=600.0,
    spent_seconds=15.0,
    trials=None,
    tokens=None,
    baselines=0,
    teacher_deployments=2,
    deployments=1,
    train_tokens=90_000,
    validation_tokens=11_000,
    test_tokens=11_000,
    parameters=134_000_000,
    seed=0,
    ray=True,
    sequence_length=256,
    step_tokens=256,
)
SLOW = Speed(cache=600.0, score=400.0, worker_train=180.0, worker_score=330.0)
FAST = Speed(cache=6e4, score=4e4, worker_train=5e3, worker_score=3e4)


def config(model_type: str = "llama", constructions: tuple[object, ...] = (1,)) -> Any:
    spec = spec_from_config(tiny_config(model_type))
    return SimpleNamespace(spec=spec, constructions=constructions, sequence_length=256)


def test_a_known_family_is_tested_where_the_time_holds_a_test_that_tells() -> None:
    """By hand: six rates of 48 steps of 256 tokens, and 11,000 tokens read after each, with a sixth to spare."""
    expected = 1.15 * 6 * (48 * 256 / 5e3 + 11_000 / 4e4)
    assert share_for(config(), WORKERS, DEMAND, FAST) * 600 == pytest.approx(expected)
    # Of 24 steps each it would take 250 s.
    assert share_for(config(), WORKERS, DEMAND, SLOW) == 0
    hours = replace(DEMAND, box_seconds=7200.0)
    assert share_for(config(), WORKERS, hours, SLOW) * 7200 == pytest.approx(1.15 * 6 * (48 * 256 / 180 + 11_000 / 400))


def test_a_new_family_is_tested_whatever_the_time_holds() -> None:
    assert share_for(config("qwen3"), WORKERS, DEMAND, SLOW) == RATES
    assert share_for(config("qwen3"), WORKERS, replace(DEMAND, box_seconds=None), SLOW) == 0
    plan: Any = SimpleNamespace(seconds={"rates": 0.0})
    assert to_test(config("qwen3"), plan, WORKERS)
    assert not to_test(config(), plan, WORKERS)
    assert to_test(config(), SimpleNamespace(seconds={"rates": 9.0}), WORKERS)  # type: ignore[arg-type]


def test_nothing_is_tested_without_a_construction_or_of_a_student_that_several_processes_hold() -> None:
    assert share_for(config(constructions=()), WORKERS, DEMAND, FAST) == 0
    assert share_for(config(), replace(WORKERS, processes=2), DEMAND, FAST) == 0

"""When learning rates are tested before a search: if the time allows a conclusive test, or the family is new."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.models.config import spec_from_config
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.plan import RATES
from autodistill.search.setup.rate_phase import share_for, to_test
from autodistill.testing import tiny_config
from tests.search.planned import DEMAND, SPEED, WORKERS

ASKED = replace(DEMAND, step_tokens=256)
FAST = Speed(cache=6e4, score=4e4, worker_train=5e3, worker_score=3e4)


def config(model_type: str = "llama", constructions: tuple[object, ...] = (1,)) -> Any:
    spec = spec_from_config(tiny_config(model_type))
    return SimpleNamespace(spec=spec, constructions=constructions, sequence_length=256)


def test_a_known_family_is_tested_where_the_time_holds_a_test_that_tells() -> None:
    """By hand: six rates with 48 steps of 256 tokens, 8,192 tokens read after each, and 15% to spare."""
    expected = 1.15 * 6 * (48 * 256 / 5e3 + 8_192 / 4e4)
    assert share_for(config(), WORKERS, ASKED, FAST) * 600 == pytest.approx(expected)
    # Even with 12 steps each it would take 259 s.
    assert share_for(config(), WORKERS, ASKED, SPEED) == 0
    hours = replace(ASKED, box_seconds=7200.0)
    assert share_for(config(), WORKERS, hours, SPEED) * 7200 == pytest.approx(1.15 * 6 * (48 * 256 / 180 + 8_192 / 400))


def test_a_new_family_is_tested_whatever_the_time_holds() -> None:
    assert share_for(config("qwen3"), WORKERS, ASKED, SPEED) == RATES
    assert share_for(config("qwen3"), WORKERS, replace(ASKED, box_seconds=None), SPEED) == 0
    plan: Any = SimpleNamespace(seconds={"rates": 0.0})
    assert to_test(config("qwen3"), plan, WORKERS)
    assert not to_test(config(), plan, WORKERS)
    assert to_test(config(), SimpleNamespace(seconds={"rates": 9.0}), WORKERS)  # type: ignore[arg-type]


def test_nothing_is_tested_without_a_construction_or_of_a_student_that_several_processes_hold() -> None:
    assert share_for(config(constructions=()), WORKERS, ASKED, FAST) == 0
    assert share_for(config(), replace(WORKERS, processes=2), ASKED, FAST) == 0

"""A row of measurements: each figure has its field, the rest lies next to them, and the row says whether it fits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.evaluation.base import Direction, Measurement
from autodistill.evaluation.evaluate import Evaluation
from autodistill.hardware.budget import Budget, DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import spec_from_config
from autodistill.runs.results.make_row import _registered, make_row
from autodistill.runs.results.row import Row, Status
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan

Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


def measured(name: str, value: float, stderr: float | None = None, direction: Direction = "max") -> Measurement:
    return Measurement(name=name, value=value, unit="", direction=direction, source="simulated", stderr=stderr)


def made(*found: Measurement, **changes: Any) -> Row:
    evaluation = Evaluation(
        deployment=Q8, measurements={one.name: one for one in found}, documents=None, teacher_accuracy=0.5
    )
    plan = small_plan()
    least: dict[str, Any] = {
        "trial": "t001",
        "kind": "student",
        "name": "t001",
        "strategy": Strategy(distillation=Distillation(divergence_weight=0.0)),
        "spec": spec_from_config(CONFIG),
        "status": Status.COMPLETED,
        "split": "validation",
        "budget": Budget(memory_bytes=1000, context=256),
        "plan": plan,
        "train_tokens": plan.tokens // 2,
        "train_seconds": 1.5,
        "seed": 7,
    }
    return make_row(evaluation, **(least | changes))


def test_figures_are_in_their_fields_and_the_others_and_errors_beside_them() -> None:
    row = made(
        measured("accuracy", 0.4, 0.01), measured("memory_bytes", 999.0, direction="min"), measured("own", 3.0, 0.5)
    )
    assert (row.accuracy, row.accuracy_stderr, row.retention) == (0.4, 0.01, pytest.approx(0.8))
    assert (row.memory_bytes, type(row.memory_bytes), row.memory_source) == (999, int, "simulated")
    assert row.other == {"own": 3.0, "own_stderr": 0.5}
    assert (row.row_id, row.fidelity, row.feasible, row.reason) == ("t001-gguf-q8_0", 0.5, True, None)
    assert made(split="test").row_id == "t001-gguf-q8_0-test"
    assert made(kind="teacher").fidelity is None


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (1000.0, None),
        (1001.0, "memory: 1001 bytes, 1 over the budget of 1000"),
        (math.nan, "memory: it was not measured"),
        (None, "memory: it was not measured"),
    ],
)
def test_what_needs_more_than_the_budget_or_was_not_measured_does_not_fit(
    memory: float | None, reason: str | None
) -> None:
    row = made(*([] if memory is None else [measured("memory_bytes", memory)]))
    assert (row.feasible, row.reason) == (reason is None, reason)
    if memory is not None and math.isnan(memory):
        # NaN is not a whole number, so it stays in `other`.
        assert row.memory_bytes is None
        assert math.isnan(row.other["memory_bytes"])


def test_latency_is_predicted_on_the_device_of_the_budget_or_else_on_one_that_is_named() -> None:
    fast, other = (replace(find_device("pi 5", devices()), bandwidth=1e9 * one) for one in (10, 5))
    limits = {"memory_bytes": 1000, "context": 256, "latency": parse_latency("9s")}
    alone, here, both = (
        made(device=device, budget=budget)
        for device, budget in (
            (other, Budget(memory_bytes=1000, context=256)),
            (None, DeviceBudget(device=fast, **limits)),
            (other, DeviceBudget(device=fast, **limits)),
        )
    )
    assert "latency_ms_predicted" not in made().other
    assert (alone.latency_ms, both.latency_ms) == (None, here.latency_ms)
    assert here.latency_ms == here.other["latency_ms_predicted"] == both.other["latency_ms_predicted"] > 0
    assert alone.other["latency_ms_predicted"] > here.latency_ms


def test_a_loss_that_stands_in_for_another_is_remarked() -> None:
    row = made(strategy=Strategy(distillation=Distillation(divergence_weight=0.5)))
    assert row.other["approximate"].startswith("forward_kl of 64 tokens and the rest as one outcome")


def test_a_row_names_what_a_session_registered_if_it_was_made_with_any_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {
        "evaluators": {
            "both": SimpleNamespace(source="aa", plugin=SimpleNamespace(measures=("rouge", "bleu"))),
            "none": SimpleNamespace(source="bb", plugin=SimpleNamespace(measures=("toxicity",))),
        },
        "divergences": {name: SimpleNamespace(source=name * 2) for name in ("mine", "other")},
    }
    monkeypatch.setattr("autodistill.runs.results.make_row.plugins.registered", found.get)

    def registered(*measured: str, divergence: str = "mine", weighs_teacher: bool = True) -> Any:
        strategy: Any = SimpleNamespace(
            distillation=SimpleNamespace(divergence=divergence, weighs_teacher=weighs_teacher)
        )
        return _registered(strategy, dict.fromkeys(measured)).get("registered")

    assert registered("bleu", "accuracy") == {"mine": "minemine", "both": "aa"}
    assert registered("rouge", divergence="other", weighs_teacher=False) == {"both": "aa"}
    assert registered(divergence="other") == {"other": "otherother"}
    assert registered("accuracy", divergence="forward_kl") is None
    assert _registered(None, {"toxicity": 0}) == {"registered": {"none": "bb"}}

"""A row of measurements: each figure has its field, the rest lies next to them, and the row says whether it fits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.estimates.speed import speed
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
        "evaluation": evaluation,
    }
    return make_row(**(least | changes))


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


def test_latencies_are_milliseconds_of_the_slow_end_and_may_be_too_long() -> None:
    device = find_device("pi 5", devices())
    spec = spec_from_config(CONFIG)
    expected = speed(spec, Q8, device, context=256)
    row = made(
        measured("memory_bytes", 1000.0),
        budget=DeviceBudget(memory_bytes=1000, context=256, device=device, latency=parse_latency("9s,ttft_p50=9s")),
    )
    assert row.latency_ms == pytest.approx(expected.decode_ms_high)
    assert row.figure("tpot_p95@streams=1") == pytest.approx(expected.decode_ms_high)
    first = speed(spec, Q8, device, context=256, prompt=256).time_to_first_token_ms
    assert row.figure("ttft_p50@streams=1") == pytest.approx(first)
    assert (row.latency_source, row.machine, row.feasible, row.reason) == ("predicted", device.name, True, None)
    late = made(
        measured("memory_bytes", 1000.0),
        budget=DeviceBudget(memory_bytes=1000, context=256, device=device, latency=parse_latency("1us,ttft_p50=1us")),
    )
    assert not late.feasible
    assert [part.split(" is predicted ")[0] for part in str(late.reason).split("; ")] == [
        "latency: tpot_p95@streams=1",
        "latency: ttft_p50@streams=1",
    ]
    # What breaks the limit of memory is said instead.
    slow = DeviceBudget(memory_bytes=1000, context=256, device=device, latency=parse_latency("1us"))
    over = made(measured("memory_bytes", 1001.0), budget=slow)
    assert over.reason == "memory: 1001 bytes, 1 over the budget of 1000"


def test_a_row_says_what_it_is_of() -> None:
    spec = spec_from_config(CONFIG)
    plain = made(measured("accuracy", 0.4))
    strategy = Strategy(distillation=Distillation(divergence_weight=0.0))
    assert (plain.strategy, plain.strategy_id, plain.split, plain.status) == (
        strategy,
        strategy.id,
        "validation",
        "completed",
    )
    assert (plain.context, plain.batch, plain.params, plain.seed) == (256, 1, spec.parameters, 7)
    assert (plain.train_tokens, plain.train_seconds) == (small_plan().tokens // 2, 1.5)
    assert (plain.latency_ms, plain.latency_source, plain.machine, plain.memory_source) == (None, None, None, None)
    assert spec_from_config(plain.shape) == spec
    assert (made(strategy=None).strategy_id, made().retention) == (None, None)
    assert [made(kind=kind).fidelity for kind in ("student", "baseline", "teacher", "initial")] == [
        0.5,
        0.5,
        None,
        None,
    ]


def test_a_row_marks_memory_of_a_gpu_and_speeds_that_nobody_measured() -> None:
    gpu, pi = (find_device(name, devices()) for name in ("rtx 4090", "pi 5"))
    marks = {}
    for device in (gpu, pi):
        budget = DeviceBudget(memory_bytes=1000, context=256, device=device)
        marks[device.name] = made(budget=budget).other
    assert (marks[gpu.name].get("memory_on"), marks[pi.name].get("memory_on")) == ("discrete-gpu", None)
    for device in (gpu, pi):
        assert marks[device.name].get("latency_assumed", "") == device.shares("llama.cpp").assumed
    assert not {"memory_on", "latency_assumed", "scoring"} & set(made().other)
    evaluation = Evaluation(deployment=Q8, measurements={}, documents=None, teacher_accuracy=None, scoring="bfloat16")
    assert made(evaluation=evaluation).other["scoring"] == "bfloat16"


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

"""What may be exported, and in which order: never what was not measured, whichever way the metric is better."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autodistill.contracts import Direction
from autodistill.estimate import spec_from_config
from autodistill.records.confirmation import KIND, confirmations
from autodistill.records.row import Row
from autodistill.search.finish import exportable, trained_rows
from autodistill.search.plan import Speed
from autodistill.search.trials import Question
from autodistill.space import load_space
from autodistill.testing import small_plan
from autodistill.units import Budget

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
FORMATS = {
    "f16": {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0},
    "q8_0": {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32},
}


def question(metric: str, direction: Direction) -> Question:
    space = load_space("default")
    return Question(
        space=space,
        deployments=space.deployments,
        budget=Budget(memory_bytes=10**9),
        plan=small_plan(),
        speed=Speed(cache=1.0, score=1.0, worker_train=1.0, worker_score=1.0),
        teacher_spec=spec_from_config(CONFIG),
        teacher_accuracy=0.5,
        metric=metric,
        direction=direction,
    )


def row(trial: str, metric: str, value: float | None, packing: str = "f16", **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": f"{trial}-{packing}",
        "trial": trial,
        "kind": "student",
        "name": trial,
        "deployment": FORMATS[packing],
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "fidelity": 1.0,
        "memory_bytes": 100,
        "seed": 0,
        metric: value,
    }
    return Row(**least | fields)


@pytest.mark.parametrize(("metric", "direction"), [("accuracy", "max"), ("perplexity", "min")])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_never_exported(metric: str, direction: Direction, missing: float | None) -> None:
    rows = [row("t000", metric, 0.5), row("t001", metric, missing), row("t002", metric, 0.4)]
    found = exportable(trained_rows(rows, metric, lambda _: True), [], question(metric, direction))
    assert [one.trial for one in found] == (["t000", "t002"] if direction == "max" else ["t002", "t000"])
    alone = trained_rows(rows[1:2], metric, lambda _: True)
    assert exportable(alone, [], question(metric, direction)) == []


def test_only_students_at_full_fidelity_that_are_on_disk_and_fit() -> None:
    rows = [
        row("gone", "accuracy", 0.9),
        row("early", "accuracy", 0.9, fidelity=0.5),
        row("teacher", "accuracy", 0.9, kind="teacher"),
        row("over", "accuracy", 0.9, feasible=False),
        row("b000", "accuracy", 0.3, kind="baseline"),
    ]
    students = trained_rows(rows, "accuracy", lambda one: one.trial != "gone")
    assert [one.trial for one in students] == ["over", "b000"]
    assert [one.trial for one in exportable(students, [], question("accuracy", "max"))] == ["b000"]


def test_what_is_best_on_several_seeds_goes_first_in_its_best_deployment() -> None:
    rows = [
        row("t000", "accuracy", 0.60),
        row("t001", "accuracy", 0.55),
        row("t001", "accuracy", 0.56, "q8_0"),
        row("t000s1", "accuracy", 0.40, kind=KIND, seed=1),
        row("t001s1", "accuracy", 0.55, kind=KIND, seed=1),
    ]
    asked = question("accuracy", "max")
    confirmed = confirmations(rows, "accuracy", "max")
    found = exportable(trained_rows(rows, "accuracy", lambda _: True), confirmed, asked)
    assert [one.row_id for one in found] == ["t001-q8_0", "t001-f16", "t000-f16"]

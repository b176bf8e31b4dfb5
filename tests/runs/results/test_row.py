"""Rows through JSON, and what is refused."""

import dataclasses
import json
import math
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.runs.results.gains import Gains
from autodistill.runs.results.row import FORGOT, SCHEMA_VERSION, Row
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy

DEPLOYMENT = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
LEAST: dict[str, Any] = {
    "row_id": "t001-gguf-q4_0",
    "trial": "t001",
    "kind": "student",
    "name": "t001",
    "deployment": DEPLOYMENT.to_json(),
    "status": "completed",
    "feasible": True,
}
FULL: dict[str, Any] = LEAST | {
    "reason": None,
    "strategy_id": Strategy().id,
    "strategy": Strategy().to_json(),
    "split": "validation",
    "accuracy": 0.5,
    "accuracy_stderr": 0.01,
    "perplexity": 12.5,
    "agreement": 0.75,
    "retention": 0.9,
    "memory_bytes": 2**40 + 1,
    "memory_source": "predicted",
    "latency_ms": 1.5,
    "tokens_per_second": 640.0,
    "latency_source": "measured",
    "machine": "Raspberry Pi 5 8GB",
    "size_bytes": 98_000_000,
    "shape": {"model_type": "llama", "num_hidden_layers": 30},
    "params": 134_515_008,
    "context": 2048,
    "batch": 1,
    "train_tokens": 4096,
    "train_seconds": 12.25,
    "fidelity": 1.0,
    "interpolation": 0.5,
    "seed": 0,
    "documents": {"ids": [3, 9], "count": [10, 20], "sum": [4.0, 11.0]},
    "other": {"speed": 2.0, "speed_stderr": 0.5},
    "schema_version": 2,
}
BEFORE = "it forgot general text, where the best row without training did not"
ISSUE_FIELDS = [
    "row_id",
    "schema_version",
    "strategy_id",
    "strategy",
    "deployment",
    "status",
    "split",
    "accuracy",
    "accuracy_stderr",
    "perplexity",
    "agreement",
    "retention",
    "memory_bytes",
    "memory_source",
    "latency_ms",
    "tokens_per_second",
    "latency_source",
    "size_bytes",
    "params",
    "context",
    "batch",
    "train_tokens",
    "train_seconds",
    "fidelity",
    "seed",
    "feasible",
    "reason",
]


def test_a_row_has_the_promised_fields_and_reads_back_through_json() -> None:
    row = Row.from_json(FULL)
    assert row.to_json() == FULL
    assert set(ISSUE_FIELDS) <= set(row.to_json())
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert row.deployment_name == "gguf-q4_0"


def test_what_was_not_measured_is_null() -> None:
    data = Row.from_json(LEAST).to_json()
    assert {data[name] for name in ("accuracy", "memory_bytes", "retention", "strategy_id")} == {None}


def test_fields_of_an_unknown_name_are_left_out_but_a_newer_schema_is_refused() -> None:
    assert Row.from_json(LEAST | {"colour": "red"}) == Row.from_json(LEAST)
    with pytest.raises(
        InputError, match=r"schema version 3, this version of autodistill reads up to 2: upgrade"
    ) as told:
        Row.from_json(LEAST | {"schema_version": 3})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("said", [{}, {"schema_version": 1}])
def test_a_row_of_the_first_schema_is_read_and_keeps_its_number(said: dict[str, int]) -> None:
    """This includes types by tensor, in rows written before there was a second schema."""
    row = Row.from_json(LEAST | said)
    assert row.to_json()["schema_version"] == 1
    assert row.deployment == DEPLOYMENT
    typed = DEPLOYMENT.to_json() | {"types": {"embeddings": "q5_1"}, "cache_type_k": "q8_0", "cache_type_v": "q4_0"}
    row = Row.from_json(LEAST | said | {"deployment": typed})
    assert row.deployment.types == (("embeddings", "q5_1"),)
    assert row.deployment.cache_types == ("q8_0", "q4_0")
    assert Row.from_json(row.to_json()) == row


def test_a_row_that_is_made_is_of_the_second_schema_and_its_number_is_no_part_of_its_name() -> None:
    first = Row.from_json(LEAST)
    made = Row(**{field.name: getattr(first, field.name) for field in dataclasses.fields(Row)[:-1]})
    assert made.schema_version == SCHEMA_VERSION == 2
    assert (made.row_id, made.deployment.name) == (first.row_id, first.deployment.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pupil"}, "pupil"),
        ({"status": "over"}, "the status of row .* must be one of completed, stopped, rejected, failed, not 'over'"),
        ({"split": "train"}, "the split of row .* must be one of validation, test, not 'train'"),
        ({"accuracy": "0.5"}, "accuracy must be of type float"),
        ({"memory_bytes": 1.5}, "memory_bytes must be of type int"),
        ({"memory_bytes": True}, "memory_bytes must be of type int"),
        ({"feasible": 1}, "feasible must be of type bool"),
        ({"strategy": "x"}, "strategy must be a mapping"),
        ({"trial": None}, "lacks the field trial"),
        ({"documents": {"ids": [1], "count": [1, 2], "sum": [1]}}, "documents"),
        ({"other": {"latency_detail": {"loads": [{"prompt_tokens": 4}]}}}, "lacks streams"),
        ({"other": {"latency_detail": [1]}}, "latency_detail must be a mapping"),
        ({"other": {"memory_parts": {"device_class": 7}}}, "device_class must be text"),
        ({"cut_short": {"read": 256, "of": 1024}}, "of an evaluation that ended early"),
    ],
)
def test_a_malformed_row_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Row.from_json(LEAST | change)


def test_whole_numbers_may_come_as_floats_and_the_reverse() -> None:
    row = Row.from_json(LEAST | {"memory_bytes": 5e9, "accuracy": 1})
    assert (row.memory_bytes, type(row.memory_bytes), type(row.accuracy)) == (5_000_000_000, int, float)


def test_a_figure_is_missing_where_it_is_not_finite() -> None:
    row = dataclasses.replace(Row.from_json(FULL), accuracy=math.nan)
    assert row.figure("accuracy") is None
    assert row.figure("speed") == 2.0
    assert row.figure("nonsense") is None
    assert row.figure("name") is None


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("undistilled student", "untrained student"),
        ("solved, without training", "solved, untrained"),
        ("t003 without training", "untrained t003"),
    ],
)
def test_names_of_untrained_students_are_read_as_they_are_said_now(before: str, now: str) -> None:
    assert Row.from_json(LEAST | {"kind": "initial", "name": before}).name == now
    assert Row.from_json(LEAST | {"name": before}).name == before, "a student has the name that somebody gave it"
    gain = {"over": "initial-gguf-q8_0", "named": f"{before} as gguf-q8_0", "value": 0.1, "stderr": 0.01}
    search = {"gain_over_untrained": gain, "gain_over_baseline": None, "gain_unit": "accuracy"}
    search["exported"] = {"row_id": "t001-gguf-q8_0", "named": "t001 as gguf-q8_0", "trained": True}
    gains = Gains.from_json(search)
    assert gains is not None
    assert f"({now} as gguf-q8_0)" in gains.describe()


def test_what_forgot_in_an_earlier_version_keeps_to_the_budget_all_the_same() -> None:
    assert Row.from_json(LEAST | {"feasible": False, "reason": BEFORE}).reason == FORGOT

"""What holds for every evaluator that is installed."""

from __future__ import annotations

import json
import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.contracts import Subject
from autodistill.plugins import load, names
from autodistill.strategy import Deployment

PACKED = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
UNITS = {
    "accuracy": ("fraction", "max"),
    "agreement": ("fraction", "max"),
    "answer_ms": ("ms", "min"),
    "exact_match": ("fraction", "max"),
    "latency_ms": ("ms", "min"),
    "memory_bytes": ("bytes", "min"),
    "perplexity": ("perplexity", "min"),
    "size_bytes": ("bytes", "min"),
    "tokens_per_second": ("tokens/s", "max"),
    "ttft_ms": ("ms", "min"),
}


@pytest.fixture(params=names("evaluators"))
def evaluator(request: pytest.FixtureRequest) -> Any:
    return load("evaluators", request.param)


@pytest.fixture
def prepared(evaluator: Any, subject: Subject, request: pytest.FixtureRequest) -> Subject:
    if evaluator.needs != "artefact":
        return subject
    return replace(subject, artefact=request.getfixturevalue("artefact"))


def test_measurements_are_finite_and_plain_with_unit_direction_and_source(evaluator: Any, prepared: Subject) -> None:
    sources = {"spec": "predicted", "scores": "simulated", "answers": "simulated", "artefact": "measured"}
    measurements = evaluator.evaluate(prepared)
    assert measurements
    for measurement in measurements:
        assert (measurement.unit, measurement.direction) == UNITS[measurement.name]
        assert measurement.source == sources[evaluator.needs]
        assert math.isfinite(measurement.value)
        assert measurement.value > 0
        assert json.loads(json.dumps(measurement.to_json(), allow_nan=False)) == measurement.to_json()


def test_what_is_not_timed_is_the_same_each_time(evaluator: Any, prepared: Subject) -> None:
    if evaluator.name == "latency":
        pytest.skip("times differ from run to run")
    assert evaluator.evaluate(prepared) == evaluator.evaluate(prepared)


def test_names_are_unique_to_one_evaluator(subject: Subject, artefact: Path) -> None:
    ready = replace(subject, artefact=artefact)
    found = [item.name for name in names("evaluators") for item in load("evaluators", name).evaluate(ready)]
    assert sorted(found) == sorted(UNITS)


def test_only_latency_is_tied_to_one_runtime(evaluator: Any, subject: Subject) -> None:
    assert evaluator.supports(subject.deployment)
    assert evaluator.supports(PACKED) == (evaluator.name != "latency")


def test_nothing_is_fetched_or_left_behind(
    evaluator: Any, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an evaluator reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    if evaluator.needs != "artefact":
        evaluator.evaluate(subject)
    assert list(tmp_path.iterdir()) == []


def test_missing_scores_or_artefact_are_an_error(evaluator: Any, subject: Subject) -> None:
    if evaluator.needs != "spec":
        with pytest.raises(ValueError, match=f"{evaluator.name} is .* and the subject has none"):
            evaluator.evaluate(replace(subject, scores=None, answers=None, artefact=None))

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.latency import Latency
from autodistill.hardware.budget import DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.strategy.deployment import Deployment

PLAIN = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)


# tests/advisor/test_measure.py also times a folder in its process.
@pytest.mark.parametrize("runtime", ["llama.cpp", pytest.param("transformers", marks=pytest.mark.slow)])
def test_states_what_it_measured_and_how(subject: Subject, student: Path, artifact: Path, runtime: str) -> None:
    given: dict[str, Any] = {"artifact": artifact} if runtime == "llama.cpp" else {"artifact": student}
    if runtime == "transformers":
        given["deployment"] = PLAIN
    measurements = {item.name: item for item in Latency().evaluate(replace(subject, threads=1, **given))}
    assert set(measurements) == {"latency_ms", "ttft_ms", "answer_ms", "tokens_per_second"}
    detail = measurements["latency_ms"].detail
    assert (detail["runtime"], detail["threads"], detail["context"]) == (runtime, 1, 512)
    assert set(detail["ttft_ms"]) == {"16", "64", "256"}
    (alone,) = detail["loads"]
    assert (alone["streams"], alone["prompt_tokens"], alone["decoded_tokens"]) == (1, 64, 5 * 47)
    assert 0 < alone["tpot_p50_ms"] <= alone["tpot_p95_ms"] <= alone["tpot_p99_ms"]
    assert measurements["latency_ms"].value == pytest.approx(alone["tpot_p95_ms"])
    assert measurements["answer_ms"].value > measurements["ttft_ms"].value


@pytest.mark.slow
def test_what_a_budget_limits_is_timed_at_its_streams(subject: Subject, artifact: Path) -> None:
    limits = parse_latency("ttft_p95=9s,tpot_p99=9s@streams=3")
    budget = DeviceBudget(memory_bytes=10**9, context=600, device=find_device("pi 4", devices()), latency=limits)
    found = {item.name: item for item in Latency().evaluate(replace(subject, artifact=artifact, budget=budget))}
    assert {limit.name for limit in limits} <= set(found)
    loads = found["latency_ms"].detail["loads"]
    # As many of 512 tokens as the model's context holds next to the answer.
    assert [(load["streams"], load["prompt_tokens"]) for load in loads] == [(1, 464), (3, 464)]
    assert found["ttft_p95@streams=3"].value == pytest.approx(loads[1]["ttft_p95_ms"])
    assert loads[1]["ttft_p95_ms"] > loads[1]["ttft_p50_ms"] * 0.5
    assert found["tpot_p99@streams=3"].value == pytest.approx(loads[1]["tpot_p99_ms"])
    # Stored with the figures, so that a later reader of the row knows that these were timed.
    kept = found["latency_ms"].detail["limits"]
    assert kept == {limit.name: found[limit.name].value for limit in limits}


def test_a_shorter_context_than_the_prompts_has_shorter_ones(subject: Subject, artifact: Path) -> None:
    short = replace(subject, artifact=artifact, budget=replace(subject.budget, context=16))
    assert all(measurement.value > 0 for measurement in Latency().evaluate(short))


def test_what_cannot_serve_here_is_not_measured() -> None:
    assert Latency().supports(PLAIN)
    assert not Latency().supports(Deployment(runtime="vllm", format="huggingface", bits=16, group_size=0))

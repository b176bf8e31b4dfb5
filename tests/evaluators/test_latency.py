from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from autodistill.evaluators.latency import Latency

from autodistill.contracts import Subject
from autodistill.llama_cpp import LlamaServer, Timing


def test_states_what_it_measured_and_how(subject: Subject, artefact: Path) -> None:
    measurements = {item.name: item for item in Latency().evaluate(replace(subject, artefact=artefact, threads=1))}
    assert set(measurements) == {"latency_ms", "ttft_ms", "tokens_per_second"}
    detail = measurements["latency_ms"].detail
    assert (detail["threads"], detail["context"], detail["streams"], detail["prompt_tokens"]) == (1, 512, 1, 128)
    assert 0 < detail["p50_ms"] <= detail["p95_ms"] == measurements["latency_ms"].value


def test_the_warm_up_is_left_out_and_tokens_are_pooled(
    subject: Subject, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = np.random.default_rng(0)
    rounds = [Timing(prompt_ms=900.0, prompt_tokens=128, step_ms=(1000.0,) * 63)]
    rounds += [
        Timing(prompt_ms=first, prompt_tokens=128, step_ms=tuple(dice.uniform(1, 9, size=63)))
        for first in (30.0, 70.0, 40.0)
    ]
    steps = sorted(step for timing in rounds[1:] for step in timing.step_ms)
    pending = iter(rounds)
    monkeypatch.setattr(LlamaServer, "time_tokens", lambda *_: next(pending))
    p95, first, rate = Latency().evaluate(replace(subject, artefact=artefact))
    assert next(pending, None) is None
    assert first.value == 40.0
    assert rate.value == pytest.approx(189 / (sum(steps) / 1000))
    assert p95.detail["p50_ms"] == pytest.approx(steps[94])
    assert steps[178] <= p95.value <= steps[179]


def test_a_longer_context_than_the_prompt_is_not_needed(subject: Subject, artefact: Path) -> None:
    short = replace(subject, artefact=artefact, budget=replace(subject.budget, context=16))
    assert all(measurement.value > 0 for measurement in Latency().evaluate(short))

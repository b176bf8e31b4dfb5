"""A few strategies of a space show what a search needs for it, whichever strategies its trials have."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.search.planning.representatives import alignment_cases, attention_cases, signal_cases
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Alignment, Attention
from autodistill.strategy.space import Space, load_space

DEPLOYMENTS = [{"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}]


def space_of(dimensions: dict[str, Any], **fields: Any) -> Space:
    return Space.from_json({"dimensions": dimensions, "deployments": DEPLOYMENTS} | fields)


def test_alignment_cases_hold_whatever_a_trial_may_need() -> None:
    space = load_space("declared")
    cases = alignment_cases(space, 30)
    known = {(int(init.depth * 30 + 1e-9), init.layers, item.layers, item.count) for init, item in cases}
    # Three depths with three choices of layers, and all layers, each with four alignments.
    assert len(known) == len(cases) == 4 * (3 * 3 + 1)
    for seed in range(200):
        source = random.Random(seed)
        (point, *_) = space.points(lambda dimension, source=source: [dimension.domain.at(source.random())])
        strategy = space.strategy(point)
        alignment = strategy.distillation.alignment
        if alignment:
            depth = int(strategy.init.depth * 30 + 1e-9)
            assert (depth, strategy.init.layers, alignment.layers, alignment.count) in known


def test_alignment_cases_of_a_continuous_depth_and_of_baselines() -> None:
    aligned = {"choices": {"none": None, "last": {"layers": "last"}}}
    dimensions = {"init.depth": {"low": 0.31, "high": 0.62}, "distillation.alignment": aligned}
    cases = alignment_cases(space_of(dimensions, baselines=["hand_designed"]), 10)
    assert {(int(init.depth * 10 + 1e-9), item.count) for init, item in cases} == {
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 1),
        (8, 4),
    }
    assert alignment_cases(space_of({"init.depth": {"low": 0.5, "high": 0.8}}), 10) == ()
    assert all(isinstance(item, Alignment) for _, item in cases)


def test_attention_cases_hold_every_layer_that_a_trial_may_follow() -> None:
    attended = {"choices": {"none": None, "maps": {"kind": "maps"}}}
    depths = {"low": 0.45, "high": 0.8, "when": {"distillation.attention": ["maps"]}}
    dimensions = {"distillation.attention": attended, "distillation.attention.teacher_depth": depths}
    cases = attention_cases(space_of(dimensions, baselines=["full_recipe"]), 10)
    assert {int(item.teacher_depth * 10 + 1e-9) for item in cases} == {4, 5, 6, 7, 8, 10}
    assert all(isinstance(item, Attention) for item in cases)
    assert attention_cases(load_space("declared"), 30) == ()


def test_signal_cases_hold_every_signal_and_temperature() -> None:
    dimensions = {
        "distillation.signal": {"choices": ["top-k", "online"]},
        "distillation.signal_tokens": {"choices": [8, 16], "when": {"distillation.signal": ["top-k"]}},
        "distillation.divergence_weight": {"low": 0.0, "high": 1.0},
        "distillation.temperature.start": {"low": 1.0, "high": 4.0},
        "distillation.learning_rate": {"low": 1e-4, "high": 1e-3},
    }
    # Without its own number, the online signal would keep the default, which is for sparse signals.
    with pytest.raises(InputError, match="signal_tokens"):
        space_of(dimensions)
    dimensions["distillation.signal_tokens"] = {"choices": [0], "when": {"distillation.signal": ["online"]}}
    space = space_of(dimensions)
    cases = signal_cases(space)
    found = {(case.signal, case.signal_tokens, case.divergence_weight, case.temperature.start) for case in cases}
    expected = {(s, n, w, t) for s, n in (("top-k", 64), ("online", 0)) for w in (0.0, 1.0) for t in (1.0, 4.0)}
    assert found == expected
    assert len(cases) == len(expected)


def test_signal_cases_without_dimensions_are_the_baselines() -> None:
    strategy = load_strategy("gkd")
    space = dataclasses.replace(load_space("declared"), dimensions=(), baselines={"gkd": strategy})
    assert signal_cases(space) == (strategy.distillation,)

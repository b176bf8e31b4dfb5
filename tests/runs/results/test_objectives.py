"""Names of objectives, and the front: never without a measurement, and against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.objectives import OBJECTIVES, front, objectives_of, parse_objectives, with_front
from autodistill.runs.results.row import Row

DEPLOYMENT = {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0}


def row(name: str, accuracy: float | None, memory: int | None = 1, latency: float | None = 1.0, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": name,
        "trial": name,
        "kind": "student",
        "name": name,
        "deployment": DEPLOYMENT,
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "fidelity": 1.0,
        "accuracy": accuracy,
        "memory_bytes": memory,
        "other": {"latency_ms_predicted": latency},
    }
    return Row.from_json(least | fields)


THREE = parse_objectives("accuracy, memory,latency")
VALUES = st.sampled_from([1, 2, 3])


def test_names_are_read_in_their_order() -> None:
    assert [(one.figure, one.direction) for one in THREE] == [
        ("accuracy", "max"),
        ("memory_bytes", "min"),
        ("latency_ms_predicted", "min"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("accuracy,speed", ["'speed'", "whose direction is not known", *OBJECTIVES]),
        ("accuracy,", ["''", "whose direction is not known"]),
        ("accuracy,memory,accuracy", ["twice"]),
        ("memory,accuracy", ["'memory'", "put one of accuracy, agreement, kl, ece, perplexity, exact_match first"]),
    ],
)
def test_what_cannot_be_an_objective_is_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse_objectives(text)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_names_none_has_its_metric() -> None:
    assert [one.name for one in objectives_of({"metric": "perplexity"})] == ["perplexity"]
    assert [one.name for one in objectives_of({"objectives": ["accuracy", "size"]})] == ["accuracy", "size"]


@given(table=st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_front_is_what_nothing_beats(table: list[tuple[int, int, int]]) -> None:
    rows = [row(f"t{index:02d}", a / 10, m, float(s)) for index, (a, m, s) in enumerate(table)]
    costs = {one.row_id: (-a, m, s) for one, (a, m, s) in zip(rows, table, strict=True)}
    expected = {
        name
        for name, mine in costs.items()
        if not any(all(x <= y for x, y in zip(other, mine, strict=True)) and other != mine for other in costs.values())
    }
    assert {one.row_id for one in front(rows, THREE)} == expected


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lacking", ["accuracy", "latency"])
def test_a_missing_measurement_is_never_on_the_front(missing: float | None, lacking: str) -> None:
    rows = [row("whole", 0.3), row("broken", **({"accuracy": 0.9, "latency": 1e-9} | {lacking: missing}))]
    assert [one.row_id for one in front(rows, THREE)] == ["whole"]
    memoryless = row("unknown", 0.9, memory=None)
    assert [one.row_id for one in front([*rows, memoryless], THREE)] == ["whole"]


def test_the_front_is_of_what_could_be_deployed() -> None:
    rows = [
        row("t000", 0.3),
        row("over", 0.9, feasible=False),
        row("early", 0.9, fidelity=0.5),
        row("t000s1", 0.9, kind="confirmation"),
        row("teacher", 0.4, memory=2, kind="teacher", fidelity=None),
    ]
    assert [one.row_id for one in front(rows, THREE)] == ["teacher", "t000"]
    marked = {one.row.row_id: one.front for one in with_front(rank(rows), THREE)}
    assert marked == {name: name in ("t000", "teacher") for name in marked}
    assert not any(one.front for one in with_front(rank(rows), THREE[:1]))


def test_a_searchs_own_metrics_are_objectives_with_their_own_directions():
    first, second = parse_objectives("task:quiz,memory", {"task:quiz": "min"})
    assert (first.name, first.figure, first.direction, first.trained) == ("task:quiz", "task:quiz", "min", True)
    assert second == OBJECTIVES["memory"]
    stored = {"objectives": ["task:quiz", "memory"], "directions": {"task:quiz": "min"}}
    assert objectives_of(stored) == (first, second)
    with pytest.raises(InputError, match="task:other"):
        parse_objectives("task:other", {"task:quiz": "min"})

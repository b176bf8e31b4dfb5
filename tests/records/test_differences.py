"""Differences to every other row of the test split, each under a name of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from autodistill.records.differences import differences, shown
from autodistill.records.row import Row
from autodistill.statistics import widening

FULL = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
F16 = {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0}
Q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}


def row(kind: str, deployment: dict[str, Any], right: list[int]) -> Row:
    return Row(
        row_id=f"{kind}-{deployment['format']}",
        trial=kind,
        kind=kind,
        name=kind,
        deployment=deployment,
        status="completed",
        feasible=True,
        split="test",
        documents={"ids": list(range(len(right))), "count": [100] * len(right), "sum": right},
    )


def test_differences_and_their_errors_are_those_of_the_documents() -> None:
    mine, theirs = [50, 60, 40, 50], [46, 58, 41, 49]
    (found,) = differences([row("student", Q8, mine), row("teacher", FULL, theirs)])
    gaps = np.subtract(mine, theirs) / 100
    assert (found.to, found.documents) == ("teacher", 4)
    assert found.difference == pytest.approx(gaps.mean())
    assert found.stderr == pytest.approx(scipy.stats.sem(gaps) * widening(4), rel=0.1)
    (alone,) = differences([row("student", Q8, mine[:1]), row("teacher", FULL, theirs[:1])])
    assert alone.stderr is None


def test_two_teachers_of_16_bits_are_told_apart_and_fill_a_column_each() -> None:
    teachers = [row("teacher", FULL, [60, 60]), row("teacher", F16, [70, 70])]
    found = differences([row("student", F16, [50, 50]), *teachers])
    assert [item.to for item in found] == ["teacher as huggingface", "teacher as gguf-f16"]
    head, line = shown(found)
    assert head[1:] == ["teacher as huggingface", "teacher as gguf-f16"]
    assert [cell.split()[0] for cell in line[1:]] == ["-0.1000", "-0.2000"]
    found = differences([row("student", Q8, [50, 50]), teachers[0], row("teacher", Q8, [60, 60])])
    assert [item.to for item in found] == ["teacher", "quantised teacher"]

"""Means over seeds are those of numpy, and the choice follows the rule of ties, paired by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autodistill.records.confirmation import KIND, confirmations, confirmed_trial, confirming
from autodistill.records.row import Row


def rows(
    trial: str, values: list[float | None], *, memory: int = 100, name: str = "gguf-q8_0", **more: Any
) -> list[Row]:
    """The trial on seed 0 and its confirmations on the seeds after it."""
    bits = 8 if name == "gguf-q8_0" else 4
    least: dict[str, Any] = {
        "name": trial,
        "deployment": {"runtime": "llama.cpp", "format": name, "bits": bits, "group_size": 32},
        "status": "completed",
        "feasible": True,
        "fidelity": 1.0,
        "split": "validation",
        "memory_bytes": memory,
    } | more
    ids = [trial, *(confirming(trial, seed) for seed in range(1, len(values)))]
    return [
        Row(
            row_id=f"{own}-{name}",
            trial=own,
            kind=KIND if seed else "student",
            seed=seed,
            accuracy=value,
            **least,
        )
        for seed, (own, value) in enumerate(zip(ids, values, strict=True))
    ]


def test_a_confirmation_names_its_trial() -> None:
    assert [confirmed_trial(row) for row in rows("t012", [0.1, 0.2, 0.3])[1:]] == ["t012", "t012"]


def test_means_errors_and_paired_differences() -> None:
    first, second = [0.50, 0.54, 0.52], [0.40, 0.46, 0.43]
    found = confirmations([*rows("t001", second), *rows("t000", first), *rows("t002", [0.9])], "accuracy", "max")
    assert [item.trial for item in found] == ["t000", "t001"]  # what was never confirmed is not compared
    assert found[0].seeds == (0, 1, 2)
    for item, values in zip(found, (first, second), strict=True):
        assert item.mean == pytest.approx(np.mean(values))
        assert item.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    gaps = np.subtract(second, first)
    assert found[1].difference == pytest.approx(gaps.mean())
    assert found[1].difference_stderr == pytest.approx(gaps.std(ddof=1) / np.sqrt(3))


def test_the_smallest_of_what_is_tied_is_chosen() -> None:
    """Its mean is lower by 0.01, with an error of 0.0115; at half the noise it is no longer tied."""
    best = rows("t000", [0.50, 0.50, 0.50], memory=200)
    assert confirmations([*best, *rows("t001", [0.51, 0.47, 0.49], memory=100)], "accuracy", "max")[0].trial == "t001"
    assert confirmations([*best, *rows("t001", [0.495, 0.485, 0.49], memory=100)], "accuracy", "max")[0].trial == "t000"


def test_less_is_better_where_the_metric_says_so() -> None:
    many = [*rows("t000", [5.0, 5.1]), *rows("t001", [4.0, 4.1])]
    named = [Row.from_json(row.to_json() | {"perplexity": row.accuracy, "accuracy": None}) for row in many]
    found = confirmations(named, "perplexity", "min")
    assert [item.trial for item in found] == ["t001", "t000"]
    assert found[1].difference == pytest.approx(1.0)


def test_a_seed_without_a_value_counts_nowhere_and_an_infeasible_row_is_not_chosen() -> None:
    found = confirmations(
        [*rows("t000", [0.5, None, 0.7]), *rows("t001", [0.9, 0.9, 0.9], feasible=False)], "accuracy", "max"
    )
    assert [(item.trial, item.seeds, item.values) for item in found] == [("t000", (0, 2), (0.5, 0.7))]
    assert confirmations([], "accuracy", "max") == []


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_means_are_of_the_same_seeds(missing: float | None) -> None:
    """Seed 1 was hard for both; that one of them failed on it must not make it the better one."""
    found = confirmations([*rows("t000", [0.5, 0.1, 0.6]), *rows("t001", [0.4, missing, 0.5])], "accuracy", "max")
    assert [(item.trial, item.seeds) for item in found] == [("t000", (0, 2)), ("t001", (0, 2))]
    assert found[0].mean == pytest.approx(0.55)

"""Means over seeds equal numpy's, and the choice follows the rule of ties, paired by seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import KIND, _stderr, confirmations, confirmed_trial, confirming
from autodistill.strategy.deployment import Deployment


def rows(
    trial: str, values: list[float | None], *, memory: int = 100, name: str = "gguf-q8_0", **more: Any
) -> list[Row]:
    """Return the trial's row on seed 0, and its confirmations on the following seeds."""
    bits = int(name.removeprefix("gguf-q")[0])
    least: dict[str, Any] = {
        "name": trial,
        "deployment": Deployment(runtime="llama.cpp", format=name, bits=bits, group_size=32, symmetric=name[-1] == "0"),
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
    first, second = [0.90, 0.50, 0.54, 0.52], [0.30, 0.40, 0.46, 0.43]
    found = confirmations([*rows("t001", second), *rows("t000", first), *rows("t002", [0.9])], "accuracy", "max")
    few = 1.3213  # Student's t for 2 degrees of freedom and 68.27%: tan(asin(p)) sqrt(2), by its closed form
    assert [item.trial for item in found] == ["t000", "t001"]  # a trial without confirmation is not compared
    # Both were selected on seed 0, so it does not count.
    assert found[0].seeds == (1, 2, 3)
    for item, values in zip(found, (first, second), strict=True):
        assert item.mean == pytest.approx(np.mean(values[1:]))
        assert item.stderr == pytest.approx(few * np.std(values[1:], ddof=1) / np.sqrt(3), rel=1e-3)
    gaps = np.subtract(second, first)[1:]
    assert found[1].difference == pytest.approx(gaps.mean())
    assert found[1].difference_stderr == pytest.approx(few * gaps.std(ddof=1) / np.sqrt(3), rel=1e-3)


def test_errors_over_two_seeds_hold_as_often_as_they_say() -> None:
    """The mean of two seeds lies within its error of the true mean in 68 of 100 searches.

    Without widening, it is 50.
    """
    dice = np.random.default_rng(5)
    within = []
    for one, two in dice.normal(0.5, 0.01, size=(4000, 2)):
        item = confirmations(rows("t000", [0.5, one, two]), "accuracy", "max")[0]
        assert item.stderr is not None
        within.append(abs(item.mean - 0.5) <= item.stderr)
    assert np.mean(within) == pytest.approx(0.683, abs=0.03)


def test_what_the_strategies_were_selected_on_does_not_choose_between_them() -> None:
    """All strategies are equally good. The selected one was luckiest on the search's seed, and really gains nothing."""
    dice = np.random.default_rng(3)
    gains = []
    for _ in range(300):
        noise = dice.normal(0.5, 0.01, size=(12, 4))
        selected = noise[np.argmax(noise[:11, 0])]
        found = confirmations([*rows("t000", list(selected)), *rows("b000", list(noise[11]))], "accuracy", "max")
        means = {item.trial: item.mean for item in found}
        gains.append(means["t000"] - means["b000"])
    error = np.std(gains) / np.sqrt(300)
    # If seed 0 counted among the four, the mean gain would be a quarter of the largest of 11: 0.004.
    assert abs(np.mean(gains)) < 3 * error < 0.002


def test_of_a_single_further_seed_the_searchs_own_counts_too() -> None:
    found = confirmations([*rows("t000", [0.5, 0.6]), *rows("t001", [0.4, 0.4])], "accuracy", "max")
    assert [(item.seeds, item.values) for item in found] == [((0, 1), (0.5, 0.6)), ((0, 1), (0.4, 0.4))]


def test_the_smallest_of_what_is_tied_is_chosen() -> None:
    """Its mean is lower by 0.01, with an error of 0.0115. With half of the noise it is no longer tied."""
    best = rows("t000", [0.5, 0.50, 0.50, 0.50], memory=200)
    near = rows("t001", [0.4, 0.51, 0.47, 0.49], memory=100)
    assert confirmations([*best, *near], "accuracy", "max")[0].trial == "t001"
    worse = rows("t001", [0.6, 0.495, 0.485, 0.49], memory=100)
    assert confirmations([*best, *worse], "accuracy", "max")[0].trial == "t000"


def test_another_deployment_of_the_best_is_chosen_only_if_it_is_tied_itself() -> None:
    best = rows("t000", [0.5, 0.51, 0.50, 0.52], memory=200)
    for lost, chosen in ((0.2, "gguf-q8_0"), (0.0, "gguf-q4_0")):
        values: list[float | None] = [0.5, 0.51 - lost, 0.50 - lost - 0.01, 0.52 - lost + 0.01]
        packed = rows("t000", values, memory=100, name="gguf-q4_0")
        assert confirmations([*best, *packed], "accuracy", "max")[0].row_id == f"t000-{chosen}"


def test_what_was_exported_is_still_chosen_once_its_runtime_was_measured() -> None:
    """The two are tied. t001 is predicted to need less. Its measurement is 10 bytes higher, and t002's would be too."""
    first, second = rows("t001", [0.5, 0.52, 0.51, 0.5], memory=240), rows("t002", [0.5, 0.51, 0.5, 0.52], memory=245)
    assert confirmations([*first, *second], "accuracy", "max")[0].trial == "t001"
    measured = replace(first[0], memory_bytes=250, memory_source="measured", other={"memory_bytes_predicted": 240})
    found = confirmations([measured, *first[1:], *second], "accuracy", "max")
    assert (found[0].trial, found[0].memory_bytes) == ("t001", 250)


def test_after_the_chosen_one_come_the_others_by_their_means() -> None:
    """The means are 0.4, 0.1, 0.3, 0.1 and 0.2. Of two that are equal, the first name comes first."""
    means = {"t000": 0.4, "t001": 0.1, "t002": 0.3, "t004": 0.2, "t003": 0.1}
    many = [row for trial, mean in means.items() for row in rows(trial, [0.5, mean - 0.01, mean + 0.01])]
    found = confirmations(many, "accuracy", "max")
    assert [item.trial for item in found] == ["t000", "t002", "t004", "t001", "t003"]
    named = [Row.from_json(row.to_json() | {"perplexity": row.accuracy, "accuracy": None}) for row in many]
    found = confirmations(named, "perplexity", "min")
    assert [item.trial for item in found][1:] == [
        {"t001": "t003", "t003": "t001"}[found[0].trial],
        "t004",
        "t002",
        "t000",
    ]


def test_less_is_better_where_the_metric_says_so() -> None:
    many = [*rows("t000", [5.0, 5.1]), *rows("t001", [4.0, 4.1])]
    named = [Row.from_json(row.to_json() | {"perplexity": row.accuracy, "accuracy": None}) for row in many]
    found = confirmations(named, "perplexity", "min")
    assert [item.trial for item in found] == ["t001", "t000"]
    assert found[1].difference == pytest.approx(1.0)


def test_a_seed_without_a_value_does_not_count_and_an_infeasible_row_is_not_chosen() -> None:
    found = confirmations(
        [*rows("t000", [0.5, None, 0.7]), *rows("t001", [0.9, 0.9, 0.9], feasible=False)], "accuracy", "max"
    )
    assert [(item.trial, item.seeds, item.values) for item in found] == [("t000", (0, 2), (0.5, 0.7))]
    assert confirmations([], "accuracy", "max") == []


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_means_are_of_the_same_seeds(missing: float | None) -> None:
    """Seed 1 was hard for both. A trial that failed on this seed must not look better because of that."""
    found = confirmations([*rows("t000", [0.5, 0.1, 0.6]), *rows("t001", [0.4, missing, 0.5])], "accuracy", "max")
    assert [(item.trial, item.seeds) for item in found] == [("t000", (0, 2)), ("t001", (0, 2))]
    assert found[0].mean == pytest.approx(0.55)


def seeds(*trained: list[float | None], **more: Any) -> dict[str, tuple[int, ...]]:
    """Return the seeds that count, by trial, for values on the search's seed and on further ones."""
    every = [row for number, values in enumerate(trained) for row in rows(f"t{number:03d}", values)]
    return {item.trial: item.seeds for item in confirmations([*every, *more.get("also", ())], "accuracy", "max")}


def test_a_training_that_failed_or_came_late_takes_its_seed_from_nobody_else() -> None:
    whole: list[float | None] = [0.5, 0.5, 0.5, 0.5]
    assert seeds(whole, whole, [0.5, 0.4]) == {"t000": (1, 2, 3), "t001": (1, 2, 3)}
    assert seeds(whole, whole, whole, [0.5, 0.4, None, 0.4]) == {f"t00{n}": (1, 2, 3) for n in range(3)}
    # If the time ends within a seed, all strategies only count the seeds before it: having that seed gains nothing.
    assert seeds([0.5, 0.5, 0.5], [0.4, 0.6], [0.4, 0.6]) == {f"t00{n}": (0, 1) for n in range(3)}
    # A strategy evaluated in many deployments on a single seed still counts once.
    packings = ("q5_1", "q5_0", "q4_1", "q4_0")
    many = [row for packing in packings for row in rows("t000", [0.5, 0.5], name=f"gguf-{packing}")]
    assert seeds(whole, whole, also=many) == {"t000": (1, 2, 3), "t001": (1, 2, 3)}


def test_of_one_seed_nobody_knows_how_much_seeds_vary() -> None:
    assert _stderr(np.array([0.25])) is None
    assert _stderr(np.array([0.25, 0.25])) == 0
    # Their deviation is the root of a half. One of twice as much has an error of twice as much.
    once, twice = (_stderr(scale * np.array([0.0, 1.0])) for scale in (1.0, 2.0))
    assert once is not None
    assert twice == pytest.approx(2 * once)
    assert once > np.sqrt(0.5) / np.sqrt(2)

"""The knapsack, compared with every possible choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from autodistill.search.solve.knapsack import Knapsack

Items = dict[str, dict[str, tuple[int, float]]]


def made(seed: int, unit: int, items: int = 6) -> Items:
    dice = np.random.default_rng(seed)
    found: Items = {}
    for item in range(items):
        sizes = unit * dice.integers(3, 40, 4)
        # Some options are dominated, and some are free.
        costs = np.round(dice.random(4) * (dice.random(4) > 0.2), 4)
        found[f"item {item}"] = {f"kind {k}": (int(sizes[k]), float(costs[k])) for k in range(4)}
    return found


def every(items: Items) -> list[tuple[int, float]]:
    """Return bytes and cost of each choice."""
    return [
        (sum(size for size, _ in choice), sum(cost for _, cost in choice))
        for choice in product(*(options.values() for options in items.values()))
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", [1, 640])
def test_every_limit_has_its_optimum(seed: int, unit: int) -> None:
    items = made(seed, unit)
    choices, solver = every(items), Knapsack(items)
    assert solver.least == min(size for size, _ in choices)
    for limit in np.linspace(solver.least - 1, max(size for size, _ in choices) + unit, 40).astype(int).tolist():
        fitting = [cost for size, cost in choices if size <= limit]
        found = solver.best(limit)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        cost, chosen = found
        assert list(chosen) == list(items)
        assert sum(items[name][kind][0] for name, kind in chosen.items()) <= limit
        assert cost == pytest.approx(sum(items[name][kind][1] for name, kind in chosen.items()))
        assert cost == pytest.approx(min(fitting))


def test_a_coarser_unit_still_keeps_to_the_limit() -> None:
    items = made(9, 7)
    choices, solver = every(items), Knapsack(items, most_cells=40)
    for limit in range(solver.least, max(size for size, _ in choices), 13):
        found = solver.best(limit)
        assert found is not None
        size = sum(items[name][kind][0] for name, kind in found[1].items())
        assert size <= limit
        assert found[0] >= min(cost for size, cost in choices if size <= limit) - 1e-12


def test_items_without_a_choice_are_taken_as_they_are() -> None:
    solver = Knapsack({"a": {"x": (5, 0.5)}, "b": {"y": (7, 0.25)}})
    assert solver.best(11) is None
    assert solver.best(12) == (0.75, {"a": "x", "b": "y"})

"""The multiple-choice knapsack: pick one option of each item so that costs are least within a limit of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

MOST_CELLS = 2**17


class Knapsack:
    """Solves the knapsack for all limits at once, by a dynamic programme over bytes.

    Bytes are counted in the largest unit that divides all differences between options. This unit is large because
    weights are stored in blocks, and with it every limit has its exact optimum. If that would take more than
    `most_cells` cells, the unit is larger and options are rounded up to it. The choice then still fits, but may miss
    the optimum by one unit per item.

    Args:
        items: The options of each item, with the bytes and the cost of each.
        most_cells: Largest number of cells with the exact unit.
    """

    def __init__(self, items: Mapping[str, Mapping[str, tuple[int, float]]], most_cells: int = MOST_CELLS) -> None:
        self._items = {name: undominated(options) for name, options in items.items()}
        self.least = sum(min(size for size, _ in options.values()) for options in self._items.values())
        most = sum(max(size for size, _ in options.values()) for options in self._items.values())
        extras = {
            name: {kind: size - min(one for one, _ in options.values()) for kind, (size, _) in options.items()}
            for name, options in self._items.items()
        }
        exact = math.gcd(*(extra for options in extras.values() for extra in options.values())) or 1
        span = max(1, most - self.least)
        self._unit = exact * max(1, math.ceil(span / exact / most_cells))
        self._steps = {
            name: {kind: -(-extra // self._unit) for kind, extra in options.items()} for name, options in extras.items()
        }
        cells = 1 + sum(max(steps.values()) for steps in self._steps.values())
        self._taken: list[npt.NDArray[np.int16]] = []
        costs = np.zeros(cells)
        for name, options in self._items.items():
            best = np.full(cells, np.inf)
            taken = np.zeros(cells, dtype=np.int16)
            for index, (kind, (_, cost)) in enumerate(options.items()):
                step = self._steps[name][kind]
                found = costs[: cells - step] + cost
                better = found < best[step:]
                best[step:][better] = found[better]
                taken[step:][better] = index
            costs = best
            self._taken.append(taken)
        self._costs = costs

    def best(self, limit: int) -> tuple[float, dict[str, str]] | None:
        """Return the least cost within a limit and the option of each item, or None if nothing fits.

        Args:
            limit: Bytes of all items together.
        """
        if limit < self.least:
            return None
        cell = min(len(self._costs) - 1, (limit - self.least) // self._unit)
        cost, chosen = float(self._costs[cell]), {}
        for (name, options), taken in reversed(list(zip(self._items.items(), self._taken, strict=True))):
            kind = list(options)[int(taken[cell])]
            chosen[name] = kind
            cell -= self._steps[name][kind]
        return cost, {name: chosen[name] for name in self._items}


def undominated(options: Mapping[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """Return the options for which no other one is both smaller and cheaper, the smallest first."""
    found: dict[str, tuple[int, float]] = {}
    least = math.inf
    for kind, (size, cost) in sorted(options.items(), key=lambda one: one[1]):
        if cost < least:
            found[kind] = (size, cost)
            least = cost
    return found

"""Finds the storage of least KL within a limit of bytes: solved from scores, then refined by measuring whole models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from autodistill.hardware.budget import LatencyLimit
from autodistill.models.tensors import block_of
from autodistill.search.solve.bench import Measured, Sample
from autodistill.search.solve.knapsack import MOST_CELLS, Knapsack
from autodistill.search.solve.library import Score
from autodistill.search.solve.options import CACHE, KEYS, VALUES, Family, Options, alike
from autodistill.strategy.deployment import Deployment

_FAMILIES = 4  # how many families are measured whole
_SWAPS, _PATIENCE = 6, 2  # most exchanges that are tried, and most failures in a row
# The price of time is in nats per whole limit of latency. It is searched for in this range, in steps of this factor.
# The interval that is found is then halved so many times.
_PRICES, _STEP, _HALVINGS = (1e-4, 1e6), 8.0, 6
_COARSE = 2**13  # knapsack cells while a price is searched for
_LEAST_DOUBT = 0.3  # least uncertainty of a score, as a share of it: a sum of single scores leaves interactions out
_NOTHING = 1e-6  # nats of KL below which no exchange pays


@dataclass(frozen=True, kw_only=True)
class SolvedStorage:
    """A storage with its predicted and its measured KL.

    Attributes:
        deployment: The storage.
        predicted: Sum of the scores, in nats, and its standard error.
        joint: Measurement of the whole model on the calibration sample.
    """

    deployment: Deployment
    predicted: tuple[float, float]
    joint: Measured


Prices: TypeAlias = Mapping[tuple[str, str], float]
"""Price of a choice's time in nats, by the keys of `Options.shares`."""


class Scores(Protocol):
    """The costs of storages of a model: a `Library`, or its counterpart for a student."""

    def score(self, name: str, kind: str) -> Score:
        """Return the cost of storing a matrix, or the cache's keys or values, as a type."""
        ...

    def predict(self, deployment: Deployment) -> tuple[float, float]:
        """Return the sum of the scores of a deployment, and its standard error."""
        ...

    def behind(self, deployment: Deployment) -> list[Score]:
        """Return the scores of which the prediction for a deployment is the sum."""
        ...

    def joint(self, deployment: Deployment, sample: Sample) -> Measured:
        """Measure a whole deployment on a sample."""
        ...


def by_block(options: Options, scores: Scores, deployment: Deployment) -> dict[str, float]:
    """Return the sum of the scores of each block's types, in nats, and those of embeddings, head and cache."""
    tensors, (keys, values) = options.matrices | options.tables, deployment.cache_types
    found: dict[str, float] = {}
    for name, kind in options.types(deployment).items():
        block = block_of(tensors[name])
        found[block] = found.get(block, 0.0) + scores.score(name, kind).kl
    return found | {CACHE: scores.score(KEYS, keys).kl + scores.score(VALUES, values).kl}


def cost_of(family: Family, scores: Scores) -> float:
    """Return the sum of the scores of a family's tables and cache."""
    keys, values = family.cache_types
    chosen = [*family.tables.items(), (KEYS, keys), (VALUES, values)]
    return sum(scores.score(name, kind).kl for name, kind in chosen)


def room_of(family: Family, limit: int, file_bytes: int | None, smallest_bytes: int) -> int:
    """Return the bytes that a family leaves for the matrices of linear layers.

    Args:
        family: The family; its bytes are counted with the smallest types for these matrices.
        limit: Bytes of the process.
        file_bytes: Bytes of all weights in the file, or None for no limit.
        smallest_bytes: Bytes of the matrices in the smallest types.
    """
    room = limit - family.bytes + smallest_bytes
    return room if file_bytes is None else min(room, file_bytes - family.weights_bytes + smallest_bytes)


class Solver:
    """Finds storages for any limit from one library of scores.

    Args:
        options: The choices.
        library: Their scores.
        sample: The calibration text, on which whole storages are compared.
    """

    def __init__(self, options: Options, library: Scores, sample: Sample) -> None:
        self._options, self._library, self._sample = options, library, sample
        self._families = options.families()
        self._least = sum(
            options.size(options.matrices[name], kind)
            for name, kind in options.smallest_types().items()
            if name in options.matrices
        )
        self._knapsack = self._knapsack_for({})
        self._prices: dict[int, Prices] = {}

    def _knapsack_for(
        self, factors: Mapping[str, float], prices: Prices | None = None, most_cells: int = MOST_CELLS
    ) -> Knapsack:
        """Return the knapsack of all matrices. Matrices that share one type are one item, named after the first.

        Args:
            factors: Factor of each matrix's scores; 1 for matrices that are missing.
            prices: Prices of the time that types take, which are added to the scores.
            most_cells: Cells of the knapsack at the most.
        """
        options, items = self._options, {}
        for names in options.tied:
            tensors = [options.matrices[name] for name in names]
            items[names[0]] = {
                kind: (
                    sum(options.size(tensor, kind) for tensor in tensors),
                    sum(self._library.score(name, kind).kl * factors.get(name, 1.0) for name in names)
                    + (prices or {}).get((names[0], kind), 0.0),
                )
                for kind in options.kinds(tensors[0])
            }
        return Knapsack(items, most_cells)

    def predicted(self, limit: int) -> tuple[float, Deployment] | None:
        """Return the least sum of scores within a limit and its deployment, or None if nothing fits."""
        found = self._best_of_families(limit)
        return (found[0][0], found[0][2]) if found else None

    def _best_of_families(self, limit: int) -> list[tuple[float, Family, Deployment]]:
        """Return the best of each family that fits and keeps to the latency, the least sum of scores first."""
        found = self._of_families(limit, self._knapsack)
        if found and not self._options.in_time(found[0][2]):
            latencies = self._options.latencies(found[0][2])
            late = [one for one, seconds in latencies.items() if seconds > one.seconds]
            # A price for the limits that are exceeded comes first. Its result may exceed another limit, so then all
            # limits get a price.
            tries = dict.fromkeys((tuple(late), tuple(latencies)))
            found = next(filter(None, (self._priced(limit, found[0][2], one) for one in tries)), [])
        return [one for one in found if self._options.in_time(one[2])]

    def _priced(
        self, limit: int, late: Deployment, latencies: Sequence[LatencyLimit]
    ) -> list[tuple[float, Family, Deployment]]:
        """Return the same under the least price of time (a Lagrange multiplier) at which the best is in time.

        The list is empty if there is no such price.

        Args:
            limit: Bytes.
            late: The best deployment regardless of time.
            latencies: Limits of latency. The price is for time as a share of these.
        """
        shares = self._options.shares(late, latencies)

        def at(price: float, most_cells: int = _COARSE) -> list[tuple[float, Family, Deployment]]:
            self._prices[limit] = {choice: price * share for choice, share in shares.items()}
            found = self._of_families(
                limit, self._knapsack_for({}, self._prices[limit], most_cells), self._prices[limit]
            )
            return found if found and self._options.in_time(found[0][2]) else []

        low, high = _PRICES[0] / _STEP, _PRICES[0]
        while not (found := at(high)):
            low, high = high, _STEP * high
            if low > _PRICES[1]:
                return []
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            if tried := at(middle):
                high, found = middle, tried
            else:
                low = middle
        return at(high, MOST_CELLS) or found

    def _of_families(
        self, limit: int, knapsack: Knapsack, prices: Prices | None = None
    ) -> list[tuple[float, Family, Deployment]]:
        """Return the best of each family by a knapsack, with its sum of scores without prices. Latency is ignored."""
        sums = []
        for family in self._families:
            best = knapsack.best(room_of(family, limit, self._options.file_bytes, self._least))
            if best is not None:
                chosen = [*family.tables.items(), (CACHE, ",".join(family.cache_types))]
                cost = cost_of(family, self._library)
                priced = best[0] + cost + sum((prices or {}).get(one, 0.0) for one in chosen)
                sums.append((priced, cost, family, best[1]))
        sums.sort(key=lambda one: one[0])
        return [
            (cost + self._score(types), family, self._deployment(types, family))
            for _, cost, family, types in sums[:_FAMILIES]
        ]

    def _score(self, types: Mapping[str, str]) -> float:
        """Return the sum of the scores of the linear layers; `types` names the first matrix of each set of one type."""
        return sum(self._library.score(name, types[names[0]]).kl for names in self._options.tied for name in names)

    def _deployment(self, types: Mapping[str, str], family: Family) -> Deployment:
        every = {name: types[names[0]] for names in self._options.tied for name in names}
        return self._options.deployment(every | dict(family.tables), family.cache_types)

    def solve(self, limit: int, others: Sequence[Deployment], *, thorough: bool = True) -> SolvedStorage | None:
        """Return the storage within a limit that has the least measured KL as a whole, or None if nothing fits.

        The best of some families and the storages in `others` are measured. Then types of matrices are exchanged within
        the bytes of the best: its knapsack is solved again with scores that are changed at random, as much as they are
        uncertain. A result that is better on the calibration text is kept. This ends after some failures in a row.

        Args:
            limit: Bytes.
            others: Further storages to measure, if they fit.
            thorough: Whether several families are measured, instead of the best by scores, and types are exchanged.
        """
        best_of_families = self._best_of_families(limit)
        if not best_of_families:
            return None
        count = _FAMILIES if thorough else 1
        members = [deployment for _, _, deployment in best_of_families[:count]]
        members += [one for one in others if self._options.fits(one, limit)]
        found = [self._measured(deployment) for deployment in dict.fromkeys(members)]
        best = min(found, key=self._order)
        return self._exchanged(best, limit) if thorough else best

    def _measured(self, deployment: Deployment) -> SolvedStorage:
        joint = self._library.joint(deployment, self._sample)
        return SolvedStorage(deployment=deployment, predicted=self._library.predict(deployment), joint=joint)

    def _order(self, one: SolvedStorage) -> tuple[float, int]:
        """Return the sort key: the KL, then the memory. A KL close to 0 counts as 0."""
        kl = one.joint.kl
        return (kl if kl >= _NOTHING else 0.0, self._options.memory(one.deployment).total_bytes)

    def _exchanged(self, best: SolvedStorage, limit: int) -> SolvedStorage:
        types = self._options.types(best.deployment)
        family = next(
            one
            for one in self._families
            if one.cache_types == best.deployment.cache_types and one.tables.items() <= types.items()
        )
        room = room_of(family, limit, self._options.file_bytes, self._least)
        dice, seen, failures = np.random.default_rng(0), {best.deployment}, 0
        for _ in range(_SWAPS):
            if best.joint.kl < _NOTHING or failures == _PATIENCE:
                break
            chosen = self._knapsack_for(self._drawn(dice), self._prices.get(limit)).best(room)
            if chosen is None:
                break
            deployment = self._deployment(chosen[1], family)
            if deployment in seen or not self._options.in_time(deployment):
                continue
            seen.add(deployment)
            tried = self._measured(deployment)
            better = self._order(tried) < self._order(best)
            best, failures = (tried, 0) if better else (best, failures + 1)
        return best

    def _drawn(self, dice: np.random.Generator) -> dict[str, float]:
        """Draw a factor for the scores of each matrix.

        It is the product of one factor for all matrices of the same name in all layers and one of its own.
        """
        common = {name: dice.normal() for name in dict.fromkeys(map(alike, self._options.matrices))}
        factors = {}
        for name, tensor in self._options.matrices.items():
            worst = max((self._library.score(name, kind) for kind in self._options.kinds(tensor)), key=lambda s: s.kl)
            doubt = worst.stderr / worst.kl if worst.kl > 0 and math.isfinite(worst.stderr) else 0.0
            drawn = _LEAST_DOUBT * common[alike(name)] + max(doubt, _LEAST_DOUBT) * dice.normal()
            factors[name] = math.exp(min(drawn, 3.0))
        return factors

"""Strategies trained on several seeds: their means on validation, and which of them is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autodistill.contracts import Direction
from autodistill.records.leaderboard import smallness
from autodistill.records.row import Row
from autodistill.statistics import widening

KIND = "confirmation"


def confirming(trial: str, seed: int) -> str:
    """Name of the trial that trains `trial`'s strategy on another seed."""
    return f"{trial}s{seed}"


def confirmed_trial(row: Row) -> str:
    """Name of the trial whose strategy a row of kind "confirmation" trained again."""
    return row.trial.rpartition("s")[0]


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """One strategy under one deployment on several seeds.

    Attributes:
        trial, name: Of the trial on the search's own seed.
        row_id: Of its row.
        seeds, values: Of the metric, by seed: the further ones, and where that is a single one the search's own first.
        mean, stderr: Over seeds; the error is widened for their being few, and None for a single one.
        difference, difference_stderr: Mean to the best's, paired by seed, at or below 0 for all but the best, and its
            standard error; None where seeds differ or there is one alone.
        memory_bytes: Of the row.
    """

    trial: str
    name: str
    row_id: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    stderr: float | None
    memory_bytes: int
    difference: float | None = None
    difference_stderr: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The confirmation as plain data."""
        return asdict(self) | {"seeds": list(self.seeds), "values": list(self.values)}


def confirmations(rows: Sequence[Row], metric: str, direction: Direction) -> list[Confirmation]:
    """The strategies that were trained on further seeds, the chosen one first, then by mean.

    Chosen is the best mean, or of those whose difference to it, paired by seed, is within one standard error the
    smallest. All means are of the same seeds: where a training failed or came too late, either its strategy or its seed
    is left out, whichever leaves more to compare. The search's own seed is the one that these strategies were selected
    on, whose luck would stay in their means: it counts only where there is a single further one.

    Args:
        rows: Of the validation split.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
    """
    sign = 1.0 if direction == "max" else -1.0
    if not any(row.kind == KIND for row in rows):
        return []
    originals = {(row.trial, row.deployment_name): row for row in rows if row.kind != KIND and row.full}
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        value, key = row.figure(metric), (confirmed_trial(row), row.deployment_name)
        if row.kind == KIND and row.full and value is not None and row.seed is not None and key in originals:
            values.setdefault(key, {})[row.seed] = value
    candidates = []
    for key, further in values.items():
        original = originals[key]
        if original.figure(metric) is not None and original.seed is not None and original.feasible:
            candidates.append((original, further))
    compared, seeds = _comparable(candidates)
    if not compared:
        return []
    found = [_confirmation(original, metric, {seed: further[seed] for seed in seeds}) for original, further in compared]
    sizes = {original.row_id: smallness(original) for original, _ in compared}
    best = max(found, key=lambda item: (sign * item.mean, item.trial))
    found = [_against(item, best) for item in found]
    tied = [item for item in found if _tied(item, best, sign)]
    chosen = min(tied, key=lambda item: (sizes[item.row_id], -sign * item.mean, item.trial))
    others = sorted((item for item in found if item != chosen), key=lambda item: (-sign * item.mean, item.trial))
    return [chosen, *others]


_Trained = tuple[Row, Mapping[int, float]]


def _comparable(candidates: Iterable[_Trained]) -> tuple[list[_Trained], list[int]]:
    """Strategies with the further seeds that all of these have, so that most pairs of trainings can be compared.

    One late training would else take its strategy's missing seeds from everybody. Of as many pairs those of more seeds,
    which say how much seeds differ; a strategy in several deployments counts once.
    """
    ordered = sorted(candidates, key=lambda pair: (-len(pair[1]), pair[0].row_id))
    best: tuple[tuple[int, int, int], list[_Trained], list[int]] = ((-1, 0, 0), [], [])
    for count in range(1, len(ordered) + 1):
        first = ordered[:count]
        seeds = sorted(set.intersection(*(set(further) for _, further in first)))
        pairs = (len({row.trial for row, _ in first}) - 1) * len(seeds)
        if seeds and (worth := (pairs, len(seeds), count)) > best[0]:
            best = worth, first, seeds
    return best[1], best[2]


def _confirmation(row: Row, metric: str, values: Mapping[int, float]) -> Confirmation:
    own = row.figure(metric)
    if len(values) < 2 and row.seed is not None and own is not None:
        values = {row.seed: own, **values}
    numbers = np.array(list(values.values()))
    return Confirmation(
        trial=row.trial,
        name=row.name,
        row_id=row.row_id,
        seeds=tuple(values),
        values=tuple(values.values()),
        mean=float(numbers.mean()),
        stderr=_stderr(numbers),
        memory_bytes=row.memory_bytes or 0,
    )


def _against(item: Confirmation, best: Confirmation) -> Confirmation:
    theirs = dict(zip(best.seeds, best.values, strict=True))
    if set(item.seeds) != set(theirs):
        return item
    gaps = np.array([value - theirs[seed] for seed, value in zip(item.seeds, item.values, strict=True)])
    return replace(item, difference=float(gaps.mean()), difference_stderr=_stderr(gaps))


def _tied(item: Confirmation, best: Confirmation, sign: float) -> bool:
    if item.trial == best.trial and item.row_id == best.row_id:
        return True
    if item.difference is None or item.difference_stderr is None:
        return False
    return -sign * item.difference <= item.difference_stderr


def _stderr(values: np.ndarray[Any, Any]) -> float | None:
    """Of a mean over seeds, widened as one of few documents is: two or three seeds say little of how much they vary."""
    return float(widening(len(values)) * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None

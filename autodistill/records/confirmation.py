"""Strategies trained on several seeds: their means on validation, and which of them is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autodistill.contracts import Direction
from autodistill.records.row import Row

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
        seeds, values: Of the metric, by seed; the search's own first.
        mean, stderr: Over seeds; the error is None for a single one.
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
    """Every strategy that was trained on further seeds, the chosen one first, then by mean.

    Chosen is the best mean, or of those whose difference to it, paired by seed, is within one standard error the one
    that needs least memory. A seed that gave no value for one of them counts in none of them, so that all means are of
    the same seeds.

    Args:
        rows: Of the validation split.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
    """
    sign = 1.0 if direction == "max" else -1.0
    originals = {(row.trial, row.deployment_name): row for row in rows if row.kind != KIND and row.full}
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        value, key = row.figure(metric), (confirmed_trial(row), row.deployment_name)
        if row.kind == KIND and row.full and value is not None and row.seed is not None and key in originals:
            values.setdefault(key, {})[row.seed] = value
    candidates = []
    for key, further in values.items():
        original = originals[key]
        value = original.figure(metric)
        if value is not None and original.seed is not None and original.feasible:
            candidates.append((original, {original.seed: value} | further))
    if not candidates:
        return []
    common = set.intersection(*(set(by_seed) for _, by_seed in candidates))
    found = [
        _confirmation(original, {seed: value for seed, value in by_seed.items() if seed in common})
        for original, by_seed in candidates
    ]
    best = max(found, key=lambda item: (sign * item.mean, item.trial))
    compared = [_against(item, best) for item in found]
    tied = [item for item in compared if _tied(item, best, sign)]
    chosen = min(tied, key=lambda item: (item.memory_bytes, -sign * item.mean, item.trial))
    others = sorted((item for item in compared if item != chosen), key=lambda item: (-sign * item.mean, item.trial))
    return [chosen, *others]


def _confirmation(row: Row, values: Mapping[int, float]) -> Confirmation:
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
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None

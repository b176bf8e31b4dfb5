"""What a runtime takes beyond the estimate, learnt from the pairs of predicted and measured memory on file."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autodistill.hardware.device import DISCRETE
from autodistill.runs.results.row import Row

FEWEST = 3
"""Pairs below which a prediction is not lowered."""

Place = tuple[str, str]
"""A class of devices, and a runtime."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """How predicted memory is changed for a class of devices and a runtime.

    Attributes:
        correction_bytes: Added to the overhead that is predicted.
        margin_bytes: Kept beyond it for safety: what the pairs scatter above their median.
        pairs: How many these rest on.
    """

    correction_bytes: int = 0
    margin_bytes: int = 0
    pairs: int = 0

    @property
    def total_bytes(self) -> int:
        """What a predicted sum is raised by."""
        return self.correction_bytes + self.margin_bytes


def recalibrate(pairs: Sequence[tuple[float, float]]) -> Overhead:
    """The correction that pairs of predicted and measured sums, in bytes, speak for.

    It is the median of the differences, which one odd pair does not move, and the margin is the distance from there to
    the largest one. Of fewer than three pairs only what lies above the prediction counts, since a chance hit below it
    must not make students fit that do not.
    """
    if not pairs:
        return Overhead()
    gaps = [measured - predicted for predicted, measured in pairs]
    middle = statistics.median(gaps)
    if len(gaps) < FEWEST:
        middle = max(0.0, middle)
    return Overhead(correction_bytes=round(middle), margin_bytes=max(0, round(max(gaps) - middle)), pairs=len(gaps))


def overheads(rows: Iterable[Row]) -> dict[Place, Overhead]:
    """The corrections that the measured rows of a results folder speak for, by class of devices and runtime."""
    pairs: dict[Place, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        parts = row.other.get("memory_parts")
        predicted = row.figure("memory_bytes_predicted")
        if row.memory_source != "measured" or row.memory_bytes is None or predicted is None:
            continue
        if isinstance(parts, Mapping) and isinstance(parts.get("device_class"), str):
            if parts["device_class"] == DISCRETE and "predicted_bytes" not in parts:
                # Rows of earlier versions predicted a process's memory, and compare a GPU's with it.
                continue
            pairs[parts["device_class"], row.deployment.runtime].append((predicted, row.memory_bytes))
    return {place: recalibrate(found) for place, found in pairs.items()}


def overhead_of(known: Mapping[Place, Overhead], runtime: str, device_class: str | None = None) -> Overhead:
    """Return the overhead of a runtime on a class of devices; of no class, that of the only one measured."""
    kinds = {kind for kind, _ in known}
    kind = device_class or (next(iter(kinds)) if len(kinds) == 1 else "")
    return known.get((kind, runtime), Overhead())


def least_beyond(rows: Iterable[Row]) -> dict[str, int]:
    """The least bytes that each runtime took beyond what was predicted, of the rows that were measured, by its name.

    It takes about as much more for one student of a run as for another, so that a row which would break a limit even
    with this would not keep to it once measured. Negative where less was taken each time.
    """
    beyond: dict[str, int] = {}
    for row in rows:
        runtime, predicted = row.deployment.runtime, row.figure("memory_bytes_predicted")
        if row.memory_source == "measured" and row.memory_bytes is not None and predicted is not None:
            gap = row.memory_bytes - int(predicted)
            beyond[runtime] = min(gap, beyond.get(runtime, gap))
    return beyond


def corrected(row: Row, beyond: Mapping[str, int]) -> int:
    """Return the bytes that a row takes: as it was measured, or as predicted and what its runtime takes beyond."""
    more = 0 if row.memory_source == "measured" else beyond.get(row.deployment.runtime, 0)
    return (row.memory_bytes or 0) + more

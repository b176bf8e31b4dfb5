"""Corrections of predicted memory, learned from stored pairs of predicted and measured memory."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autodistill.hardware.device import DISCRETE
from autodistill.runs.results.row import Row

FEWEST = 3
"""The fewest pairs with which a prediction may be lowered."""

Place = tuple[str, str]
"""A class of devices, and a runtime."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """How predicted memory is changed for a class of devices and a runtime.

    Attributes:
        correction_bytes: Bytes to add to the predicted overhead.
        margin_bytes: Further bytes for safety: how far the pairs scatter above their median.
        pairs: Number of pairs that these are based on.
    """

    correction_bytes: int = 0
    margin_bytes: int = 0
    pairs: int = 0

    @property
    def total_bytes(self) -> int:
        """The bytes by which predicted memory is raised."""
        return self.correction_bytes + self.margin_bytes


def recalibrate(pairs: Sequence[tuple[float, float]]) -> Overhead:
    """Return the correction that follows from pairs of predicted and measured memory, in bytes.

    The correction is the median of the differences, which a single outlier does not move. The margin is the distance
    from the median to the largest difference. With fewer than three pairs the correction is never negative: a chance
    measurement below the prediction must not make students fit that do not.
    """
    if not pairs:
        return Overhead()
    gaps = [measured - predicted for predicted, measured in pairs]
    middle = statistics.median(gaps)
    if len(gaps) < FEWEST:
        middle = max(0.0, middle)
    return Overhead(correction_bytes=round(middle), margin_bytes=max(0, round(max(gaps) - middle)), pairs=len(gaps))


def overheads(rows: Iterable[Row]) -> dict[Place, Overhead]:
    """Return the corrections from the measured rows of a results folder, by class of devices and runtime."""
    pairs: dict[Place, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        parts = row.other.get("memory_parts")
        predicted = row.figure("memory_bytes_predicted")
        if row.memory_source != "measured" or row.memory_bytes is None or predicted is None:
            continue
        if isinstance(parts, Mapping) and isinstance(parts.get("device_class"), str):
            if parts["device_class"] == DISCRETE and "predicted_bytes" not in parts:
                # Rows of earlier versions compare the predicted memory of a process with the measured one of a GPU.
                continue
            pairs[parts["device_class"], row.deployment.runtime].append((predicted, row.memory_bytes))
    return {place: recalibrate(found) for place, found in pairs.items()}


def overhead_of(known: Mapping[Place, Overhead], runtime: str, device_class: str | None = None) -> Overhead:
    """Return the overhead of a runtime on a class of devices.

    Without a class, the only measured class is taken, if there is exactly one.
    """
    kinds = {kind for kind, _ in known}
    kind = device_class or (next(iter(kinds)) if len(kinds) == 1 else "")
    return known.get((kind, runtime), Overhead())


def least_beyond(rows: Iterable[Row]) -> dict[str, int]:
    """Return, by runtime, the least difference between measured and predicted memory among measured rows, in bytes.

    The difference is about the same for all students of a run. A row that breaks a limit even with the least difference
    would therefore break it when measured too. The value is negative if every measurement was below the prediction.
    """
    beyond: dict[str, int] = {}
    for row in rows:
        runtime, predicted = row.deployment.runtime, row.figure("memory_bytes_predicted")
        if row.memory_source == "measured" and row.memory_bytes is not None and predicted is not None:
            gap = row.memory_bytes - int(predicted)
            beyond[runtime] = min(gap, beyond.get(runtime, gap))
    return beyond


def corrected(row: Row, beyond: Mapping[str, int]) -> int:
    """Return a row's memory in bytes: as measured, or as predicted plus the runtime's difference in `beyond`."""
    more = 0 if row.memory_source == "measured" else beyond.get(row.deployment.runtime, 0)
    return (row.memory_bytes or 0) + more

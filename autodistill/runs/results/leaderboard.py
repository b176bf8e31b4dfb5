"""The ranking of rows, as pure functions: order, ties, Pareto front, and the nearest candidate that does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.evaluation.statistics import paired_bootstrap
from autodistill.hardware.budget import Budget, DeviceBudget
from autodistill.runs.results.row import Row
from autodistill.units import format_bytes, format_duration

DISTILLED = ("student", "baseline")
"""Kinds of rows whose models were trained."""
UNTRAINED = ("teacher", "initial")
"""Kinds of rows whose models need no training: the teacher itself, and students as they begin."""
SPEEDS = ("latency_ms", "ttft_ms", "tokens_per_second", "answer_ms")
"""Figures that are only valid on one machine and in one runtime."""

_FEW_DOCUMENTS = 10
_ALIKE = 1.01  # rows within this factor of memory count as equally large: predictions have a larger error


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A row and its place in the ranking.

    Attributes:
        place: Place in the ranking, from 1.
        row: The row.
        tied: Whether the row is among the first rows that the metric cannot tell apart.
        difference: How much worse it is than the best row by the metric, paired by document (mean over tokens). None if
            the rows are not comparable.
        difference_stderr: Bootstrapped standard error of the difference.
        front: With several objectives, whether no other row beats it in one objective without losing in another.
    """

    place: int
    row: Row
    tied: bool = False
    difference: float | None = None
    difference_stderr: float | None = None
    front: bool = False


def rank(rows: Sequence[Row], metric: str = "accuracy", direction: Direction = "max") -> list[Ranked]:
    """Rank rows. The result does not depend on their order in `rows`.

    Rows that have the metric come before those that lack it. Then feasible rows come before infeasible ones, full
    fidelity before any other, and higher fidelity before lower. Then the metric decides, and then memory and size. If
    all this is equal, a row that needs no training comes first, and among these a file as it was given.

    The first place has an extra rule. A row is tied with the best by the metric if their paired difference is within
    one standard error, bootstrapped by document. Only feasible rows of full fidelity can be tied. The smallest of the
    tied rows, by memory, is put first; if memory differs by less than a hundredth, the better by the metric is. No row
    that is better by the metric and no larger is placed after it.

    Args:
        rows: Rows of one split.
        metric: A figure of the rows.
        direction: Whether more ("max") or less ("min") of it is better.

    Raises:
        ValueError: The rows are of several splits, whose figures cannot be compared.
        InputError: The metric is a latency, and the rows are of several machines or runtimes.
    """
    check_comparable(rows, metric)
    splits = {row.split for row in rows if row.split is not None and row.figure(metric) is not None}
    if len(splits) > 1:
        raise ValueError(f"rows of the splits {', '.join(sorted(splits))} cannot be ranked together")
    ordered = sorted(rows, key=lambda row: _order(row, metric, direction))
    # The order puts the rows that can be tied, which are feasible and of full fidelity, before all others.
    comparable = [row for row in ordered if row.feasible and row.full and row.figure(metric) is not None]
    differences = _differences(comparable, metric, direction)
    tied = {index for index, (gap, error) in enumerate(differences) if gap <= error}
    places = list(range(len(ordered)))
    if tied:
        # Of the rows with about the least memory, take the first, which is the best of them by the metric.
        least = min(smallness(ordered[index])[0] for index in tied)
        winner = min(index for index in tied if smallness(ordered[index])[0] <= _ALIKE * least)
        # A better row that is no larger may be outside of the tied set, if its difference to the best is more certain.
        limit = smallness(ordered[winner])
        winner = next(index for index in range(len(comparable)) if smallness(ordered[index]) <= limit)
        places.insert(0, places.pop(winner))
    differences += [(math.nan, math.nan)] * (len(ordered) - len(comparable))
    return [
        Ranked(
            place=place,
            row=ordered[index],
            tied=len(tied) > 1 and index in tied,
            difference=_finite(differences[index][0]),
            difference_stderr=_finite(differences[index][1]),
        )
        for place, index in enumerate(places, start=1)
    ]


def rests_on(rows: Sequence[Row]) -> str:
    """Return a sentence that says how many documents the errors of some rows are based on, and warns if they are few.

    For a task each question is a document. For one long text a document is a block of consecutive sequences. The
    sentence is empty if no row has documents.
    """
    in_a_row = max((row.documents.get("in_a_row", 0) for row in rows if row.documents is not None), default=0)
    unit, of = ("block", f" of {in_a_row} sequences in a row of one long text") if in_a_row else ("document", "")
    counts = [sum(count > 0 for count in row.documents["count"]) for row in rows if row.documents is not None]
    least, most = min(counts, default=0), max(counts, default=0)
    if not most:
        return ""
    if most == 1:
        return f"No ± is given: all was read in one {unit}{of}, and an error needs several."
    said = f"± comes from {f'{least} to ' if least < most else ''}{most} {unit}s{of}"
    if least >= _FEW_DOCUMENTS:
        return f"{said}."
    return f"{said}: with fewer than {_FEW_DOCUMENTS}, errors and ties are uncertain themselves."


def check_comparable(rows: Sequence[Row], metric: str) -> None:
    """Refuse to compare latencies of several machines or runtimes.

    Raises:
        InputError: The message names them.
    """
    if metric not in SPEEDS:
        return
    served = {(row.machine or "an unknown machine", row.deployment.runtime) for row in rows if row.figure(metric)}
    if len(served) > 1:
        told = ", ".join(f"{runtime} on {machine}" for machine, runtime in sorted(served))
        raise InputError(f"{metric} cannot rank rows of several machines or runtimes ({told}): rank those of one")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _order(row: Row, metric: str, direction: Direction) -> tuple[Any, ...]:
    value = row.figure(metric)
    worse = math.inf if value is None else -value if direction == "max" else value
    fidelity = 1.0 if row.full else row.figure("fidelity") or 0.0
    changed = row.kind not in UNTRAINED, row.deployment.file is None
    return (value is None, not row.feasible, -fidelity, worse, *smallness(row), *changed, row.row_id)


def smallness(row: Row) -> tuple[float, float]:
    """Return the bytes of memory and of size, which decide between tied rows: less is better.

    Predicted values are used if they are known.
    """
    # Measured values tend to be larger than predicted ones, so mixing them would be unfair to a measured row.
    figures = []
    for name, value in (("memory_bytes", row.memory_bytes), ("size_bytes", row.size_bytes)):
        predicted = row.figure(f"{name}_predicted")
        found = value if predicted is None else predicted
        figures.append(math.inf if found is None else float(found))
    memory, size = figures
    return memory, size


def _differences(rows: Sequence[Row], metric: str, direction: Direction) -> list[tuple[float, float]]:
    """Return each row's paired difference to the first row (above 0 is worse) and its standard error.

    Both are NaN for rows that cannot be paired, except if the metric is exactly equal: then both are 0.
    """
    if not rows:
        return []
    best = _documents(rows[0], metric)
    result = [(0.0, 0.0) if row.figure(metric) == rows[0].figure(metric) else (math.nan, math.nan) for row in rows]
    if best is None:
        return result
    ids, counts, sums = best
    paired, gaps = [], []
    for index, row in enumerate(rows):
        other = _documents(row, metric)
        if other is not None and other[0] == ids and np.array_equal(other[1], counts):
            paired.append(index)
            gaps.append(sums - other[2] if direction == "max" else other[2] - sums)
    estimates, errors = paired_bootstrap(np.array(gaps), counts)
    for index, estimate, error in zip(paired, estimates, errors, strict=True):
        # With one document the error of a difference is unknown, but rows that are exactly equal are still tied.
        if math.isfinite(error) or estimate:
            result[index] = (float(estimate), float(error))
    return result


def _documents(row: Row, metric: str) -> tuple[list[Any], npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Return ids, token counts and metric sums of documents with tokens, or None if the row has none for `metric`."""
    data = row.documents
    if data is not None and data.get("metric", "accuracy") != metric:
        data = data.get("others", {}).get(metric)
    if data is None or "sum" not in data:
        return None
    counts, sums = np.array(data["count"], float), np.array(data["sum"], float)
    used = counts > 0
    if not used.any() or not np.isfinite(sums[used]).all():
        return None
    return [name for name, has in zip(data["ids"], used, strict=True) if has], counts[used], sums[used]


def rank_students(rows: Sequence[Row], metric: str = "accuracy", direction: Direction = "max") -> list[Row]:
    """Return the distilled students among some rows, the best first. If only students may be exported, it is the first.

    They are in the order in which they rank among themselves, with one exception. A student that ranks first among all
    rows comes first here too. This matters if the teacher is tied with the best student: a smaller student that is
    better than the teacher then ranks first.
    """
    order = [one.row for one in rank([row for row in rows if row.kind in DISTILLED], metric, direction)]
    first = rank(rows, metric, direction)[0].row.row_id if order else ""
    return sorted(order, key=lambda row: row.row_id != first)


def pareto(rows: Sequence[Row], objectives: Mapping[str, Direction]) -> list[Row]:
    """Return the rows that no other row beats in one objective without losing in another, by the first objective.

    Rows that lack an objective are left out. All of several equal rows are kept. The caller selects rows by feasibility
    and fidelity.
    """
    having = [row for row in rows if all(row.figure(name) is not None for name in objectives)]
    signs = np.array([-1.0 if direction == "max" else 1.0 for direction in objectives.values()])
    costs = np.array([[row.figure(name) for name in objectives] for row in having], float).reshape(-1, len(signs))
    costs *= signs
    kept: list[int] = []
    # In lexicographic order a row can only be beaten by one before it, so one pass over the growing front is enough.
    for index in np.lexsort(costs.T[::-1]):
        front = costs[kept]
        if not ((front <= costs[index]).all(axis=1) & (front < costs[index]).any(axis=1)).any():
            kept.append(int(index))
    return [having[index] for index in kept]


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The candidate that is nearest to meeting all limits, and the limit that it misses by most.

    Attributes:
        candidate: Name of the candidate.
        limit: "memory_bytes", or a latency like "tpot_p95@streams=1".
        need, allowed: What the candidate needs and what the limit allows, in the limit's unit.
    """

    candidate: str
    limit: str
    need: float
    allowed: float

    @property
    def excess(self) -> float:
        """log(need / limit), which is above 0 if the limit is broken."""
        return math.log(self.need / self.allowed)

    def describe(self) -> str:
        """Return the miss in words, like "needs 98.3 MB of memory, 1.23 times the limit of 80.0 MB"."""
        memory = self.limit == "memory_bytes"
        need, allowed = (format_bytes(v) if memory else format_duration(v / 1e3) for v in (self.need, self.allowed))
        what = "of memory" if memory else f"of {self.limit}"
        return f"needs {need} {what}, {self.need / self.allowed:.3g} times the limit of {allowed}"


def limits_of(budget: Budget) -> dict[str, float]:
    """Return the budget's limits by the names of the rows' figures, latencies in milliseconds."""
    limits: dict[str, float] = {"memory_bytes": budget.memory_bytes}
    latency = budget.latency if isinstance(budget, DeviceBudget) else ()
    return limits | {limit.name: 1e3 * limit.seconds for limit in latency}


def nearest(candidates: Mapping[str, Mapping[str, float | None]], limits: Mapping[str, float]) -> Nearest | None:
    """Return the candidate whose worst log(need / limit) is the smallest, or None if no needs are known.

    Args:
        candidates: For each name, its needs by the names of the limits.
        limits: See `limits_of`.
    """
    worst = []
    for name, needs in candidates.items():
        known = [
            Nearest(candidate=name, limit=limit, need=need, allowed=allowed)
            for limit, allowed in limits.items()
            if (need := needs.get(limit)) is not None and need > 0
        ]
        if known:
            worst.append(max(known, key=lambda one: one.excess))
    return min(worst, key=lambda one: (one.excess, one.candidate), default=None)

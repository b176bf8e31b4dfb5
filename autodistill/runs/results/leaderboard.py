"""The pure ranking of rows: order, ties, Pareto front, the nearest that does not fit."""

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
"""Figures that hold on one machine, in one runtime."""

_FEW_DOCUMENTS = 10
_ALIKE = 1.01  # times the memory of a row, within which another is no larger: less than a prediction is off by


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A row in its place.

    Attributes:
        place: 1 is the first.
        row: The row.
        tied: Whether it belongs to the first rows that cannot be told apart by the metric.
        difference: How much worse than the best by the metric, paired by document (mean over tokens); None where it
            is not comparable.
        difference_stderr: Its bootstrapped standard error.
        front: Whether no other row beats it in one objective without losing in another, where there are several.
    """

    place: int
    row: Row
    tied: bool = False
    difference: float | None = None
    difference_stderr: float | None = None
    front: bool = False


def rank(rows: Sequence[Row], metric: str = "accuracy", direction: Direction = "max") -> list[Ranked]:
    """Rank rows; the order does not depend on the order they come in.

    Rows that have the metric come before those that lack it, feasible ones before infeasible ones, those of full
    fidelity before others, higher fidelity before lower, then the metric decides; of a row of which not all was read,
    what it is taken to be over all (`Row.standing`). Among feasible rows of full fidelity, the best by the metric and
    all that are tied with it form a set, whose smallest (memory, within a hundredth the better by the metric) is put
    first: a row is tied where its paired difference to the best is within one standard error, bootstrapped by document.
    No row that is better by the metric and no larger stands behind the first. Of rows that are equal in all this, one
    that needs no training comes first.

    Args:
        rows: Of one split.
        metric: A figure of the rows.
        direction: Whether more ("max") or less ("min") of it is better.

    Raises:
        ValueError: The rows are of several splits, whose figures cannot be compared.
        InputError: A latency is to rank rows of several machines or runtimes.
    """
    check_comparable(rows, metric)
    splits = {row.split for row in rows if row.split is not None and row.figure(metric) is not None}
    if len(splits) > 1:
        raise ValueError(f"rows of the splits {', '.join(sorted(splits))} cannot be ranked together")
    ordered = sorted(rows, key=lambda row: _order(row, metric, direction))
    # The order puts the rows that may tie, feasible and of full fidelity, before all others.
    comparable = [row for row in ordered if row.feasible and row.full and row.figure(metric) is not None]
    differences = _differences(comparable, metric, direction)
    tied = {index for index, (gap, error) in enumerate(differences) if gap <= error}
    places = list(range(len(ordered)))
    if tied:
        # Of rows of about one size the first, which is the best of them by the metric.
        least = min(smallness(ordered[index])[0] for index in tied)
        winner = min(index for index in tied if smallness(ordered[index])[0] <= _ALIKE * least)
        # A better row that is no larger may stand outside of the set, where its difference to the best is more certain.
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
    """Return how many documents the errors of some rows rest on, in a sentence that warns if they are few.

    Of a task each question is a document, of one long text some sequences in a row. Empty where no row says.
    """
    in_a_row = max((row.documents.get("in_a_row", 0) for row in rows if row.documents is not None), default=0)
    unit, of = ("block", f" of {in_a_row} sequences in a row of one long text") if in_a_row else ("document", "")
    counts = [sum(count > 0 for count in row.documents["count"]) for row in rows if row.documents is not None]
    least, most = min(counts, default=0), max(counts, default=0)
    if not most:
        return ""
    said = f"± comes from {f'{least} to ' if least < most else ''}{most} {unit}{'s' * (most > 1)}{of}"
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
    return (value is None, not row.feasible, -fidelity, worse, *smallness(row), row.kind not in UNTRAINED, row.row_id)


def smallness(row: Row) -> tuple[float, float]:
    """Return what decides between tied rows: bytes of memory, then of size, predicted if known; less is better."""
    # Like is compared with like: one row that was measured among predicted ones would be the larger for that alone.
    figures = []
    for name, value in (("memory_bytes", row.memory_bytes), ("size_bytes", row.size_bytes)):
        predicted = row.figure(f"{name}_predicted")
        found = value if predicted is None else predicted
        figures.append(math.inf if found is None else float(found))
    memory, size = figures
    return memory, size


def _differences(rows: Sequence[Row], metric: str, direction: Direction) -> list[tuple[float, float]]:
    """For each row its paired difference to the first one (above 0 is worse) and the standard error of that.

    Rows that cannot be paired have NaN, but for those of exactly the same metric, which have a difference of 0.
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
        # Of one document nobody knows how certain a difference is; what is equal ties all the same.
        if math.isfinite(error) or estimate:
            result[index] = (float(estimate), float(error))
    return result


def _documents(row: Row, metric: str) -> tuple[list[Any], npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Ids, token counts and metric sums of the documents that have tokens; None where the row has none for `metric`."""
    data = row.documents
    if data is None or data.get("metric", "accuracy") != metric:
        return None
    counts, sums = np.array(data["count"], float), np.array(data["sum"], float)
    used = counts > 0
    if not used.any() or not np.isfinite(sums[used]).all():
        return None
    return [name for name, has in zip(data["ids"], used, strict=True) if has], counts[used], sums[used]


def rank_students(rows: Sequence[Row], metric: str = "accuracy", direction: Direction = "max") -> list[Row]:
    """The distilled students among some rows, the best first: of these alone the first is what is to be exported.

    They follow each other as they rank among themselves, but for one that is first beside all rows: where the teacher
    is tied with the best student, a smaller student that is better than the teacher is.
    """
    order = [one.row for one in rank([row for row in rows if row.kind in DISTILLED], metric, direction)]
    first = rank(rows, metric, direction)[0].row.row_id if order else ""
    return sorted(order, key=lambda row: row.row_id != first)


def pareto(rows: Sequence[Row], objectives: Mapping[str, Direction]) -> list[Row]:
    """The rows that no other row beats in one objective without losing in another, ordered by the first objective.

    Rows that lack an objective are left out; of equal rows all are kept. Feasibility and fidelity are the caller's
    choice.
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
    """The candidate that comes nearest to meeting all limits, and the limit it misses by most.

    Attributes:
        candidate: Its name.
        limit: "memory_bytes", or a latency like "tpot_p95@streams=1".
        need, allowed: In the limit's unit.
    """

    candidate: str
    limit: str
    need: float
    allowed: float

    @property
    def excess(self) -> float:
        """log(need / limit): above 0 where the limit is broken."""
        return math.log(self.need / self.allowed)

    def describe(self) -> str:
        """Return the miss in words, like "needs 98.3 MB of memory, 1.23 times the limit of 80.0 MB"."""
        memory = self.limit == "memory_bytes"
        need, allowed = (format_bytes(v) if memory else format_duration(v / 1e3) for v in (self.need, self.allowed))
        what = "of memory" if memory else f"of {self.limit}"
        return f"needs {need} {what}, {self.need / self.allowed:.3g} times the limit of {allowed}"


def limits_of(budget: Budget) -> dict[str, float]:
    """The budget's limits under the names of the rows' figures."""
    limits: dict[str, float] = {"memory_bytes": budget.memory_bytes}
    latency = budget.latency if isinstance(budget, DeviceBudget) else ()
    return limits | {limit.name: 1e3 * limit.seconds for limit in latency}


def nearest(candidates: Mapping[str, Mapping[str, float | None]], limits: Mapping[str, float]) -> Nearest | None:
    """The candidate whose worst log(need / limit) is the smallest; None where nothing is known of any.

    Args:
        candidates: For each name what it needs, under the names of the limits.
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

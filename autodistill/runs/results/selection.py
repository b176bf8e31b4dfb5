"""The choice of a run's best row. Export, explanation, report and summary all use it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autodistill.evaluation.base import Direction
from autodistill.evaluation.statistics import widening
from autodistill.runs.results.beginnings import worsened
from autodistill.runs.results.finalists import finalists_first
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, rank, rank_students, smallness
from autodistill.runs.results.row import Row
from autodistill.utils.plain_dataclass import ToJson

KIND = "confirmation"


def confirming(trial: str, seed: int) -> str:
    """Return the name of the trial that trains the strategy of `trial` with another seed."""
    return f"{trial}s{seed}"


def confirmed_trial(row: Row) -> str:
    """Return the name of the trial whose strategy was trained again for a row of kind "confirmation"."""
    return row.trial.rpartition("s")[0]


@dataclass(frozen=True, kw_only=True)
class Confirmation(ToJson):
    """One strategy under one deployment on several seeds.

    Attributes:
        trial, name: Id and name of the trial with the search's own seed.
        row_id: Id of that trial's row.
        seeds, values: The further seeds, and the metric for each. If there is only one further seed, the search's own
            seed is added at the front.
        mean, stderr: Mean over seeds and its standard error, which is widened since seeds are few. The error is None
            for a single seed.
        difference, difference_stderr: Mean difference to the best strategy, paired by seed, and its standard error.
            The difference is None if the seeds are not the same, and the error also for a single seed.
        memory_bytes: Memory of the row.
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


def confirmations(rows: Sequence[Row], metric: str, direction: Direction) -> list[Confirmation]:
    """Return the strategies that were trained on further seeds: the chosen one first, then by mean.

    A strategy is tied with the best mean if their difference, paired by seed, is within one standard error. The
    smallest of the tied strategies is chosen. All means are over the same seeds: if a training failed or ended too
    late, either its strategy or its seed is left out, whichever leaves more to compare. The search's own seed is used
    only if there is a single further seed. The strategies were selected on it, so their luck with it would bias the
    means.

    Args:
        rows: Rows of the validation split.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
    """
    sign = 1.0 if direction == "max" else -1.0
    originals = {(row.trial, row.deployment_name): row for row in rows if row.kind != KIND and row.full}
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in (row for row in rows if row.kind == KIND and row.full):
        value, key = row.figure(metric), (confirmed_trial(row), row.deployment_name)
        if value is not None and row.seed is not None and key in originals:
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
    """Return some strategies and the further seeds that all of them have, so that most pairs can be compared.

    Without this, one late training would remove its strategy's missing seeds from all strategies. If several selections
    have equally many pairs, the one with more seeds is taken, since it shows better how much seeds differ. A strategy
    in several deployments counts once.
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
    """Return the standard error of a mean over seeds, widened since two or three seeds hardly show how much they vary.

    It is None for a single seed.
    """
    return float(widening(len(values)) * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def students_only(search: Mapping[str, Any]) -> bool:
    """Return whether a run chooses from trained students only, by its `search.json`; earlier versions always did."""
    return bool(search.get("students_only", True))


def contenders(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the validation split that are ranked, which excludes rows of further seeds.

    In a ranking the luckiest seed would come first. Seeds are therefore compared by their means.
    """
    return [row for row in rows if row.split != "test" and row.kind != KIND]


def in_order(
    rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool, simulated: bool = False
) -> list[Row]:
    """Return the rows that fit the budget and have the metric, trained or not, the chosen one first.

    Rows that a runtime has read come first, by their loss there. Then the row that ranks first comes. There are two
    special cases, in which one row represents all students in this ranking. If strategies were trained on further
    seeds, it is the best of these in the best of its deployments. If no student was trained to the end, it is the one
    that came furthest, judged by its metric like any other. The other rows follow as they rank. A student that is worse
    than before its training is left out.

    Args:
        rows: Rows of a run, including those of further seeds.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
        students_only: Whether to return trained students only. Then all of them are included.
        simulated: Whether losses in runtimes are left aside.
    """
    found = _in_order(rows, metric, direction, students_only=students_only)
    return found if simulated else finalists_first(found, metric)


def _in_order(rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool) -> list[Row]:
    validation = [row for row in rows if row.split != "test"]
    if students_only:
        return _students(validation, metric, direction)
    worse = {row.row_id for row, _ in worsened(validation, metric, direction)}
    usable = [row for row in validation if row.row_id not in worse]
    students = _students(usable, metric, direction)
    untrained = untrained_in_order(usable, metric, direction)
    if students and (not students[0].full or confirmations(usable, metric, direction)):
        # Give it full fidelity, so that it is ranked by its metric, although a rung evaluates fewer tokens.
        champion = replace(students[0], fidelity=1.0)
        beside = [one.row.row_id for one in rank([champion, *untrained], metric, direction)]
        place = beside.index(champion.row_id)
        before, after = beside[:place], beside[place + 1 :]
        by_id = {row.row_id: row for row in untrained}
        return [*map(by_id.__getitem__, before), *students, *map(by_id.__getitem__, after)]
    ranked = [one.row for one in rank(contenders(usable), metric, direction)]
    return [row for row in ranked if row.kind in (*DISTILLED, *UNTRAINED) and _counts(row, metric)]


def untrained_in_order(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """Return the untrained rows that fit the budget and have the metric, the best first, as by `in_order`."""
    ranked = rank([row for row in rows if row.split != "test" and row.kind in UNTRAINED], metric, direction)
    return finalists_first([one.row for one in ranked if _counts(one.row, metric)], metric)


def chosen(rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool) -> Row | None:
    """Return the first row of `in_order`, or None if nothing fits the budget."""
    return next(iter(in_order(rows, metric, direction, students_only=students_only)), None)


def _students(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """Return the students, the best first. If further seeds were trained, the best strategy by these comes first."""
    ranked = [row for row in rank_students(contenders(rows), metric, direction) if _counts(row, metric)]
    confirmed = confirmations(rows, metric, direction)
    if not confirmed:
        return ranked
    trial = confirmed[0].trial
    own = [row for row in contenders(rows) if row.trial == trial]
    best = [row for row in rank_students(own, metric, direction) if _counts(row, metric)]
    return [*best, *(row for row in ranked if row.trial != trial)]


def _counts(row: Row, metric: str) -> bool:
    return row.feasible and row.figure(metric) is not None

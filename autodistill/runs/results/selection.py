"""Which student of a run is chosen: the one answer that export, explanation, report and summary give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autodistill.evaluation.base import Direction
from autodistill.evaluation.statistics import widening
from autodistill.runs.results.beginnings import worsened
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, rank, rank_students, smallness
from autodistill.runs.results.row import Row
from autodistill.utils.plain_dataclass import ToJson

KIND = "confirmation"


def confirming(trial: str, seed: int) -> str:
    """Name of the trial that trains `trial`'s strategy on another seed."""
    return f"{trial}s{seed}"


def confirmed_trial(row: Row) -> str:
    """Name of the trial whose strategy a row of kind "confirmation" trained again."""
    return row.trial.rpartition("s")[0]


@dataclass(frozen=True, kw_only=True)
class Confirmation(ToJson):
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
    """The standard error of a mean over seeds, widened: two or three seeds say little of how much they vary."""
    return float(widening(len(values)) * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def students_only(search: Mapping[str, Any]) -> bool:
    """Return whether a run, by its `search.json`, chooses among trained students alone, as those of earlier versions
    did.
    """
    return bool(search.get("students_only", True))


def contenders(rows: Sequence[Row]) -> list[Row]:
    """The rows of the validation split that are ranked: a strategy counts once, not again for each further seed.

    Of several seeds the luckiest would be the first of them; these are compared by their means.
    """
    return [row for row in rows if row.split != "test" and row.kind != KIND]


def in_order(rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool) -> list[Row]:
    """The rows that keep to the budget and have the metric, the chosen one first, whether it was trained or not.

    Chosen is what ranks first. Of strategies that were trained on further seeds only the best by these stands for the
    students, in the best of its deployments; and where no student was trained to the end, the one that came furthest
    does, judged by its metric as any other. The others follow as they rank. A student that does worse than its own
    beginning is left out.

    Args:
        rows: Of a run, those of further seeds among them.
        metric: A figure of the rows.
        direction: Whether more or less of it is better.
        students_only: Whether only trained students are asked for: then all of them count, and nothing else does.
    """
    validation = [row for row in rows if row.split != "test"]
    if students_only:
        return _students(validation, metric, direction)
    worse = {row.row_id for row, _ in worsened(validation, metric, direction)}
    usable = [row for row in validation if row.row_id not in worse]
    students = _students(usable, metric, direction)
    untrained = untrained_in_order(usable, metric, direction)
    if students and (not students[0].full or confirmations(usable, metric, direction)):
        # A rung reads less than the end does, but a person judges a student short of the end by its figure.
        champion = replace(students[0], fidelity=1.0)
        beside = [one.row.row_id for one in rank([champion, *untrained], metric, direction)]
        place = beside.index(champion.row_id)
        before, after = beside[:place], beside[place + 1 :]
        by_id = {row.row_id: row for row in untrained}
        return [*map(by_id.__getitem__, before), *students, *map(by_id.__getitem__, after)]
    ranked = [one.row for one in rank(contenders(usable), metric, direction)]
    return [row for row in ranked if row.kind in (*DISTILLED, *UNTRAINED) and _counts(row, metric)]


def untrained_in_order(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """The rows that need no training, keep to the budget and have the metric, the best first."""
    ranked = rank([row for row in rows if row.split != "test" and row.kind in UNTRAINED], metric, direction)
    return [one.row for one in ranked if _counts(one.row, metric)]


def chosen(rows: Sequence[Row], metric: str, direction: Direction, *, students_only: bool) -> Row | None:
    """The first of `in_order`, or None where nothing keeps to the budget."""
    return next(iter(in_order(rows, metric, direction, students_only=students_only)), None)


def _students(rows: Sequence[Row], metric: str, direction: Direction) -> list[Row]:
    """The students, the best first: on several seeds where some were trained on these, else as they rank."""
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

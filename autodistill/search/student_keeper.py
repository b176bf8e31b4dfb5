"""Which students of finished trials a search keeps under its disk limit, beside the checkpoints of its stages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from autodistill.contracts import Status
from autodistill.formats import get_format
from autodistill.records.choice import contenders, in_order
from autodistill.records.confirmation import KIND as CONFIRMATION
from autodistill.records.confirmation import confirmed_trial
from autodistill.records.leaderboard import DISTILLED, pareto, rank, smallness
from autodistill.records.row import Row
from autodistill.search.rungs import CONFIRMED
from autodistill.search.trials import Question, TrialState
from autodistill.storage import Storage
from autodistill.students import remove_student, student_bytes

# The end of a search exports so many students of a container before it gives up.
_FIRST = 3


class StudentKeeper:
    """The whole students of a run on disk, or on its storage.

    Args:
        checkpoints: The run's folder of trained weights, on this machine.
        storage: The run's, which holds its students then; the folder has copies.
        question: Says what is the best.
    """

    def __init__(self, checkpoints: Path, storage: Storage | None, question: Question) -> None:
        self._checkpoints = checkpoints
        self._storage = storage
        self._question = question

    def sizes(self) -> dict[str, int]:
        """Bytes of each student, by trial.

        Raises:
            OSError: As a storage that fails for a moment does.
        """
        return student_bytes(self._checkpoints, self._storage)

    def surplus(
        self, trials: Mapping[str, TrialState], rows: Sequence[Row], sizes: Mapping[str, int], over: int
    ) -> list[str]:
        """The trials whose students are to be removed to free so many bytes, the least valuable first.

        Least are students of further seeds, then those that keep to no budget, then as they rank. Never removed is what
        `needed` names. One that was collected before, and is there still since a kill came between, always goes.

        Args:
            trials: All of the search, by id.
            rows: Of the validation split.
            sizes: Of the students.
            over: Bytes that are too many.
        """
        found = [name for name in sizes if name in trials and trials[name].collected]
        over -= sum(sizes[name] for name in found)
        if over <= 0:
            return found
        ranked = in_order(rows, self._question.metric, self._question.direction, students_only=True)
        order = [row.trial for row in ranked]
        safe = needed(trials.values(), rows, self._question)
        left = [name for name in sizes if name in trials and name not in safe and not trials[name].collected]

        def worth(name: str) -> tuple[bool, int, str]:
            distilled = trials[name].kind in DISTILLED
            return distilled, -order.index(name) if name in order else -len(order), name

        for name in sorted(left, key=worth):
            if over <= 0:
                break
            found.append(name)
            over -= sizes[name]
        return found

    def remove(self, names: Iterable[str]) -> None:
        """Removes the students of these trials."""
        for name in names:
            remove_student(self._checkpoints / name, self._storage)


def needed(trials: Collection[TrialState], rows: Sequence[Row], question: Question) -> set[str]:
    """Ids of the trials whose students must stay.

    Those that a worker has, that have not ended, or lack rows; of what may be exported the first few, overall and in
    each container, whatever cannot be told apart from the best, the smallest in each container, for when others turn
    out larger than predicted, and with several objectives the front; whatever further seeds choose among; and what
    these are compared with on test: the best baselines, and what was trained on as it was before.

    Args:
        trials: All of the search.
        rows: Of the validation split.
        question: Says what is the best.
    """
    metric, direction = question.metric, question.direction
    busy = {
        one.task.id
        for one in trials
        if one.running or one.evaluating or one.unseen or one.status is not Status.COMPLETED
    }
    whole = [row for row in contenders(rows) if row.full and row.figure(metric) is not None]
    usable = [row for row in whole if row.kind in DISTILLED and row.feasible]
    order = [row for row in in_order(rows, metric, direction, students_only=True) if row.full]
    kept = {one.row.trial for one in rank(usable, metric, direction) if one.tied}
    kept |= _confirmed(trials, rows, question)
    by_container: dict[str, list[Row]] = {}
    for row in order:
        by_container.setdefault(get_format(row.deployment["format"]).container, []).append(row)
    for some in (order, *by_container.values()):
        kept.update(list(dict.fromkeys(row.trial for row in some))[:_FIRST])
    kept.update(min(some, key=smallness).trial for some in by_container.values())
    if question.further:
        ways = {metric: direction} | {one.figure: one.direction for one in question.further}
        kept.update(row.trial for row in pareto(usable, ways))
    for tokens in {row.train_tokens for row in whole if row.kind == "baseline"}:
        equal = [row for row in whole if row.kind == "baseline" and row.train_tokens == tokens]
        kept.add(rank(equal, metric, direction)[0].row.trial)
    made = {(str(row.strategy), row.seed) for row in whole if row.trial in kept}
    return busy | kept | {row.trial for row in usable if (str(row.strategy), row.seed) in made}


def _confirmed(trials: Collection[TrialState], rows: Sequence[Row], question: Question) -> set[str]:
    """Trials that are trained on further seeds, or will be: of the students the best few, as the agenda takes them."""
    begun = {confirmed_trial(row) for row in rows if row.kind == CONFIRMATION}
    if not question.confirm:
        return begun
    sign = -1.0 if question.direction == "max" else 1.0
    students = [one for one in trials if one.kind == "student" and one.status is Status.COMPLETED]
    valued = sorted((sign * one.value, one.task.id) for one in students if one.value is not None)
    return begun | {name for _, name in valued[:CONFIRMED]}

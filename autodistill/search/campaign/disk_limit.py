"""Which checkpoints and students a search keeps under its disk limit, and what goes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.evaluation.base import Direction
from autodistill.runs.checkpoints import Checkpoint, StageStore
from autodistill.runs.events import CheckpointsRemoved, RunEvent, StudentsRemoved
from autodistill.runs.results.leaderboard import DISTILLED, pareto, rank, smallness
from autodistill.runs.results.row import Row, Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.results.selection import confirmed_trial, contenders, in_order
from autodistill.runs.run_log import RunLog
from autodistill.runs.students import remove_student, student_bytes
from autodistill.search.algorithms.successive_halving import BEST, CONFIRMED
from autodistill.search.campaign.state import Question, TrialState
from autodistill.utils.storage import Storage


class StageKeeper:
    """What a campaign knows of its stages; all but the files themselves follows from its log.

    Args:
        stages: The run's store.
        limit: Bytes that its checkpoints, and students beside them, may take, those that are never removed aside; None
            for no limit.
        plan: Says where segments begin.
        direction: Whether more or less of what trials are compared by is better.
    """

    def __init__(self, stages: StageStore, limit: int | None, plan: Plan, direction: Direction) -> None:
        self._stages = stages
        self._limit = limit
        self._plan = plan
        self._sign = 1.0 if direction == "max" else -1.0
        self._seen: list[Checkpoint] = []
        # The driver alone holds the run, and no worker runs yet.
        stages.sweep()

    def branched(self, trial: TrialState, rung: int) -> bool:
        """Return whether the checkpoint is kept that the decay of a rung, below the last, branches off."""
        branch = branch_point(self._plan.rungs[rung], self._plan.decay, self._plan.batch_tokens)
        return branch in self.checkpoints(trial)

    def checkpoints(self, trial: TrialState) -> list[int]:
        """Return the tokens of the checkpoints that a trial may go on from, the furthest first."""
        stage = trial.task.stage or trial.task.id
        with suppress(OSError):  # of a storage that fails for a moment: then they are as they were last seen
            self._seen = self._stages.checkpoints()
        return sorted((one.tokens for one in self._seen if one.stage == stage), reverse=True)

    def busy(self, trial: TrialState, trials: Iterable[TrialState]) -> bool:
        """Return whether another trial is training the segment of this trial's stage that would be next.

        It is continued from that one's checkpoint a little later, and not trained twice.
        """
        same = [other for other in trials if other is not trial and other.task.stage == trial.task.stage]
        if not trial.task.stage or any(other.rung > trial.rung for other in same):
            return False
        return any(other.running and self._next(other) > trial.rung for other in same)

    def _next(self, trial: TrialState) -> int:
        return len(self._plan.rungs) - 1 if trial.task.straight else trial.rung + 1

    @property
    def limit(self) -> int | None:
        """Bytes that checkpoints, and the students beside them, may take; None for no limit."""
        return self._limit

    def bytes(self) -> int:
        """Return the bytes of all checkpoints."""
        return sum(checkpoint.bytes for checkpoint in self._stages.checkpoints())

    def surplus(self, trials: Collection[TrialState], promotable: Collection[str], beside: int = 0) -> list[Checkpoint]:
        """Return what is to be removed to hold the limit, the least valuable first.

        A stage is worth what the best trial of it is: that which went furthest, then that of the better value; one of
        no trial is worth least, and within a stage the shorter checkpoint. Never removed is what a trial that runs, or
        may yet be promoted, goes on from, and all of the best few.

        Args:
            trials: All of the search.
            promotable: Ids of the trials that wait at a rung and may go on.
            beside: Bytes that students take of the limit.
        """
        held = self._stages.checkpoints()
        total = beside + sum(checkpoint.bytes for checkpoint in held)
        if self._limit is None or total <= self._limit:
            return []
        safe = self._safe(held, trials, promotable)
        worth = self._worth(trials)
        nothing = (-1, -math.inf)
        found = []
        for checkpoint in sorted(held, key=lambda item: (worth.get(item.stage, nothing), item)):
            if total <= self._limit:
                break
            if checkpoint not in safe:
                found.append(checkpoint)
                total -= checkpoint.bytes
        return found

    def spare(self, trials: Collection[TrialState]) -> list[Checkpoint]:
        """Return what a search that has ended does not need: all but that of the best few, which a longer one trains
        on, and what a student that was kept short of the end is trained on from.
        """
        held = self._stages.checkpoints()
        safe = self._safe(held, trials, {trial.task.id for trial in trials if trial.kept})
        return [checkpoint for checkpoint in held if checkpoint not in safe]

    def remove(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Remove checkpoints."""
        for checkpoint in checkpoints:
            self._stages.remove(checkpoint)

    def _safe(
        self, held: Sequence[Checkpoint], trials: Collection[TrialState], promotable: Collection[str]
    ) -> set[Checkpoint]:
        best = {trial.task.stage for trial in self._best(trials)}
        safe = {checkpoint for checkpoint in held if checkpoint.stage in best}
        for trial in trials:
            if not (trial.running or trial.task.id in promotable):
                continue
            plan, stage = self._plan, trial.task.stage or trial.task.id
            rung, length = min(self._next(trial), len(plan.rungs) - 1), trial.task.length
            target = plan.tokens_of(length) if length > 1 else plan.rungs[rung]
            branch = branch_point(target, plan.decay, plan.batch_tokens)
            own = [checkpoint for checkpoint in held if checkpoint.stage == stage and checkpoint.tokens <= branch]
            safe.update(own[-1:])
        return safe

    def _best(self, trials: Collection[TrialState]) -> list[TrialState]:
        usable = [trial for trial in trials if trial.task.stage and self._value(trial) > -math.inf]
        usable = [trial for trial in usable if trial.status is not Status.FAILED]
        best: dict[str, TrialState] = {}
        for trial in sorted(usable, key=lambda trial: (-self._value(trial), trial.task.id)):
            # What is trained on further has the stage of that which it goes on from.
            best.setdefault(trial.task.stage, trial)
        return list(best.values())[:BEST]

    def _worth(self, trials: Iterable[TrialState]) -> dict[str, tuple[int, float]]:
        worth: dict[str, tuple[int, float]] = {}
        for trial in trials:
            stage = trial.task.stage or trial.task.id
            worth[stage] = max(worth.get(stage, (-1, -math.inf)), (trial.rung, self._value(trial)))
        return worth

    def _value(self, trial: TrialState) -> float:
        """Return what it is compared by, higher for better, below all where there is none or it is of a further
        seed.
        """
        if trial.kind == CONFIRMATION or trial.judged is None or not math.isfinite(trial.judged):
            return -math.inf
        return self._sign * trial.judged


class Collector:
    """Removes what nothing needs any more; the log says so before, so that a kill in between is made good.

    Args:
        stages: Checkpoints, and the limit that both share.
        students: Trained students.
        trials: Of the campaign, by id, as they are at any moment.
        log: The campaign's.
        write: Writes an event down there.
        notify: Called with a line for a person.
    """

    def __init__(
        self,
        stages: StageKeeper,
        students: StudentKeeper,
        trials: Mapping[str, TrialState],
        *,
        log: RunLog,
        write: Callable[[RunEvent], None],
        notify: Callable[[str], None],
    ) -> None:
        self._stages = stages
        self._students = students
        self._trials = trials
        self._log = log
        self._write = write
        self._notify = notify

    def between(self, promotable: Collection[str]) -> None:
        """Remove what is beyond the limit while a search goes on; a trial among `promotable` may go past its rung."""
        self.students()
        self._checkpoints(lambda: self._surplus(promotable))

    def at_the_end(self) -> None:
        """Remove what nothing may continue from, once no trial of this session goes on."""
        self._checkpoints(lambda: self._stages.spare(self._trials.values()))
        self.students()

    def students(self) -> None:
        """Remove students that nothing needs, if the limit asks for it."""
        if self._stages.limit is None:
            return
        try:
            sizes = self._students.sizes()
            over = self._stages.bytes() + sum(sizes.values()) - self._stages.limit
            again = any(name in self._trials and self._trials[name].collected for name in sizes)
            if over <= 0 and not again:
                return
            rows = self._log.rows(split="validation")
            names = self._students.surplus(self._trials, rows, sizes, over)
            if not names:
                return
            self._write(StudentsRemoved(trials=tuple(names), bytes=sum(sizes[name] for name in names)))
            for name in names:
                self._trials[name].collected = True
            self._students.remove(names)
            self._notify(f"removed the trained students of {', '.join(names)}, to hold the disk limit for checkpoints")
        except OSError as error:
            self._notify(f"no students could be collected this time: {error}")

    def _surplus(self, promotable: Collection[str]) -> Sequence[Checkpoint]:
        # What was interrupted short of its first rung is begun again, from what it left.
        waiting = {one.task.id for one in self._trials.values() if one.status is None and one.rung < 0}
        beside = 0 if self._stages.limit is None else sum(self._students.sizes().values())
        return self._stages.surplus(self._trials.values(), waiting | set(promotable), beside)

    def _checkpoints(self, chosen: Callable[[], Sequence[Checkpoint]]) -> None:
        """Remove checkpoints of stages; what a storage does not let go of stays."""
        try:
            checkpoints = chosen()
            if not checkpoints:
                return
            keys = tuple(checkpoint.key for checkpoint in checkpoints)
            self._write(CheckpointsRemoved(checkpoints=keys, bytes=sum(one.bytes for one in checkpoints)))
            self._stages.remove(checkpoints)
        except OSError as error:
            self._notify(f"no checkpoints could be collected this time: {error}")


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
        """Return the bytes of each student, by trial.

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
        """Remove the students of these trials."""
        for name in names:
            remove_student(self._checkpoints / name, self._storage)


def needed(trials: Collection[TrialState], rows: Sequence[Row], question: Question) -> set[str]:
    """Return the ids of the trials whose students must stay.

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
        by_container.setdefault(row.deployment.container, []).append(row)
    for some in (order, *by_container.values()):
        kept.update(list(dict.fromkeys(row.trial for row in some))[:_FIRST])
    kept.update(min(some, key=smallness).trial for some in by_container.values())
    if question.further:
        ways = {metric: direction} | {one.figure: one.direction for one in question.further}
        kept.update(row.trial for row in pareto(usable, ways))
    for tokens in {row.train_tokens for row in whole if row.kind == "baseline"}:
        equal = [row for row in whole if row.kind == "baseline" and row.train_tokens == tokens]
        kept.add(rank(equal, metric, direction)[0].row.trial)
    made = {(row.strategy, row.seed) for row in whole if row.trial in kept}
    return busy | kept | {row.trial for row in usable if (row.strategy, row.seed) in made}


def _confirmed(trials: Collection[TrialState], rows: Sequence[Row], question: Question) -> set[str]:
    """Return the trials that are trained on further seeds, or will be: of the students the best few, as the agenda
    takes them.
    """
    begun = {confirmed_trial(row) for row in rows if row.kind == CONFIRMATION}
    if not question.confirm:
        return begun
    sign = -1.0 if question.judge_direction == "max" else 1.0
    students = [one for one in trials if one.kind == "student" and one.status is Status.COMPLETED]
    valued = sorted((sign * one.judged, one.task.id) for one in students if one.judged is not None)
    return begun | {name for _, name in valued[:CONFIRMED]}

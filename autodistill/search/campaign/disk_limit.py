"""Which checkpoints and students a search keeps under its disk limit, and which it removes first."""

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
    """Keeps track of a campaign's stages. Everything except the files themselves follows from its log.

    Args:
        stages: The run's store.
        limit: Bytes that checkpoints and students together may take, not counting those that are never removed; None
            for no limit.
        plan: Says where segments begin.
        direction: Whether more or less is better in what trials are compared by.
    """

    def __init__(self, stages: StageStore, limit: int | None, plan: Plan, direction: Direction) -> None:
        self._stages = stages
        self._limit = limit
        self._plan = plan
        self._sign = 1.0 if direction == "max" else -1.0
        self._seen: list[Checkpoint] = []
        # Only the driver uses the run at this point: no worker is running yet.
        stages.sweep()

    def branched(self, trial: TrialState, rung: int) -> bool:
        """Return whether the checkpoint still exists from which the decay to a rung (not the last one) branches off."""
        branch = branch_point(self._plan.rungs[rung], self._plan.decay, self._plan.batch_tokens)
        return branch in self.checkpoints(trial)

    def checkpoints(self, trial: TrialState) -> list[int]:
        """Return the tokens of the checkpoints from which a trial may continue, the furthest first."""
        stage = trial.task.stage or trial.task.id
        with suppress(OSError):  # if a storage fails for a moment, use the last known list
            self._seen = self._stages.checkpoints()
        return sorted((one.tokens for one in self._seen if one.stage == stage), reverse=True)

    def busy(self, trial: TrialState, trials: Iterable[TrialState]) -> bool:
        """Return whether another trial is training the next segment of this trial's stage.

        Then this trial continues from that checkpoint a little later, and the segment is not trained twice.
        """
        same = [other for other in trials if other is not trial and other.task.stage == trial.task.stage]
        if not trial.task.stage or any(other.rung > trial.rung for other in same):
            return False
        return any(other.running and self._next(other) > trial.rung for other in same)

    def _next(self, trial: TrialState) -> int:
        return len(self._plan.rungs) - 1 if trial.task.straight else trial.rung + 1

    @property
    def limit(self) -> int | None:
        """Bytes that checkpoints and students together may take; None for no limit."""
        return self._limit

    def bytes(self) -> int:
        """Return the size of all checkpoints in bytes."""
        return sum(checkpoint.bytes for checkpoint in self._stages.checkpoints())

    def surplus(
        self, trials: Collection[TrialState], promotable: Collection[str], reserved_bytes: int = 0
    ) -> list[Checkpoint]:
        """Return the checkpoints to remove to keep to the limit, the least valuable first.

        A stage is worth as much as its best trial: the one that went furthest, then the one with the better value. A
        stage without a trial is worth least. Within a stage, the shorter checkpoint goes first. Two kinds are never
        removed: the checkpoint from which a running or promotable trial continues, and all checkpoints of the best few
        trials.

        Args:
            trials: All trials of the search.
            promotable: Ids of the trials that wait at a rung and may go on.
            reserved_bytes: Bytes of the limit that students take.
        """
        held = self._stages.checkpoints()
        total = reserved_bytes + sum(checkpoint.bytes for checkpoint in held)
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
        """Return the checkpoints that a search no longer needs after its end.

        It still needs those of the best few trials, from which a longer search continues, and those from which a
        student that was kept before the end can be trained further.
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
            # A trial that is trained further has the same stage as the trial it continues.
            best.setdefault(trial.task.stage, trial)
        return list(best.values())[:BEST]

    def _worth(self, trials: Iterable[TrialState]) -> dict[str, tuple[int, float]]:
        worth: dict[str, tuple[int, float]] = {}
        for trial in trials:
            stage = trial.task.stage or trial.task.id
            worth[stage] = max(worth.get(stage, (-1, -math.inf)), (trial.rung, self._value(trial)))
        return worth

    def _value(self, trial: TrialState) -> float:
        """Return the value that a trial is compared by, so that higher is better.

        It is minus infinity for a trial without a value, and for one on a further seed.
        """
        if trial.kind == CONFIRMATION or trial.judged is None or not math.isfinite(trial.judged):
            return -math.inf
        return self._sign * trial.judged


class Collector:
    """Removes what is no longer needed.

    The log records each removal first, so that one that a kill interrupts is finished later.

    Args:
        stages: The checkpoints, and the limit that they share with the students.
        students: The trained students.
        trials: The campaign's trials by id, always up to date.
        log: The campaign's log.
        write: Writes an event to the log.
        notify: Called with a line of text for the user.
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
        """Remove what exceeds the limit while a search goes on; trials in `promotable` may go past their rung."""
        self.students()
        self._checkpoints(lambda: self._surplus(promotable))

    def at_the_end(self) -> None:
        """Remove checkpoints that no trial may continue from, once no trial of this session goes on."""
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
        # Work that was interrupted before its first rung restarts from the checkpoint that it left.
        waiting = {one.task.id for one in self._trials.values() if one.status is None and one.rung < 0}
        beside = 0 if self._stages.limit is None else sum(self._students.sizes().values())
        return self._stages.surplus(self._trials.values(), waiting | set(promotable), beside)

    def _checkpoints(self, chosen: Callable[[], Sequence[Checkpoint]]) -> None:
        """Remove checkpoints of stages. Those that a storage fails to remove stay."""
        try:
            checkpoints = chosen()
            if not checkpoints:
                return
            keys = tuple(checkpoint.key for checkpoint in checkpoints)
            self._write(CheckpointsRemoved(checkpoints=keys, bytes=sum(one.bytes for one in checkpoints)))
            self._stages.remove(checkpoints)
        except OSError as error:
            self._notify(f"no checkpoints could be collected this time: {error}")


# The end of a search tries to export at most this many students of a container.
_FIRST = 3


class StudentKeeper:
    """The complete trained students of a run, on disk or in its storage.

    Args:
        checkpoints: The run's folder of trained weights, on this machine.
        storage: The run's storage, which then holds its students while the folder has copies; None if it has no
            storage.
        question: Says which student is best.
    """

    def __init__(self, checkpoints: Path, storage: Storage | None, question: Question) -> None:
        self._checkpoints = checkpoints
        self._storage = storage
        self._question = question

    def sizes(self) -> dict[str, int]:
        """Return the size of each student in bytes, by trial.

        Raises:
            OSError: A storage failed, perhaps only for a moment.
        """
        return student_bytes(self._checkpoints, self._storage)

    def surplus(
        self, trials: Mapping[str, TrialState], rows: Sequence[Row], sizes: Mapping[str, int], over: int
    ) -> list[str]:
        """Return the trials whose students are removed to free so many bytes, the least valuable first.

        Students of further seeds go first, then those that never fit the budget, then the others from the worst up. The
        students that `needed` names are never removed. A student that was already removed in the log, but is still
        there because of a kill, always goes.

        Args:
            trials: All trials of the search, by id.
            rows: Rows of the validation split.
            sizes: Bytes of each student.
            over: Bytes over the limit.
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

    - Students that a worker uses, whose trial has not ended, or that lack rows.
    - Students that may be exported: the first few, overall and in each container; all that cannot be told apart from
      the best; the smallest in each container, in case others turn out larger than predicted; and, with several
      objectives, the Pareto front.
    - Students that further seeds choose among.
    - Students that these are compared with on test: the best baselines, and each student as it was before its further
      training.

    Args:
        trials: All trials of the search.
        rows: Rows of the validation split.
        question: Says which student is best.
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
    """Return the trials that are trained on further seeds, or will be: the best few students, in the agenda's order."""
    begun = {confirmed_trial(row) for row in rows if row.kind == CONFIRMATION}
    if not question.confirm:
        return begun
    sign = -1.0 if question.judge_direction == "max" else 1.0
    students = [one for one in trials if one.kind == "student" and one.status is Status.COMPLETED]
    valued = sorted((sign * one.judged, one.task.id) for one in students if one.judged is not None)
    return begun | {name for _, name in valued[:CONFIRMED]}

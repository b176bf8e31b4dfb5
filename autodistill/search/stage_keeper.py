"""Which checkpoints of stages a search keeps under its disk limit, who may be forked, and who has to wait."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

from autodistill.contracts import Direction, Plan, Status
from autodistill.distillation.schedule import branch_point
from autodistill.records.confirmation import KIND as CONFIRMATION
from autodistill.search.forks import FEW
from autodistill.search.trials import TrialState
from autodistill.stages import Checkpoint, StageStore
from autodistill.trial_data import RungReport


class StageKeeper:
    """What a campaign knows of its stages; all but the files themselves follows from its log.

    Args:
        stages: The run's store.
        limit: Bytes that its checkpoints, and students beside them, may take, those that are never removed aside; None
            for no limit.
        plan: Says where stretches begin.
        direction: Whether more or less of the metric is better.
    """

    def __init__(self, stages: StageStore, limit: int | None, plan: Plan, direction: Direction) -> None:
        self._stages = stages
        self._limit = limit
        self._plan = plan
        self._sign = 1.0 if direction == "max" else -1.0
        self._gone: set[str] = set()
        self._seen: list[Checkpoint] = []
        # The driver alone holds the run, and no worker runs yet.
        stages.sweep()

    def learn(self, trial: TrialState, unsaved: str | None) -> None:
        """Follows a stretch that ended: its checkpoint is there, or could not be written."""
        (self._gone.discard if unsaved is None else self._gone.add)(trial.task.stage)

    def forget(self, stages: Iterable[str]) -> None:
        """Follows a collection, after which these stages have no checkpoint left."""
        self._gone.update(stages)

    def forkable(self, trial: TrialState) -> bool:
        """Whether others may go on from the trial's stage: it was saved at a rung, and is kept."""
        return trial.rung >= 0 and bool(trial.task.stage) and trial.task.stage not in self._gone

    def branched(self, trial: TrialState, rung: int) -> bool:
        """Whether the checkpoint is kept that the decay of a rung, below the last, branches off."""
        branch = branch_point(self._plan.rungs[rung], self._plan.decay, self._plan.batch_tokens)
        return branch in self.checkpoints(trial)

    def checkpoints(self, trial: TrialState) -> list[int]:
        """Tokens of the checkpoints that a trial may go on from, the furthest first."""
        stage = trial.task.stage or trial.task.id
        with suppress(OSError):  # of a storage that fails for a moment: then they are as they were last seen
            self._seen = self._stages.checkpoints()
        return sorted((one.tokens for one in self._seen if one.stage == stage), reverse=True)

    def busy(self, trial: TrialState, trials: Iterable[TrialState]) -> bool:
        """Whether another trial is training the stretch of this trial's stage that would be next.

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
        """Of all checkpoints."""
        return sum(checkpoint.bytes for checkpoint in self._stages.checkpoints())

    def surplus(self, trials: Collection[TrialState], promotable: Collection[str], beside: int = 0) -> list[Checkpoint]:
        """What is to be removed to hold the limit, the least valuable first.

        A stage is worth what the best trial of it is: that which went furthest, then that of the better value; one of
        no trial is worth least, and within a stage the shorter checkpoint. Never removed is what a trial that runs, or
        may yet be promoted, goes on from, and all of the best few, which are forked.

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
        """What a search that has ended has no use for: all but the best few, which a longer one may fork, and what a
        student that was kept short of the end is trained on from.
        """
        held = self._stages.checkpoints()
        safe = self._safe(held, trials, {trial.task.id for trial in trials if trial.kept})
        return [checkpoint for checkpoint in held if checkpoint not in safe]

    def left_without(self, removed: Sequence[Checkpoint]) -> list[str]:
        """Stages of which nothing is left once these checkpoints are removed."""
        held = {checkpoint.stage for checkpoint in set(self._stages.checkpoints()) - set(removed)}
        return sorted({checkpoint.stage for checkpoint in removed} - held)

    def remove(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Removes them."""
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
        return list(best.values())[:FEW]

    def _worth(self, trials: Iterable[TrialState]) -> dict[str, tuple[int, float]]:
        worth: dict[str, tuple[int, float]] = {}
        for trial in trials:
            stage = trial.task.stage or trial.task.id
            worth[stage] = max(worth.get(stage, (-1, -math.inf)), (trial.rung, self._value(trial)))
        return worth

    def _value(self, trial: TrialState) -> float:
        """Of the metric, higher for better, below all where there is none or it is of a further seed."""
        if trial.kind == CONFIRMATION or trial.value is None or not math.isfinite(trial.value):
            return -math.inf
        return self._sign * trial.value


def stage_facts(report: RungReport) -> dict[str, Any]:
    """What a rung's event says of its stage."""
    unsaved = {} if report.unsaved is None else {"unsaved": report.unsaved}
    return {"trained": report.trained, "shared": report.shared, **unsaved}

"""The trials of a campaign, and the one place that records what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autodistill.errors import AutoDistillError
from autodistill.runs import events
from autodistill.runs.events import RowAdded, RunEvent, TrialAdded, TrialEnded, WorkBegan, WorkLost
from autodistill.runs.results.make_row import make_row
from autodistill.runs.results.row import Row, Status
from autodistill.runs.run_log import RunLog
from autodistill.search.campaign.admission import admit, candidate_of, with_training
from autodistill.search.campaign.events import EventReporter
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import RungReport
from autodistill.strategy.strategy import Strategy

KEPT = "kept"
"""Kind of the work that keeps a student before the end, as in `TrialState.retried`."""


def work_of(assignment: Assignment) -> tuple[int, str | None]:
    """Return the rung and kind of an assignment, as `TrialState.retried` has them."""
    name = assignment.deployment.name if assignment.deployment is not None else None
    return assignment.rung, KEPT if assignment.keep else name


class TrialTable:
    """Holds the state of each trial. The log records each change before it takes effect.

    Args:
        question: What is searched for.
        log: Every event is written here.
        tell: Reports trials to callbacks.
        admission: Makes the state of a new trial. Studies replace `admit`.

    Attributes:
        trials: The trials, by id.
        broken: Error that stopped the log from being written, if any.
    """

    def __init__(
        self, question: Question, log: RunLog, tell: EventReporter, admission: Callable[..., TrialState] = admit
    ):
        self.trials: dict[str, TrialState] = {}
        self.broken: AutoDistillError | None = None
        self._question = question
        self._log = log
        self._tell = tell
        self._admission = admission

    def of(self, assignment: Assignment) -> TrialState:
        """Return the trial that an assignment belongs to."""
        return self.trials[assignment.task.id]

    def write(self, event: RunEvent) -> None:
        """Write an event to the log.

        Raises:
            AutoDistillError: There is no room for it, or the disk fails.
        """
        try:
            self._log.add(event)
        except AutoDistillError as error:
            self.broken = error
            raise

    def enter(self, strategy: Strategy, **fields: Any) -> TrialState:
        """Record a new trial, and its rejection if no deployment fits or its training does not."""
        # A trial that continues another one's stage is trained in the same way.
        same = next((one for one in self.trials.values() if one.task.strategy.id == strategy.id), None)
        made = same.candidate if same else with_training(self._question, candidate_of(self._question, strategy))
        trial = self._admission(self._question, made, **fields)
        self.trials[trial.task.id] = trial
        self.write(
            TrialAdded(
                trial=trial.task.id,
                number=trial.number,
                kind=trial.kind,
                name=trial.name,
                point=trial.point,
                parameters=made.spec.parameters if made.spec else None,
                strategy=strategy,
                seed=trial.task.seed,
                length=trial.task.length,
                training=made.training.to_json() if made.training else None,
            )
        )
        if trial.reason is not None:
            self.end(trial, Status.REJECTED, trial.reason)
        return trial

    def begin(self, assignment: Assignment, kills: int) -> None:
        """Record that work begins, for a runner that dies with its work.

        Work that kills its runner too often is given up.

        Args:
            assignment: The work.
            kills: Number of processes that the kernel has ended so far for lack of memory.
        """
        rung, work = work_of(assignment)
        self.write(WorkBegan(trial=assignment.task.id, rung=rung, work=work, kills=kills))
        self.of(assignment).begun[rung, work] += 1

    def lose(self, assignment: Assignment, trained: int) -> None:
        """Record the tokens of an attempt without a result, and that it has ended."""
        trial = self.of(assignment)
        if trained or trial.begun:
            rung, work = work_of(assignment)
            self.write(WorkLost(trial=trial.task.id, rung=rung, work=work, trained=trained))
        trial.lose(trained)

    def add_row(self, trial: TrialState, report: RungReport, status: Status) -> Row:
        """Write the row of what a worker found about a trial, which has this `status`, and return it."""
        assert trial.candidate.spec is not None
        row = make_row(
            report.evaluation,
            trial=trial.task.id,
            kind=trial.kind,
            name=trial.name,
            strategy=trial.task.strategy,
            spec=trial.candidate.spec,
            status=status,
            split="validation",
            budget=self._question.budget,
            plan=self._question.plan,
            train_tokens=report.tokens,
            train_seconds=trial.train_seconds,
            seed=trial.task.seed,
            device=self._question.served_on,
        )
        self.write(RowAdded(row=row))
        return row

    def end(self, trial: TrialState, status: Status, reason: str | None = None, cause: str | None = None) -> None:
        """End a trial and record it."""
        trial.status, trial.reason, trial.cause = status, reason, cause
        miss: events.Miss | None = None
        if status is Status.REJECTED and trial.miss is not None:
            miss = {"limit": trial.miss.limit, "slack": trial.miss.slack}
        self.write(TrialEnded(trial=trial.task.id, status=status, reason=reason, cause=cause, miss=miss))
        self._tell.ends(trial)

    def is_last(self, rung: int) -> bool:
        """Return whether a rung is the end of the plan."""
        return rung == len(self._question.plan.rungs) - 1

    def mend(self, trial: TrialState) -> None:
        """End a trial that a kill left open, and reopen one that a closed search had left at a rung."""
        # Killed between the trial and its rejection. Work that had begun was admitted, whatever is estimated now.
        if trial.status is None and trial.reason is not None and trial.rung < 0 and not trial.begun:
            self.end(trial, Status.REJECTED, trial.reason)
        # Killed between the last rung and the final status.
        if trial.status is None and self.is_last(trial.rung):
            self.end(trial, Status.COMPLETED)
        # A longer search may take it further.
        if trial.status is Status.STOPPED:
            trial.status = None

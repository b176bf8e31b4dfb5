"""The trials of a campaign, and the one place that writes down what becomes of them."""

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
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.campaign.telling import Teller
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import RungReport
from autodistill.strategy.strategy import Strategy

KEPT = "kept"
"""Of a piece of work that keeps a student short of the end, among those that failed once."""


def work_of(assignment: Assignment) -> tuple[int, str | None]:
    """Return which of a trial's pieces of work an assignment is, as `TrialState.retried` has them."""
    name = assignment.deployment.name if assignment.deployment is not None else None
    return assignment.rung, KEPT if assignment.keep else name


class TrialTable:
    """Holds the state of each trial; what becomes of one is in the log before it takes effect.

    Args:
        question: What is searched for.
        log: Where every event goes.
        tell: Tells callbacks of trials.
        admission: Makes the state of a new trial; another one than `admit` is for studies.

    Attributes:
        trials: By id.
        broken: Why the log could not be written, once that was so.
    """

    def __init__(self, question: Question, log: RunLog, tell: Teller, admission: Callable[..., TrialState] = admit):
        self.trials: dict[str, TrialState] = {}
        self.broken: AutoDistillError | None = None
        self._question = question
        self._log = log
        self._tell = tell
        self._admission = admission

    def of(self, assignment: Assignment) -> TrialState:
        """Return the trial that an assignment is of."""
        return self.trials[assignment.task.id]

    def write(self, event: RunEvent) -> None:
        """Write an event down.

        Raises:
            AutoDistillError: There is no room for it, or the disk fails.
        """
        try:
            self._log.add(event)
        except AutoDistillError as error:
            self.broken = error
            raise

    def enter(self, strategy: Strategy, **fields: Any) -> TrialState:
        """Write a new trial down, and its rejection where no deployment, or its training, can fit."""
        # What goes on from another one's stage is trained as that one is.
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
        """Write down that work begins, for a runner that ends with it: what ends it twice is not begun again.

        Args:
            assignment: The work.
            kills: Processes that the kernel has ended so far for want of memory.
        """
        rung, work = work_of(assignment)
        self.write(WorkBegan(trial=assignment.task.id, rung=rung, work=work, kills=kills))
        self.of(assignment).begun[rung, work] += 1

    def lose(self, assignment: Assignment, trained: int) -> None:
        """Write down what an attempt without a result had trained, and that it has ended."""
        trial = self.of(assignment)
        if trained or trial.begun:
            rung, work = work_of(assignment)
            self.write(WorkLost(trial=trial.task.id, rung=rung, work=work, trained=trained))
        trial.lose(trained)

    def add_row(self, trial: TrialState, report: RungReport, status: Status) -> Row:
        """Write down and return the row of what a worker found of a trial that is at `status`."""
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
        """End a trial, and write that down."""
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
        """End a trial that a kill left unended, and open one again that a closed search had left at a rung."""
        # Between a trial and its rejection. What was begun had been admitted, by whatever estimate.
        if trial.status is None and trial.reason is not None and trial.rung < 0 and not trial.begun:
            self.end(trial, Status.REJECTED, trial.reason)
        # Between the last rung and its status.
        if trial.status is None and self.is_last(trial.rung):
            self.end(trial, Status.COMPLETED)
        # A longer search may take it further.
        if trial.status is Status.STOPPED:
            trial.status = None

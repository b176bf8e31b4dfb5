"""A search in progress: which work is given out, and what each report means for its trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from autodistill.errors import AutoDistillError
from autodistill.hardware.process_memory import killed_for_memory
from autodistill.runs import events
from autodistill.runs.checkpoints import open_stages
from autodistill.runs.events import (
    NotEvaluated,
    RunEvent,
    RungReached,
    StudentKept,
    TrunkDecided,
    WorkRetried,
)
from autodistill.runs.results.row import Decision, Row, Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.run_log import RunLog
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.algorithms.successive_halving import SuccessiveHalving
from autodistill.search.callbacks import Event
from autodistill.search.campaign.admission import admit
from autodistill.search.campaign.agenda import Agenda
from autodistill.search.campaign.disk_limit import Collector, StageKeeper, StudentKeeper
from autodistill.search.campaign.events import EventReporter
from autodistill.search.campaign.judging import Judge
from autodistill.search.campaign.replay import Replay
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.campaign.table import KEPT, TrialTable
from autodistill.search.campaign.time_budget import TimeBudget
from autodistill.search.campaign.trunk import Trunk
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.failures import KILLED, OUT_OF_MEMORY, RETRIED, WORKER_DIED
from autodistill.search.worker.messages import RungReport
from autodistill.utils.storage import Storage

# How often the same work may begin if the search is killed during it: when the kernel killed it for lack of memory, and
# when the cause is unknown. An unknown cause must not change what a search finds, so it gets more tries.
_TRIES_IN_MEMORY, _TRIES = 2, 5


class Campaign:
    """Proposes, schedules, judges and records. It knows neither processes nor models; a runner drives it.

    Args:
        question: What is searched for.
        sampler: Proposes points.
        log: Every event is written here before it takes effect.
        checkpoints: Folder that holds a folder for each trial, and the store of their stages.
        storage: The run's storage, if it has one. The stages are then kept there.
        checkpoint_limit: Bytes that the store and the trained students may take, not counting what is in use and what
            belongs to the best; None for no limit.
        deadline: `time.monotonic()` after which no trial may run, or None.
        notify: Called after each event with a line of text for the user.
        tell: Called with each event that callbacks receive.
        halving, admission: Make the scheduler and the state of a new trial. Studies replace them.
    """

    def __init__(
        self,
        question: Question,
        *,
        sampler: Sampler,
        log: RunLog,
        checkpoints: Path,
        storage: Storage | None = None,
        checkpoint_limit: int | None = None,
        deadline: float | None = None,
        notify: Callable[[str], None] = lambda line: None,
        tell: Callable[[Event], None] = lambda event: None,
        halving: Callable[..., SuccessiveHalving] = SuccessiveHalving,
        admission: Callable[..., TrialState] = admit,
    ) -> None:
        self.question = question
        self.log = log
        self.time_budget = TimeBudget(question, deadline)
        self._notify = notify
        self._tell = EventReporter(tell, question.metric)
        self._table = TrialTable(question, log, self._tell, admission)
        self.trials = self._table.trials
        self.watch: Callable[[], None] = lambda: None
        self._worker_seconds = {"train": 0.0, "evaluate": 0.0, "other": 0.0}
        plan = question.plan
        stages = StageKeeper(open_stages(checkpoints, storage), checkpoint_limit, plan, question.judge_direction)
        scheduler = halving(
            trials=plan.trials,
            rungs=plan.rungs,
            keep=plan.keep,
            direction=question.judge_direction,
            further=[objective.direction for objective in question.further],
        )
        self._judge = Judge(question, self.trials, scheduler)
        self._agenda = Agenda(
            question,
            trials=self.trials,
            time_budget=self.time_budget,
            sampler=sampler,
            scheduler=scheduler,
            stages=stages,
            enter=self._table.enter,
            evaluating=self._evaluating,
            decide=self._decide,
            behind=self._judge.behind,
            notify=notify,
        )
        self._collector = Collector(
            stages,
            StudentKeeper(checkpoints, storage, question),
            self.trials,
            log=log,
            write=self._table.write,
            notify=notify,
        )

    # Methods for runners.

    def next(self) -> Assignment | None:
        """Return the next piece of work and mark it as under way, or None if there is none at the moment."""
        if self.broken:
            return None
        assignment = self._agenda.next()
        if assignment is not None:
            trial = self._table.of(assignment)
            if assignment.deployment is None:
                trial.running = True
                self._tell.starts(trial)
            else:
                trial.settled.add(assignment.deployment.name)
                trial.evaluating += 1
        self.watch()
        return assignment

    @property
    def broken(self) -> AutoDistillError | None:
        """Error that stopped the log from being written, if any. After it no work is given out."""
        return self._table.broken

    @property
    def finished(self) -> bool:
        """Whether nothing is running and nothing more will begin."""
        busy = self._evaluating() or any(trial.running for trial in self.trials.values())
        return not busy and (self.broken is not None or self._agenda.idle())

    def _evaluating(self) -> bool:
        return any(trial.evaluating for trial in self.trials.values())

    def take(self, assignment: Assignment, outcome: Mapping[str, Any]) -> None:
        """Take the outcome of an assignment, as `attempted` or a group of processes returns it."""
        if "report" in outcome:
            if outcome.get("lost"):
                # The group restarted meanwhile, from the last checkpoint.
                self._table.lose(assignment, outcome["lost"])
            self.report(assignment, outcome["report"])
            return
        trained = outcome.get("trained", 0)
        if "failure" in outcome:
            self.fail(assignment, *outcome["failure"], trained=trained)
        else:
            self.abandon(assignment, trained=trained)

    def begin(self, assignment: Assignment, kills: int) -> None:
        """Record that work begins, for a runner that dies with its work: see `TrialTable.begin`."""
        self._table.begin(assignment, kills)

    def report(self, assignment: Assignment, report: RungReport) -> Decision:
        """Record what a worker found, and return what becomes of the trial."""
        trial, plan = self._table.of(assignment), self.question.plan
        # A trial that has all threads takes the time of every worker.
        share = plan.workers if assignment.threads else 1
        self._count_seconds(assignment, report, share)
        if report.damaged is not None:
            self._notify(f"{trial.task.id}: {report.damaged}")
        # The log already has lost tokens, and the stable part that a kept student branches off from. Work that was
        # interrupted silently left nothing in the log.
        resumed = 0 if assignment.keep else max(0, report.resumed - trial.lost)
        trial.begun.clear()
        trial.train_seconds += report.seconds["train"]
        trial.trained_tokens += report.trained + resumed
        status = Status.COMPLETED if self._table.is_last(report.rung) else Status.STOPPED
        row = self._table.add_row(trial, report, status)
        if assignment.deployment is not None:
            return self._evaluated(trial, row)
        trial.running = False
        if assignment.keep:
            return self._kept(trial, row, report)
        return self._reached(trial, row, report, resumed, share)

    def _count_seconds(self, assignment: Assignment, report: RungReport, share: int) -> None:
        """Record how long work took on `share` workers, for later estimates and for the totals by phase."""
        if not assignment.keep:
            rung = self._table.of(assignment).rung
            work = report.seconds["train"] + report.seconds["evaluate"]
            other_seconds = sum(report.seconds.values()) - work
            self.time_budget.learn(assignment, rung, work, report.trained, other_seconds)
        for phase in self._worker_seconds:
            self._worker_seconds[phase] += share * report.seconds[phase]

    def _shown(self, row: Row) -> str:
        value = row.figure(self.question.metric)
        return "no value" if value is None else f"{self.question.metric} {value:.4f}"

    def _evaluated(self, trial: TrialState, row: Row) -> Decision:
        trial.evaluating -= 1
        self._notify(f"{trial.task.id} as {row.deployment_name}: {self._shown(row)}")
        self._collector.students()
        return Decision.STOP

    def _kept(self, trial: TrialState, row: Row, report: RungReport) -> Decision:
        """Record that the student of a rung before the end was kept; `trial.kept` says whether it may be exported."""
        trial.kept = row.feasible and row.figure(self.question.metric) is not None
        self._table.write(
            StudentKept(
                trial=trial.task.id,
                kept=trial.kept,
                trained=report.trained,
                seconds=report.seconds,
                tokens=report.tokens,
                student=report.student,
            )
        )
        self._notify(
            f"no trial has reached the end: {trial.task.id} is kept as it is after {report.tokens:,} tokens, "
            f"{self._shown(row)}"
        )
        return Decision.STOP

    def _reached(self, trial: TrialState, row: Row, report: RungReport, resumed: int, share: int) -> Decision:
        """Judge a trial that has reached a rung, and record the result.

        Args:
            trial: The trial.
            row: Row of its student under the deployment that judges it.
            report: What the worker reported for this rung.
            resumed: Tokens of the segment that were trained by an earlier attempt, which was interrupted without a
                message.
            share: Number of workers whose time the work took.
        """
        trial.rung = report.rung
        trial.ended_at(report.tokens, self.question.plan)
        trial.value = row.figure(self.question.metric) if row.feasible else None
        trial.judged = row.figure(self.question.judge) if row.feasible else None
        trial.further = tuple(row.figure(objective.figure) for objective in self.question.further)
        trial.settled = {row.deployment_name}
        decision = self._judge.judge(trial, row)
        steps = tuple(cast(events.Step, asdict(step)) for step in report.steps)
        trial.hold(steps, self.question.plan)
        # The row is written before its rung. If the search is killed in between, the segment runs again and replaces
        # the row.
        self._table.write(
            RungReached(
                trial=trial.task.id,
                rung=report.rung,
                tokens=report.tokens,
                value=trial.value,
                judged=trial.judged,
                further=trial.further,
                decision=decision,
                seconds=report.seconds,
                steps=steps,
                trained=report.trained,
                shared=report.shared,
                unsaved=report.unsaved,
                resumed=resumed,
                workers=share,
                student=report.student,
            )
        )
        trial.lost = 0
        reused = f", {report.shared:,} of them from a shared stage" if report.shared else ""
        self._notify(f"{trial.task.id} {trial.name}: {self._shown(row)} after {report.tokens:,} tokens{reused}")
        if report.unsaved is not None:
            self._notify(f"{trial.task.id}: {report.unsaved}")
        self._tell.reaches(trial, report, decision)
        if self._table.is_last(report.rung):
            self._table.end(trial, Status.COMPLETED)
        self._collector.between(self._promotable())
        return decision

    def _promotable(self) -> set[str]:
        return self._judge.promotable(self._agenda.in_flight())

    def fail(self, assignment: Assignment, cause: str, message: str, *, trained: int = 0) -> None:
        """Record work that ended without a result after so many tokens, or give it out once more. The search goes on.

        If memory was short twice, the trial itself is taken to need too much.
        """
        trial = self._table.of(assignment)
        self._table.lose(assignment, trained)
        name = assignment.deployment.name if assignment.deployment is not None else None
        if name is None:
            trial.running = False
        else:
            trial.evaluating -= 1
        if assignment.keep:
            # The same student may be tried once more; otherwise another one may be kept.
            again = cause in RETRIED and (assignment.rung, KEPT) not in trial.retried
            trial.retried.add((assignment.rung, KEPT))
            trial.kept = None if again else False
            self._notify(f"{trial.task.id} could not be kept ({cause}): {message}")
            return
        if cause in RETRIED and (assignment.rung, name) not in trial.retried:
            self._table.write(
                WorkRetried(trial=trial.task.id, rung=assignment.rung, deployment=name, cause=cause, reason=message)
            )
            trial.retry(assignment.rung, name)
            self._notify(f"{trial.task.id} is tried once more ({cause}): {message}")
            return
        cause = OUT_OF_MEMORY if cause == KILLED else cause
        if name is not None:
            # The student is trained, and keeps its rows under the deployments that were evaluated.
            self._table.write(NotEvaluated(trial=trial.task.id, deployment=name, reason=f"{cause}: {message}"))
            self._notify(f"{trial.task.id} could not be evaluated as {name} ({cause}): {message}")
            return
        self._judge.discard(trial.task.id)
        self._table.end(trial, Status.FAILED, f"{cause}: {message}", cause)
        self._notify(f"{trial.task.id} failed ({cause}): {message}")

    def abandon(self, assignment: Assignment, *, trained: int = 0) -> None:
        """Take back work that a worker returned undone, because the search is stopping or out of time."""
        trial = self._table.of(assignment)
        self._table.lose(assignment, trained)
        if assignment.deployment is None:
            trial.running = False
        else:
            trial.evaluating -= 1
            trial.settled.discard(assignment.deployment.name)
        if assignment.keep:
            trial.kept = False
        self.time_budget.close()

    def close(self) -> None:
        """End every trial that was left at a rung. Call this once nothing runs and the search will not be resumed."""
        for trial in self.trials.values():
            if trial.status is None:
                reason = f"stopped at rung {trial.rung + 1} of {len(self.question.plan.rungs)}"
                if lag := self._judge.lag(trial.task.id):
                    reason += f": {lag}"
                self._table.end(
                    trial, Status.STOPPED, reason if trial.rung >= 0 else "the time budget ended before its first rung"
                )
        self._collector.at_the_end()

    def _decide(self, trunk: Trunk) -> None:
        self._table.write(TrunkDecided.from_json(trunk.to_json()))
        self._notify(trunk.describe())

    # What the user sees.

    @property
    def exhausted(self) -> bool:
        """Whether the space has nothing left to propose."""
        return self._agenda.exhausted

    def untrained_baselines(self) -> list[str]:
        """Return the names of the baselines that were not trained before the time budget ended."""
        return self._agenda.untrained_baselines()

    def standing(self) -> tuple[float | None, float | None]:
        """Return the metric of the best student at full fidelity so far, and that of the best baseline."""
        best = self.question.best
        values: dict[str, list[float]] = {"student": [], "baseline": [], CONFIRMATION: []}
        for trial in self.trials.values():
            if trial.status is Status.COMPLETED and trial.value is not None:
                values[trial.kind].append(trial.value)
        found, baseline = (best(values[kind]) if values[kind] else None for kind in ("student", "baseline"))
        return found, baseline

    def worker_seconds(self) -> dict[str, float]:
        """Return the seconds that all workers together spent training, evaluating, and loading or saving students."""
        return dict(self._worker_seconds)

    # Resuming a search.

    def replay(self, log: Sequence[RunEvent]) -> None:
        """Restore the state that earlier events left, and finish what a kill interrupted in the last one."""
        self._agenda.resumed = bool(log)
        replay = Replay(self.question, self.trials, self._judge, self._agenda.take)
        replay.take(log)
        for trial in self.trials.values():
            self._table.mend(trial)
        self._give_up_killers(replay.kills)
        if log:
            self._collector.between(self._promotable())

    def _give_up_killers(self, kills: int) -> None:
        """End work that the search has been killed with too often.

        Args:
            kills: Number of processes that the kernel had ended for lack of memory when work last began.
        """
        memory = killed_for_memory() > kills
        for trial in self.trials.values():
            for (rung, work), times in list(trial.begun.items()):
                over = times >= (_TRIES_IN_MEMORY if memory else _TRIES)
                if over and (trial.status is None or work is not None):
                    self._give_up(trial, rung, work, times, memory=memory)

    def _give_up(self, trial: TrialState, rung: int, work: str | None, times: int, *, memory: bool) -> None:
        """End work during which the search was killed so many times.

        Args:
            trial: The trial that the work belongs to.
            rung, work: Which work, as in `TrialState.begun`.
            times: How often the search was killed during it.
            memory: Whether the kernel killed it for lack of memory.
        """
        named = next((one for one in trial.task.deployments if one.name == work), None)
        if named is None and work not in (None, KEPT):
            return
        assignment = Assignment(task=trial.task, rung=rung, deployment=named, keep=work == KEPT)
        trial.retried.add((rung, work))
        if named is not None:
            # The state that giving out the work would leave.
            trial.evaluating += 1
            trial.settled.add(named.name)
        cause = KILLED if memory else WORKER_DIED
        self.fail(assignment, cause, f"the search was killed {times} times while it was under way")

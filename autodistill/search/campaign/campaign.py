"""A search in progress: what is given out, what a report means for its trial, and what is written down of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from autodistill.errors import AutoDistillError
from autodistill.hardware.process_memory import killed_for_memory
from autodistill.runs import events
from autodistill.runs.checkpoints import open_stages
from autodistill.runs.events import (
    NotEvaluated,
    RowAdded,
    RunEvent,
    StudentKept,
    StudentsRemoved,
    TrialAdded,
    TrialEnded,
    TrunkDecided,
    WorkBegan,
    WorkLost,
    WorkRetried,
)
from autodistill.runs.results.make_row import make_row
from autodistill.runs.results.row import Decision, Row, Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.run_log import RunLog
from autodistill.search.algorithms.race import clearly_behind
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.algorithms.successive_halving import SuccessiveHalving
from autodistill.search.callbacks import Event, RungReached, Step, TrialFinished, TrialStarted
from autodistill.search.campaign.admission import admit, candidate_of, with_training
from autodistill.search.campaign.agenda import Agenda
from autodistill.search.campaign.disk_limit import Collector, StageKeeper, StudentKeeper
from autodistill.search.campaign.state import LIKELIHOOD, Candidate, Question, TrialState
from autodistill.search.campaign.time_budget import TimeBox
from autodistill.search.campaign.trunk import Trunk
from autodistill.search.planning.trial_memory import TrainingNeed
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.failures import KILLED, OUT_OF_MEMORY, RETRIED, WORKER_DIED
from autodistill.search.worker.messages import RungReport
from autodistill.strategy.strategy import Strategy
from autodistill.utils.storage import Storage

# How often work is begun that the search is killed with: where the kernel did it for want of memory, and where it may
# have been anybody, which must change nothing of what a search finds.
_TRIES_IN_MEMORY, _TRIES = 2, 5
# Of a piece of work that keeps a student short of the end, among those that failed once.
_KEPT = "kept"


def _work(assignment: Assignment) -> tuple[int, str | None]:
    """Which of a trial's pieces of work an assignment is, as `TrialState.retried` has them."""
    name = assignment.deployment.name if assignment.deployment is not None else None
    return assignment.rung, _KEPT if assignment.keep else name


class Campaign:
    """Proposes, schedules, judges and records; knows neither processes nor models, and is driven by a runner.

    Args:
        question: What is searched for.
        sampler: Proposes points.
        log: Where every event goes before it takes effect.
        checkpoints: Folder that holds a folder for each trial, and the store of their stages.
        storage: The run's, where it has one, which holds the stages then.
        checkpoint_limit: Bytes that the store and the trained students may take, what is in use and of the best aside;
            None for no limit.
        deadline: `time.monotonic()` after which no trial may run, or None.
        notify: Called after each event with a line for a person.
        tell: Called with each event that callbacks are told of.
        halving: Makes the scheduler; another one is for studies of schedulers.
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
    ) -> None:
        self.question = question
        self.trials: dict[str, TrialState] = {}
        self.stopping = False
        self.broken: AutoDistillError | None = None
        self.box = TimeBox(question, deadline)
        self._log = log
        self._notify = notify
        self._tell = tell
        self._started: set[str] = set()
        self.watch: Callable[[], None] = lambda: None
        # By which each trial was judged at its latest rung, and how far it is behind.
        self._rows: dict[str, Row] = {}
        self._behind: dict[str, tuple[float, float]] = {}
        # While a log is replayed: each trial's latest row, and kills when work was last begun.
        self._read: dict[str, Row] = {}
        self._kills = 0
        self._worker_seconds = {"train": 0.0, "evaluate": 0.0, "other": 0.0}
        plan = question.plan
        self._stages = StageKeeper(open_stages(checkpoints, storage), checkpoint_limit, plan, question.judge_direction)
        self._scheduler = halving(
            trials=plan.trials,
            rungs=plan.rungs,
            keep=plan.keep,
            direction=question.judge_direction,
            further=[objective.direction for objective in question.further],
        )
        self._agenda = Agenda(
            question,
            trials=self.trials,
            box=self.box,
            sampler=sampler,
            scheduler=self._scheduler,
            stages=self._stages,
            enter=self._enter,
            evaluating=self._evaluating,
            decide=self._decide,
            behind=self._behind_of,
            notify=notify,
        )
        self._collector = Collector(
            self._stages,
            StudentKeeper(checkpoints, storage, question),
            self.trials,
            log=log,
            write=self._write,
            notify=notify,
        )

    # What a runner asks.

    def next(self) -> Assignment | None:
        """The next piece of work, or None while there is none; taken as under way from here on."""
        if self.stopping:
            return None
        assignment = self._agenda.next()
        if assignment is not None:
            trial = self.trials[assignment.task.id]
            if assignment.deployment is None:
                trial.running = True
                self._start(trial)
            else:
                trial.settled.add(assignment.deployment.name)
                trial.evaluating += 1
        self.watch()
        return assignment

    def _start(self, trial: TrialState) -> None:
        """Tells of a trial that begins: once, also where its first work is given out again."""
        if trial.task.id not in self._started and trial.rung < 0:
            self._started.add(trial.task.id)
            self._tell(
                TrialStarted(
                    trial=trial.task.id,
                    name=trial.name,
                    kind=trial.kind,
                    strategy=trial.candidate.strategy,
                    seed=trial.task.seed,
                    parameters=trial.candidate.spec.parameters if trial.candidate.spec else None,
                )
            )

    @property
    def finished(self) -> bool:
        """Whether nothing runs and nothing will."""
        busy = self._evaluating() or any(trial.running for trial in self.trials.values())
        return not busy and (self.stopping or self._agenda.idle())

    def _evaluating(self) -> bool:
        return any(trial.evaluating for trial in self.trials.values())

    def take(self, assignment: Assignment, outcome: Mapping[str, Any]) -> None:
        """Takes what became of an assignment back, as `attempted` gives it, or a group of processes."""
        if "report" in outcome:
            if outcome.get("lost"):
                # The group began again in between, from the last checkpoint.
                self._lose(assignment, outcome["lost"])
            self.report(assignment, outcome["report"])
            return
        trained = outcome.get("trained", 0)
        if "failure" in outcome:
            self.fail(assignment, *outcome["failure"], trained=trained)
        else:
            self.abandon(assignment, trained=trained)

    def begin(self, assignment: Assignment, kills: int) -> None:
        """Writes down that work begins, for a runner that ends with it: what ends it twice is not begun again.

        Args:
            assignment: The work.
            kills: Processes that the kernel has ended so far for want of memory.
        """
        rung, work = _work(assignment)
        self._write(WorkBegan(trial=assignment.task.id, rung=rung, work=work, kills=kills))
        self.trials[assignment.task.id].begun[rung, work] += 1

    def report(self, assignment: Assignment, report: RungReport) -> Decision:
        """Records what a worker found and says what becomes of the trial."""
        trial, plan = self.trials[assignment.task.id], self.question.plan
        # Beside one that has all threads no other worker does anything.
        share = plan.workers if assignment.threads else 1
        self._count_seconds(assignment, report, share)
        if report.damaged is not None:
            self._notify(f"{trial.task.id}: {report.damaged}")
        # What was lost is in the log already, as is what a student that is kept branches off from; of what was
        # interrupted without a word nothing is.
        resumed = 0 if assignment.keep else max(0, report.resumed - trial.lost)
        trial.begun.clear()
        trial.train_seconds += report.seconds["train"]
        trial.trained_tokens += report.trained + resumed
        row = self._row(trial, report, Status.COMPLETED if self._is_last(report.rung) else Status.STOPPED)
        self._write(RowAdded(row=row))
        if assignment.deployment is not None:
            return self._evaluated(trial, row)
        trial.running = False
        if assignment.keep:
            return self._kept(trial, row, report)
        return self._reached(trial, row, report, resumed, share)

    def _count_seconds(self, assignment: Assignment, report: RungReport, share: int) -> None:
        """Takes note of how long work took, on so many workers: for what is expected of others, and of all by phase."""
        if not assignment.keep:
            rung = self.trials[assignment.task.id].rung
            work = report.seconds["train"] + report.seconds["evaluate"]
            beside = sum(report.seconds.values()) - work
            self.box.learn(assignment, rung, work, report.trained, beside)
        for phase in self._worker_seconds:
            self._worker_seconds[phase] += share * report.seconds[phase]

    def _is_last(self, rung: int) -> bool:
        return rung == len(self.question.plan.rungs) - 1

    def _shown(self, row: Row) -> str:
        value = row.figure(self.question.metric)
        return "no value" if value is None else f"{self.question.metric} {value:.4f}"

    def _evaluated(self, trial: TrialState, row: Row) -> Decision:
        trial.evaluating -= 1
        self._notify(f"{trial.task.id} as {row.deployment_name}: {self._shown(row)}")
        self._collector.students()
        return Decision.STOP

    def _kept(self, trial: TrialState, row: Row, report: RungReport) -> Decision:
        """The student of a rung short of the end was kept, and is its trial's if it may be exported."""
        trial.kept = row.feasible and row.figure(self.question.metric) is not None
        self._write(
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
        """A trial reached a rung, and is judged there.

        Args:
            trial: Which one.
            row: Of its student under the deployment that it is judged by.
            report: Of the rung.
            resumed: Tokens of the stretch that it had trained before, when it was interrupted without a word.
            share: Workers whose time it took.
        """
        trial.rung = report.rung
        self._ended_at(trial, report.tokens)
        trial.value = row.figure(self.question.metric) if row.feasible else None
        trial.judged = row.figure(self.question.judge) if row.feasible else None
        self._rows[trial.task.id] = row
        trial.further = tuple(row.figure(objective.figure) for objective in self.question.further)
        trial.settled = {row.deployment_name}
        decision = self._judge(trial)
        steps = tuple(cast(events.Step, asdict(step)) for step in report.steps)
        self._hold(trial, steps)
        # The row came before the rung it belongs to: killed in between, the stretch runs again and supersedes it.
        self._write(
            events.RungReached(
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
        self._tell_of_rung(trial, report, decision)
        if self._is_last(report.rung):
            self._end(trial, Status.COMPLETED)
        self._collector.between(self._promotable())
        return decision

    def _promotable(self) -> set[str]:
        return self._scheduler.promotable(self._agenda.in_flight())

    def _keep_none(self) -> None:
        """Which student is the best short of the end is open again, once one was trained further."""
        for trial in self.trials.values():
            trial.kept = None

    def _tell_of_rung(self, trial: TrialState, report: RungReport, decision: Decision) -> None:
        name = trial.task.id
        for step in report.steps:
            self._tell(
                Step(
                    trial=name,
                    tokens=step.tokens,
                    loss=step.loss,
                    learning_rate=step.learning_rate,
                    gradient_norm=step.gradient_norm,
                    tokens_per_second=step.tokens_per_second,
                )
            )
        self._tell(
            RungReached(
                trial=name,
                rung=report.rung,
                tokens=report.tokens,
                metric=self.question.metric,
                value=trial.value,
                decision=decision.value,
            )
        )

    def _judge(self, trial: TrialState) -> Decision:
        # A baseline runs straight to the end and takes nobody's place at a rung.
        if trial.task.straight:
            return Decision.STOP
        decision = self._scheduler.report(trial.task.id, trial.rung, trial.judged, further=trial.further)
        if self.question.raced:
            self._race(trial.rung)
        return decision

    def _race(self, rung: int) -> None:
        """Takes the trials out that are clearly behind the best at a rung, whatever place they have."""
        here = [
            trial
            for trial in self.trials.values()
            if trial.status is None and trial.rung == rung and trial.judged is not None and not trial.task.straight
        ]
        for name, (behind, error) in self._behind_of(here).items():
            if name not in self._behind:
                self._behind[name] = (behind, error)
                self._scheduler.discard(name)

    def _behind_of(self, trials: Sequence[TrialState]) -> dict[str, tuple[float, float]]:
        """By how much trials are clearly behind the best of them, and the standard error of it."""
        return clearly_behind({trial.task.id: self._rows[trial.task.id] for trial in trials}, LIKELIHOOD)

    def _ended_at(self, trial: TrialState, tokens: int) -> None:
        """What was trained on for as long as the box had time is as long as it became."""
        if trial.task.length > 1:
            trial.task = replace(trial.task, length=tokens / self.question.plan.tokens)

    def _hold(self, trial: TrialState, steps: Sequence[events.Step]) -> None:
        """Where memory ran out, the trial goes on with as many sequences at once as its last step had."""
        most = self.question.plan.micro_batch
        if steps and (held := steps[-1].get("micro_batch", most)) < most:
            trial.task = replace(trial.task, micro_batch=held)

    def fail(self, assignment: Assignment, cause: str, message: str, *, trained: int = 0) -> None:
        """Records work that ended without a result after so many tokens, or gives it out once more; the search goes on.

        Where memory was short twice, it is the trial that takes too much.
        """
        trial = self.trials[assignment.task.id]
        self._lose(assignment, trained)
        name = assignment.deployment.name if assignment.deployment is not None else None
        if name is None:
            trial.running = False
        else:
            trial.evaluating -= 1
        if assignment.keep:
            # Where it stands as it did, it may be tried once more, or another be kept.
            again = cause in RETRIED and (assignment.rung, _KEPT) not in trial.retried
            trial.retried.add((assignment.rung, _KEPT))
            trial.kept = None if again else False
            self._notify(f"{trial.task.id} could not be kept ({cause}): {message}")
            return
        if cause in RETRIED and (assignment.rung, name) not in trial.retried:
            self._write(
                WorkRetried(trial=trial.task.id, rung=assignment.rung, deployment=name, cause=cause, reason=message)
            )
            self._retry(trial, assignment.rung, name)
            self._notify(f"{trial.task.id} is tried once more ({cause}): {message}")
            return
        cause = OUT_OF_MEMORY if cause == KILLED else cause
        if name is not None:
            # The student is trained, and stands with the deployments it was evaluated under.
            self._write(NotEvaluated(trial=trial.task.id, deployment=name, reason=f"{cause}: {message}"))
            self._notify(f"{trial.task.id} could not be evaluated as {name} ({cause}): {message}")
            return
        self._scheduler.discard(trial.task.id)
        self._end(trial, Status.FAILED, f"{cause}: {message}", cause)
        self._notify(f"{trial.task.id} failed ({cause}): {message}")

    def _retry(self, trial: TrialState, rung: int, deployment: str | None) -> None:
        """Takes note of a first failure; the work is then as undone as it was."""
        trial.retried.add((rung, deployment))
        if deployment is not None:
            trial.settled.discard(deployment)

    def _lose(self, assignment: Assignment, trained: int) -> None:
        """Writes down what an attempt without a result had trained, and that it has ended."""
        trial = self.trials[assignment.task.id]
        if trained or trial.begun:
            rung, work = _work(assignment)
            self._write(WorkLost(trial=trial.task.id, rung=rung, work=work, trained=trained))
        self._lost(trial, trained)

    def _lost(self, trial: TrialState, trained: int) -> None:
        trial.begun.clear()
        trial.lost += trained
        trial.trained_tokens += trained

    def abandon(self, assignment: Assignment, *, trained: int = 0) -> None:
        """A worker gave work back undone, because the search is stopping or out of time."""
        trial = self.trials[assignment.task.id]
        self._lose(assignment, trained)
        if assignment.deployment is None:
            trial.running = False
        else:
            trial.evaluating -= 1
            trial.settled.discard(assignment.deployment.name)
        if assignment.keep:
            trial.kept = False
        self.box.close()

    def close(self) -> None:
        """Ends every trial that was left at a rung. Called once nothing runs and the search is not to be resumed."""
        for trial in self.trials.values():
            if trial.status is None:
                reason = f"stopped at rung {trial.rung + 1} of {len(self.question.plan.rungs)}"
                if trial.task.id in self._behind:
                    gap, error = self._behind[trial.task.id]
                    reason += f": {gap:.4f} ± {error:.4f} nats a token behind the best there"
                self._end(
                    trial, Status.STOPPED, reason if trial.rung >= 0 else "the time budget ended before its first rung"
                )
        self._collector.at_the_end()

    def _decide(self, trunk: Trunk) -> None:
        self._write(TrunkDecided.from_json(trunk.to_json()))
        self._notify(trunk.describe())

    # What a person is shown.

    @property
    def exhausted(self) -> bool:
        """Whether the space has nothing left to propose."""
        return self._agenda.exhausted

    def untrained_baselines(self) -> list[str]:
        """Names of the baselines that the time box ended before."""
        return self._agenda.untrained_baselines()

    def standing(self) -> tuple[float | None, float | None]:
        """The metric of the best student at full fidelity so far, and of the best baseline."""
        best = self.question.best
        values: dict[str, list[float]] = {"student": [], "baseline": [], CONFIRMATION: []}
        for trial in self.trials.values():
            if trial.status is Status.COMPLETED and trial.value is not None:
                values[trial.kind].append(trial.value)
        found, baseline = (best(values[kind]) if values[kind] else None for kind in ("student", "baseline"))
        return found, baseline

    def worker_seconds(self) -> dict[str, float]:
        """Seconds that workers spent training, evaluating, and loading or saving students, added over all of them."""
        return dict(self._worker_seconds)

    # What a resumed search replays.

    def replay(self, log: Sequence[RunEvent]) -> None:
        """Takes up the state that earlier events left; what a kill left undone of the last one is done now."""
        self._agenda.resumed = bool(log)
        for event in log:
            self._replay(event)
        for trial in self.trials.values():
            self._end_after_kill(trial)
        self._give_up_killers()
        if log:
            self._collector.between(self._promotable())

    def _replay(self, event: RunEvent) -> None:
        match event:
            case TrialAdded():
                self._replay_trial(event)
            case RowAdded():
                self._replay_row(event.row)
            case events.RungReached():
                self._replay_rung(event)
            case TrialEnded():
                self._replay_end(event)
            case WorkBegan():
                self.trials[event.trial].begun[event.rung, event.work] += 1
                self._kills = event.kills
            case WorkLost():
                self._lost(self.trials[event.trial], event.trained)
            case StudentKept():
                self.trials[event.trial].kept = event.kept
            case NotEvaluated():
                self.trials[event.trial].settled.add(event.deployment)
            case WorkRetried():
                self._retry(self.trials[event.trial], event.rung, event.deployment)
            case TrunkDecided():
                self._agenda.take(Trunk.from_json(event.to_json()))
            case StudentsRemoved():
                for name in event.trials:
                    self.trials[name].collected = True

    def _replay_trial(self, event: TrialAdded) -> None:
        assert event.strategy is not None  # `check_log` has refused a log without
        candidate = candidate_of(self.question, event.strategy)
        self._admit(
            # As it was then: what was admitted on another machine stays so.
            replace(candidate, training=TrainingNeed.from_json(event.training)),
            trial_id=event.trial,
            number=event.number,
            kind=event.kind,
            name=event.name,
            point=event.point,
            seed=event.seed,
            length=event.length,
        )

    def _replay_row(self, row: Row) -> None:
        trial = self.trials.get(row.trial)
        if trial is None or row.split != "validation":
            return
        self._read[row.trial] = row
        trial.settled.add(row.deployment_name)
        # A training's is followed by its rung; all other work has ended with it.
        for piece in [piece for piece in trial.begun if piece[1] is not None]:
            del trial.begun[piece]

    def _replay_rung(self, event: events.RungReached) -> None:
        trial = self.trials[event.trial]
        trial.rung, trial.value, trial.judged, trial.further = event.rung, event.value, event.judged, event.further
        self._ended_at(trial, event.tokens)
        trial.train_seconds += event.seconds["train"]
        trial.trained_tokens += event.trained + event.resumed
        trial.begun.clear()
        trial.lost = 0
        trial.settled = set()
        if (row := self._read.get(trial.task.id)) is not None:
            # That of the rung, whatever deployments are looked at later.
            self._rows[trial.task.id] = row
            trial.settled = {row.deployment_name}
        self._keep_none()
        self._hold(trial, event.steps)
        self._judge(trial)

    def _replay_end(self, event: TrialEnded) -> None:
        trial = self.trials[event.trial]
        trial.status, trial.reason, trial.cause = event.status, event.reason, event.cause
        if trial.status is Status.FAILED:
            self._scheduler.discard(trial.task.id)

    def _end_after_kill(self, trial: TrialState) -> None:
        """Ends a trial that a kill left unended, and opens one again that a closed search had left at a rung."""
        # Between a trial and its rejection. What was begun had been admitted, by whatever estimate.
        if trial.status is None and trial.reason is not None and trial.rung < 0 and not trial.begun:
            self._end(trial, Status.REJECTED, trial.reason)
        # Between the last rung and its status.
        if trial.status is None and self._is_last(trial.rung):
            self._end(trial, Status.COMPLETED)
        # A longer search may take it further.
        if trial.status is Status.STOPPED:
            trial.status = None

    def _give_up_killers(self) -> None:
        """Ends work that the search has been killed with too often."""
        memory = killed_for_memory() > self._kills
        for trial in self.trials.values():
            for (rung, work), times in list(trial.begun.items()):
                over = times >= (_TRIES_IN_MEMORY if memory else _TRIES)
                if over and (trial.status is None or work is not None):
                    self._give_up(trial, rung, work, times, memory=memory)

    def _give_up(self, trial: TrialState, rung: int, work: str | None, times: int, *, memory: bool) -> None:
        """Ends work that the search was ended with so many times; `memory` says whether the kernel did it for that."""
        named = next((one for one in trial.task.deployments if one.name == work), None)
        if named is None and work not in (None, _KEPT):
            return
        assignment = Assignment(task=trial.task, rung=rung, deployment=named, keep=work == _KEPT)
        trial.retried.add((rung, work))
        if named is not None:
            # As when it was given out.
            trial.evaluating += 1
            trial.settled.add(named.name)
        cause = KILLED if memory else WORKER_DIED
        self.fail(assignment, cause, f"the search was killed {times} times while it was under way")

    # Trials.

    def _enter(self, strategy: Strategy, **fields: Any) -> TrialState:
        """Writes a new trial down, and its rejection where no deployment, or its training, can fit."""
        # What goes on from another one's stage is trained as that one is.
        same = next((one for one in self.trials.values() if one.task.strategy.id == strategy.id), None)
        made = same.candidate if same else with_training(self.question, candidate_of(self.question, strategy))
        trial = self._admit(made, **fields)
        self._write(
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
            self._end(trial, Status.REJECTED, trial.reason)
        return trial

    def _admit(self, candidate: Candidate, **fields: Any) -> TrialState:
        trial = admit(self.question, candidate, **fields)
        self.trials[trial.task.id] = trial
        return trial

    def _end(self, trial: TrialState, status: Status, reason: str | None = None, cause: str | None = None) -> None:
        trial.status, trial.reason, trial.cause = status, reason, cause
        miss: events.Miss | None = None
        if status is Status.REJECTED and trial.miss is not None:
            miss = {"limit": trial.miss.limit, "slack": trial.miss.slack}
        self._write(TrialEnded(trial=trial.task.id, status=status, reason=reason, cause=cause, miss=miss))
        value = trial.value if trial.rung >= 0 else None
        self._tell(TrialFinished(trial=trial.task.id, name=trial.name, status=status.value, reason=reason, value=value))

    def _row(self, trial: TrialState, report: RungReport, status: Status) -> Row:
        assert trial.candidate.spec is not None
        return make_row(
            report.evaluation,
            trial=trial.task.id,
            kind=trial.kind,
            name=trial.name,
            strategy=trial.task.strategy,
            spec=trial.candidate.spec,
            status=status,
            split="validation",
            budget=self.question.budget,
            plan=self.question.plan,
            train_tokens=report.tokens,
            train_seconds=trial.train_seconds,
            seed=trial.task.seed,
            device=self.question.served_on,
        )

    def _write(self, event: RunEvent) -> None:
        try:
            self._log.add(event)
        except AutoDistillError as error:
            self.broken, self.stopping = error, True
            raise

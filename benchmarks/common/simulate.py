"""Replays a search on the table of recorded students: the real campaign, sampler and scheduler, without training."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.plan import Plan
from autodistill.estimates.fit import fits
from autodistill.evaluation.base import Measurement
from autodistill.evaluation.evaluate import Evaluation
from autodistill.models.spec import ModelSpec
from autodistill.runs.events import RunEvent
from autodistill.runs.results.row import Decision
from autodistill.runs.run_log import RunLog
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.algorithms.successive_halving import SuccessiveHalving, rung_tokens
from autodistill.search.campaign.admission import admit
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.state import Candidate, Question, TrialState
from autodistill.search.planning.durations import Speed
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.failures import WORKER_DIED
from autodistill.search.worker.messages import RungReport
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from benchmarks.common.expenses import Expense, Expenses
from benchmarks.common.math_search import BUDGET, METRIC, QUESTIONS, RUNG_QUESTIONS, STEP, TOKENS
from benchmarks.common.math_table import RUNGS
from benchmarks.common.math_teacher import LENGTH
from benchmarks.common.plans import straight_plan
from benchmarks.common.prepared import Costs
from benchmarks.common.recorded import SEED, Table


def plan(trials: int, rungs: Sequence[int], keep: Sequence[int], workers: int = 1) -> Plan:
    """Return the plan of a simulated search."""
    return straight_plan(
        TOKENS,
        sequence_length=LENGTH,
        batch_tokens=STEP,
        trials=trials,
        rungs=tuple(rungs),
        keep=tuple(keep),
        warmup_tokens=min(8 * STEP, TOKENS // 8),
        rung_eval_tokens=RUNG_QUESTIONS * LENGTH,
        eval_tokens=QUESTIONS * LENGTH,
        workers=workers,
        bf16=True,
        seed=SEED,
    )


def default_rungs() -> tuple[int, ...]:
    """Return the rungs that a search of this many tokens has."""
    return rung_tokens(TOKENS, STEP)


class Memory(RunLog):
    """A log that is kept only in memory."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))
        self._kept: list[RunEvent] = []

    def add(self, event: RunEvent) -> None:
        """Keep an event."""
        self._kept.append(event)

    def all(self) -> list[RunEvent]:
        """Return all events."""
        return self._kept


class Stopping(SuccessiveHalving):
    """Asynchronous successive halving that never pauses. A trial stops unless it is among the best when it reports.

    It keeps the same shares as the search's scheduler, among the trials that have reported so far (Li et al., 2020, and
    Ray's ASHA).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._going: set[str] = set()

    def report(
        self,
        trial_id: str,
        rung: int,
        value: float | None,
        further: Sequence[float | None] = (),
    ) -> Decision:
        """Decide as the scheduler does, but stop a trial instead of pausing it."""
        decision = super().report(trial_id, rung, value, further)
        if decision is Decision.PAUSE:
            reported = len(self._reports[rung])
            share = max(1, reported * self.keep[rung] // self._arriving[rung])
            if trial_id in self._ranked(rung)[:share]:
                self._going.add(trial_id)
            else:
                self.discard(trial_id)
        return decision

    def next_to_promote(self, in_flight: Any, all_proposed: bool, extra: bool = False) -> str | None:
        """Return a trial that passed a rung; it continues at once."""
        for rung in reversed(range(self.last)):
            waiting = [trial for trial in self._waiting(rung, in_flight) if trial in self._going]
            if waiting:
                return waiting[0]
        return None


@dataclass
class Spent:
    """What a simulated search has spent and found so far.

    Attributes:
        operations: Operations of all workers, including the teacher's cache and rows.
        seconds: Seconds since the search began. The cache and the teacher come before the first trial; workers run in
            parallel.
        curve: (operations, seconds, accuracy, row's strategy, deployment) of each student at full fidelity.
        trained: Tokens trained on.
        shared: Tokens that other trials had trained already.
        worked: Seconds of work, over all workers, that ended with a report.
        lost: How often a worker was lost with its work.
    """

    operations: int
    seconds: float = 0.0
    curve: list[tuple[int, float, float, str, str]] = field(default_factory=list)
    trained: int = 0
    shared: int = 0
    worked: float = 0.0
    lost: int = 0

    def add(self, assignment: Assignment, report: RungReport, expense: Expense, now: float, *, whole: bool) -> None:
        """Add the expense of reported work. At the end of the plan (`whole`), add the student's value too."""
        self.worked += expense.seconds
        self.operations += round(expense.operations)
        self.seconds = now
        self.trained += report.trained
        self.shared += report.shared
        value = report.evaluation.measurements.get(METRIC)
        if whole and value is not None:
            strategy = assignment.task.strategy
            self.curve.append((self.operations, now, value.value, strategy.id, report.evaluation.deployment.name))

    def first_above(self, value: float) -> int | None:
        """Return the operations after which a student was better than this value, or None."""
        return next((one[0] for one in self.curve if one[2] > value), None)

    @property
    def best(self) -> tuple[int, float, float, str, str]:
        """The best student at full fidelity, as an entry of `curve`."""
        return max(self.curve, key=lambda one: one[2])


class Worker:
    """Answers assignments from the table, and knows what they would have cost.

    Args:
        table: Recorded students.
        plan: The search's plan.
        live_teacher: Whether there is no cache, so the teacher runs with every student that learns from it.
    """

    def __init__(self, table: Table, plan: Plan, *, live_teacher: bool = False) -> None:
        self.table = table
        self.plan = plan
        self.costs = Costs(table.teacher, plan)
        self.expenses = Expenses(self.costs, table.clock, len(table.deployments))
        self._live = live_teacher
        self._stages: dict[str, set[int]] = {}

    @property
    def start(self) -> Expense:
        """The expense before the first trial."""
        return self.expenses.teacher_rows + (Expense() if self._live else self.expenses.cache)

    def answer(self, assignment: Assignment) -> tuple[RungReport, Expense]:
        """Return the report of an assignment, and the expense of it."""
        strategy = assignment.task.strategy
        line = self.table.lines.get(strategy.id)
        last = assignment.rung == len(self.plan.rungs) - 1
        if assignment.deployment is not None:
            assert line is not None
            value = line.rows[assignment.deployment.name]
            spent = self.expenses.evaluation(strategy, self.plan.eval_tokens)
            return self._report(assignment, assignment.deployment, value, 0, 0, spent.seconds), spent
        tokens = self.plan.rungs[assignment.rung]
        start, shared = self._restore(assignment)
        trained = tokens - start
        spent = self.expenses.train(strategy, trained, live=self._live) + self.expenses.evaluation(
            strategy, self.costs.read_at(assignment.rung)
        )
        # If nothing is rejected, students that no budget can hold are trained too; they have no value.
        value = None if line is None else line.rows[line.probe] if last else line.decayed[RUNGS.index(tokens)]
        return self._report(assignment, assignment.task.probe, value, trained, shared, spent.seconds), spent

    def forget(self, assignment: Assignment, held: set[int]) -> None:
        """Drop the checkpoints of lost work, and keep those that existed before."""
        self._stages[getattr(assignment.task, "stage", "") or assignment.task.id] = held

    def held(self, assignment: Assignment) -> set[int]:
        """Return the checkpoints, in tokens, from which an assignment may continue."""
        return set(self._stages.get(getattr(assignment.task, "stage", "") or assignment.task.id, ()))

    def _restore(self, assignment: Assignment) -> tuple[int, int]:
        """Return where a segment begins (its stage's furthest checkpoint), and how much of it others had trained."""
        task, rung = assignment.task, assignment.rung
        stage = getattr(task, "stage", "") or task.id
        held = self._stages.setdefault(stage, set())
        branch = self.costs.branch(rung)
        start = max((tokens for tokens in held if tokens <= branch), default=0)
        before = self.costs.branch(rung - 1) if rung > 0 and not task.straight else 0
        rungs = range(rung + 1) if stage != task.id else (rung,)
        held.update(self.costs.branch(one) for one in rungs)
        return start, max(0, start - before)

    def _report(
        self,
        assignment: Assignment,
        deployment: Deployment,
        value: float | None,
        trained: int,
        shared: int,
        seconds: float,
    ) -> RungReport:
        spec = student_spec(assignment.task.strategy, self.table.teacher)
        figures = {"memory_bytes": _measured("memory_bytes", _need(spec, deployment), "bytes")}
        if value is not None:
            figures[METRIC] = _measured(METRIC, value, "fraction")
        return RungReport(
            rung=assignment.rung,
            tokens=self.plan.rungs[assignment.rung],
            evaluation=Evaluation(
                deployment=deployment, measurements=figures, documents={"ids": [], "count": [], "sum": []}
            ),
            params=spec.parameters,
            seconds={"train": seconds, "evaluate": 0.0, "other": 0.0},
            steps=(),
            trained=trained,
            shared=shared,
        )


@cache
def _need(spec: ModelSpec, deployment: Deployment) -> int:
    return fits(spec, (deployment,), BUDGET)[0].need


def _measured(name: str, value: float, unit: str) -> Measurement:
    direction = "min" if name == "memory_bytes" else "max"
    return Measurement(name=name, value=value, unit=unit, direction=direction, source="simulated")


def unrejecting(question: Question, candidate: Candidate, **fields: Any) -> TrialState:
    """Admit trials that no deployment can hold. They are trained up to their first rung and do not fit there."""
    trial = admit(question, candidate, **fields)
    trial.reason = None
    return trial


def campaign_of(
    table: Table,
    search_plan: Plan,
    sampler: str,
    seed: int,
    *,
    stopping: bool,
    sharing: bool,
    rejection: bool,
    space: Space | None,
    log: RunLog | None,
    hints: Mapping[str, Any],
) -> Campaign:
    """Return the campaign of a simulated search. The arguments are those of `simulate`."""
    question = Question(
        space=space or table.space,
        deployments=table.deployments,
        budget=BUDGET,
        plan=search_plan,
        speed=Speed(cache=1e6, score=1e6, worker_train=1e6, worker_score=1e6),
        teacher_spec=table.teacher,
        teacher_accuracy=1.0,
        metric=METRIC,
        direction="max",
        sharing=sharing,
    )
    proposer = Sampler(
        question.space,
        name=sampler,
        seed=seed,
        direction="max",
        **hints,
    )
    return Campaign(
        question,
        sampler=proposer,
        log=log or Memory(),
        checkpoints=Path("/nowhere"),
        halving=Stopping if stopping else SuccessiveHalving,
        admission=admit if rejection else unrejecting,
    )


def simulate(
    table: Table,
    search_plan: Plan,
    *,
    sampler: str = "tpe",
    seed: int = 0,
    stopping: bool = False,
    sharing: bool = True,
    rejection: bool = True,
    live_teacher: bool = False,
    space: Space | None = None,
    limit: Expense | None = None,
    life: float = float("inf"),
    away: float = 0.0,
    log: RunLog | None = None,
    **hints: Any,
) -> tuple[Spent, Campaign]:
    """Run one search to its end, in simulated time.

    Args:
        table: Recorded students.
        search_plan: Trials, rungs and workers.
        sampler, seed: Name and seed of the sampler.
        stopping: Whether trials stop at rungs, instead of being paused and promoted.
        sharing: Whether stages are shared.
        rejection: Whether trials that no deployment can hold are rejected without training.
        live_teacher: Whether there is no cache.
        space: A space other than the table's.
        limit: The search ends when both its operations and its seconds have been reached.
        life: Mean seconds of work after which a worker is lost with its work, at random (exponential).
        away: Seconds until another worker replaces a lost one.
        log: Receives the events; by default they are kept only in memory.
        hints: Further arguments of the sampler: observations of earlier searches.
    """
    worker = Worker(table, search_plan, live_teacher=live_teacher)
    campaign = campaign_of(
        table,
        search_plan,
        sampler,
        seed,
        stopping=stopping,
        sharing=sharing,
        rejection=rejection,
        space=space,
        log=log,
        hints=hints,
    )
    start, ticket = worker.start, count()
    now = start.seconds
    spent = Spent(operations=round(start.operations), seconds=now)
    dice = np.random.default_rng([seed, search_plan.workers])
    # An entry without a report is a worker lost at that time. An entry without an assignment is an empty place until
    # then.
    running: list[tuple[float, int, Assignment | None, RungReport | None, Expense]] = []
    while limit is None or not Expense(operations=spent.operations, seconds=spent.seconds).covers(limit):
        while len(running) < search_plan.workers and (assignment := campaign.next()) is not None:
            before = worker.held(assignment)
            report, expense = worker.answer(assignment)
            until = dice.exponential(life) if np.isfinite(life) else life
            if until < expense.seconds:
                worker.forget(assignment, before)
                expense = replace(expense, operations=expense.operations * until / expense.seconds, seconds=until)
                heapq.heappush(running, (now + until, next(ticket), assignment, None, expense))
                continue
            # Rejections aside, work ends in the order of its end times. Ties end in the order of their start.
            heapq.heappush(running, (now + expense.seconds, next(ticket), assignment, report, expense))
        if not running:
            break
        now, _, assignment, report, expense = heapq.heappop(running)
        if assignment is None:
            continue
        if report is None:
            spent.operations += round(expense.operations)
            spent.seconds, spent.lost = now, spent.lost + 1
            campaign.fail(assignment, WORKER_DIED, "its node was lost")
            heapq.heappush(running, (now + away, next(ticket), None, None, Expense()))
            continue
        campaign.report(assignment, report)
        spent.add(assignment, report, expense, now, whole=report.rung == len(search_plan.rungs) - 1)
    campaign.close()
    return spent, campaign

"""What a search is asked, and where each of its trials stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from autodistill.distillation.training.plan import Plan
from autodistill.estimates.fit import Fit, Miss
from autodistill.evaluation.base import Direction, Goal
from autodistill.hardware.budget import Budget
from autodistill.hardware.device import Device
from autodistill.models.spec import ModelSpec
from autodistill.runs.events import Step, TrialKind
from autodistill.runs.results.objectives import Objective
from autodistill.runs.results.row import LIKELIHOOD, Status
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.trial_memory import TrainingNeed, TrialMemory
from autodistill.search.worker.messages import TrialTask
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a campaign searches for; all of it fixed by `search.json`. `confirm` counts further seeds for the best.

    `explore` is the share of the time for training that goes to trials; in the rest the best are trained on.
    `further` are objectives beside the metric; latencies are predicted on `served_on`, where one of them is a latency.
    `sharing` is off where it is to be measured what sharing stages is worth: every trial then trains all of its own.
    `students_only` is on where what needs no training is not chosen, however good it is; `goal` says whether a student
    may forget general text. `raced` is on where
    constructions were solved: students are then compared by their likelihood, paired by document, which decides on
    fewer tokens than the metric does, and are packed on the grid that they were trained on alone.
    `memory` is what a trial has where it runs, which is this session's alone; None where nobody asks for it.
    """

    space: Space
    deployments: tuple[Deployment, ...]
    budget: Budget
    plan: Plan
    speed: Speed
    teacher_spec: ModelSpec
    teacher_accuracy: float
    metric: str
    direction: Direction
    explore: float = 1.0
    confirm: int = 0
    further: tuple[Objective, ...] = ()
    served_on: Device | None = None
    device: str = "cpu"
    sharing: bool = True
    students_only: bool = False
    goal: Goal = "task"
    raced: bool = False
    memory: TrialMemory | None = None

    @property
    def judge(self) -> str:
        """The figure that rungs are judged by; the metric has the last word on what is exported."""
        return LIKELIHOOD if self.raced else self.metric

    @property
    def judge_direction(self) -> Direction:
        """Whether more or less of it is better."""
        return "min" if self.raced else self.direction

    @property
    def best(self) -> Callable[..., float]:
        """`max` or `min`, as the metric asks."""
        return max if self.direction == "max" else min


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy as this search may train it: made once, where it is proposed, and carried to its rows.

    Attributes:
        strategy: What would be trained.
        spec: Shape of its student; None where the teacher has no such student.
        fits: How each deployment that can hold the student stands to the budget.
        reason: Why there is no such student, or no deployment that holds it; None where there is one.
        training: What its training takes of the memory that a trial has, as it was asked when it was proposed; None
            where nobody asked.
    """

    strategy: Strategy
    spec: ModelSpec | None = None
    fits: tuple[Fit, ...] = ()
    reason: str | None = None
    training: TrainingNeed | None = None

    @property
    def slack(self) -> float:
        """The largest log(need / limit), of the deployment that needs least and of training; 0 where none is known."""
        deployed = min((fit.slack for fit in self.fits), default=0.0)
        return deployed if self.training is None else max(deployed, self.training.slack)


@dataclass
class TrialState:
    """The state of one trial.

    Attributes:
        task: What runs; for a rejected trial its strategy alone counts.
        candidate: What it was admitted as.
        number: Of the proposal; baselines have none.
        kind, name: As on its rows.
        point: Of the space, or None for a baseline outside of it.
        rung: Last rung reported, -1 before the first.
        value, further: Of the metric there, and of the further objectives; before, what is predicted of these.
        judged: What it is compared by there: the metric, or in a race its likelihood.
        running: Whether a worker trains it.
        status, reason, cause: Once it has ended; the cause is that of a failure.
        miss: The limit for which it is rejected; None of one that is not, or that contradicts its teacher.
        settled: Deployments that were evaluated at full fidelity, are being, or cannot be.
        retried: Pieces of work that failed once: to which rung, and of an evaluation the deployment's name, or "kept"
            where a student was to be kept.
        begun: How often work was begun, by a runner that ends with it, that has not ended since; by what `retried` has.
        lost: Tokens that attempts which failed, or were given back, trained on since the last rung.
        trained_tokens, train_seconds: What its own training took so far.
        kept: Whether its student was kept short of the end, and may be exported; None where nobody tried.
        evaluating: Evaluations of its trained student that are under way.
        collected: Whether its student was removed, to hold the disk limit.
    """

    task: TrialTask
    candidate: Candidate
    number: int | None
    kind: TrialKind
    name: str
    point: Point | None
    rung: int = -1
    value: float | None = None
    judged: float | None = None
    further: tuple[float | None, ...] = ()
    train_seconds: float = 0.0
    trained_tokens: int = 0
    running: bool = False
    status: Status | None = None
    reason: str | None = None
    cause: str | None = None
    miss: Miss | None = None
    settled: set[str] = field(default_factory=set)
    retried: set[tuple[int, str | None]] = field(default_factory=set)
    kept: bool | None = None
    begun: Counter[tuple[int, str | None]] = field(default_factory=Counter)
    lost: int = 0
    evaluating: int = 0
    collected: bool = False

    @property
    def unseen(self) -> list[Deployment]:
        """Deployments of the trained student that nobody has evaluated or is evaluating."""
        if self.status is not Status.COMPLETED or self.collected:
            return []
        return [deployment for deployment in self.task.deployments if deployment.name not in self.settled]

    def lose(self, trained: int) -> None:
        """Take note of an attempt that ended without a result, after so many tokens."""
        self.begun.clear()
        self.lost += trained
        self.trained_tokens += trained

    def retry(self, rung: int, deployment: str | None) -> None:
        """Take note of a first failure; the work is then as undone as it was."""
        self.retried.add((rung, deployment))
        if deployment is not None:
            self.settled.discard(deployment)

    def ended_at(self, tokens: int, plan: Plan) -> None:
        """Take note of how long extended training became, which the time budget decides."""
        if self.task.length > 1:
            self.task = replace(self.task, length=tokens / plan.tokens)

    def hold(self, steps: Sequence[Step], plan: Plan) -> None:
        """Go on with as many sequences at once as the last step had, if memory ran out."""
        if steps and (held := steps[-1].get("micro_batch", plan.micro_batch)) < plan.micro_batch:
            self.task = replace(self.task, micro_batch=held)

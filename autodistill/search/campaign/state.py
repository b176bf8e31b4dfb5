"""What a search is asked, and the state of each of its trials."""

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
    """What a campaign searches for. `search.json` fixes all of it, except `memory`.

    Attributes:
        explore: Share of the training time that goes to trials. In the rest, the best are trained further.
        confirm: Number of further seeds for the best.
        further: Objectives in addition to the metric.
        served_on: Device for which latencies are predicted, if one of the objectives is a latency.
        sharing: Whether trials share stages. Off to measure what that is worth: each trial then trains all of its
            segments.
        students_only: Whether only trained students may be chosen, even if something that needs no training is better.
        goal: Says whether a student may forget general text.
        raced: On if constructions were solved. Students are then compared by their likelihood, paired by document,
            which decides with fewer tokens than the metric does. They are packed only on the grid that they were
            trained on.
        memory: Memory that a trial has where it runs, in this session only; None if nobody asks for it.
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
        """The figure that judges trials at rungs. The metric still decides what is exported."""
        return LIKELIHOOD if self.raced else self.metric

    @property
    def judge_direction(self) -> Direction:
        """Whether more or less of the figure that judges trials is better."""
        return "min" if self.raced else self.direction

    @property
    def best(self) -> Callable[..., float]:
        """`max` or `min`, depending on the metric's direction."""
        return max if self.direction == "max" else min


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy as this search may train it. It is made once, when the strategy is proposed, and carried to its rows.

    Attributes:
        strategy: What would be trained.
        spec: Shape of its student; None if the teacher has no such student.
        fits: How each deployment that can hold the student compares with the budget.
        reason: Why there is no such student, or no deployment that holds it; None if there is one.
        training: Training memory, as estimated at the time of the proposal; None if nobody asked.
    """

    strategy: Strategy
    spec: ModelSpec | None = None
    fits: tuple[Fit, ...] = ()
    reason: str | None = None
    training: TrainingNeed | None = None

    @property
    def slack(self) -> float:
        """The larger log(need / limit): that of the smallest deployment, or that of training. 0 if neither is known."""
        deployed = min((fit.slack for fit in self.fits), default=0.0)
        return deployed if self.training is None else max(deployed, self.training.slack)


@dataclass
class TrialState:
    """The state of one trial.

    Attributes:
        task: The work that a worker runs. For a rejected trial, only its strategy counts.
        candidate: The candidate that was admitted.
        number: Number of the proposal; None for baselines.
        kind, name: As on its rows.
        point: Its point in the space, or None for a baseline outside the space.
        rung: Last rung reported, -1 before the first.
        value, further: The metric at this rung, and the further objectives. Before the first rung, `further` has
            predictions.
        judged: What it is compared by at this rung: the metric, or in a race its likelihood.
        running: Whether a worker trains it.
        status, reason, cause: How it ended, once it has; `cause` is that of a failure.
        miss: The limit for which it is rejected; None if it is not rejected, or is rejected for a conflict with its
            teacher.
        settled: Deployments that were evaluated at full fidelity, are being evaluated, or cannot be.
        retried: Pieces of work that failed once, each as its rung and its kind: None for training, the deployment's
            name for an evaluation, "kept" for keeping a student.
        begun: How often each piece of work began and has not ended since, under a runner that dies with its work. Keys
            as in `retried`.
        lost: Tokens trained since the last rung by attempts that failed or were given back.
        trained_tokens, train_seconds: Tokens and seconds of its own training so far.
        kept: Whether its student was kept before the end, and may be exported; None if nobody tried.
        evaluating: Number of running evaluations of its trained student.
        collected: Whether its student was removed to keep to the disk limit.
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
        """Deployments of the trained student that are neither evaluated nor being evaluated."""
        if self.status is not Status.COMPLETED or self.collected:
            return []
        return [deployment for deployment in self.task.deployments if deployment.name not in self.settled]

    def lose(self, trained: int) -> None:
        """Record an attempt that ended without a result after so many tokens."""
        self.begun.clear()
        self.lost += trained
        self.trained_tokens += trained

    def retry(self, rung: int, deployment: str | None) -> None:
        """Record a first failure. The work then counts as not done."""
        self.retried.add((rung, deployment))
        if deployment is not None:
            self.settled.discard(deployment)

    def ended_at(self, tokens: int, plan: Plan) -> None:
        """Record the length that extended training reached, which depends on the time budget."""
        if self.task.length > 1:
            self.task = replace(self.task, length=tokens / plan.tokens)

    def hold(self, steps: Sequence[Step], plan: Plan) -> None:
        """If memory ran out, continue with the micro-batch of the last step."""
        if steps and (held := steps[-1].get("micro_batch", plan.micro_batch)) < plan.micro_batch:
            self.task = replace(self.task, micro_batch=held)

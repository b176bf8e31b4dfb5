"""Where the trials of a search stand, what is asked of them, and the work that a worker is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from autodistill.certainty import Bar
from autodistill.contracts import Direction, ModelSpec, Plan, Status
from autodistill.devices import Device
from autodistill.distillation.memory import TooManyAtOnce
from autodistill.distillation.trainer import StepRecord
from autodistill.errors import TrialFailedError
from autodistill.estimate import Fit, Miss
from autodistill.moments import Moment
from autodistill.records.objectives import Objective
from autodistill.search.deadline import OutOfTime
from autodistill.search.expected import Speed
from autodistill.search.failures import explained
from autodistill.search.trial_memory import TrainingNeed, TrialMemory
from autodistill.space import Point, Space
from autodistill.strategy import Deployment
from autodistill.trial import Trial
from autodistill.trial_data import RungReport, TrialTask
from autodistill.units import Budget
from autodistill.workbench import Workbench


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a campaign searches for; all of it fixed by `search.json`. `confirm` counts further seeds for the best.

    `explore` is the share of the time for training that goes to trials; in the rest the best are trained on.
    `further` are objectives beside the metric; latencies are predicted on `served_on`, where one of them is a latency.
    `sharing` is off where it is to be measured what sharing stages is worth: every trial then trains all of its own.
    `students_only` is on where what needs no training is not chosen, however good it is.
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
    memory: TrialMemory | None = None

    @property
    def best(self) -> Callable[..., float]:
        """`max` or `min`, as the metric asks."""
        return max if self.direction == "max" else min


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Work for one worker: take a trial to a rung, or evaluate its trained student under one more deployment.

    Attributes:
        task: Which trial.
        rung: To be reached, or that the student stands at.
        deployment: To be evaluated; None where the trial is trained.
        keep: Whether the student is kept as this rung judges it, which is done where no trial reaches the end.
        until: When a trial that is trained on past the plan is to be trained: it then ends short of
            its length. None for all of its length.
        threads: CPU threads that the worker has for this, where nothing else runs; 0 for as many as ever.
        bar: What the trial must reach at the rung to go on, as those before it stand there; None for no such.
    """

    task: TrialTask
    rung: int
    deployment: Deployment | None = None
    keep: bool = False
    until: Moment | None = None
    threads: int = 0
    bar: Bar | None = None


def work(bench: Workbench, assignment: Assignment, on_step: Callable[[StepRecord], None]) -> RungReport | None:
    """Does what a worker was assigned; of several processes the first one has the report.

    Raises:
        TrialFailedError: Whatever went wrong in this trial.
        OutOfTime: As `on_step` raises it.
        TooManyAtOnce: Several processes are to begin again with fewer sequences at once.
    """
    try:
        # What is kept at the end of a time box is all that there is, and is not given back for its end.
        trial = Trial(bench, assignment.task, (lambda _: None) if assignment.keep else on_step)
        if assignment.deployment is not None:
            first = bench.sharding is None or bench.sharding.rank == 0
            return trial.evaluate(assignment.deployment) if first else None
        with _threads(assignment.threads):
            return trial.run(assignment.rung, keep=assignment.keep, until=assignment.until, bar=assignment.bar)
    except (OutOfTime, TooManyAtOnce):
        raise
    except Exception as error:  # a fault of one trial never ends a search
        raise explained(error) from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many CPU threads in this process, for a while; as many as before where that is 0."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attempt(work: Callable[[], RungReport | None]) -> dict[str, Any]:
    """The outcome of some work as plain data: "report", or "failure" with its cause and what it said.

    Work that ran out of time has neither; that of several processes, which are to begin again, has "fewer": with how
    many sequences at once.
    """
    try:
        return {"report": work()}
    except OutOfTime:
        return {}
    except TooManyAtOnce as error:
        return {"fewer": error.fewer}
    except TrialFailedError as error:
        return {"failure": (error.cause, str(error))}


def attempted(bench: Workbench, assignment: Assignment, on_step: Callable[[StepRecord], None]) -> dict[str, Any]:
    """The outcome of an assignment, as `attempt` gives it; without a report also "trained": on so many tokens."""
    steps = 0

    def count(record: StepRecord) -> None:
        nonlocal steps
        steps += 1
        on_step(record)

    outcome = attempt(lambda: work(bench, assignment, count))
    return outcome if "report" in outcome else outcome | {"trained": steps * bench.setting.plan.batch_tokens}


@dataclass
class TrialState:
    """Where one trial stands.

    Attributes:
        task: What runs; for a rejected trial its strategy alone counts.
        number: Of the proposal; baselines have none.
        kind, name: As on its rows.
        point: Of the space, or None for a baseline outside of it.
        fits: Of each deployment.
        rung: Last rung reported, -1 before the first.
        value, further: Of the metric there, and of the further objectives; before, what is predicted of these.
        running: Whether a worker trains it.
        status, reason, cause: Once it has ended; the cause is that of a failure.
        miss: The limit for which it is rejected; None of one that is not, or that contradicts its teacher.
        settled: Deployments that were evaluated at full fidelity, are being, or cannot be.
        retried: Pieces of work that failed once: to which rung, and of an evaluation the deployment's name, or "kept"
            where a student was to be kept.
        begun: How often work was begun, by a runner that ends with it, that has not ended since; by what `retried` has.
        lost: Tokens that attempts which failed, or were given back, trained on since the last rung.
        trained_tokens, train_seconds: What its own training took so far.
        parameters: Weights of its student; None where the teacher has no such student.
        kept: Whether its student was kept short of the end, and may be exported; None where nobody tried.
        evaluating: Evaluations of its trained student that are under way.
        collected: Whether its student was removed, to hold the disk limit.
        training: What its training takes of the memory that a trial has, as it was asked when it was proposed.
    """

    task: TrialTask
    number: int | None
    kind: str
    name: str
    point: Point | None
    fits: tuple[Fit, ...]
    rung: int = -1
    value: float | None = None
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
    parameters: int | None = None
    kept: bool | None = None
    begun: Counter[tuple[int, str | None]] = field(default_factory=Counter)
    lost: int = 0
    training: TrainingNeed | None = None
    evaluating: int = 0
    collected: bool = False

    @property
    def slack(self) -> float:
        """The largest log(need / limit), of the deployment that needs least and of training; 0 where none is known."""
        deployed = min((fit.slack for fit in self.fits), default=0.0)
        return deployed if self.training is None else max(deployed, self.training.slack)

    @property
    def unseen(self) -> list[Deployment]:
        """Deployments of the trained student that nobody has evaluated or is evaluating."""
        if self.status is not Status.COMPLETED or self.collected:
            return []
        return [deployment for deployment in self.task.deployments if deployment.name not in self.settled]

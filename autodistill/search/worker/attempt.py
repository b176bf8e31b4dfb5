"""One piece of work of a trial on a worker: what it is given, and how it can end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autodistill.distillation.training.fsdp import Sharding
from autodistill.distillation.training.step_record import StepRecord
from autodistill.errors import TrialFailedError
from autodistill.inference.torch_memory import StepOutOfMemory
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.failures import explained
from autodistill.search.worker.messages import RungReport, TrialTask
from autodistill.search.worker.trial import Trial
from autodistill.strategy.deployment import Deployment
from autodistill.utils.clock import Moment


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Work for one worker: take a trial to a rung, or evaluate its trained student under one more deployment.

    Attributes:
        task: The trial.
        rung: Rung to reach, or the rung that the student stands at.
        deployment: Deployment to evaluate; None to train the trial.
        keep: Whether to keep the student as this rung judges it. This is done if no trial reaches the end.
        until: When a trial that is trained beyond the plan must be ready. It may then end before its full length. None
            for its full length.
        threads: CPU threads for this work while nothing else runs; 0 for the usual number.
    """

    task: TrialTask
    rung: int
    deployment: Deployment | None = None
    keep: bool = False
    until: Moment | None = None
    threads: int = 0


def work(
    bench: Workbench,
    assignment: Assignment,
    on_step: Callable[[StepRecord], None],
    in_time: Callable[[], None] = lambda: None,
) -> RungReport | None:
    """Do what a worker was assigned. If several processes do it, only the first one returns the report.

    Raises:
        TrialFailedError: Any error of this trial.
        OutOfTime: As `on_step` raises it, or `in_time` before the first step.
        StepOutOfMemory: Several processes must restart with a smaller micro-batch.
    """
    try:
        # A student that is kept at the end of a time budget is all that the search has. So the end of the time does not
        # stop it.
        on_step = (lambda _: None) if assignment.keep else on_step
        trial = Trial(bench, assignment.task, on_step, assignment.threads, in_time)
        if assignment.deployment is not None:
            first = bench.sharding is None or bench.sharding.rank == 0
            return trial.evaluate(assignment.deployment) if first else None
        with _threads(assignment.threads):
            return trial.run(assignment.rung, keep=assignment.keep, until=assignment.until)
    except (OutOfTime, StepOutOfMemory):
        raise
    except Exception as error:  # a fault of one trial never ends a search
        raise explained(error) from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use so many CPU threads in this process for a while; 0 keeps the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attempt(work: Callable[[], RungReport | None]) -> dict[str, Any]:
    """Return the outcome of some work as plain data: "report", or "failure" with its cause and message.

    Work that ran out of time has neither. If several processes must restart, the outcome has "fewer", the new
    micro-batch.
    """
    try:
        return {"report": work()}
    except OutOfTime:
        return {}
    except StepOutOfMemory as error:
        return {"fewer": error.micro_batch}
    except TrialFailedError as error:
        return {"failure": (error.cause, str(error))}


def attempted(
    bench: Workbench,
    assignment: Assignment,
    on_step: Callable[[StepRecord], None],
    deadline: Moment | None = None,
) -> dict[str, Any]:
    """Return the outcome of an assignment, as `attempt` does. Without a report it also has "trained", in tokens.

    Args:
        bench: The worker's bench.
        assignment: The work.
        on_step: Called after each step; may raise `OutOfTime`.
        deadline: When to give up the work that comes before the first step, or None.
    """
    reached: list[int] = []

    def count(record: StepRecord) -> None:
        reached.append(record.tokens)
        on_step(record)

    def in_time() -> None:
        if deadline is not None and deadline.left < 0:
            raise OutOfTime

    outcome = attempt(lambda: work(bench, assignment, count, in_time))
    if "report" in outcome:
        return outcome
    trained = reached[-1] - reached[0] + bench.setting.plan.batch_tokens if reached else 0
    return outcome | {"trained": trained}


class OutOfTime(Exception):
    """The time budget ended while a trial trained. The trial is given back; it has not failed."""


def step_guard(deadline: Moment | None, sharding: Sharding | None = None) -> Callable[[StepRecord], None]:
    """Return a callback for `Trial` that raises `OutOfTime` after the first step past `deadline`, if there is one.

    If several processes train together, all raise after the same step, even if their clocks differ.
    """

    def guard(record: StepRecord) -> None:
        """Raise `OutOfTime` if this step ended past the deadline in any process."""
        if deadline is None:
            return
        late = deadline.left < 0
        if sharding is not None:
            late = sharding.sum({"late": float(late)})["late"] > 0
        if late:
            raise OutOfTime

    return guard

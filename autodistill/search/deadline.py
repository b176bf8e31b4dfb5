"""The time box as a running trial sees it."""

from __future__ import annotations

from collections.abc import Callable

from autodistill.distillation.sharding import Sharding
from autodistill.distillation.trainer import StepRecord
from autodistill.moments import Moment


class OutOfTime(Exception):
    """The time box ended while a trial trained; the trial is given back, not failed."""


def step_guard(deadline: Moment | None, sharding: Sharding | None = None) -> Callable[[StepRecord], None]:
    """A callback for `Trial` that raises `OutOfTime` after the first step past `deadline`, if there is one.

    Of several processes all raise after the same step, whatever their clocks say.
    """

    def guard(record: StepRecord) -> None:
        """Raises `OutOfTime` where this step, or that of any process, ended past the deadline."""
        if deadline is None:
            return
        late = deadline.left < 0
        if sharding is not None:
            late = sharding.sum({"late": float(late)})["late"] > 0
        if late:
            raise OutOfTime

    return guard

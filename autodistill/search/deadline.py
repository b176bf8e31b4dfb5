"""The time box as a running trial sees it."""

from __future__ import annotations

import time
from collections.abc import Callable

from autodistill.distillation.trainer import StepRecord


class OutOfTime(Exception):
    """The time box ended while a trial trained; the trial is given back, not failed."""


def step_guard(deadline: float | None) -> Callable[[StepRecord], None]:
    """A callback for `Trial` that raises `OutOfTime` after the first step past `deadline`, a `time.time()` or None."""

    def guard(record: StepRecord) -> None:
        if deadline is not None and time.time() > deadline:
            raise OutOfTime

    return guard

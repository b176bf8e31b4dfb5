"""A range test of the learning rate, as a worker's piece of work."""

from __future__ import annotations

import math
from functools import partial

from autodistill.distillation.student.check import student_spec
from autodistill.search.prior.range_test import STEPS, range_test
from autodistill.search.prior.tried_rates import RangeTest
from autodistill.search.worker.begin import on_codes, student_of
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialTask
from autodistill.search.worker.trial import trainer_of


def try_rates(
    bench: Workbench,
    task: TrialTask,
    *,
    horizon: int,
    tokens: int,
    steps: int = STEPS,
    seconds: float = math.inf,
) -> RangeTest:
    """Build a trial's student once, and test learning rates around that of its strategy.

    Args:
        bench: The worker's bench, of one process.
        task: The trial.
        horizon: Optimiser steps of the training that the rate is for.
        tokens: Validation tokens that judge each rate.
        steps, seconds: As for `range_test`.

    Raises:
        TrialFailedError: As `range_test`.
        ValueError: Several processes train together.
    """
    setting, strategy = bench.setting, task.strategy
    if bench.sharding is not None:
        raise ValueError("a range test needs the whole student in one process")
    model, kept = student_of(setting, strategy, task.seed)
    bench.check(strategy, kept)
    model = model.to(setting.device)
    # The student starts on its codes, and each rate must keep to them.
    scales = on_codes(setting, strategy, model)
    return range_test(
        model,
        partial(trainer_of, bench, task, model, kept),
        spec=student_spec(strategy, setting.teacher_spec, setting.pretrained.get(strategy.init.model)),
        strategy=strategy,
        plan=setting.plan,
        held_out=bench.held_out(tokens, strategy.init)[0],
        deployment=task.probe,
        horizon=horizon,
        scales=scales,
        steps=steps,
        seconds=seconds,
        device=setting.device,
    )

"""Sets the learning rate for the planned number of steps, and tests it if time allows or the model family is new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from autodistill.distillation.student.check import probe_deployment
from autodistill.distillation.training.plan import Plan
from autodistill.inference.torch_memory import give_back_memory
from autodistill.search.construction.recipe import first_prior
from autodistill.search.planning.durations import Demand, Speed, evaluated_tokens
from autodistill.search.planning.placement import Workers
from autodistill.search.planning.plan import FURTHER, RATES
from autodistill.search.prior.range_test import FEWEST_LONG, LONG_RATES, LONG_STEPS, SPARE
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.worker.begin import codes_file
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.rates import try_rates


def steps_of(plan: Plan) -> int:
    """Return the optimiser steps of the longest training that is planned, if trials leave time for it."""
    longest = plan.tokens_of(FURTHER * plan.expected) if plan.longest > 1 else plan.most_tokens
    return max(1, longest // plan.batch_tokens)


def for_plan(config: SearchConfig, plan: Plan) -> SearchConfig:
    """Return the settings with the prior for the planned size and number of steps."""
    if not config.constructions:
        return config
    prior = first_prior(config.spec, batch_tokens=plan.batch_tokens, steps=steps_of(plan))
    return config.with_constructions(config.constructions, prior)


def share_for(config: SearchConfig, workers: Workers, demand: Demand, speed: Speed) -> float:
    """Return the share of the time budget for a test of learning rates; 0 if there is no test.

    A teacher's shape does not tell how far its best rate is from that of other teachers. Of two teachers of one family,
    one had its best rate at the prior, the other at ten times the prior. So a rate is tested if the time allows a test
    with a clear outcome. For a family that the prior knows nothing about, any test is better than none.
    """
    if not _testable(config, workers) or demand.box_seconds is None:
        return 0.0
    judging = evaluated_tokens(demand, speed)[0] / speed.score
    step = demand.step_tokens / speed.worker_train
    least, enough = (SPARE * LONG_RATES * (steps * step + judging) for steps in (FEWEST_LONG, LONG_STEPS))
    if not _seen(config) or least <= RATES * demand.box_seconds:
        return min(RATES, enough / demand.box_seconds)
    return 0.0


def to_test(config: SearchConfig, plan: Plan, workers: Workers) -> bool:
    """Return whether rates are tested: the plan has time for it, or the family is new, regardless of time."""
    return _testable(config, workers) and (plan.seconds.get("rates", 0.0) > 0 or not _seen(config))


def _testable(config: SearchConfig, workers: Workers) -> bool:
    """Return whether the search begins with constructions and each trial has a single process."""
    return bool(config.constructions) and workers.processes == 1


def _seen(config: SearchConfig) -> bool:
    return first_prior(config.spec, batch_tokens=config.sequence_length).family_seen


def tested(
    config: SearchConfig, plan: Plan, setting: TrialSetting, notify: Callable[[str], None]
) -> tuple[SearchConfig, Mapping[str, Any]]:
    """Return the settings with the rate that a test finds for the first arm, and the test as plain data.

    Args:
        config: Settings with the prior for the plan.
        plan: Plan of the search.
        setting: Setting of its trials.
        notify: Called with the outcome.

    Raises:
        TrialFailedError: The first arm cannot be trained for a single step.
    """
    strategy = next(iter(config.space.starts.values()))
    own = tuple(one.deployment for one in config.constructions if one.init == strategy.init)
    probe = probe_deployment(strategy, own)
    task = TrialTask(id="rates", strategy=strategy, seed=plan.seed, deployments=(probe,), probe=probe)
    if strategy.codes:
        codes_file(setting, strategy)  # made first, since its time is planned separately
    bench = Workbench(setting)
    try_them = partial(try_rates, bench, task, horizon=steps_of(plan), tokens=plan.rung_eval_tokens)
    found = try_them() if plan.box_seconds is None else try_them(steps=LONG_STEPS, seconds=plan.seconds["rates"])
    del bench
    give_back_memory()
    notify(found.describe())
    prior = first_prior(config.spec, batch_tokens=plan.batch_tokens, steps=steps_of(plan), rate=found.chosen)
    return config.with_constructions(config.constructions, prior), found.to_json()

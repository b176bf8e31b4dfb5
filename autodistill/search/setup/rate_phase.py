"""The learning rate of a search: for as many steps as were planned, and tested where the teacher's family is new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autodistill.distillation.student.check import probe_deployment
from autodistill.distillation.training.plan import Plan
from autodistill.inference.torch_memory import give_back_memory
from autodistill.search.construction.recipe import first_prior
from autodistill.search.planning.placement import Workers
from autodistill.search.planning.plan import FURTHER, RATES
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.rates import try_rates


def steps_of(plan: Plan) -> int:
    """Optimiser steps of the longest training that is planned, where trials leave it some time."""
    longest = plan.tokens_of(FURTHER * plan.expected) if plan.longest > 1 else plan.most_tokens
    return max(1, longest // plan.batch_tokens)


def for_plan(config: SearchConfig, plan: Plan) -> SearchConfig:
    """The settings with the prior for steps of this size, and for as many of them as are planned."""
    if not config.constructions:
        return config
    prior = first_prior(config.spec, batch_tokens=plan.batch_tokens, steps=steps_of(plan))
    return config.with_constructions(config.constructions, prior)


def to_test(config: SearchConfig, workers: Workers) -> bool:
    """Return whether rates are tested: of a family that the prior has seen nothing of, where a process trains alone."""
    if not config.constructions or workers.processes > 1:
        return False
    return not first_prior(config.spec, batch_tokens=config.sequence_length).family_seen


def tested(
    config: SearchConfig, plan: Plan, setting: TrialSetting, notify: Callable[[str], None]
) -> tuple[SearchConfig, Mapping[str, Any]]:
    """The settings with the rate that a test finds for the first arm, and the test as plain data.

    Args:
        config: With the prior for the plan.
        plan: Of the search.
        setting: Of its trials.
        notify: Told of the outcome.

    Raises:
        TrialFailedError: The first arm cannot be trained a single step.
    """
    strategy = next(iter(config.space.starts.values()))
    own = tuple(one.deployment for one in config.constructions if one.init == strategy.init)
    probe = probe_deployment(strategy, own)
    task = TrialTask(id="rates", strategy=strategy, seed=plan.seed, deployments=(probe,), probe=probe)
    seconds = float("inf") if plan.box_seconds is None else RATES * plan.box_seconds
    bench = Workbench(setting)
    found = try_rates(bench, task, horizon=steps_of(plan), tokens=plan.rung_eval_tokens, seconds=seconds)
    del bench
    give_back_memory()
    notify(found.describe())
    prior = first_prior(config.spec, batch_tokens=plan.batch_tokens, steps=steps_of(plan), rate=found.chosen)
    return config.with_constructions(config.constructions, prior), found.to_json()

"""A range test of the learning rate: one student is trained briefly at several rates and judged on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import TrialFailedError
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.inference.scoring import score
from autodistill.models.loading import token_tables
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.search.prior.prior import many_tokens
from autodistill.search.prior.tried_rates import (
    HORIZON,
    HORIZON_OF_SCALES,
    RangeTest,
    TriedRate,
    choose,
    next_rate,
    next_rate_of_many,
    paired,
    rate_of_many,
)
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy

STEPS = 12
"""Optimiser steps at each rate, including the decay."""

LONG_STEPS, FEWEST_LONG = 48, 12
"""Steps at each rate in a search's test. A family that the prior knows is not tested if there is only time for fewer
than `FEWEST_LONG`. For the scales of a small language model the best rate after 12 steps is also the best after 400."""

LONG_RATES = 6
"""Number of rates that such a test gets time for."""

# Shares of the steps that warm the rate up, and that bring it down to 0.
_WARMUP, _DECAY = 1 / 6, 0.25
_LEAST_STEPS, _TIMED_STEPS = 4, 2
# If time is short, steps become fewer, down to `STEPS`, so that `_WANTED_RATES` rates fit. Below `STEPS` they become
# fewer so that `_FEWEST_RATES` rates fit.
_WANTED_RATES, _FEWEST_RATES = 5, 3
SPARE = 1.15
"""Factor by which a rate may take longer than was timed."""


def range_test(
    model: Any,
    make_trainer: Callable[[Strategy, Plan], Trainer],
    *,
    spec: ModelSpec,
    strategy: Strategy,
    plan: Plan,
    held_out: TokenSet,
    deployment: Deployment,
    horizon: int,
    scales: Mapping[str, Scales] | None = None,
    steps: int = STEPS,
    seconds: float = math.inf,
    device: str = "cpu",
) -> RangeTest:
    """Train a student for some steps at each of several learning rates, and choose one for a longer training.

    All rates begin with the same weights and see the same sequences. Each ends with a short decay, on the strategy's
    own grid if it has one. Rates go down from the strategy's rate while none clearly beats the untrained student, or
    while the smallest is clearly the best. They go up while the largest is the best. With fixed steps and unlimited
    seconds the outcome is deterministic.

    For a training of weights with many tokens for each, rates go down only while they clearly harm the student, and up
    while the highest would be chosen (`rate_of_many`).

    Afterwards the model's weights, flags and gradients and torch's random state are as before. Until then a copy of the
    trained weights is in this machine's memory.

    Args:
        model: The student before training, in float32 on `device`, whole in this process.
        make_trainer: Makes a trainer of this model for a strategy and a plan, which differ from those given here only
            in the rate and the number of tokens. It does not change the weights.
        spec: The student's shape.
        strategy: The strategy to train; its learning rate is tried first.
        plan: Plan of the longer training.
        held_out: Text that is not trained on.
        deployment: Deployment in which the student is judged.
        horizon: Steps of the longer training.
        scales: Scales that pack the untrained student, as for `deployed_weights`.
        steps: Steps at each rate, at least 4. They are fewer if the seconds do not suffice for five rates with so many
            steps, or for three rates with 12.
        seconds: Time limit of the test, without compilation. No rate is begun that would end later.
        device: Device of the model.

    Raises:
        ValueError: There are fewer than 4 steps.
        TrialFailedError: The untrained student's likelihoods are not finite, or memory is too small for a step.
    """
    if steps < _LEAST_STEPS:
        raise ValueError(f"a range test takes at least {_LEAST_STEPS} steps, not {steps}")
    first = strategy.distillation.learning_rate
    long = many_tokens(horizon * plan.batch_tokens, spec.parameters) and not strategy.scales_alone
    tried: tuple[TriedRate, ...] = ()
    with _restoring(model, strategy) as restore:
        held = HeldOut(model, spec, held_out, deployment, device)
        if math.isfinite(seconds):
            # Loops are compiled on their first call. Trials use them too, so this is not part of a rate's time.
            with deployed_weights(model, spec, deployment, scales):
                pass
            train_briefly(make_trainer, strategy, plan, spec, first, _TIMED_STEPS)
            restore()
        began = time.monotonic()
        before = held.sums(scales)
        if before is None:
            raise TrialFailedError("nan", "the untrained student's likelihoods are not finite")
        judging = time.monotonic() - began
        if math.isfinite(seconds):
            records, _ = train_briefly(make_trainer, strategy, plan, spec, first, _TIMED_STEPS)
            step = plan.batch_tokens / records[-1].tokens_per_second
            steps = _steps_within(began + seconds - time.monotonic(), steps, judging, step)
        if steps >= _LEAST_STEPS:
            train = partial(train_briefly, make_trainer, strategy, plan, spec, steps=steps)
            following = partial(next_rate_of_many if long else next_rate, first, counts=held.counts)
            tried = _tried(following, held, before, train, restore, began + seconds)
    chosen = first
    if tried:
        chosen = choose(tried, horizon / steps, HORIZON_OF_SCALES if strategy.scales_alone else HORIZON)
    if long:
        chosen = rate_of_many(first, tried, held.counts) or chosen
    return RangeTest(
        first=first,
        steps=steps if tried else 0,
        horizon=horizon,
        counts=held.counts,
        sums=before,
        tried=tried,
        chosen=chosen,
    )


def _steps_within(left: float, steps: int, judging: float, step: float) -> int:
    """Return how many steps a rate may have, so that five rates fit in the time, or three with at most `STEPS`.

    Args:
        left: Seconds that are left.
        steps: The most steps.
        judging, step: Seconds of an evaluation, and of a step.
    """
    many, few = (int((left / rates / SPARE - judging) / step) for rates in (_WANTED_RATES, _FEWEST_RATES))
    return min(steps, max(many, min(STEPS, few)))


def _tried(
    following: Callable[[Sequence[TriedRate]], float | None],
    held: HeldOut,
    before: tuple[float, ...],
    train: Callable[[float], tuple[list[StepRecord], Mapping[str, Scales]]],
    restore: Callable[[], None],
    until: float,
) -> tuple[TriedRate, ...]:
    """Try one rate after another, until the best is known or the next may end too late.

    Args:
        following: Returns the rate to try next, or None.
        held: Scores the student.
        before: The scores of the untrained student.
        train: Trains at a rate.
        restore: Brings the untrained student back.
        until: When the last rate must have ended, by `time.monotonic`.
    """
    tried: list[TriedRate] = []
    rate = following(tried)
    while rate is not None:
        restore()
        tried.append(_try(rate, held, before, train))
        rate = following(tried)
        if time.monotonic() + SPARE * max(one.seconds for one in tried) > until:
            break
    return tuple(tried)


class HeldOut:
    """Scores the student on held-out text, as it is deployed.

    Args:
        model, spec, held_out, deployment, device: As for `range_test`.
    """

    def __init__(self, model: Any, spec: ModelSpec, held_out: TokenSet, deployment: Deployment, device: str) -> None:
        self._model, self._spec, self._data = model, spec, held_out
        self._deployment, self._device = deployment, device
        counted = np.ones(held_out.tokens.shape, dtype=bool) if held_out.scored is None else held_out.scored
        _, self._places = np.unique(held_out.documents[:, 1:][counted[:, 1:]], return_inverse=True)
        self.counts: tuple[int, ...] = tuple(np.bincount(self._places).tolist())

    def sums(self, scales: Mapping[str, Scales] | None) -> tuple[float, ...] | None:
        """Return the nats of each document, or None if some likelihood is not finite."""
        with deployed_weights(self._model, self._spec, self._deployment, scales):
            nll = score(self._model, self._data, device=self._device)[0].nll
        found = np.bincount(self._places, weights=nll)
        return tuple(found.round(6).tolist()) if np.isfinite(found).all() else None


def _try(
    rate: float,
    held: HeldOut,
    before: tuple[float, ...],
    train: Callable[[float], tuple[list[StepRecord], Mapping[str, Scales]]],
) -> TriedRate:
    began = time.monotonic()
    try:
        after = held.sums(train(rate)[1])
    except TrialFailedError as error:
        if error.cause != "nan":
            raise
        after = None
    gain, stderr = paired(held.counts, before, after) if after else (None, None)
    return TriedRate(rate=rate, gain=gain, stderr=stderr, sums=after or (), seconds=time.monotonic() - began)


def train_briefly(
    make_trainer: Callable[[Strategy, Plan], Trainer],
    strategy: Strategy,
    plan: Plan,
    spec: ModelSpec,
    rate: float,
    steps: int,
) -> tuple[list[StepRecord], Mapping[str, Scales]]:
    """Train for some steps at a rate, including the decay. Return the records of the steps and the learned scales."""
    tokens = steps * plan.batch_tokens
    warmup = max(1, round(steps * _WARMUP)) * plan.batch_tokens
    short = replace(plan, tokens=tokens, rungs=(tokens,), keep=(), warmup_tokens=warmup, lengths=(1.0,))
    trainer = make_trainer(replace(strategy, distillation=replace(strategy.distillation, learning_rate=rate)), short)
    try:
        records = list(trainer.train_stable(branch_point(tokens, _DECAY, plan.batch_tokens)))
        records += trainer.finish(tokens, spec)
    except TrialFailedError:
        trainer.settle()
        raise
    return records, trainer.scales


@contextmanager
def _restoring(model: Any, strategy: Strategy) -> Iterator[Callable[[], None]]:
    """Yield a function that restores weights and random state. At the end, flags and gradients are restored too."""
    tables = [] if strategy.distillation.train_embeddings else token_tables(model)
    trained = [parameter for parameter in model.parameters() if all(parameter is not table for table in tables)]
    held = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    training, checkpointing = model.training, _checkpoints(model)
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []

    @torch.no_grad()
    def restore() -> None:
        for parameter, values in zip(trained, held, strict=True):
            parameter.copy_(values)
        torch.manual_seed(0)  # so that dropout draws the same numbers at each rate

    with torch.random.fork_rng(devices=devices):
        try:
            yield restore
        finally:
            restore()
            for parameter, trains, gradient in flags:
                parameter.requires_grad_(trains)
                parameter.grad = gradient
            model.train(training)
            if _checkpoints(model) and not checkpointing:
                model.gradient_checkpointing_disable()


def _checkpoints(model: Any) -> bool:
    """Return whether some layer recomputes its activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

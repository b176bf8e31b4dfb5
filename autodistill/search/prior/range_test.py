"""A range test of the learning rate: one student trained briefly at several rates, judged on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from autodistill.evaluation.statistics import paired_bootstrap
from autodistill.inference.scoring import score
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.plain_dataclass import PlainDataclass

FACTOR = 10**0.5
"""Between neighbouring rates."""

STEPS = 12
"""Optimiser steps at each rate, the decay included."""

LONG_STEPS, FEWEST_LONG = 48, 24
"""Likewise, of a test of a rate that is believed already: of fewer than the latter it is not asked."""

LONG_RATES = 6
"""That such a test is given time for."""

# Of the steps: so many warm the rate up, and so many bring it down to 0.
_WARMUP, _DECAY = 1 / 6, 0.25
_LEAST_STEPS, _TIMED_STEPS = 4, 2
# Of rates that the time must hold with fewer steps rather than fewer rates.
_WANTED_RATES = 3
SPARE = 1.15
"""Times as long as timed that a rate may take."""

# How far rates go below the first one, and above it: in steps of `FACTOR`.
_LOWEST, _HIGHEST = -6, 4
# Of standard errors, for one rate to be clearly better than another.
_CLEAR = 2.0
HORIZON, HORIZON_OF_SCALES = -0.35, 0.0
"""The best rate of weights falls with the length of a training, as steps to this power; that of scales of fixed codes
does not."""


@dataclass(frozen=True, kw_only=True)
class TriedRate(PlainDataclass):
    """One learning rate, tried.

    Attributes:
        rate: The peak rate.
        gain: Nats per held-out token that the training won over the untrained student, paired by document; negative
            where it lost. None where loss, gradient or likelihoods were not finite, which is worse than any number.
        stderr: Of the gain; None where the held-out text is one document.
        sums: Nats of each held-out document after the training; empty where they are not finite.
        seconds: That it took.
    """

    rate: float
    gain: float | None
    stderr: float | None
    sums: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RangeTest(PlainDataclass):
    """The outcome of a range test.

    Attributes:
        first: The rate that it began with.
        steps: Optimiser steps at each rate; 0 where the time held none.
        horizon: Steps of the training that a rate is chosen for.
        counts: Predicted tokens of each held-out document.
        sums: Nats of each of them before any training.
        tried: The rates, in the order in which they were tried.
        chosen: The rate to train with; `first` where none was tried.
    """

    first: float
    steps: int
    horizon: int
    counts: tuple[int, ...]
    sums: tuple[float, ...]
    tried: tuple[TriedRate, ...]
    chosen: float

    @property
    def ordered(self) -> tuple[TriedRate, ...]:
        """The tried rates, the smallest first."""
        return tuple(sorted(self.tried, key=lambda one: one.rate))

    @property
    def best(self) -> TriedRate | None:
        """The rate of the largest gain; None where no training stayed finite."""
        finite = [one for one in self.ordered if one.gain is not None]
        return max(finite, key=lambda one: one.gain or 0.0, default=None)

    @property
    def beats_beginning(self) -> bool:
        """Whether some rate is above the untrained student, whatever the standard error."""
        return self.best is not None and (self.best.gain or 0.0) > 0

    def difference(self, one: TriedRate, other: TriedRate) -> tuple[float, float | None]:
        """Nats per token by which one rate is better than another, paired by document, and the standard error.

        Raises:
            ValueError: One of the two has no figures.
        """
        if not (one.sums and other.sums):
            raise ValueError("a training that was not finite has no difference")
        return paired(self.counts, other.sums, one.sums)

    def describe(self) -> str:
        """The outcome in one sentence."""
        if not self.tried:
            return f"the learning rate was not tested, for lack of time: {self.chosen:.3g} is the prior's"
        figures = ", ".join(_figure(one) for one in self.ordered)
        verdict = (
            f"{self.chosen:.3g} is taken"
            if self.beats_beginning
            else (f"none beats the untrained student, and {self.chosen:.3g} is taken as the safest")
        )
        return f"learning rate after {self.steps} steps each, in nats won per held-out token: {figures}; {verdict}"


def _figure(one: TriedRate) -> str:
    if one.gain is None:
        return f"{one.rate:.3g} not finite"
    return f"{one.rate:.3g} {one.gain:+.4f}" + ("" if one.stderr is None else f" ± {one.stderr:.4f}")


def paired(counts: Sequence[int], before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None]:
    """Return nats per token that were won, and the standard error over documents, None where there is one.

    Args:
        counts: Tokens of each document.
        before, after: Nats of each.
    """
    gaps = np.asarray(before, float) - np.asarray(after, float)
    if len(counts) < 2:
        return float(gaps.sum() / sum(counts)), None
    means, errors = paired_bootstrap(gaps[None], np.asarray(counts, float))
    return float(means[0]), float(errors[0])


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

    All rates see the same sequences, and their weights begin the same. Each ends with a short decay, on the strategy's
    own grid where it has one. Rates go down from the strategy's while none beats the untrained student, or the smallest
    is clearly the best, and up while the largest is the best. With fixed steps and unlimited seconds the outcome
    is the same each time.

    Afterwards the model is as it was: weights, flags and gradients; and so is torch's random state. A copy of the
    weights that are trained lies in this machine's memory meanwhile.

    Args:
        model: The student before training, in float32 on `device`, whole in this process.
        make_trainer: Makes a trainer of this very model for a strategy and a plan, which differ from those given in the
            rate and the number of tokens. It does not change the weights.
        spec: The student's shape.
        strategy: What is trained; its learning rate is tried first.
        plan: Of the longer training.
        held_out: Text that is not trained on.
        deployment: What the student is judged as.
        horizon: Steps of the longer training.
        scales: Those with which the untrained student is packed, as for `deployed_weights`.
        steps: At each rate, at least 4; fewer where the seconds do not hold three rates of so many.
        seconds: That all of it may take. No rate is begun that would end later.
        device: Where the model lies.

    Raises:
        ValueError: Fewer than 4 steps.
        TrialFailedError: The untrained student's likelihoods are not finite, or memory does not hold a step.
    """
    if steps < _LEAST_STEPS:
        raise ValueError(f"a range test takes at least {_LEAST_STEPS} steps, not {steps}")
    began, first = time.monotonic(), strategy.distillation.learning_rate
    power = HORIZON_OF_SCALES if strategy.scales_alone else HORIZON
    tried: list[TriedRate] = []
    with _as_it_was(model, strategy) as restore:
        held = HeldOut(model, spec, held_out, deployment, device)
        before = held.sums(scales)
        if before is None:
            raise TrialFailedError("nan", "the untrained student's likelihoods are not finite")
        judging = time.monotonic() - began
        if math.isfinite(seconds):
            records, _ = train_briefly(make_trainer, strategy, plan, spec, first, _TIMED_STEPS)
            # The first step is slower than all others.
            step = plan.batch_tokens / records[-1].tokens_per_second
            left = seconds - (time.monotonic() - began)
            steps = min(steps, int((left / _WANTED_RATES / SPARE - judging) / step))
        rate = next_rate(first, tried, held.counts) if steps >= _LEAST_STEPS else None
        while rate is not None:
            restore()
            train = partial(train_briefly, make_trainer, strategy, plan, spec, steps=steps)
            tried.append(_try(rate, held, before, train))
            rate = next_rate(first, tried, held.counts)
            slowest = max(one.seconds for one in tried)
            if time.monotonic() - began + SPARE * slowest > seconds:
                break
    return RangeTest(
        first=first,
        steps=steps if tried else 0,
        horizon=horizon,
        counts=held.counts,
        sums=before,
        tried=tuple(tried),
        chosen=choose(tried, horizon / steps, power) if tried else first,
    )


class HeldOut:
    """The student on held-out text, as it is deployed.

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
        """Nats of each document; None where some likelihood is not finite."""
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
    """Train for some steps at a rate, decay included; what each step did, and the scales that were learned."""
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
def _as_it_was(model: Any, strategy: Strategy) -> Iterator[Callable[[], None]]:
    """Yield a function that puts weights and random state back; at the end flags and gradients are as before too."""
    table = None if strategy.distillation.train_embeddings else model.get_input_embeddings().weight
    trained = [parameter for parameter in model.parameters() if parameter is not table]
    held = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    training, checkpointing = model.training, _checkpoints(model)
    devices = [torch.cuda.current_device()] if model.device.type == "cuda" else []

    @torch.no_grad()
    def restore() -> None:
        for parameter, values in zip(trained, held, strict=True):
            parameter.copy_(values)
        torch.manual_seed(0)  # dropout draws the same at each rate

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
    """Return whether some layer computes its activations again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def next_rate(first: float, tried: Sequence[TriedRate], counts: Sequence[int]) -> float | None:
    """Return the rate to try next, or None where the rates so far tell enough.

    Args:
        first: The rate to begin with.
        tried: Those so far.
        counts: Tokens of each held-out document.
    """
    if not tried:
        return first
    places = {round(math.log(one.rate / first, FACTOR)): one for one in tried}
    low, high = min(places), max(places)
    best = max(places, key=lambda place: (_gain(places[place]), -place))

    def at(place: int) -> float | None:
        return first * FACTOR**place if _LOWEST <= place <= _HIGHEST else None

    def clear(neighbor: int) -> bool:
        """Return whether the best is clearly better than a neighbour, or that one has not been tried."""
        other = places.get(neighbor)
        if other is None or not (other.sums and places[best].sums):
            return True
        gap, error = paired(counts, other.sums, places[best].sums)
        return gap > _CLEAR * (error or 0.0)

    if _gain(places[best]) <= 0:
        # Whatever the differences of rates that ruin a student: down, until training changes nothing.
        smallest = places[low]
        error = smallest.stderr or 0.0
        if len(tried) > 1 and _gain(smallest) >= -error:
            return None
        return at(low - 2 if _gain(smallest) < -_CLEAR * error else low - 1) or at(low - 1)
    # Down first: too high a rate costs more than too low a one.
    if low == high or (best == low and clear(low + 1)):
        return at(low - 1)
    if best == high:
        return at(high + 1)
    return at(best + 1) if best < high and best + 1 not in places else None


def choose(tried: Sequence[TriedRate], longer: float, power: float = HORIZON) -> float:
    """Return the rate to train with for `longer` times the steps at which these were tried.

    A parabola through the gains of the best rate and of its neighbours, over the logarithm of the rate, has its top at
    the best rate for so many steps; of weights the best one falls with their number, and none is taken above the best
    that was tried. Where none beats the untrained student it is the smallest that stayed finite, or less than all.

    Args:
        tried: At least one rate.
        longer: Steps of the longer training over those of the test.
        power: Of that, by which the best rate falls.
    """
    ordered = sorted(tried, key=lambda one: one.rate)
    best = max(range(len(ordered)), key=lambda place: (_gain(ordered[place]), -place))
    rate = ordered[best].rate
    if _gain(ordered[best]) <= 0:
        return min((one.rate for one in ordered if one.gain is not None), default=ordered[0].rate / FACTOR)
    if 0 < best < len(ordered) - 1:
        near = ordered[best - 1 : best + 2]
        rate = _top([math.log(one.rate) for one in near], [_gain(one) for one in near]) or rate
    most = ordered[best].rate if power < 0 else rate  # the top itself may lie above the best that was tried
    return min(most, max(ordered[0].rate, rate * max(1.0, longer) ** power))


def _top(places: Sequence[float], gains: Sequence[float]) -> float | None:
    """Return e to the place of the top of a parabola through three points, ascending; None where it has none."""
    if not all(map(math.isfinite, gains)):
        return None
    below, above = places[1] - places[0], places[2] - places[1]
    rise, fall = (gains[1] - gains[0]) / below, (gains[1] - gains[2]) / above
    if rise + fall <= 0:
        return None
    return math.exp(places[1] + (rise * above - fall * below) / (2 * (rise + fall)))


def _gain(one: TriedRate) -> float:
    return -math.inf if one.gain is None else one.gain

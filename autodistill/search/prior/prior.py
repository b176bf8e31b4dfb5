"""The recipe that a search begins with, and the uncertainty of each of its dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autodistill.models.spec import ModelSpec
from autodistill.search.prior.knowledge import (
    CHOICES,
    LAW,
    RATE,
    UNITS,
    Belief,
    Knowledge,
    alignment_of,
    covariates,
    load,
)
from autodistill.strategy.recipe import Distillation, Temperature

_LINEAR = "distillation.divergence_weight"
# From so many tokens per weight on, training is more than an adaptation. At 0.09, a model of two million weights
# reached 3.02 nats if weights and tables were trained, 3.11 if only weights were, and 3.15 if only scales were. For
# SmolLM2 at 0.001, scales are ahead. With that many tokens, labels alone lead a student so far from its teacher that it
# forgets general text. Among students with trained scales, those that forgot nothing had 3.12 nats with the teacher as
# half of the loss, 3.13 with a quarter, and more than 3.18 without it.
_MANY = 0.05
# With so many tokens per weight the best rate does not fall with the length of the training: it is the best one after
# so many steps, those of a search's range test. For a cut of the same model trained 3,500 steps of 256 tokens, the law
# of few tokens gives 4e-5, this one 1.5e-4; the best of four rates, 2.5 times apart, was 1.3e-4.
_STEPS_OF_MANY = 48


@dataclass(frozen=True, kw_only=True)
class NumberPrior:
    """The prior of a number of the recipe.

    Attributes:
        value: The best value with the highest probability.
        low, high: One standard deviation below and above it, within the number's bounds.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ChoicePrior:
    """The prior of a choice of the recipe.

    Attributes:
        value: The choice with the least loss. It differs from the first one only if it is three times as likely to be
            better as to be worse.
        nats: For each choice, the expected loss in nats per held-out token compared with the first choice, and its
            standard deviation.
    """

    value: str
    nats: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The prior that a search begins with.

    Attributes:
        recipe: The recipe that is most likely the best.
        numbers, choices: The prior of each dimension, by its path in a space.
        family_seen: Whether the knowledge comes from students of the teacher's family too. If not, the rate needs a
            range test.
        tokens: Tokens of the training that the recipe is for.
        tokens_per_weight: The same per weight of the teacher.
    """

    recipe: Distillation
    numbers: Mapping[str, NumberPrior]
    choices: Mapping[str, ChoicePrior]
    family_seen: bool
    tokens: int
    tokens_per_weight: float = 0.0

    @property
    def many(self) -> bool:
        """Whether the tokens are `many_tokens` for the teacher's weights."""
        return self.tokens_per_weight >= _MANY


def many_tokens(tokens: int, weights: int) -> bool:
    """Return whether a training has so many tokens per weight that weights are trained, which may forget.

    With fewer tokens, training the scales of fixed codes gains more and forgets nothing.
    """
    return tokens / weights >= _MANY


def prior_for(
    teacher: ModelSpec,
    *,
    batch_tokens: int,
    steps: int,
    cut: bool,
    knowledge: Knowledge | None = None,
) -> Prior:
    """Return the recipe for students of a teacher.

    Args:
        teacher: Its shape and family.
        batch_tokens: Tokens of an optimiser step.
        steps: Optimiser steps of the training.
        cut: Whether the student is smaller than the teacher. If not, it is the teacher on a coarser grid.
        knowledge: The knowledge to use; by default the one that ships.
    """
    known = load() if knowledge is None else knowledge
    tokens = max(1, steps) * batch_tokens
    many = many_tokens(tokens, teacher.parameters)
    length = min(steps, _STEPS_OF_MANY) if many else steps
    factors = covariates(width=teacher.width, batch=batch_tokens, steps=max(1, length), cut=cut)
    parts = [(factors[name], known.beliefs[name]) for name in LAW] + [(1.0, known.family(teacher.architecture))]
    mean = sum(factor * one.mean for factor, one in parts)
    spread = math.sqrt(sum((factor * one.sd) ** 2 for factor, one in parts))
    beliefs = {path: Belief(mean=mean, sd=spread) if path == RATE else known.beliefs[path] for path in UNITS}
    numbers = {path: _number(path, belief, known) for path, belief in beliefs.items()}
    choices = {path: _choice(path, known, "cut" if cut else "whole") for path in CHOICES}
    temperature = _temperature(
        choices["distillation.temperature.shape"].value,
        numbers["distillation.temperature.start"].value,
        numbers["distillation.temperature.end"].value,
    )
    recipe = Distillation(
        train_embeddings=many,
        learning_rate=numbers[RATE].value,
        divergence_weight=numbers[_LINEAR].value,
        temperature=temperature,
        alignment=alignment_of(
            choices["distillation.alignment"].value,
            choices["distillation.alignment.projection"].value,
            numbers["distillation.alignment.weight"].value,
        ),
    )
    seen = f"family {teacher.architecture}" in known.beliefs
    return Prior(
        recipe=recipe,
        numbers=numbers,
        choices=choices,
        family_seen=seen,
        tokens=tokens,
        tokens_per_weight=tokens / teacher.parameters,
    )


# A normal variate stays below this many standard deviations in three of four cases.
_DOUBT = 0.674
# Bounds of the numbers.
_BOUNDS = {
    RATE: (1e-7, 3e-2),
    _LINEAR: (0.0, 1.0),
    "distillation.temperature.start": (0.5, 8.0),
    "distillation.temperature.end": (0.5, 8.0),
    "distillation.alignment.weight": (1e-3, 1e3),
}


def _number(path: str, belief: Belief, known: Knowledge) -> NumberPrior:
    least, most = _BOUNDS[path]

    def shown(value: float) -> float:
        plain = value if path == _LINEAR else 10 ** min(5.0, max(-9.0, value))
        return float(f"{min(most, max(least, plain)):.3g}")

    sd = math.hypot(belief.sd, known.between[path])
    return NumberPrior(value=shown(belief.mean), low=shown(belief.mean - sd), high=shown(belief.mean + sd))


def _choice(path: str, known: Knowledge, kind: str) -> ChoicePrior:
    first, *others = CHOICES[path]
    nats = {first: (0.0, 0.0)}
    for name in others:
        belief = known.beliefs[f"{kind} {path}={name}"]
        nats[name] = (belief.mean, belief.sd)
    # The first choice is the plainest. Another one must be likely to be better.
    value = min(nats, key=lambda name: nats[name][0] + _DOUBT * nats[name][1])
    return ChoicePrior(value=value, nats=nats)


def _temperature(shape: str, start: float, end: float) -> Temperature:
    """Return the schedule; a constant temperature is 1."""
    return Temperature() if shape == "constant" else Temperature(shape=shape, start=start, end=end)

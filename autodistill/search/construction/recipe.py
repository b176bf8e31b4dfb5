"""The recipe that a search begins with, and how far other proposed recipes may be from it."""

from __future__ import annotations

from dataclasses import replace

from autodistill.hardware.machine import memory_bytes
from autodistill.models.spec import ModelSpec
from autodistill.search.prior.knowledge import RATE
from autodistill.search.prior.prior import NumberPrior, Prior, prior_for

STEPS = 128
"""Optimiser steps of the training that a recipe is for, until a plan sets their number."""

_BESIDE = 0.1  # share of the machine's memory that a teacher next to each student may take
_TESTED = 2.0  # rates are proposed within this factor above and below a tested rate


def first_prior(spec: ModelSpec, *, batch_tokens: int, steps: int = STEPS, rate: float | None = None) -> Prior:
    """Return the prior that a search begins with.

    If memory easily holds the teacher next to each student, the teacher runs there. This gives the whole divergence,
    and no trial waits for outputs that it does not read. Otherwise the teacher's outputs are cached.

    Args:
        spec: The teacher's shape.
        batch_tokens: Tokens of an optimiser step.
        steps: Optimiser steps of the longest training.
        rate: The learning rate that a range test chose; None for the prior's.
    """
    prior = prior_for(spec, batch_tokens=batch_tokens, steps=steps, cut=False)
    teacher_fits = 4 * spec.parameters <= _BESIDE * memory_bytes()
    signal, tokens = ("online", 0) if teacher_fits else ("top-k", 64)
    recipe = replace(prior.recipe, signal=signal, signal_tokens=tokens)
    if rate is None:
        return replace(prior, recipe=recipe)
    tested = NumberPrior(value=rate, low=rate / _TESTED, high=rate * _TESTED)
    return replace(prior, recipe=replace(recipe, learning_rate=rate), numbers={**prior.numbers, RATE: tested})

"""Checks a strategy against a teacher, and chooses the deployment that its student is judged by."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from autodistill.distillation.losses.attention import check_attention
from autodistill.distillation.losses.hidden_states import aligned_layers, check_projection
from autodistill.distillation.student.build import init_spec
from autodistill.distillation.training.lora import check_lora
from autodistill.errors import InputError
from autodistill.estimates.fit import check_holds, holdable
from autodistill.models.spec import ModelSpec
from autodistill.strategy.deployment import Deployment, serving
from autodistill.strategy.strategy import Strategy


def probe_deployment(strategy: Strategy, deployments: tuple[Deployment, ...]) -> Deployment:
    """Return the deployment that a rung is judged by: that of the finishing grid if allowed, or else the widest.

    Args:
        strategy: The trial's strategy.
        deployments: The allowed deployments, at least one.
    """
    finishing = strategy.finishing
    own = (one for one in deployments if finishing is not None and one.scheme == finishing.scheme)
    return next(own, max(deployments, key=_width))


def _width(deployment: Deployment) -> tuple[int, bool, float, str]:
    return deployment.bits, bool(deployment.keep), -(deployment.group_size or math.inf), deployment.name


def own_deployment(strategy: Strategy) -> Deployment | None:
    """Return the deployment of a strategy's finishing grid, or None without a finishing stage."""
    if strategy.finishing is None:
        return None
    scheme = strategy.finishing.scheme
    return Deployment(runtime=serving(scheme)[0], **asdict(scheme))


def with_own(strategy: Strategy, deployments: tuple[Deployment, ...]) -> tuple[Deployment, ...]:
    """Return the deployments, plus that of the strategy's finishing grid if it is not among them."""
    own = own_deployment(strategy)
    if own is None or any(deployment.scheme == own.scheme for deployment in deployments):
        return deployments
    return (*deployments, own)


def student_spec(strategy: Strategy, teacher: ModelSpec, pretrained: Path | None = None) -> ModelSpec:
    """Return the shape of the student that a strategy makes from a teacher.

    Args:
        strategy: How the student is made.
        teacher: The teacher's shape.
        pretrained: As for `init_spec`.

    Raises:
        InputError: The teacher cannot have a student of these proportions.
    """
    return init_spec(strategy.init, teacher, pretrained)


def check_rendering(strategy: Strategy, renderings: Collection[str]) -> None:
    """Check that a strategy does not need teacher and student to read the same tokens if their renderings differ.

    Args:
        strategy: The strategy to train.
        renderings: References of the pretrained models that have their own chat template.

    Raises:
        InputError: The student has its own template, and the strategy compares attention over whole sequences or lets
            the student write answers.
    """
    if strategy.distillation.on_policy is not None and strategy.init.model in renderings:
        raise InputError(
            f"the teacher judges what a student writes without changing it, and {strategy.init.model} reads prompts in "
            "its own chat template: leave distillation.on_policy out if it is the student, or take the template out of "
            "its folder"
        )
    if strategy.distillation.attention is not None and strategy.init.model in renderings:
        raise InputError(
            f"attention is compared between the same tokens, and {strategy.init.model} reads prompts in its own chat "
            "template: leave distillation.attention out if it is the student, or take the template out of its folder"
        )


def check_strategy(strategy: Strategy, teacher: ModelSpec, deployments: tuple[Deployment, ...] = ()) -> None:
    """Check that a strategy suits this teacher, before anything is loaded.

    Args:
        strategy: How the student is made.
        teacher: The teacher's shape.
        deployments: Deployments that students are judged in. One that stores the codes of the finishing grid in another
            container is enough.

    Raises:
        InputError: The teacher cannot be cut to the shape, the student has too few layers to align, the projection does
            not allow the widths, attention cannot be compared, a LoRA rank is too large, or the finishing grid cannot
            hold the student.
    """
    spec = student_spec(strategy, teacher)
    alignment = strategy.distillation.alignment
    if alignment is not None:
        aligned_layers(alignment, spec.layers)
        check_projection(alignment, spec.width, teacher.width)
    if strategy.distillation.attention is not None:
        check_attention(strategy.distillation.attention, spec, teacher)
    if strategy.distillation.lora is not None:
        check_lora(strategy.distillation.lora, spec)
    if strategy.finishing is not None:
        stored = [one for one in deployments if one.scheme == strategy.finishing.scheme]
        if not holdable(spec, stored):
            check_holds(spec, strategy.finishing)

"""A proposed strategy becomes a trial, or is rejected for the memory it needs or the teacher it contradicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autodistill.distillation.student.check import check_strategy, probe_deployment, student_spec, with_own
from autodistill.errors import InputError
from autodistill.estimates.fit import Fit, cannot_hold, fits, holdable, nearest_miss, smallest
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.hardware.budget import on_gpu, served
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import weights_bytes
from autodistill.runs.checkpoints import stage_key
from autodistill.runs.results.objectives import Objective
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.planning.trial_memory import TrainingNeed
from autodistill.search.worker.messages import TrialTask
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.strategy.strategy import Strategy


def admit(
    question: Question,
    strategy: Strategy,
    *,
    trial_id: str,
    number: int | None,
    kind: str,
    name: str,
    point: Point | None,
    seed: int | None = None,
    length: float = 1.0,
    training: TrainingNeed | None = None,
) -> TrialState:
    """The trial of a strategy; one that is rejected has a reason.

    Args:
        question: Has budget, deployments and teacher.
        strategy: What is to be trained.
        trial_id, number, kind, name, point: As `TrialState` takes them.
        seed: The plan's by default.
        length: How many times the plan's tokens.
        training: What its training takes, as `training_need` found when it was proposed; None where nobody asked.
    """
    fitting, spec, reason = _fits(question, strategy)
    plan = question.plan
    micro_batch = training.micro_batch if training and training.micro_batch < plan.micro_batch else None
    # Fewer at once round otherwise, so that a stage is shared by those of as many.
    plan = replace(plan, micro_batch=micro_batch or plan.micro_batch)
    # What is trained again, or on, was trained before, whatever is predicted of it.
    training = None if kind == CONFIRMATION or length > 1 else training
    allowed = tuple(fit.deployment for fit in fitting if fit.slack <= 0)
    miss = None
    if reason is None:
        miss = nearest_miss(fitting, question.budget) or (training.miss if training else None)
    # Of several objectives a narrower grid serves the others; where nothing is proposed, a strategy has no rival.
    own_first = bool(question.further) or not question.space.dimensions
    probe = probe_deployment(strategy, allowed or question.deployments, own_first=own_first)
    seed = question.plan.seed if seed is None else seed
    # Nobody goes on from a further seed, nor from anything where nothing is proposed.
    shares = question.sharing and kind != CONFIRMATION and bool(question.space.dimensions)
    task = TrialTask(
        id=trial_id,
        strategy=strategy,
        seed=seed,
        # On further seeds a strategy is compared under the one deployment that it was judged by.
        deployments=(probe,) if kind == CONFIRMATION else allowed,
        probe=probe,
        straight=kind != "student" or length > 1,
        length=length,
        stage=stage_key(strategy, seed, plan, question.device) if shares else "",
        micro_batch=micro_batch,
    )
    return TrialState(
        task=task,
        number=number,
        kind=kind,
        name=name,
        point=point,
        fits=fitting,
        reason=miss.said if miss else reason,
        miss=miss,
        parameters=spec.parameters if spec else None,
        training=training,
        further=_before_training(question, spec, fitting, probe),
    )


def untrained_figure(objective: Objective, spec: ModelSpec, deployment: Deployment, question: Question) -> float:
    """What follows from a student's shape and packing, of an objective that is no metric."""
    budget = question.budget
    if objective.name == "memory":
        load: dict[str, Any] = {"context": budget.context, "batch": budget.batch, "on_gpu": on_gpu(budget)}
        return float(memory(spec, deployment, **load).total_bytes)
    if objective.name == "size":
        return float(weights_bytes(spec.tensors, deployment))
    assert question.served_on is not None
    return speed(spec, deployment, question.served_on, context=budget.context).decode_ms_high


def training_need(question: Question, strategy: Strategy) -> TrainingNeed | None:
    """What training a strategy takes of the memory that a trial has; None where nobody asks, or it has no student."""
    if question.memory is None:
        return None
    try:
        return question.memory.need(strategy, student_spec(strategy, question.teacher_spec), question.plan)
    except InputError:
        return None


def _fits(question: Question, strategy: Strategy) -> tuple[tuple[Fit, ...], ModelSpec | None, str | None]:
    """How each deployment stands to the budget, the student's shape, and why this teacher has no such student."""
    spec = None
    try:
        spec = student_spec(strategy, question.teacher_spec)
        check_strategy(strategy, question.teacher_spec)
        deployments = served(with_own(strategy, question.deployments), question.budget)
        fitting = fits(spec, holdable(spec, deployments), question.budget)
    except InputError as error:
        return (), spec, str(error)
    return fitting, spec, None if fitting else cannot_hold(spec, question.deployments[0])


def _before_training(
    question: Question, spec: ModelSpec | None, fitting: Sequence[Fit], probe: Deployment
) -> tuple[float | None, ...]:
    """Of each further objective what is known of an untrained student, packed as it will be judged, if it can be so."""
    held = [fit.deployment for fit in fitting]
    if spec is None or not held:
        return (None,) * len(question.further)
    deployment = probe if probe in held else smallest(fitting).deployment
    return tuple(
        None if objective.trained else untrained_figure(objective, spec, deployment, question)
        for objective in question.further
    )

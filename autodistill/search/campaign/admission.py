"""Turn a proposed strategy into a trial, or reject it for the memory it needs or a conflict with the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autodistill.distillation.student.check import check_strategy, probe_deployment, student_spec, with_own
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits, holdable, nearest_miss, smallest
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.hardware.budget import on_gpu, served
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import as_held, weights_bytes
from autodistill.runs.checkpoints import stage_key
from autodistill.runs.events import TrialKind
from autodistill.runs.results.objectives import Objective
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.search.campaign.state import Candidate, Question, TrialState
from autodistill.search.worker.messages import TrialTask
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.strategy.strategy import Strategy


def admit(
    question: Question,
    candidate: Candidate,
    *,
    trial_id: str,
    number: int | None,
    kind: TrialKind,
    name: str,
    point: Point | None,
    seed: int | None = None,
    length: float = 1.0,
) -> TrialState:
    """Return the trial of a candidate. A rejected trial has a reason.

    Args:
        question: Has budget, deployments and teacher.
        candidate: What is to be trained.
        trial_id, number, kind, name, point: As `TrialState` takes them.
        seed: The plan's seed by default.
        length: Multiple of the plan's tokens that the trial is trained on.
    """
    strategy, fitting, training, plan = candidate.strategy, candidate.fits, candidate.training, question.plan
    micro_batch = training.micro_batch if training and training.micro_batch < plan.micro_batch else None
    # A smaller micro-batch rounds differently, so only trials with the same micro-batch share a stage.
    plan = replace(plan, micro_batch=micro_batch or plan.micro_batch)
    # A strategy that is trained again or further has been trained before, so a prediction cannot reject it.
    training = None if kind == CONFIRMATION or length > 1 else training
    allowed = tuple(fit.deployment for fit in fitting if fit.slack <= 0)
    miss = None
    if candidate.reason is None:
        miss = nearest_miss(fitting, question.budget) or (training.miss if training else None)
    probe = probe_deployment(strategy, allowed or question.deployments)
    seed = question.plan.seed if seed is None else seed
    # No trial continues from a confirmation, and none continues at all if nothing is proposed and nothing is trained
    # further.
    gone_on_from = bool(question.space.dimensions) or plan.longest > 1
    shares = question.sharing and kind != CONFIRMATION and gone_on_from
    task = TrialTask(
        id=trial_id,
        strategy=strategy,
        seed=seed,
        # On further seeds, strategies are compared only under the deployment that judged them.
        deployments=(probe,) if kind == CONFIRMATION else allowed,
        probe=probe,
        straight=kind != "student" or length > 1,
        length=length,
        stage=stage_key(strategy, seed, plan, question.device) if shares else "",
        micro_batch=micro_batch,
    )
    return TrialState(
        task=task,
        candidate=candidate,
        number=number,
        kind=kind,
        name=name,
        point=point,
        reason=miss.text if miss else candidate.reason,
        miss=miss,
        further=_before_training(question, candidate, probe),
    )


def untrained_figure(objective: Objective, spec: ModelSpec, deployment: Deployment, question: Question) -> float:
    """Return an objective that follows from a student's shape and packing alone, before any training."""
    budget = question.budget
    if objective.name == "memory":
        load: dict[str, Any] = {"context": budget.context, "batch": budget.batch, "on_gpu": on_gpu(budget)}
        return float(memory(spec, deployment, **load).total_bytes)
    if objective.name == "size":
        return float(weights_bytes(as_held(spec, deployment).tensors, deployment))
    assert question.served_on is not None
    return speed(spec, deployment, question.served_on, context=budget.context).decode_ms_high


def candidate_of(question: Question, strategy: Strategy) -> Candidate:
    """Return a strategy as a candidate.

    It has the student's shape and the fit of each deployment to the budget, or the reason why there is no student.
    """
    try:
        spec = student_spec(strategy, question.teacher_spec)
    except InputError as error:
        return Candidate(strategy=strategy, reason=str(error))
    try:
        check_strategy(strategy, question.teacher_spec, question.deployments)
        deployments = served(with_own(strategy, question.deployments), question.budget)
        if question.raced and strategy.finishing is not None:
            scheme = strategy.finishing.scheme
            deployments = tuple(one for one in deployments if one.scheme == scheme)
        fitting = fits(spec, holdable(spec, deployments), question.budget)
    except InputError as error:
        return Candidate(strategy=strategy, spec=spec, reason=str(error))
    reason = None if fitting else cannot_hold(spec, question.deployments[0])
    return Candidate(strategy=strategy, spec=spec, fits=fitting, reason=reason)


def with_training(question: Question, candidate: Candidate) -> Candidate:
    """Return a candidate with the memory that its training needs, if the question has a memory limit for trials."""
    if question.memory is None or candidate.spec is None:
        return candidate
    try:
        need = question.memory.need(candidate.strategy, candidate.spec, question.plan)
    except InputError:
        return candidate
    return replace(candidate, training=need)


def _before_training(question: Question, candidate: Candidate, probe: Deployment) -> tuple[float | None, ...]:
    """Return each further objective of the untrained student, or None if only a trained student has it.

    The student is packed as it will be judged if that is possible, else under the smallest deployment.
    """
    spec, held = candidate.spec, [fit.deployment for fit in candidate.fits]
    if spec is None or not held:
        return (None,) * len(question.further)
    deployment = probe if probe in held else smallest(candidate.fits).deployment
    return tuple(
        None if objective.trained else untrained_figure(objective, spec, deployment, question)
        for objective in question.further
    )

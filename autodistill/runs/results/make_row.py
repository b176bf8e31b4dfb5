"""Make rows of the leaderboard from evaluations of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autodistill import plugins
from autodistill.distillation.training.plan import Plan
from autodistill.estimates.fit import latencies, too_late
from autodistill.estimates.speed import limit_seconds
from autodistill.evaluation.evaluate import Evaluation
from autodistill.hardware.budget import LATENCY, Budget, DeviceBudget, on_gpu
from autodistill.hardware.device import DISCRETE, Device
from autodistill.models.config import config_of
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.objectives import PREDICTED_LATENCY
from autodistill.runs.results.row import Row, Status
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy

_FIELDS = ("accuracy", "perplexity", "agreement", "memory_bytes", "latency_ms", "tokens_per_second", "size_bytes")
_COUNTS = ("memory_bytes", "size_bytes")


def make_row(
    evaluation: Evaluation,
    *,
    trial: str,
    kind: str,
    name: str,
    strategy: Strategy | None,
    spec: ModelSpec,
    status: Status,
    split: str,
    budget: Budget,
    plan: Plan,
    train_tokens: int,
    train_seconds: float,
    seed: int,
    device: Device | None = None,
) -> Row:
    """Return the row of one trial under one deployment.

    Args:
        evaluation: Measurements on the packed weights.
        trial, kind, name: See `Row`.
        strategy: The strategy that was trained, or None for the teacher.
        spec: Shape of the student.
        status: Current status of the trial.
        split: The split that was evaluated.
        budget: The limits for the row. If it is for a device, latencies on it are predicted.
        plan: The plan, from which the fidelity is computed.
        train_tokens, train_seconds: The trial's training so far.
        seed: Seed of the trial.
        device: Device for which the 95th percentile of the decode time is predicted, at the slow end of the band, or
            None. The budget's own device takes precedence.
    """
    times = latencies(spec, evaluation.deployment, budget)
    reason = _over(evaluation, budget) or "; ".join(too_late(times, "predicted")) or None
    figures = {name: measurement.value for name, measurement in evaluation.measurements.items()}
    figures |= {limit.name: 1e3 * seconds for limit, seconds in times.items()}
    figures |= _latency(spec, evaluation.deployment, budget, device)
    fields, others = _by_field(figures)
    errors, theirs = _errors(evaluation), evaluation.teacher_accuracy
    accuracy, memory = fields.get("accuracy"), evaluation.measurements.get("memory_bytes")
    return Row(
        row_id=f"{trial}-{evaluation.deployment.name}" + ("" if split == "validation" else f"-{split}"),
        trial=trial,
        kind=kind,
        name=name,
        deployment=evaluation.deployment,
        status=status.value,
        feasible=reason is None,
        reason=reason,
        strategy_id=strategy.id if strategy else None,
        strategy=strategy,
        split=split,
        accuracy_stderr=errors.pop("accuracy_stderr", None),
        retention=accuracy / theirs if accuracy is not None and theirs else None,
        memory_source=memory.source if memory else None,
        latency_source="predicted" if "latency_ms" in fields else None,
        machine=budget.device.name if isinstance(budget, DeviceBudget) else None,
        shape=config_of(spec),
        params=spec.parameters,
        context=budget.context,
        batch=budget.batch,
        train_tokens=train_tokens,
        train_seconds=train_seconds,
        fidelity=train_tokens / plan.tokens if kind not in ("teacher", "initial") else None,
        seed=seed,
        documents=evaluation.documents,
        other=others
        | errors
        | _remarks(strategy, spec)
        | _registered(strategy, evaluation.measurements)
        | _assumed(evaluation.deployment, budget)
        | _memory_on(budget)
        | ({} if evaluation.scoring == "float32" else {"scoring": evaluation.scoring}),
        **fields,
    )


def _over(evaluation: Evaluation, budget: Budget) -> str | None:
    """Return why the memory breaks the budget, or None if it fits. Unknown memory counts as breaking it."""
    memory = evaluation.measurements.get("memory_bytes")
    if memory is None or not math.isfinite(memory.value):
        return "memory: it was not measured"
    if memory.value <= budget.memory_bytes:
        return None
    over = int(memory.value) - budget.memory_bytes
    return f"memory: {int(memory.value)} bytes, {over} over the budget of {budget.memory_bytes}"


def _latency(spec: ModelSpec, deployment: Deployment, budget: Budget, device: Device | None) -> dict[str, float]:
    """Return the predicted latency on the budget's device, or else on `device`; empty if there is neither.

    On the budget's device it is also the row's own latency.
    """
    own = budget.device if isinstance(budget, DeviceBudget) else None
    served_on = own or device
    if served_on is None:
        return {}
    seconds = limit_seconds(spec, deployment, served_on, LATENCY, context=budget.context)
    return dict.fromkeys((PREDICTED_LATENCY, *(["latency_ms"] if own else [])), 1000.0 * seconds)


def _by_field(figures: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the figures that a row has fields for, with bytes as integers, and all other figures."""
    fields: dict[str, Any] = {name: figures[name] for name in _FIELDS if name in figures}
    others = {name: value for name, value in figures.items() if name not in fields}
    for name in _COUNTS:
        if name in fields and math.isfinite(fields[name]):
            fields[name] = int(fields[name])
        elif name in fields:
            others[name] = fields.pop(name)
    return fields, others


def _errors(evaluation: Evaluation) -> dict[str, float]:
    found = {f"{name}_stderr": measurement.stderr for name, measurement in evaluation.measurements.items()}
    return {name: error for name, error in found.items() if error is not None}


def _memory_on(budget: Budget) -> dict[str, str]:
    """Return the mark of a row whose memory is that of a discrete GPU, not of a process."""
    return {"memory_on": DISCRETE} if on_gpu(budget) else {}


def _assumed(deployment: Deployment, budget: Budget) -> dict[str, str]:
    """Return why the row's latency is an assumption, if its runtime was never measured on such a device."""
    why = budget.device.shares(deployment.runtime).assumed if isinstance(budget, DeviceBudget) else ""
    return {"latency_assumed": why} if why else {}


def _remarks(strategy: Strategy | None, spec: ModelSpec) -> dict[str, str]:
    """Return what the loss computed if it was not exactly the named divergence.

    The student has the teacher's vocabulary, so `spec` gives its size.
    """
    approximation = strategy.distillation.approximation(spec.vocabulary) if strategy else None
    return {"approximate": approximation} if approximation else {}


def _registered(strategy: Strategy | None, measured: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return hashes of the source of the divergence and the evaluators that a Python session registered, by name.

    Only those that the row was made with are included.
    """
    found = {}
    for name, one in plugins.registered("divergences").items():
        if strategy and strategy.distillation.weighs_teacher and strategy.distillation.divergence == name:
            found[name] = one.source
    for name, one in plugins.registered("evaluators").items():
        if any(figure in measured for figure in one.plugin.measures):
            found[name] = one.source
    return {"registered": found} if found else {}

"""An evaluation of a trial becomes a row of the leaderboard."""

from __future__ import annotations

import math
from typing import Any

from autodistill.budget import DeviceBudget
from autodistill.contracts import ModelSpec, Plan, Status
from autodistill.devices import Device
from autodistill.estimate import config_of, latencies, too_late
from autodistill.evaluation import Evaluation
from autodistill.records.objectives import PREDICTED_LATENCY
from autodistill.records.row import Row
from autodistill.roofline import limit_seconds
from autodistill.strategy import Strategy
from autodistill.units import LATENCY, Budget

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
    teacher_accuracy: float,
    budget: Budget,
    plan: Plan,
    train_tokens: int,
    train_seconds: float,
    seed: int,
    device: Device | None = None,
) -> Row:
    """The row of one deployment of one trial.

    Args:
        evaluation: Measurements on the packed weights.
        trial, kind, name: See `Row`.
        strategy: What was trained, or None for the teacher.
        spec: Shape of the student.
        status: Of the trial at this moment.
        split: What was read.
        teacher_accuracy: Of the teacher on the same examples, at full precision.
        budget: Limits it is held to; on a device its latency is predicted.
        plan: Gives the fidelity.
        train_tokens, train_seconds: What training took so far.
        seed: Of the trial.
        device: Where a latency is predicted, if it is to be: as every 95th percentile, at the slow end of the band. A
            budget's own goes before it.
    """
    figures = {name: measurement.value for name, measurement in evaluation.measurements.items()}
    errors = {
        f"{name}_stderr": measurement.stderr
        for name, measurement in evaluation.measurements.items()
        if measurement.stderr is not None
    }
    memory = evaluation.measurements.get("memory_bytes")
    # What a student needs must be known before it can be said to fit.
    reason = "memory: it was not measured" if memory is None or not math.isfinite(memory.value) else None
    if memory is not None and memory.value > budget.memory_bytes:
        over = int(memory.value) - budget.memory_bytes
        reason = f"memory: {int(memory.value)} bytes, {over} over the budget of {budget.memory_bytes}"
    times = latencies(spec, evaluation.deployment, budget)
    reason = reason or "; ".join(too_late(times, "predicted")) or None
    figures |= {limit.name: 1e3 * seconds for limit, seconds in times.items()}
    if isinstance(budget, DeviceBudget):
        device = budget.device
    if device is not None:
        seconds = limit_seconds(spec, evaluation.deployment, device, LATENCY, context=budget.context)
        figures[PREDICTED_LATENCY] = 1e3 * seconds
    if isinstance(budget, DeviceBudget):
        figures["latency_ms"] = figures[PREDICTED_LATENCY]
    accuracy_stderr = errors.pop("accuracy_stderr", None)
    fields: dict[str, Any] = {
        field: int(figures.pop(field)) if field in _COUNTS else figures.pop(field)
        for field in _FIELDS
        if field in figures and (field not in _COUNTS or math.isfinite(figures[field]))
    }
    approximation = strategy.distillation.approximation if strategy else None
    remarks = {"approximate": approximation} if approximation else {}
    accuracy = fields.get("accuracy")
    return Row(
        row_id=f"{trial}-{evaluation.deployment.name}" + ("" if split == "validation" else f"-{split}"),
        trial=trial,
        kind=kind,
        name=name,
        deployment=evaluation.deployment.to_json(),
        status=status.value,
        feasible=reason is None,
        reason=reason,
        strategy_id=strategy.id if strategy else None,
        strategy=strategy.to_json() if strategy else None,
        split=split,
        accuracy_stderr=accuracy_stderr,
        retention=accuracy / teacher_accuracy if accuracy is not None and teacher_accuracy > 0 else None,
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
        other=figures | errors | remarks,
        **fields,
    )

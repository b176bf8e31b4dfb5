"""Export of one row of a run: pack it, verify it, run it and measure it in its runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autodistill.estimates.fit import too_late
from autodistill.evaluation.base import Measurement, Subject, load_evaluator
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.export.base import PROMPT_TOKENS, Expected, load_exporter
from autodistill.export.huggingface import greedy
from autodistill.export.verify import POSITIONS, compare
from autodistill.hardware.budget import DeviceBudget
from autodistill.hardware.device import DISCRETE
from autodistill.hardware.lookup import is_machine
from autodistill.inference.scoring import choices
from autodistill.inference.torch_memory import give_back_memory
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.results.row import Row
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.exported_row import ExportedRow, exported_before
from autodistill.search.finish.in_runtime import held_out, pack, packed_and_run, with_runtime_loss
from autodistill.strategy.deployment import Deployment


def export_packed(row: Row, deployment: Deployment, finisher: Finisher) -> ExportedRow:
    """Export a row's model in a deployment that is not run or measured, or return an earlier such export."""
    with finisher.phases.phase("export", f"exporting {row.name} as {deployment.name}"):
        if (known := exported_before(row, deployment, finisher)) is not None:
            return known
        artifact, weights = pack(row, deployment, finisher)
    return ExportedRow(row=row, deployment=deployment, path=artifact.path, weights=weights)


def export_row(row: Row, finisher: Finisher) -> ExportedRow:
    """Export a row's model and prove it in its runtime. The row is updated with what was measured there.

    An export of an earlier session is kept if nothing about it has changed.
    """
    deployment, strategy = row.deployment, row.strategy
    spec = finisher.spec(strategy)
    with finisher.phases.phase("export", f"exporting {row.name} as {deployment.name}"):
        known = exported_before(row, deployment, finisher)
        if known is not None and known.check is not None:
            finisher.line(f"{row.name} as {deployment.name} is exported and verified already: {known.path} is kept")
            return known
    packed = packed_and_run(row, finisher)
    with finisher.phases.phase("evaluate", f"{row.name} as {deployment.name}, to compare"):
        data = held_out(row, finisher)
        length = data.tokens.shape[1]
        data = data.head(min(len(data.tokens), math.ceil(POSITIONS / (length - 1))) * length)
        model = finisher.load(row)
        with deployed_weights(model, spec, deployment, read_scales(finisher.student(row), deployment)):
            top1, nll, leads = choices(model, data, device=finisher.setting.device)
            prompt = torch.from_numpy(data.tokens[:1, :PROMPT_TOKENS].astype(np.int64))
            with torch.inference_mode():
                written = greedy(model, prompt.to(finisher.setting.device))
        # Free the GPU, because the runtime may need all of its memory.
        del model
        give_back_memory()
    expected = Expected(np.array(data.tokens), top1, nll, leads, written)
    exporter, (_, artifact, weights, ran) = load_exporter(deployment.container), packed
    check = compare(ran, exporter, artifact.path, deployment, expected, finisher.student(row), weights)
    row = with_runtime_loss(row, finisher)
    subject = Subject(
        spec=spec,
        deployment=deployment,
        budget=finisher.question.budget,
        artifact=artifact.path,
        artifact_bytes=artifact.size_bytes,
        threads=finisher.threads,
    )
    measured: dict[str, Measurement] = {}
    for name in ("memory", "size", "latency"):
        evaluator = load_evaluator(name)
        if evaluator.supports(deployment):
            with finisher.phases.phase("evaluate", f"{name} of the {deployment.name} student"):
                measured |= {item.name: item for item in evaluator.evaluate(subject)}
    updated = with_measured(row, measured, finisher)
    finisher.write(updated)
    return ExportedRow(
        row=updated, deployment=deployment, path=artifact.path, check=check, expected=expected, weights=weights
    )


def with_measured(row: Row, measured: Mapping[str, Measurement], finisher: Finisher) -> Row:
    """Return the row with the runtime's figures. The predicted memory and size are kept in `other`."""
    fields: dict[str, Any] = {"other": dict(row.other)}
    for name, item in measured.items():
        if name in ("memory_bytes", "size_bytes"):
            fields[name] = int(item.value)
        elif name in ("latency_ms", "tokens_per_second"):
            fields[name] = item.value
        elif "@" not in name:
            fields["other"][name] = item.value
    if "memory_bytes" in measured:
        fields["memory_source"] = measured["memory_bytes"].source
        if row.memory_source != "measured":
            fields["other"] |= {"memory_bytes_predicted": row.memory_bytes, "size_bytes_predicted": row.size_bytes}
        detail = measured["memory_bytes"].detail
        fields["other"]["memory_parts"] = dict(detail)
        if "predicted_bytes" in detail:
            # The prediction must be for the place of the measurement: a GPU's memory differs from the process's memory
            # that the budget limits.
            fields["other"]["memory_bytes_predicted"] = detail["predicted_bytes"]
            fields["other"].pop("memory_on", None)
            fields["other"] |= {"memory_on": DISCRETE} if detail["on_gpu"] else {}
    late: tuple[str, ...] = ()
    if "latency_ms" in measured:
        detail = measured["latency_ms"].detail
        fields |= {"latency_source": "measured", "machine": detail["machine"]}
        fields["other"].pop("latency_assumed", None)
        fields["other"] |= {"latency_detail": dict(detail), "latency_doubts": "; ".join(detail["doubts"]) or None}
        late = _too_late(measured, fields, finisher)
    updated = replace(row, **fields)
    limit = finisher.question.budget.memory_bytes
    over = (updated.memory_bytes or 0) - limit
    broken = [f"memory: {updated.memory_bytes} bytes, {over} over {limit}"] if over > 0 else [*late]
    return replace(updated, feasible=False, reason="; ".join(broken)) if broken else updated


def _too_late(measured: Mapping[str, Measurement], fields: Mapping[str, Any], finisher: Finisher) -> tuple[str, ...]:
    """Return the broken latency limits if latency was measured on the budget's device.

    Otherwise latency stays predicted, because a measurement on another machine says nothing about these limits.
    """
    budget = finisher.question.budget
    if not isinstance(budget, DeviceBudget) or not is_machine(budget.device, fields["machine"]):
        return ()
    times = {limit: measured[limit.name].value / 1e3 for limit in budget.latency}
    fields["other"].update({limit.name: 1e3 * seconds for limit, seconds in times.items()})
    return too_late(times, "measured")

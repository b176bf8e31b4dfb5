"""A solution written as a GGUF file, read back, and run in llama.cpp with its cache."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from autodistill.data.dataset import Prepared, load_split
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.evaluation.base import Subject, load_evaluator
from autodistill.export.base import load_exporter
from autodistill.export.verify import POSITIONS, verify, verify_runtime
from autodistill.hardware.budget import Budget
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import choices
from autodistill.search.solve.bench import Bench
from autodistill.strategy.deployment import Deployment


def export(
    bench: Bench, teacher: Teacher, deployment: Deployment, budget: Budget, data: Prepared, out: Path
) -> dict[str, Any]:
    """Writes a deployment of the teacher, and holds the file and its runtime to what was measured.

    Args:
        bench: The teacher in memory.
        teacher: Its folder.
        deployment: What is written.
        budget: At whose context and batch memory is measured.
        data: Whose validation text the runtime reads.
        out: Folder that the file goes into.

    Returns:
        Plain data: path, size, what was compared and how much agreed, memory as measured in the runtime, and the
        arguments that llama.cpp's server needs beside the file, which says nothing of its cache.

    Raises:
        InputError: `out` cannot be written.
        VerificationError: The file, or what the runtime makes of it, is not what was measured.
    """
    exporter = load_exporter("gguf")
    artifact = exporter.export(
        teacher.folder, deployment, out, teacher=teacher.name, license=teacher.license, name=f"{teacher.name}, solved"
    )
    checked = verify(exporter, artifact, teacher.folder, deployment)
    sequences = math.ceil(POSITIONS / (data.sequence_length - 1))
    read = load_split(data.folder, "validation").head(sequences * data.sequence_length)
    storages = {tensor.name: deployment.storage(tensor) for tensor in bench.spec.tensors}
    with bench.shown(storages), quantized_cache(bench.model, deployment.cache_types):
        simulated = choices(bench.model, read, device=bench.device)
    run = verify_runtime(exporter, artifact, deployment, simulated, read.tokens[:, :-1], 1, teacher.folder)
    subject = Subject(spec=bench.spec, deployment=deployment, budget=budget, artifact=artifact.path, threads=1)
    (memory,) = load_evaluator("memory").evaluate(subject)
    server = ["llama-server", "--model", str(artifact.path), "--ctx-size", str(budget.context)]
    return {
        "path": str(artifact.path),
        "size_bytes": artifact.size_bytes,
        "tensors": checked.tensors,
        "agreement": run.agreement,
        "agreement_interval": list(run.interval),
        "raw_agreement": run.raw_agreement,
        "positions": run.positions,
        "memory_bytes": int(memory.value),
        "memory_source": memory.source,
        "over_budget_bytes": max(0, int(memory.value) - budget.memory_bytes),
        "text": run.text,
        "serve": shlex.join([*server, *deployment.server_arguments]),
    }

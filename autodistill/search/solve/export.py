"""A solution written as a GGUF file, read back, and run in llama.cpp with its cache."""

from __future__ import annotations

import math
import shlex
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from autodistill.data.dataset import Prepared, load_split
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.errors import NothingFitsError
from autodistill.evaluation.base import Subject, load_evaluator
from autodistill.export.base import Artifact, load_exporter
from autodistill.export.gguf import FILE
from autodistill.export.gguf_mixtures import verify_mixture, write_mixture
from autodistill.export.student_reader import replacing
from autodistill.export.verify import POSITIONS, verify, verify_runtime
from autodistill.hardware.budget import Budget
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import choices
from autodistill.models.families import GGUF_MIXTURES
from autodistill.quantization.grids import Floats
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.candidates import Candidate
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes
from autodistill.utils.json_files import read_json


def export(
    bench: Bench, teacher: Teacher, chosen: Deployment | Candidate, budget: Budget, data: Prepared, out: Path
) -> dict[str, Any]:
    """Writes a deployment of the teacher, or copies a candidate, and holds file and runtime to what was measured.

    Args:
        bench: The teacher in memory.
        teacher: Its folder.
        chosen: What is written.
        budget: At whose context and batch memory is measured.
        data: Whose validation text the runtime reads.
        out: Folder that the file goes into.

    Returns:
        Plain data: path, size, what was compared and how much agreed, memory as measured in the runtime, and the
        arguments that llama.cpp's server needs beside the file, which says nothing of its cache.

    Raises:
        InputError: `out` cannot be written.
        VerificationError: The file, or what the runtime makes of it, is not what was measured.
        NothingFitsError: The process takes more than the budget, measured; the file is removed.
    """
    exporter = load_exporter("gguf")
    if isinstance(chosen, Candidate):
        deployment, tensors = chosen.deployment, len(chosen.file.tensors)
        artifact = _copied(chosen.path, out)
    else:
        deployment = chosen
        artifact, tensors = write_solution(bench, teacher, chosen, out)
    sequences = math.ceil(POSITIONS / (data.sequence_length - 1))
    read = load_split(data.folder, "validation").head(sequences * data.sequence_length)
    with _shown(bench, chosen), quantized_cache(bench.model, deployment.cache_types):
        simulated = choices(bench.model, read, device=bench.device)
    run = verify_runtime(exporter, artifact, deployment, simulated, read.tokens[:, :-1], 1, teacher.folder)
    subject = Subject(spec=bench.spec, deployment=deployment, budget=budget, artifact=artifact.path, threads=1)
    (memory,) = load_evaluator("memory").evaluate(subject)
    over = int(memory.value) - budget.memory_bytes
    if over > 0 and memory.source == "measured":
        if not (isinstance(chosen, Candidate) and artifact.path.samefile(chosen.path)):
            artifact.path.unlink()
        takes = f"{format_bytes(int(memory.value))} in llama.cpp, {format_bytes(over)} over the budget"
        raise NothingFitsError(
            f"{chosen.name} takes {takes}, though less was predicted: give a --budget of "
            f"{max(0, budget.memory_bytes - over) // 10**6}MB to solve for"
        )
    server = ["llama-server", "--model", str(artifact.path), "--ctx-size", str(budget.context)]
    return {
        "path": str(artifact.path),
        "size_bytes": artifact.size_bytes,
        "name": chosen.name,
        "tensors": tensors,
        "agreement": run.agreement,
        "agreement_interval": list(run.interval),
        "raw_agreement": run.raw_agreement,
        "positions": run.positions,
        "memory_bytes": int(memory.value),
        "memory_source": memory.source,
        "text": run.text,
        "serve": shlex.join([*server, *deployment.server_arguments]),
    }


def write_solution(bench: Bench, teacher: Teacher, chosen: Deployment, out: Path) -> tuple[Artifact, int]:
    """Writes a deployment of the teacher, compares the file's tensors with what was measured, and counts them.

    Args:
        bench, teacher, chosen, out: As for `export`.

    Raises:
        InputError, VerificationError: As `export`.
    """
    name = f"{teacher.name}, solved"
    if bench.spec.architecture not in GGUF_MIXTURES:
        exporter = load_exporter("gguf")
        told = {"teacher": teacher.name, "license": teacher.license, "name": name}
        artifact = exporter.export(teacher.folder, chosen, out, **told)
        return artifact, verify(exporter, artifact, teacher.folder, chosen).tensors
    storages = {tensor.name: chosen.storage(tensor) for tensor in bench.spec.tensors}

    def own(name: str) -> Floats:
        return _rows(bench, name, bench.master(name))

    def stored(name: str) -> Floats:
        return _rows(bench, name, bench.stored(name, storages[name]))

    artifact = write_mixture(
        own,
        bench.spec,
        read_json(teacher.folder / "config.json"),
        chosen,
        teacher.folder,
        out,
        name=name,
        teacher=teacher.name,
        license=teacher.license,
    )
    return artifact, verify_mixture(artifact.path, stored, bench.spec, chosen)


def _rows(bench: Bench, name: str, values: Tensor) -> Floats:
    """A tensor as a file holds it: of experts [experts, out, in]."""
    found = bench.matrices(name, values) if values.dim() == 3 else values
    return np.asarray(found.cpu().numpy(), dtype=np.float32)


def _shown(bench: Bench, chosen: Deployment | Candidate) -> AbstractContextManager[None]:
    """The teacher with the weights of what is written."""
    if isinstance(chosen, Candidate):
        return bench.replaced(chosen.weights(bench))
    return bench.shown({tensor.name: chosen.storage(tensor) for tensor in bench.spec.tensors})


def _copied(path: Path, out: Path) -> Artifact:
    """A candidate's file in the folder that solutions are written to; one that lies there already stays."""
    target = out / FILE
    if not (target.exists() and target.samefile(path)):
        with replacing(out) as partial:
            shutil.copyfile(path, partial / FILE)
    return Artifact(path=target, size_bytes=target.stat().st_size)

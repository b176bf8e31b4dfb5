"""Writes a solution as a GGUF file or a folder of compressed-tensors, reads it back, and runs it."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from autodistill.data.dataset import Prepared, load_split
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.errors import NothingFitsError
from autodistill.evaluation.base import Subject, load_evaluator
from autodistill.export.base import Artifact, Expected, Label, load_exporter
from autodistill.export.gguf_writing import FILE
from autodistill.export.student_reader import WEIGHTS, StudentFiles, replacing
from autodistill.export.verify import POSITIONS, prove, verify
from autodistill.export.whole.file import verify_whole, write_whole
from autodistill.hardware.budget import Budget
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.models.families import FAMILIES, get_family
from autodistill.models.model_folder import read_config
from autodistill.quantization.grids import Floats, Scales
from autodistill.quantization.learned_scales import SCALES_FILE, write_scales
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.call.candidates import Candidate
from autodistill.search.solve.compensation import Compensated
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes

READERS = {"llama.cpp": "llama.cpp", "onnxruntime": "ONNX Runtime", "vllm": "transformers"}
"""The program that verifies a solution, by the runtime that will serve it."""


def export(
    bench: Bench,
    teacher: Teacher,
    chosen: Deployment | Candidate | Compensated,
    budget: Budget,
    data: Prepared,
    out: Path,
) -> dict[str, Any]:
    """Write a deployment of the teacher, or copy a candidate, and compare file and runtime with what was measured.

    Args:
        bench: The teacher in memory.
        teacher: Its folder.
        chosen: What to write.
        budget: The budget; memory is measured at its context and batch.
        data: Data whose validation text the runtime reads.
        out: Folder for the file.

    Returns:
        Plain data: path, size, what was compared and how much agreed, memory as measured in the runtime, and the
        server's command. It has arguments for the types of the cache, which the file does not contain.

    Raises:
        InputError: `out` cannot be written.
        VerificationError: The file, or the runtime's output, differs from what was measured.
        NothingFitsError: The measured memory of the process is above the budget. The file is removed.
    """
    deployment = chosen if isinstance(chosen, Deployment) else chosen.deployment
    exporter = load_exporter(deployment.container)
    if isinstance(chosen, Candidate):
        artifact, tensors = _copied(chosen.path, out), len(chosen.file.tensors)
    else:
        artifact, tensors = write_solution(bench, teacher, chosen, out)
    sequences = math.ceil(POSITIONS / (data.sequence_length - 1))
    read = load_split(data.folder, "validation").head(sequences * data.sequence_length)
    with _shown(bench, chosen), quantized_cache(bench.model, deployment.cache_types):
        expected = Expected(read.tokens, *bench.choices(read))
    run = prove(exporter, artifact.path, deployment, expected, 1, teacher.folder)
    subject = Subject(spec=bench.spec, deployment=deployment, budget=budget, artifact=artifact.path, threads=1)
    (memory,) = load_evaluator("memory").evaluate(subject)
    over = int(memory.value) - budget.memory_bytes
    if over > 0 and memory.source == "measured":
        if not (isinstance(chosen, Candidate) and artifact.path.samefile(chosen.path)):
            shutil.rmtree(artifact.path) if artifact.path.is_dir() else artifact.path.unlink()
        takes = (
            f"{format_bytes(int(memory.value))} in {READERS[deployment.runtime]}, {format_bytes(over)} over the budget"
        )
        raise NothingFitsError(
            f"{chosen.name} takes {takes}, more than predicted: solve for a smaller budget, like --budget "
            f"{max(0, budget.memory_bytes - over) // 10**6}MB"
        )
    server = ["llama-server", "--model", str(artifact.path), "--ctx-size", str(budget.context)]
    if deployment.runtime == "onnxruntime":
        server = ["autodistill", "measure", str(artifact.path), "--runtime", "onnxruntime"]
    elif deployment.runtime == "vllm":
        server = ["vllm", "serve", str(artifact.path), "--max-model-len", str(budget.context)]
    return {
        "ran_in": READERS[deployment.runtime],
        "path": str(artifact.path),
        "size_bytes": artifact.size_bytes,
        "name": chosen.name,
        "tensors": tensors,
        "agreement": run.agreement,
        "positions": run.positions,
        "loss": run.loss,
        "excess": run.excess,
        "proof": run.describe(),
        "memory_bytes": int(memory.value),
        "memory_source": memory.source,
        "text": run.text,
        "serve": shlex.join([*server, *deployment.server_arguments]),
    }


def write_solution(bench: Bench, teacher: Teacher, chosen: Deployment | Compensated, out: Path) -> tuple[Artifact, int]:
    """Write a deployment of the teacher, and compare the file's tensors with those that were measured.

    Returns the file and the number of tensors that were compared.

    Args:
        bench, teacher, chosen, out: As for `export`.

    Raises:
        InputError, VerificationError: As `export`.
    """
    label = Label(teacher=teacher.name, license=teacher.license, name=f"{teacher.name}, solved")
    deployment = chosen if isinstance(chosen, Deployment) else chosen.deployment
    if bench.spec.architecture in FAMILIES:
        exporter = load_exporter(deployment.container)
        with _with_scales(bench, teacher.folder, chosen) as folder:
            artifact = exporter.export(folder, deployment, out, **label)
            return artifact, verify(exporter, artifact, folder, deployment).tensors
    storages = {tensor.name: deployment.storage(tensor) for tensor in bench.spec.tensors}

    def own(name: str) -> Floats:
        return bench.in_file(name, bench.master(name))

    def stored(name: str) -> Floats:
        return bench.in_file(name, bench.stored(name, storages[name]))

    def scales(name: str) -> Scales | None:
        return bench.scales(name, storages[name])

    config = read_config(teacher.folder)
    artifact = write_whole(own, scales, bench.spec, config, deployment, teacher.folder, out, **label)
    return artifact, verify_whole(artifact.path, stored, bench.spec, config, deployment)


@contextmanager
def _with_scales(bench: Bench, folder: Path, chosen: Deployment | Compensated) -> Iterator[Path]:
    """Yield a folder of the teacher with the scales that were measured, and with compensated weights if any."""
    deployment = chosen if isinstance(chosen, Deployment) else chosen.deployment
    moved = {} if isinstance(chosen, Deployment) else dict(chosen.values)
    found = {} if isinstance(chosen, Deployment) else dict(chosen.scales)
    with TemporaryDirectory(prefix="autodistill-scales-") as made, StudentFiles(folder, deployment) as files:
        for entry in folder.iterdir():
            replaced = moved and entry.name.endswith((".safetensors", ".safetensors.index.json"))
            if entry.name != SCALES_FILE and not replaced:
                Path(made, entry.name).symlink_to(entry.resolve())
        for name, tensor in files.specs.items():  # one by one, since a teacher may be larger than memory
            if name not in found:
                weight = torch.from_numpy(files.read(name)).to(bench.device)
                scales = bench.scales(name, deployment.storage(tensor), weight)
                found |= {} if scales is None else {name: scales}
        if moved:
            head = get_family(bench.spec.architecture).stored_head
            stored = {name: moved.get(name, torch.from_numpy(files.read(name))).cpu() for name in files.specs}
            named = {f"{head}.weight" if name == "lm_head.weight" else name: one for name, one in stored.items()}
            save_file(named, Path(made, WEIGHTS), metadata={"format": "pt"})
        write_scales(Path(made), deployment.scheme, found)
        yield Path(made)


def _shown(bench: Bench, chosen: Deployment | Candidate | Compensated) -> AbstractContextManager[None]:
    """Within the context, the teacher computes with the weights that are written."""
    if not isinstance(chosen, Deployment):
        return bench.replaced(chosen.weights(bench))
    return bench.shown({tensor.name: chosen.storage(tensor) for tensor in bench.spec.tensors})


def _copied(path: Path, out: Path) -> Artifact:
    """Copy a candidate's file to the folder of solutions, unless it lies there already."""
    target = out / FILE
    if not (target.exists() and target.samefile(path)):
        with replacing(out) as partial:
            shutil.copyfile(path, partial / FILE)
    return Artifact(path=target, size_bytes=target.stat().st_size)

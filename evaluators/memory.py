"""Memory of the deployed student: predicted, or measured in the runtime that serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autodistill.estimates.serving_memory import MemoryEstimate, basis_of, memory
from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Source, Subject
from autodistill.hardware.budget import on_gpu
from autodistill.hardware.device import DISCRETE
from autodistill.hardware.lookup import class_of_machine
from autodistill.hardware.machine import detect, machine_name
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.runtimes.timing import installed, serve

_PROMPT = 512  # tokens: llama.cpp reads this many at once, so they fill its compute buffer


class Memory(Evaluator):
    """Measures "memory_bytes" at the budget's context and batch, with its parts as detail.

    The figure is predicted, unless an artifact exists and its runtime can measure it:

    - llama.cpp loads the GGUF file and reads a prompt. Weights, KV cache and compute buffers come from its log. The
      overhead is the peak of its process minus these. On a discrete GPU the buffers are those on the GPU, and the
      overhead stays predicted: neither the log nor the process shows what libraries hold there.
    - transformers and ONNX Runtime load the folder and read prompts that fill the context. The sum is the peak of the
      process since loading, or of the GPU's memory. All parts except the compute buffers are the estimate's.
    - vLLM takes all the memory that it is given, so its figure stays predicted.

    If the budget is for a discrete GPU and no such GPU runs the artifact here, the figure stays predicted too: the
    memory of a process says nothing about a GPU.
    """

    name = "memory"
    needs: Needs = "spec"
    measures: Mapping[str, Quantity] = {"memory_bytes": Quantity("bytes", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Predict the memory, or load the artifact and measure it.

        Raises:
            InputError: The format cannot hold one of the tensors.
            VerificationError: The runtime cannot load the artifact.
        """
        measured = _measuring(subject.deployment.runtime)
        of_gpu = on_gpu(subject.budget)
        if subject.artifact is None or measured is None or (of_gpu and not detect().accelerator):
            return (_measurement(_estimate(subject, of_gpu), "predicted"),)
        found, where = measured(subject, subject.artifact)
        if of_gpu and not found.on_gpu:
            return (_measurement(_estimate(subject, of_gpu), "predicted"),)
        predicted = {"predicted_bytes": _estimate(subject, found.on_gpu).total_bytes}
        return (_measurement(found, "measured", where | predicted),)


def _estimate(subject: Subject, of_gpu: bool) -> MemoryEstimate:
    budget = subject.budget
    return memory(subject.spec, subject.deployment, context=budget.context, batch=budget.batch, on_gpu=of_gpu)


def _in_llama_cpp(subject: Subject, artifact: Path) -> tuple[MemoryEstimate, dict[str, str]]:
    context, batch = subject.budget.context, subject.budget.batch
    keys, values = subject.deployment.cache_types
    with LlamaServer(artifact, context, subject.threads, batch, cache_type_k=keys, cache_type_v=values) as server:
        server.begin([_prompt(subject, min(_PROMPT, _read(subject) - 1))])
        where = _where(server.accelerated)
        of_gpu = where["device_class"] == DISCRETE
        buffers, peak = server.buffers(on_gpu=True if of_gpu else None), server.peak_bytes()
    stated = replace(
        _estimate(subject, of_gpu),
        weights_bytes=buffers.model_bytes,
        kv_cache_bytes=buffers.kv_bytes,
        compute_bytes=buffers.compute_bytes + buffers.output_bytes,
    )
    if of_gpu:
        return replace(stated, main_memory_bytes=peak), where
    return replace(stated, overhead_bytes=max(0, peak - buffers.total_bytes)), where


def _measuring(runtime: str) -> Callable[[Subject, Path], tuple[MemoryEstimate, dict[str, str]]] | None:
    if runtime == "llama.cpp":
        return _in_llama_cpp
    # vLLM takes all the memory that it is given, so a measurement would say nothing.
    return _by_peak if runtime != "vllm" and installed(runtime) else None


def _by_peak(subject: Subject, artifact: Path) -> tuple[MemoryEstimate, dict[str, str]]:
    """Measure the memory of an artifact in a runtime that is served by `PythonServer` or its exporter, and where."""
    context, batch = subject.budget.context, subject.budget.batch
    runtime = subject.deployment.runtime
    with serve(artifact, runtime, context=context, threads=subject.threads, parallel=batch) as folder:
        folder.begin([_prompt(subject, _read(subject) - 1)] * batch)
        folder.step()
        peak, where = folder.peak_bytes(), _where(folder.accelerated)
    estimate = _estimate(subject, where["device_class"] == DISCRETE)
    return replace(estimate, compute_bytes=peak - estimate.total_bytes + estimate.compute_bytes), where


def _read(subject: Subject) -> int:
    """Return the tokens of each stream: the budget's context, but at most what the model can read."""
    return min(subject.budget.context, subject.spec.max_context)


def _prompt(subject: Subject, length: int) -> list[int]:
    return [index % subject.spec.vocabulary for index in range(max(1, length))]


def _measurement(parts: MemoryEstimate, source: Source, more: Mapping[str, Any] | None = None) -> Measurement:
    """Return the total as a measurement. Its detail has the parts, and the basis of a prediction or `more`."""
    told = {"basis": basis_of(parts.runtime, on_gpu=parts.on_gpu)} if more is None else dict(more)
    return Measurement(
        name="memory_bytes",
        value=float(parts.total_bytes),
        unit="bytes",
        direction="min",
        source=source,
        detail=asdict(parts) | told,
    )


def _where(accelerated: bool) -> dict[str, str]:
    """Return the machine of a measurement and its class of devices."""
    machine = machine_name(detect(), accelerated=accelerated)
    return {"machine": machine, "device_class": class_of_machine(machine, DISCRETE if accelerated else "cpu")}

"""Memory of the deployed student: predicted, or measured in the runtime that serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from autodistill.contracts import Measurement, Needs, Quantity, Source, Subject
from autodistill.devices import class_of_machine
from autodistill.hardware import detect, machine_name
from autodistill.llama_cpp import LlamaServer
from autodistill.python_server import PythonServer
from autodistill.serving_memory import MemoryEstimate, memory
from autodistill.strategy import Deployment

_PROMPT = 512  # tokens that llama.cpp reads at once, which fill its compute buffer


class Memory:
    """Measures "memory_bytes" at the budget's context and batch, with its parts as detail.

    It is predicted, unless there is an artefact whose runtime states it. llama.cpp loads a GGUF file and reads a
    prompt: weights, KV cache and compute buffers are those of its log, and the overhead is what its process had at its
    peak beyond them. transformers loads a folder and reads prompts that fill the context: the peak of its process since
    it was loaded (or of the GPU's memory) is the sum, its parts but the compute buffers are the estimate's. What vLLM
    takes is what it is given, so that there the figure stays predicted.
    """

    name = "memory"
    needs: Needs = "spec"
    measures: Mapping[str, Quantity] = {"memory_bytes": Quantity("bytes", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Predicts, or loads the artefact.

        Raises:
            InputError: The format cannot hold one of the tensors.
            VerificationError: The runtime cannot load the artefact.
        """
        context, batch = subject.budget.context, subject.budget.batch
        estimate = memory(subject.spec, subject.deployment, context=context, batch=batch)
        runtime = subject.deployment.runtime
        if subject.artefact is None or runtime not in ("llama.cpp", "transformers"):
            return (_measurement(estimate, "predicted"),)
        # Room may be made for more than the model was made for, but it reads no more.
        read = min(context, subject.spec.max_context)
        if runtime == "llama.cpp":
            with LlamaServer(subject.artefact, context, subject.threads, batch) as server:
                server.begin([_prompt(subject, min(_PROMPT, read - 1))])
                buffers, peak, accelerated = server.buffers(), server.peak_bytes(), server.accelerated
            compute = buffers.compute_bytes + buffers.output_bytes
            measured = replace(
                estimate,
                weights_bytes=buffers.model_bytes,
                kv_cache_bytes=buffers.kv_bytes,
                compute_bytes=compute,
                overhead_bytes=max(0, peak - buffers.total_bytes),
            )
            return (_measurement(measured, "measured", accelerated),)
        with PythonServer(subject.artefact, runtime, context, subject.threads, batch) as folder:
            folder.begin([_prompt(subject, read - 1)] * batch)
            folder.step()
            peak, accelerated = folder.peak_bytes(), folder.accelerated
        rest = peak - estimate.total_bytes + estimate.compute_bytes
        return (_measurement(replace(estimate, compute_bytes=rest), "measured", accelerated),)

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment's memory can at least be predicted."""
        return True


def _prompt(subject: Subject, length: int) -> list[int]:
    return [index % subject.spec.vocabulary for index in range(max(1, length))]


def _measurement(parts: MemoryEstimate, source: Source, accelerated: bool = False) -> Measurement:
    where = _where(accelerated) if source == "measured" else {}
    return Measurement(
        name="memory_bytes",
        value=float(parts.total_bytes),
        unit="bytes",
        direction="min",
        source=source,
        detail=asdict(parts) | where,
    )


def _where(accelerated: bool) -> dict[str, str]:
    """The machine that a measurement is of, and its class of devices."""
    machine = machine_name(detect(), accelerated=accelerated)
    return {"machine": machine, "device_class": class_of_machine(machine, "discrete-gpu" if accelerated else "cpu")}

"""Memory of the deployed student: predicted, or added up from what llama.cpp says it allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from autodistill.contracts import Measurement, Needs, Quantity, Source, Subject
from autodistill.llama_cpp import LlamaServer
from autodistill.serving_memory import MemoryEstimate, memory
from autodistill.strategy import Deployment


class Memory:
    """Measures "memory_bytes" at the budget's context and batch, with its parts as detail.

    It is predicted, unless the artefact is a GGUF file: then llama.cpp loads it, and weights, KV cache and compute
    buffers are those of its log. What its process takes beyond them is the estimate's in both cases.
    """

    name = "memory"
    needs: Needs = "spec"
    measures: Mapping[str, Quantity] = {"memory_bytes": Quantity("bytes", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Predicts, or loads the artefact.

        Raises:
            InputError: The format cannot hold one of the tensors.
            VerificationError: llama.cpp cannot load the artefact.
        """
        context, batch = subject.budget.context, subject.budget.batch
        estimate = memory(subject.spec, subject.deployment, context=context, batch=batch)
        if subject.artefact is None or subject.artefact.suffix != ".gguf":
            return (_measurement(estimate, "predicted"),)
        with LlamaServer(subject.artefact, context, subject.threads, batch) as server:
            buffers = server.buffers()
        measured = MemoryEstimate(
            weights_bytes=buffers.model_bytes,
            kv_cache_bytes=buffers.kv_bytes,
            compute_bytes=buffers.compute_bytes + buffers.output_bytes,
            overhead_bytes=estimate.overhead_bytes,
            runtime=estimate.runtime,
            context=context,
            batch=batch,
        )
        return (_measurement(measured, "measured"),)

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment's memory can be predicted."""
        return True


def _measurement(parts: MemoryEstimate, source: Source) -> Measurement:
    return Measurement(
        name="memory_bytes",
        value=float(parts.total_bytes),
        unit="bytes",
        direction="min",
        source=source,
        detail=asdict(parts),
    )

"""Size: bytes of the packed weights, predicted from the format or counted by the exporter."""

from __future__ import annotations

from collections.abc import Mapping

from autodistill.evaluation.base import Evaluator, Measurement, Needs, Quantity, Source, Subject
from autodistill.quantization.formats import as_held, weights_bytes


class Size(Evaluator):
    """Measures "size_bytes", of the artifact's files that hold weights, or of the tensors if there is no artifact."""

    name = "size"
    needs: Needs = "spec"
    measures: Mapping[str, Quantity] = {"size_bytes": Quantity("bytes", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Return the artifact's bytes, or the sum over all tensors in the deployment's format."""
        source: Source = "predicted" if subject.artifact_bytes is None else "measured"
        value = _predicted(subject) if subject.artifact_bytes is None else subject.artifact_bytes
        return (Measurement(name="size_bytes", value=float(value), unit="bytes", direction="min", source=source),)


def _predicted(subject: Subject) -> int:
    return weights_bytes(as_held(subject.spec, subject.deployment).tensors, subject.deployment)

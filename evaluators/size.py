"""Size: bytes of the packed weights, predicted by the format's arithmetic or counted on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from autodistill.evaluation.base import Measurement, Needs, Quantity, Source, Subject
from autodistill.quantization.formats import weights_bytes
from autodistill.strategy.deployment import Deployment


class Size:
    """Measures "size_bytes": of the artefact's files that hold weights where there is one, else of the tensors."""

    name = "size"
    needs: Needs = "spec"
    measures: Mapping[str, Quantity] = {"size_bytes": Quantity("bytes", "min")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Counts the artefact's bytes, or adds up those of each tensor in the deployment's format."""
        source: Source = "predicted" if subject.artefact is None else "measured"
        value = _predicted(subject) if subject.artefact is None else _on_disk(subject.artefact)
        return (Measurement(name="size_bytes", value=float(value), unit="bytes", direction="min", source=source),)

    def supports(self, deployment: Deployment) -> bool:
        """Every deployment has a size."""
        return True


def _predicted(subject: Subject) -> int:
    return weights_bytes(subject.spec.tensors, subject.deployment)


def _on_disk(artefact: Path) -> int:
    if artefact.is_file():
        return artefact.stat().st_size
    files = list(artefact.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{artefact} holds no weights: neither a GGUF file nor a folder with safetensors")
    return sum(file.stat().st_size for file in files)

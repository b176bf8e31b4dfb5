"""Exporter to a 16-bit folder of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autodistill.export.base import Artifact
from autodistill.export.student_reader import WEIGHTS, StudentFiles, bf16_config, read_arrays, write_folder
from autodistill.quantization.grids import Floats
from autodistill.quantization.packing import unpack
from autodistill.strategy.deployment import Deployment


class HuggingFaceExporter:
    """Writes bfloat16 safetensors, config, tokenizer and generation config."""

    name = "huggingface"
    formats = ("huggingface",)

    def export(
        self,
        student: Path,
        deployment: Deployment,
        out: Path,
        *,
        teacher: str | None = None,
        license: str | None = None,
        name: str | None = None,
    ) -> Artifact:
        """Write the student into the folder `out`; only the model card names its teacher and licence.

        Raises:
            InputError: The student cannot be read, or `out` not be written.
        """
        with StudentFiles(student, deployment) as files:
            tensors = {name: as_bf16(files.pack(name)) for name in files.specs}
            return write_folder(out, student, bf16_config(files.config), tensors)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, widened to float32."""
        for name, tensor in read_arrays(artifact / WEIGHTS):
            yield name, unpack({"data": tensor.view(torch.uint16).numpy()}, "bf16", tuple(tensor.shape))


def as_bf16(arrays: Mapping[str, Any]) -> torch.Tensor:
    """Return the torch tensor of the bfloat16 bits that `packing.pack` gave."""
    return torch.from_numpy(arrays["data"]).view(torch.bfloat16)

"""Exporter to a torch.export archive that only needs torch to run, for any number and length of sequences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from autodistill.export.graphs.torch_module import Logits, TorchExporter, exported


class Pt2Exporter(TorchExporter):
    """Writes `student.pt2`, in float32, and the tokenizer."""

    name = "pt2"
    file = "student.pt2"

    def write(self, module: Logits, example: Tensor, path: Path) -> None:
        """Export the module with both dimensions of its input dynamic."""
        torch.export.save(exported(module, example, least_tokens=1), path)

    def stored(self, path: Path) -> Mapping[str, Tensor]:
        """Return the archive's parameters."""
        return dict(torch.export.load(path).named_parameters())

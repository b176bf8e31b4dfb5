"""Exporter to an archive of torch.export, which torch alone runs, for any number and length of sequences."""

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
        """Follow the module with both dimensions of its input free."""
        torch.export.save(exported(module, example, least_tokens=1), path)

    def stored(self, path: Path) -> Mapping[str, Tensor]:
        """Return the archive's parameters."""
        return dict(torch.export.load(path).named_parameters())

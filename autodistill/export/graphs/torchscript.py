"""Exporter to TorchScript, which torch deprecates, for runtimes that load nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodistill.export.graphs.torch_module import Logits, TorchExporter


class TorchScriptExporter(TorchExporter):
    """Writes `student.pt`, traced in float32, and the tokenizer."""

    name = "torchscript"
    file = "student.pt"
    notes: Mapping[str, Any] = {"deprecated": "torch deprecates TorchScript; pt2 is its successor"}

    def write(self, module: Logits, example: Tensor, path: Path) -> None:
        """Trace the module; running it later shows that it accepts other shapes."""
        torch.jit.save(torch.jit.trace(module, (example,), check_trace=False), path)

    def stored(self, path: Path) -> Mapping[str, Tensor]:
        """Return the module's parameters."""
        return dict(torch.jit.load(path).named_parameters())

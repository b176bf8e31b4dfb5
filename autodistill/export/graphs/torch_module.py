"""A student as a torch module that maps tokens to logits with the evaluated weights, and its base exporter."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from autodistill.export.base import Artifact, Label, Ran, TokenIds
from autodistill.export.graphs.child import run_alone
from autodistill.export.proof import deployed_model
from autodistill.export.student_reader import StudentFiles, copy_tokenizer, no_graph, replacing
from autodistill.hardware.runtime import Runtime
from autodistill.quantization.formats import Format
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment

PREFIX = "student."
_HEAD = "lm_head.weight"
_MOST_SEQUENCES = 1024
_TRACED = (2, 24)  # sequences and tokens of the example; torch would treat a size of 1 as a constant
_GRAPH_BYTES = 256 * 1024  # of each layer, without its weights: more than SmolLM2 takes in any of the three formats


class Logits(nn.Module):
    """A student that takes only tokens, int64 [batch, tokens], and returns logits [batch, tokens, vocabulary]."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, tokens: Tensor) -> Tensor:
        """Read whole sequences, without a cache."""
        logits: Tensor = self.student(input_ids=tokens, use_cache=False).logits
        return logits


class TorchExporter(ABC):
    """Base of exporters to torch graphs: float32 weights with exactly the values of any deployment."""

    name: ClassVar[str]
    file: ClassVar[str]
    formats: tuple[Format, ...] = ()
    runtimes: tuple[Runtime, ...] = ()
    runs_in = "torch"
    is_code = True
    packages: tuple[str, ...] = ()
    notes: Mapping[str, Any] = {}

    @abstractmethod
    def write(self, module: Logits, example: Tensor, path: Path) -> None:
        """Write the graph of a module, traced with an example input."""

    @abstractmethod
    def stored(self, path: Path) -> Mapping[str, Tensor]:
        """Return the tensors of a file that was just written. The file is code, so no foreign file is ever read."""

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Accept every row of layers that are alike: codes become the float32 weights that they stand for."""
        return no_graph(student)

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the student's graph and its tokenizer into the folder `out`; the card names its teacher.

        Raises:
            InputError: The student cannot be read, or `out` cannot be written.
            OSError: The disk has no room for the file.
        """
        with StudentFiles(student, deployment) as files, replacing(out) as partial:
            model = deployed_model(student, files)
            model.set_attn_implementation("sdpa")
            model.requires_grad_(False)
            weights = {one.data_ptr(): one.nbytes for one in model.parameters()}  # a tied table is written once
            check_room(partial, sum(weights.values()) + _GRAPH_BYTES * files.spec.layers)
            with without_warnings(), torch.no_grad():
                self.write(Logits(model), torch.ones(_TRACED, dtype=torch.int64), partial / self.file)
            copy_tokenizer(student, partial)
        return Artifact(path=out, size_bytes=(out / self.file).stat().st_size)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor of a file that was just written."""
        with without_warnings():
            found = self.stored(artifact / self.file)
        stored = {name.removeprefix(PREFIX): one.detach() for name, one in found.items() if name.startswith(PREFIX)}
        tables = [one for name, one in stored.items() if name.endswith((".embed_tokens.weight", ".embed_in.weight"))]
        if _HEAD in stored and any(one.data_ptr() == stored[_HEAD].data_ptr() for one in tables):
            del stored[_HEAD]
        for name, tensor in stored.items():
            yield name, tensor.float().numpy()

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the file in a process without transformers; see `Exporter.run`."""
        return run_alone(self.name, artifact / self.file, artifact, sequences, threads)


def exported(module: Logits, example: Tensor, *, least_tokens: int) -> torch.export.ExportedProgram:
    """Export a module with both dimensions of its input dynamic.

    Args:
        module: The student.
        example: Example input.
        least_tokens: Length of the shortest sequence that the graph must accept.
    """
    most = int(module.student.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    free = {
        0: torch.export.Dim("batch", min=1, max=_MOST_SEQUENCES),
        1: torch.export.Dim("tokens", min=least_tokens, max=most),
    }
    return torch.export.export(module, (example,), dynamic_shapes=(free,), strict=False)


def check_room(folder: Path, size: int) -> None:
    """Notice a full disk before torch does: if a write fails, torch's archive writers abort the whole process.

    Args:
        folder: Folder that the file will be written into.
        size: Bytes that it needs.

    Raises:
        OSError: The disk, a quota or a limit of the process does not allow a file of this size.
    """
    if not hasattr(os, "posix_fallocate"):  # as on macOS
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence torch's warnings about transformers' code during tracing; the result is run and compared anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

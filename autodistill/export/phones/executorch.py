"""Exporter to an ExecuTorch program, which phones run with XNNPACK and which keeps the cache itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from autodistill.export.graphs.torch_module import without_warnings
from autodistill.export.phones.cached_decoder import CachedDecoder, Update
from autodistill.export.phones.phone import CHUNK, PhoneExporter
from autodistill.export.phones.stored import Stored


class ExecuTorchExporter(PhoneExporter):
    """Writes `student.pte`. Its `forward` takes tokens and the position of the first; the program keeps its cache."""

    name = "executorch"
    file = "student.pte"
    extra = "executorch"
    runs_in = "ExecuTorch"
    packages = ("executorch",)
    modules = ("executorch",)

    @property
    def update(self) -> Update:
        """An operation that a pass of ExecuTorch converts to an in-place one."""

        def write(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
            places = start + torch.arange(new.shape[2], dtype=start.dtype)
            written: Tensor = torch.ops.aten.index_put(cache, [None, None, places], new)
            return written

        return write

    def write(self, decoder: CachedDecoder, stored: Mapping[str, Stored], out: Path) -> None:
        """Lower the student to XNNPACK, and operations that XNNPACK does not compute to ExecuTorch's own kernels."""
        with without_warnings(), _quiet(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

            most = min(CHUNK, decoder.context)
            example = (torch.zeros(1, most // 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
            free = {1: torch.export.Dim("tokens", min=1, max=most)}
            program = torch.export.export(_Stateful(decoder).eval(), example, dynamic_shapes=(free, None), strict=False)
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            made = lowered.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
        with (out / self.file).open("wb") as file:
            made.write_to_file(file)


class _Stateful(nn.Module):
    """A decoder that keeps its cache."""

    def __init__(self, decoder: CachedDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        for number, part in enumerate(decoder.empty):
            self.register_buffer(f"cache_{number}", part)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Return the logits of tokens that follow the first `start` ones; see `CachedDecoder`."""
        cache = [part for name, part in self.named_buffers() if name.startswith("cache_")]
        logits, longer = self.decoder(tokens, start, cache)
        for before, after in zip(cache, longer, strict=True):
            before.copy_(after)
        found: Tensor = logits
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ExecuTorch's logging of each step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

"""Exporter to a file of LiteRT, which Android and boards run: a signature for prompts, another for single tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from autodistill.export.graphs.cached_decoder import CachedDecoder, Update
from autodistill.export.graphs.phone import CHUNK, PhoneExporter
from autodistill.export.graphs.torch_module import without_warnings

_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"


class LiteRtExporter(PhoneExporter):
    """Writes `student.tflite` with the signatures `prefill` and `decode`; the cache is among inputs and outputs."""

    name = "litert"
    file = "student.tflite"
    extra = "litert"
    most_bytes = 2e9  # what a flatbuffer addresses, less the graph
    runs_in = "LiteRT"
    packages = ("litert-torch", "ai-edge-litert")
    modules = ("litert_torch", "ai_edge_litert")

    @property
    def update(self) -> Update:
        """LiteRT's own operation, which may write in place."""
        from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

        def write(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
            first = torch.zeros_like(start[0])
            written: Tensor = dynamic_update_slice(cache, new, [first, first, start[0], first])
            return written

        return write

    def write(self, decoder: CachedDecoder, path: Path) -> None:
        """Convert both signatures, which share the weights."""
        with _quiet(), without_warnings(), torch.no_grad():
            import litert_torch

            module = _Signature(decoder).eval()
            made = litert_torch.signature("prefill", module, sample_kwargs=module.example(min(CHUNK, decoder.context)))
            made.signature("decode", module, sample_kwargs=module.example(1)).convert().export(str(path))


class _Signature(nn.Module):
    """A decoder whose inputs and outputs have names, the same for what a cache is before and after."""

    def __init__(self, decoder: CachedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def example(self, tokens: int) -> dict[str, Tensor]:
        """Return inputs of so many tokens."""
        cache = self.decoder.empty
        given = {"tokens": torch.zeros(1, tokens, dtype=torch.int32), "start": torch.zeros(1, dtype=torch.int32)}
        return given | dict(zip(_names(len(cache)), cache, strict=True))

    def forward(self, tokens: Tensor, start: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        """Read tokens; see `CachedDecoder`."""
        names = _names(len(cache))
        logits, longer = self.decoder(tokens, start, [cache[name] for name in names])
        return {"logits": logits, **dict(zip(names, longer, strict=True))}


def _names(count: int) -> list[str]:
    """Of the parts of a cache, in their order."""
    return [f"{part}_{layer}" for layer in range(count // 2) for part in ("keys", "values")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep litert-torch from printing each of its steps."""
    before = os.environ.get(_PROGRESS)
    os.environ[_PROGRESS] = "n"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROGRESS]
        else:
            os.environ[_PROGRESS] = before

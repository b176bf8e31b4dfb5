"""Exporters to a LiteRT file for Android and boards, with one signature for prompts and one for single tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from autodistill.export.graphs.torch_module import without_warnings
from autodistill.export.phones.cached_decoder import CachedDecoder, Update
from autodistill.export.phones.litert_weights import narrow_weights
from autodistill.export.phones.phone import CHUNK, PhoneExporter
from autodistill.export.phones.stored import Stored
from autodistill.export.student_reader import StudentFiles
from autodistill.quantization.grids import Floats
from autodistill.strategy.deployment import Deployment

_PROGRESS = "LITERT_TORCH_SHOW_PROGRESS"


class LiteRtExporter(PhoneExporter):
    """Writes `student.tflite` with the signatures `prefill` and `decode`; the cache is an input and an output.

    Matrices that are stored in 16 bits in the row are float16 if float16 represents each value exactly. All others are
    float32.
    """

    name = "litert"
    file = "student.tflite"
    extra = "litert"
    most_bytes = 2e9  # limit of a flatbuffer, minus the graph
    runs_in = "LiteRT"
    packages: tuple[str, ...] = ("litert-torch", "ai-edge-litert")
    modules: ClassVar[tuple[str, ...]] = ("litert_torch", "ai_edge_litert")

    @property
    def update(self) -> Update:
        """LiteRT's own operation, which may write in place."""
        from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

        def write(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
            first = torch.zeros_like(start[0])
            written: Tensor = dynamic_update_slice(cache, new, [first, first, start[0], first])
            return written

        return write

    def held(self, files: StudentFiles, name: str, deployment: Deployment, values: Floats) -> Stored:
        """Return how the file holds a tensor; vectors are float32."""
        matrix = values.ndim == 2 and deployment.storage(files.specs[name]) in ("f16", "bf16")
        return Stored.narrowed(values) if matrix else Stored.plain(values)

    def write(self, decoder: CachedDecoder, stored: Mapping[str, Stored], out: Path) -> None:
        """Convert both signatures; they share the weights."""
        with _quiet(), without_warnings(), torch.no_grad():
            import litert_torch

            module = _Signature(decoder).eval()
            made = litert_torch.signature("prefill", module, sample_kwargs=module.example(min(CHUNK, decoder.context)))
            made.signature("decode", module, sample_kwargs=module.example(1)).convert().export(str(out / self.file))
        narrow_weights(out / self.file, decoder.weights, stored)


class LiteRtCodesExporter(LiteRtExporter):
    """The same with codes of GGUF's types in the same number of bytes: smaller, but slower, as products are float32."""

    name = "litert-codes"

    def held(self, files: StudentFiles, name: str, deployment: Deployment, values: Floats) -> Stored:
        """Return how the file holds a tensor: as the evaluated codes if they are of GGUF's types."""
        codes = Stored.of_codes(files, name, deployment.storage(files.specs[name]))
        return codes or super().held(files, name, deployment, values)


class _Signature(nn.Module):
    """A decoder whose inputs and outputs have the names that LiteRT-LM expects."""

    def __init__(self, decoder: CachedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def example(self, tokens: int) -> dict[str, Tensor]:
        """Return example inputs with this number of tokens."""
        cache = self.decoder.empty
        given = {
            "tokens": torch.zeros(1, tokens, dtype=torch.int32),
            "input_pos": torch.zeros(tokens, dtype=torch.int32),
        }
        return given | dict(zip(_names(len(cache)), cache, strict=True))

    def forward(self, tokens: Tensor, input_pos: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        """Read tokens from the first position in `input_pos` on; see `CachedDecoder`."""
        names = _names(len(cache))
        logits, longer = self.decoder(tokens, input_pos[:1], [cache[name] for name in names])
        return {"logits": logits, **dict(zip(names, longer, strict=True))}


def _names(count: int) -> list[str]:
    """Return the names of the parts of a cache, in order."""
    return [f"kv_cache_{part}_{layer}" for layer in range(count // 2) for part in ("k", "v")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep litert-torch from printing its steps."""
    before = os.environ.get(_PROGRESS)
    os.environ[_PROGRESS] = "n"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROGRESS]
        else:
            os.environ[_PROGRESS] = before

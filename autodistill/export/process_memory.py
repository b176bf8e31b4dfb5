"""What llama.cpp's process takes on this machine beside its buffers: code, heap and the tokenizer's own tables."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path

from autodistill.errors import InputError, VerificationError
from autodistill.export.tokenizer_check import SAMPLE_CONTEXT, write_sample_model
from autodistill.hardware.machine import detect
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.runtimes.llama_cpp import LlamaServer

# A whole model was seen to take up to 0.6 MB more than one of one layer with the same tokenizer.
_MARGIN_BYTES = 1_000_000


def measured_process_bytes(folder: Path, vocabulary: int) -> int:
    """Measure what llama.cpp's process takes beside weights, cache and compute buffers with this tokenizer.

    A model of one layer and of zeros is written with the tokenizer and reads a prompt. The constants by which it is
    predicted elsewhere are of one machine and of a tokenizer whose tokens are as long as is usual.

    Args:
        folder: Holds the tokenizer's files.
        vocabulary: Rows of the model's embedding table.

    Returns:
        Bytes, or 0 where it cannot be measured: llama.cpp is not installed, it computes on a GPU, or it cannot hold the
        tokenizer.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return 0
    try:
        return _measured(folder, vocabulary, tokenizer_fingerprint(folder))
    except (InputError, VerificationError, ValueError):
        return 0


@functools.lru_cache(maxsize=16)
def _measured(folder: Path, vocabulary: int, fingerprint: str) -> int:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "sample.gguf"
        write_sample_model(path, folder, vocabulary)
        with LlamaServer(path, SAMPLE_CONTEXT, detect().cpus) as server:
            server.begin([[0] * (SAMPLE_CONTEXT - 1)])
            if server.accelerated:
                return 0
            return max(0, server.peak_bytes() - server.buffers().total_bytes) + _MARGIN_BYTES

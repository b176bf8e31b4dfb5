"""What llama.cpp's process takes on this machine beside its buffers: code, heap and the tokenizer's own tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import tempfile
from pathlib import Path

from autodistill.errors import InputError, VerificationError
from autodistill.export.tokenizer_check import SAMPLE_CONTEXT, write_sample_model
from autodistill.hardware.machine import detect
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json, write_json

# A whole model was seen to take up to 0.6 MB more than one of one layer with the same tokenizer.
_MARGIN_BYTES = 1_000_000
_MOST_BYTES = 10**10  # a file that says more is damaged


def measured_process_bytes(folder: Path, vocabulary: int, cache: Path) -> int:
    """Measure what llama.cpp's process takes beside weights, cache and compute buffers with this tokenizer.

    A model of one layer and of zeros is written with the tokenizer and reads a prompt. The constants by which it is
    predicted elsewhere are of one machine and of a tokenizer whose tokens are as long as is usual.

    What is measured is kept, since a second measurement differs by up to 0.3 MB: the same budget would be filled in
    another way.

    Args:
        folder: Holds the tokenizer's files.
        vocabulary: Rows of the model's embedding table.
        cache: Where it is kept.

    Returns:
        Bytes, or 0 where it cannot be measured: llama.cpp is not installed, it computes on a GPU, or it cannot hold the
        tokenizer.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return 0
    cpus = detect().cpus
    try:
        key = {
            "tokenizer": tokenizer_fingerprint(folder),
            "vocabulary": vocabulary,
            "runtime": importlib.metadata.version("xllamacpp"),
            "machine": [platform.platform(), platform.machine(), cpus],
        }
        path = cache / "devices" / f"process-{content_hash(key)}.json"
        if known := _kept(path):
            return known
        if found := _measured(folder, vocabulary, cpus):
            with contextlib.suppress(OSError):
                write_json(path, {"bytes": found})
        return found
    except (InputError, VerificationError, ValueError):
        return 0


def _kept(path: Path) -> int:
    """Return what was measured before; 0 where nothing was, or the file is damaged."""
    try:
        found = read_json(path).get("bytes") if path.exists() else 0
    except InputError:
        return 0
    return found if type(found) is int and _MARGIN_BYTES < found < _MOST_BYTES else 0


def _measured(folder: Path, vocabulary: int, cpus: int) -> int:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "sample.gguf"
        write_sample_model(path, folder, vocabulary)
        with LlamaServer(path, SAMPLE_CONTEXT, cpus) as server:
            server.begin([[0] * (SAMPLE_CONTEXT - 1)])
            if server.accelerated:
                return 0
            return max(0, server.peak_bytes() - server.buffers().total_bytes) + _MARGIN_BYTES

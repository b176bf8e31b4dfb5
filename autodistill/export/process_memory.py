"""Memory of llama.cpp's process on this machine outside its buffers: code, heap and the tokenizer's own tables."""

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

# In measurements, a whole model took up to 0.6 MB more than a one-layer model with the same tokenizer.
_MARGIN_BYTES = 1_000_000
_MOST_BYTES = 10**10  # a file with a larger number is damaged


def measured_process_bytes(folder: Path, vocabulary: int, cache: Path) -> int:
    """Measure the memory of llama.cpp's process with this tokenizer, without weights, cache and compute buffers.

    A one-layer model of zeros is written with the tokenizer and reads a prompt. Elsewhere, this memory is predicted by
    constants. They hold for one machine, and for a tokenizer whose tokens have a usual length.

    The result is kept. A second measurement may differ by up to 0.3 MB, and the same budget would then be filled
    differently.

    Args:
        folder: Holds the tokenizer's files.
        vocabulary: Rows of the model's embedding table.
        cache: Folder in which the result is kept.

    Returns:
        Bytes, or 0 if it cannot be measured, because llama.cpp is not installed, computes on a GPU, or cannot hold the
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
    """Return an earlier measurement, or 0 if there is none or its file is damaged."""
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

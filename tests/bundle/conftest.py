"""Exports of a tiny student that tests bundle, and a llama.cpp server that gets the arguments of a bundle."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.export.base import load_exporter
from autodistill.export.proof import simulate
from autodistill.export.record import Exported, write
from autodistill.export.verify import prove, verify
from autodistill.runtimes.launch_files import write_launch_files
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

CONTEXT, STREAMS, BUDGET = 256, 2, 210_000_000
Q8_0 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32, cache_type_k="q8_0")
INT8 = Deployment(runtime="vllm", format="compressed-tensors", bits=8, group_size=32)
SEQUENCES = np.random.default_rng(0).integers(3, 300, (4, 40))
PROMISE: dict[str, Any] = {
    "context": CONTEXT,
    "streams": STREAMS,
    "memory_bytes": BUDGET,
    "device": None,
    "latency": [],
    "measured": {
        "memory_bytes": 150_500_000,
        "tpot_p95_ms": 20.0,
        "ttft_p50_ms": 40.0,
        "machine": "a CPU",
        "prompt": 64,
    },
}
CARD = "---\nlicense: apache-2.0\ntags: [distillation]\n---\n\n# A student\n"


def export_to(folder: Path, name: str, deployment: Deployment, promise: dict[str, Any] | None = PROMISE) -> Path:
    """Export a tiny student in a format and check it in its runtime, as `autodistill export` does."""
    student, exporter = (
        save_tiny_teacher(folder / "student", layers=2, heads=2, kv_heads=1, seed=1),
        load_exporter(name),
    )
    artifact = exporter.export(student, deployment, folder / name)
    expected = simulate(student, deployment, SEQUENCES, 1)
    check = prove(exporter, artifact.path, deployment, expected, 1, student)
    if artifact.path.suffix == ".gguf":
        write_launch_files(artifact.path, deployment, CONTEXT, STREAMS)
    (folder / name / "README.md").write_text(CARD)
    known = Exported(
        row=f"t001-{deployment.name}",
        deployment=deployment,
        artifact="" if artifact.path == folder / name else artifact.path.name,
        weights=verify(exporter, artifact, student, deployment),
        expected=expected,
        check=check,
        text="random tokens",
        promise=promise,
    )
    write(folder / name, exporter, known)
    return folder / name


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to GGUF."""
    return export_to(tmp_path_factory.mktemp("exported"), "gguf", Q8_0)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to compressed-tensors, for vLLM."""
    return export_to(tmp_path_factory.mktemp("packed"), "compressed-tensors", INT8)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(words: Sequence[str], log: Path) -> Iterator[None]:
    """Run a llama.cpp server while the block lasts."""
    program = Path(__file__).with_name("llama_server.py")
    with log.open("wb") as said:
        server = subprocess.Popen([sys.executable, program, *words], stdout=said, stderr=said)
    try:
        yield
    finally:
        server.terminate()
        server.wait(20)

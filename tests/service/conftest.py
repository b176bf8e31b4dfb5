"""Fixtures for tests of services: a tiny student as a GGUF file, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autodistill.advisor.describe import deployment_named
from autodistill.export.gguf import GgufExporter
from autodistill.runtimes.launch_files import write_launch_files
from autodistill.service.launch import Service, settle
from autodistill.service.request import ServeRequest
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported tiny student, with `serve.json`: two slots of 512 tokens, and a cache in 8 bits."""
    teacher = save_tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=2)
    deployment = deployment_named("gguf-q8_0")
    path = GgufExporter().export(teacher, deployment, tmp_path_factory.mktemp("export") / "gguf").path
    write_launch_files(path, deployment, 512, 2)
    return path.parent


@pytest.fixture(scope="session")
def student(export: Path) -> Path:
    (path,) = export.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[Service]:
    """A running server of the student, on one thread."""
    with Service(settle(ServeRequest(export, port=0, threads=1))) as running:
        yield running

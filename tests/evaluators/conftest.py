from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.evaluation.base import Subject
from autodistill.testing import tiny_subject


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject]:
    folder = tmp_path_factory.mktemp("subject")
    return folder, tiny_subject(folder, artifact=True)


@pytest.fixture(scope="session")
def student(made: tuple[Path, Subject]) -> Path:
    return made[0] / "student"


@pytest.fixture(scope="session")
def subject(made: tuple[Path, Subject]) -> Subject:
    """A tiny student before its export, with scores on synthetic tokens of 40 documents."""
    return replace(made[1], artifact=None)


@pytest.fixture(scope="session")
def artifact(made: tuple[Path, Subject]) -> Path:
    assert made[1].artifact is not None
    return made[1].artifact

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from autodistill.contracts import Answers, Subject, TokenScores
from autodistill.estimate import spec_from_config
from autodistill.export.gguf import GgufExporter
from autodistill.strategy import Deployment
from autodistill.testing import save_tiny_teacher
from autodistill.units import Budget


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("student"), ffn=192)


@pytest.fixture(scope="session")
def subject(student: Path) -> Subject:
    """A tiny student before its export, scored on made-up tokens of 40 documents."""
    dice = np.random.default_rng(0)
    documents = np.repeat(np.arange(40, dtype=np.int32), dice.integers(10, 50, size=40))
    difficulty = dice.uniform(0.5, 4.0, size=40)[documents]
    count = documents.size
    scores = TokenScores(
        nll=dice.exponential(difficulty),
        correct=dice.random(count) < np.exp(-difficulty),
        agrees=dice.random(count) < 0.7,
        documents=documents,
    )
    return Subject(
        spec=spec_from_config(json.loads((student / "config.json").read_text())),
        deployment=Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32),
        budget=Budget(memory_bytes=10**9, context=512, batch=2),
        scores=scores,
        answers=Answers(
            texts=tuple(map(str, range(60))),
            marks=np.random.default_rng(1).choice([0.0, 0.01, 0.5, 1.0], size=60),
            documents=np.arange(60, dtype=np.int32) // 2,
        ),
    )


@pytest.fixture(scope="session")
def artefact(student: Path, subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GgufExporter().export(student, subject.deployment, tmp_path_factory.mktemp("gguf")).path

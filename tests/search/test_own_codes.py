"""A teacher that is quantised already stands beside a search's students in its own codes, and a reader is told so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodistill.export.student_files import StudentFiles
from autodistill.search.request import SearchRequest
from autodistill.search.search import Outcome, search
from autodistill.strategy import Deployment
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.units import Budget

OWN = Deployment(runtime="llama.cpp", format="gguf-q4_1", bits=4, group_size=32, symmetric=False)
SPACE = """
name: small
dimensions:
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}
  - {runtime: llama.cpp, format: gguf-q4_0, bits: 4, group_size: 32}
"""


def _request(folder: Path, teacher: Path) -> SearchRequest:
    (folder / "space.yaml").write_text(SPACE)
    return SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=str(teacher),
        data=str(folder / "text"),
        space=str(folder / "space.yaml"),
        trials=1,
        tokens=768,
        runner="inline",
        out=folder / "runs",
        name="run",
        cache=folder / "cache",
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("own-codes")
    teacher = save_tiny_teacher(folder / "teacher", layers=2)
    with StudentFiles(teacher, OWN) as files:
        weights = {name: torch.from_numpy(files.deployed(name).copy()) for name in files.specs}
    assert weights.keys() == load_file(teacher / "model.safetensors").keys()
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    tiny_text(folder / "text", documents=20, sentences=24)
    return search(_request(folder, teacher)), folder


def test_its_own_codes_are_a_row_that_loses_nothing_though_the_space_does_not_have_them(
    outcome: tuple[Outcome, Path],
) -> None:
    rows = {row.deployment_name: row for row in outcome[0].rows if row.kind == "teacher"}
    assert rows.keys() == {"gguf-f16", "gguf-q4_0", "gguf-q4_1"}
    own = rows["gguf-q4_1"]
    assert own.deployment == OWN.to_json()
    # To the last bit what the teacher does, so that it agrees with it at every token; rounded again it does not.
    assert (own.agreement, own.retention) == (1.0, 1.0)
    assert (rows["gguf-q4_0"].agreement or 0.0) < 1.0
    assert own.feasible
    assert {row.deployment_name for row in outcome[0].rows if row.kind == "student"} <= {"gguf-f16", "gguf-q4_0"}


def test_a_reader_is_told_so(outcome: tuple[Outcome, Path]) -> None:
    run = outcome[1] / "runs" / "run"
    plan = json.loads((run / "search.json").read_text())
    said = "the teacher is pre-quantised: its matrices lie on Q4_1, its table on Q8_0, which gguf-q4_1 stores without"
    assert any(note.startswith(said) for note in plan["plan"]["notes"])
    assert plan["teacher"]["stored_as"] == "gguf-q4_1"
    assert "the teacher is pre-quantised" in (run / "report.md").read_text()

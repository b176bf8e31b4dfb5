"""A quantised teacher has a row in its own codes next to a search's students, and the report says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodistill.distillation.teacher.resolve import Teacher
from autodistill.distillation.teacher.stored_grids import StoredAs
from autodistill.estimates.fit import cannot_hold
from autodistill.export.student_reader import StudentFiles
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import Outcome, search
from autodistill.search.setup import loading
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.testing import save_tiny_teacher, tiny_config, tiny_text

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
        runs=folder / "runs",
        name="run",
        cache=folder / "cache",
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
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
    assert own.deployment == OWN
    # The row equals the teacher to the last bit, so both agree at every token. A teacher rounded again does not agree.
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


def test_a_run_of_a_version_without_such_rows_goes_on_without_them(
    outcome: tuple[Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = outcome[1]
    shutil.copytree(folder / "runs", tmp_path / "runs")
    stored = tmp_path / "runs" / "run" / "search.json"
    document = json.loads(stored.read_text())
    del document["teacher"]["stored_as"]
    stored.write_text(json.dumps(document))
    monkeypatch.setattr(loading, "stored_as", lambda *_: pytest.fail("it was looked for"))
    request = replace(_request(folder, folder / "teacher"), runs=tmp_path / "runs", resume=True)
    assert len(search(request).rows) == len(outcome[0].rows)


def test_whether_its_own_codes_are_ranked_is_said(outcome: tuple[Outcome, Path]) -> None:
    folder = outcome[1]
    config = check_request(replace(_request(folder, folder / "teacher"), name="asked"))
    spec = spec_from_config(tiny_config())
    teacher = Teacher(folder=folder, fingerprint="", name="tiny", license=None)
    stored = StoredAs(types="its matrices lie on Q4_1", deployment=OWN, exact=True)
    said = "the teacher's own codes are ranked beside the students, as teacher-gguf-q4_1, and need no training"
    assert loading._ranked(teacher, stored, spec, config) == said
    refused = replace(spec, text_not_in_gguf="its text is cut otherwise")
    assert loading._ranked(teacher, stored, refused, config).endswith("not ranked here: " + cannot_hold(refused, OWN))
    for_vllm = replace(config, served_by="vllm")
    assert "the search is for vllm, and llama.cpp serves them" in loading._ranked(teacher, stored, spec, for_vllm)
    assert loading._ranked(teacher, None, spec, config) == ""


def test_its_own_codes_are_a_row_beside_constructions_too(outcome: tuple[Outcome, Path]) -> None:
    folder = outcome[1]
    solved = Space({"distillation.learning_rate": {"choices": [1e-3]}}, solved=True)
    (folder / "solved.yaml").write_text(solved.to_yaml())
    asked = replace(_request(folder, folder / "teacher"), space=str(folder / "solved.yaml"), name="solved")
    rows = search(replace(asked, budget=Budget(memory_bytes=10**9, context=64))).rows
    assert "gguf-q4_1" in {row.deployment_name for row in rows if row.kind == "teacher"}

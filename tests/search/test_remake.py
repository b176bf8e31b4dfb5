"""A row that is made again on the same machine with the same versions is equal to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.runs.events import RowAdded, RowTested
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.remake import compare, environment_differs, remake
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text

SPACE = {
    "name": "small",
    "dimensions": {"init.depth": {"choices": [0.5, 0.75]}},
    "deployments": [{"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """Return a finished search and its cache."""
    folder = tmp_path_factory.mktemp("remake")
    teacher = save_tiny_teacher(folder / "teacher", layers=4)
    text = tiny_text(folder / "text", documents=30, sentences=24)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    search(
        SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            space=str(folder / "space.yaml"),
            teacher=str(teacher),
            data=str(text),
            trials=2,
            tokens=1024,
            runner="inline",
            runs=folder / "runs",
            name="run",
            cache=folder / "cache",
        )
    )
    return RunFolder.open(folder / "runs", "run"), folder / "cache"


def test_rows_made_again_are_identical(made: tuple[RunFolder, Path]) -> None:
    run, cache = made
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    rows = run.events.rows(split="validation")
    student = next(row for row in rows if row.kind == "student")
    teacher = next(row for row in rows if row.kind == "teacher")
    for row in (student, teacher):
        found = remake(run, row, cache)
        assert found.verdict == "identical", found.describe()
        assert found.environment == ()
        assert found.figures["accuracy"] == (row.accuracy, row.accuracy)
        assert "identical" in found.describe()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_row_is_made_again_in_the_space_of_its_run_whatever_became_of_the_file(made: tuple[RunFolder, Path]) -> None:
    run, cache = made
    file = run.path.parents[1] / "space.yaml"
    before = file.read_bytes()
    teacher = next(row for row in run.events.rows(split="validation") if row.kind == "teacher")
    try:
        file.write_text(yaml.safe_dump({**SPACE, "dimensions": {"init.depth": {"choices": [0.25]}}}))
        assert remake(run, teacher, cache).verdict == "identical"
        file.unlink()
        assert remake(run, teacher, cache).verdict == "identical"
    finally:
        file.write_bytes(before)


def test_the_code_and_the_machine_are_written_down(made: tuple[RunFolder, Path]) -> None:
    asked = made[0].read_settings()
    assert len(asked["code"]["hash"]) == 12
    assert asked["machine"]["cpus"] >= 1
    changed = {**asked, "versions": {**asked["versions"], "torch": "1.0"}, "code": {"hash": "other"}, "machine": None}
    told = environment_differs(changed)
    assert told[0] == "the run does not say its machine"
    assert told[1].startswith("package torch was 1.0, and is ")
    assert told[2].startswith("code hash was other, and is ")


def test_a_row_of_the_test_split_stays_unread(made: tuple[RunFolder, Path]) -> None:
    run, cache = made
    rows = run.events.rows(RowAdded, RowTested)
    with pytest.raises(InputError, match="is of the test split, which a run reads once"):
        remake(run, next(row for row in rows if row.split == "test"), cache)


def test_a_difference_is_held_to_the_error_of_the_row(made: tuple[RunFolder, Path]) -> None:
    run, _ = made
    row = next(row for row in run.events.rows(split="validation") if row.kind == "student")
    assert row.accuracy is not None
    row = replace(row, accuracy_stderr=0.01)

    def verdict(other: Row) -> str:
        return compare("run", row, other, run.read_settings(), 1.0).verdict

    assert verdict(row) == "identical"
    assert verdict(replace(row, accuracy=row.accuracy + 0.009)) == "within its error"
    assert verdict(replace(row, accuracy=row.accuracy + 0.011)) == "different"
    documents = json.loads(json.dumps(row.documents))
    documents["sum"][0] += 1
    assert verdict(replace(row, documents=documents)) == "within its error", "the mean may hide it"

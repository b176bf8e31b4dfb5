"""A student that forgot general text is passed over, unless only the task is the goal. The report says so."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load_file

from autodistill.errors import InputError
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.row import FORGOT, Row
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of
from autodistill.search.finish import forgetting
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.forgetting import Forgotten, Gate
from autodistill.search.remake import remake
from autodistill.search.request.validate import check_request
from autodistill.search.search import search
from tests.search.small_search import small_inputs
from tests.search.small_search import small_request as request


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_inputs(tmp_path_factory.mktemp("inputs"))


def test_what_forgot_is_not_exported(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test treats the tiny teacher as one that knows text, and adds a nat to the loss of its trained students."""
    monkeypatch.setattr(forgetting, "_entropy", lambda data: math.inf)
    real = Gate._scores

    def worse(gate: Gate, row: Row, text: Any) -> Any:
        found = real(gate, row, text)
        return replace(found, nll=found.nll + 1.0) if found and row.kind in DISTILLED else found

    monkeypatch.setattr(Gate, "_scores", worse)
    asked = request(inputs, tmp_path)
    outcome = search(asked)
    best, forgotten = outcome.finish.best, outcome.finish.forgotten
    assert best.kind in UNTRAINED
    (passed,) = [row for row in outcome.rows if row.kind in DISTILLED]
    assert (passed.feasible, passed.reason) == (False, FORGOT)
    assert (passed.accuracy or 0.0) > (best.accuracy or 0.0)
    assert forgotten is not None
    assert (forgotten.row, forgotten.untrained) == (passed.row_id, best.row_id)
    assert forgotten.kl > forgotten.untrained_kl >= 0
    assert forgotten.difference == pytest.approx(forgotten.loss - forgotten.untrained_loss)
    assert forgotten.documents >= 10
    note = next(note for note in outcome.document["notes"] if "general text" in note)
    assert f"autodistill export run --row {passed.row_id}" in note
    run = RunFolder.open(tmp_path, "run")
    report = run.path.joinpath("report.md").read_text()
    assert "What was trained forgot general text, and" in report
    assert "was passed over: on general text" in report
    assert outcome.finish.gains.describe().endswith("is exported as it is (see --goal).")
    assert json.loads(run.search_file.read_text())["forgotten"]["row"] == passed.row_id
    chosen = best_of(run, run.events.rows(split="validation"))
    assert chosen is not None
    assert chosen.row_id == best.row_id
    with pytest.raises(InputError, match="was begun with --goal general"):
        check_request(replace(asked, resume=True, goal="task"))


@pytest.mark.slow
def test_what_forgot_is_exported_as_far_on_the_way_as_it_does_not(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Students lose a nat more beyond a quarter of the way. The row of the quarter can be made again, and exported."""
    monkeypatch.setattr(forgetting, "_entropy", lambda data: math.inf)
    real, read = Gate._scores, []

    def worse(gate: Gate, row: Row, text: Any) -> Any:
        found = real(gate, row, text)
        assert found is not None
        if row.kind in DISTILLED:
            read.append(row.interpolation)
        gone = row.kind in DISTILLED and (row.interpolation or 1.0) > 0.3
        return replace(found, nll=found.nll + 1.0) if gone else found

    monkeypatch.setattr(Gate, "_scores", worse)
    asked = request(inputs, tmp_path)
    outcome = search(asked)
    assert read[:4] == [None, 0.5, 0.25, 0.375]
    best = outcome.finish.best
    assert (best.kind, best.interpolation, best.trial) == ("student", 0.25, "t000w25")
    passed = next(row for row in outcome.rows if row.trial == "t000")
    assert (passed.feasible, passed.reason) == (False, FORGOT)
    assert best.train_tokens == passed.train_tokens
    run = RunFolder.open(tmp_path, "run")
    ends, part = (load_file(run.checkpoints / name / "student" / "model.safetensors") for name in ("t000", "t000w25"))
    # The weights are interpolated: a quarter of the way, they differ from the fully trained weights.
    assert max(float(np.abs(ends[name] - part[name]).max()) for name in ends) > 0
    on_test = next(row for row in outcome.finish.test if row.trial == best.trial)
    assert on_test.interpolation == 0.25
    note = next(note for note in outcome.document["notes"] if "general text" in note)
    assert "its weights lie 25% of the way from where its training began to its end, since on general text" in note
    assert "nothing was forgotten" in note
    assert "Its weights lie 25% of the way" in (run.student("gguf") / "README.md").read_text()
    assert (
        remake(run, best_of(run, run.events.rows(split="validation")) or best, inputs / "cache").verdict == "identical"
    )
    # If its files are gone, the student is made anew but not evaluated again.
    shutil.rmtree(run.checkpoints / "t000w25")
    again = search(replace(asked, resume=True)).finish
    assert (again.best.row_id, again.best.accuracy) == (best.row_id, best.accuracy)
    made = load_file(run.checkpoints / "t000w25" / "student" / "model.safetensors")
    assert all(np.array_equal(made[name], part[name]) for name in part)


@pytest.mark.slow
def test_a_teacher_that_knows_no_text_has_nothing_to_forget_and_that_is_said(inputs: Path, tmp_path: Path) -> None:
    outcome = search(request(inputs, tmp_path))
    assert outcome.finish.best.kind in DISTILLED
    assert outcome.finish.forgotten is None
    assert any("is not known: the teacher itself knows none" in note for note in outcome.document["notes"])


def test_by_default_the_goal_is_general_but_for_a_task(inputs: Path, tmp_path: Path) -> None:
    asked = request(inputs, tmp_path)
    assert check_request(asked).goal == "general"
    assert check_request(replace(asked, goal="task")).goal == "task"
    with pytest.raises(InputError, match="--goal"):
        request(inputs, tmp_path, goal="both")


def _gate(goal: str, students_only: bool = False) -> Gate:
    question = SimpleNamespace(goal=goal, students_only=students_only, metric="accuracy", direction="max")
    return Gate(cast(Finisher, SimpleNamespace(question=question, line=lambda text: None)))


def test_the_task_alone_or_students_alone_hold_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _gate("general").holds
    assert not _gate("task").holds
    assert not _gate("general", students_only=True).holds
    found = Forgotten(
        row="t000-q",
        untrained="teacher-q",
        loss=3.3,
        untrained_loss=3.1,
        difference=0.2,
        stderr=0.05,
        kl=0.3,
        untrained_kl=0.1,
        text="a text",
        tokens=1000,
        documents=12,
    )
    monkeypatch.setattr(Gate, "forgotten", lambda self, row, rows: found)
    row = cast(Any, SimpleNamespace(kind="student", name="t000", interpolation=None))
    for gate, said in ((_gate("task"), "--goal task"), (_gate("general", students_only=True), "--students-only")):
        assert gate.refused_with(row, [row]) == []
        (note,) = gate.notes(row, [row])[1]
        assert note.endswith(f"training made it forget (+0.2000 ± 0.0500), which {said} allows")


def test_two_standard_errors_are_no_difference() -> None:
    found = Forgotten(
        row="a",
        untrained="b",
        loss=3.2,
        untrained_loss=3.1,
        difference=0.1,
        stderr=0.05,
        kl=0.2,
        untrained_kl=0.1,
        text="a text",
        tokens=1000,
        documents=12,
    )
    assert not found.worse
    assert "nothing was forgotten (+0.1000 ± 0.0500)" in found.describe("it")
    assert replace(found, stderr=0.049).worse

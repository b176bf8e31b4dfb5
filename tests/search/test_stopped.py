"""A search that is stopped exports the best it has, keeps the test split closed, and goes on as it was."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from gguf import GGUFReader

from autodistill.errors import InterruptedSearchError, VerificationError
from autodistill.estimates.serving_memory import memory
from autodistill.export.record import repeat
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.runs.results.beginnings import worsened
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.finish.export_run import export_run
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import Outcome, search
from autodistill.search.worker.attempt import Assignment
from autodistill.strategy.space import load_space
from tests.search.small_search import SPACE, small_inputs, small_request
from tests.search.test_kill import ROOT, start, wait_for


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_inputs(tmp_path_factory.mktemp("inputs"))


request = partial(small_request, trials=2)


class Killed(BaseException):
    """Nothing in a search catches it, as if the process were killed."""


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C once `count` pieces of work have ended."""
    reports, report = [], Campaign.report

    def reported(self: Campaign, assignment: Assignment, found: Any) -> None:
        report(self, assignment, found)
        reports.append(assignment)
        if len(reports) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Campaign, "report", reported)


def stopped(asked: SearchRequest) -> str:
    with pytest.raises(InterruptedSearchError) as caught:
        search(asked)
    return str(caught.value)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder.open(out, "run").events.read() if event["event"] == kind]


def figures(outcome: Outcome) -> dict[str, tuple[Any, ...]]:
    """Return the figures of all rows except untrained students, which are read for whatever was best at some moment."""
    rows = [row for row in outcome.rows if row.kind != "initial"]
    return {row.row_id: (row.accuracy, row.perplexity, row.train_tokens, row.feasible) for row in rows}


@pytest.mark.slow
def test_what_is_stopped_exports_its_best_row_verified_and_goes_on_as_it_was(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(request(inputs, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        said = stopped(request(inputs, tmp_path / "cut"))
    run = RunFolder.open(tmp_path / "cut", "run")
    rows = run.events.rows(split="validation")
    assert any(row.full and row.kind in DISTILLED for row in rows), "a student was trained to the end"
    best = best_of(run, rows)
    assert best is not None
    assert f"the best so far, {named(best)} (" in said
    assert f"is exported and verified: {run.student('gguf') / 'student.gguf'}" in said
    assert "To go on: autodistill search --resume" in said
    assert GGUFReader(run.student("gguf") / "student.gguf").tensors
    assert (run.student("gguf") / "README.md").exists()
    assert run.leaderboard_file.exists()
    assert "seconds" not in json.loads(run.search_file.read_text()), "it has not finished"
    assert not events(tmp_path / "cut", "test")
    assert not (tmp_path / "cut" / "test_openings.jsonl").exists()
    resumed = search(request(inputs, tmp_path / "cut", resume=True))
    assert figures(resumed) == figures(whole)
    assert resumed.finish.best.row_id == whole.finish.best.row_id
    assert resumed.finish.test


@pytest.mark.parametrize("place", ["search.prepare_trials", "workplace.run_inline"])
def test_before_anything_is_trained_the_untrained_row_is_exported(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"autodistill.search.{place}", interrupt)
    said = stopped(request(inputs, tmp_path))
    assert "the best so far, the teacher itself as gguf-q8_0" in said
    assert (tmp_path / "run" / "student" / "gguf" / "student.gguf").exists()


def test_where_only_students_are_asked_for_and_there_is_none_it_says_so(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autodistill.search.workplace.run_inline", interrupt)
    said = stopped(request(inputs, tmp_path, students_only=True))
    assert said.startswith("stopped; nothing so far may be exported; every finished trial is kept")
    assert not (tmp_path / "run" / "student" / "gguf").exists()


@pytest.mark.slow
def test_a_second_one_stops_at_once_and_what_cannot_be_exported_is_said(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: BaseException) -> Callable[..., None]:
        def export(*given: object) -> None:
            raise error

        return export

    for error, expected in (
        (KeyboardInterrupt(), "stopped; every finished trial is kept"),
        (VerificationError("bytes differ"), "stopped; the best so far could not be exported (bytes differ); every"),
    ):
        with monkeypatch.context() as patch:
            interrupted_after(1, patch)
            patch.setattr("autodistill.search.finish.finish.export_row", failing(error))
            assert stopped(request(inputs, tmp_path, resume=(tmp_path / "run").exists())).startswith(expected)
    assert search(request(inputs, tmp_path, resume=True)).finish.best.feasible


def test_a_row_on_disk_is_exported_by_name_though_the_search_was_killed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*given: object) -> None:
        raise Killed

    monkeypatch.setattr("autodistill.search.workplace.run_inline", kill)
    with pytest.raises(Killed):
        search(request(inputs, tmp_path))
    run = RunFolder.open(tmp_path, "run")
    paths = export_run(run, None, ["gguf"], tmp_path / "out")
    assert GGUFReader(paths["gguf"]).tensors


def killed_at(place: str, asked: SearchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a search that ends silently when it calls a function."""

    def kill(*given: object, **more: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"autodistill.search.finish.{place}", kill)
        with pytest.raises(Killed):
            search(asked)


@pytest.mark.slow
def test_what_was_exported_before_the_end_was_cut_off_is_kept_if_nothing_of_it_has_changed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(request(inputs, tmp_path / "whole", trials=1))
    out = tmp_path / "cut"
    killed_at("finish.score_on_test", request(inputs, out, trials=1), monkeypatch)
    folders = [out / "run" / "student" / name for name in ("gguf", "huggingface")]
    file = folders[0] / "student.gguf"
    written = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    for folder in folders:
        record = json.loads((folder / "export.json").read_text())
        assert record["weights"]["tensors"] > 0, "they were held to the student's"
        assert (record["proof"] is None) == (folder.name == "huggingface")
    killed_at("finish.score_on_test", request(inputs, out, trials=1, resume=True), monkeypatch)
    resumed = search(request(inputs, out, trials=1, resume=True))
    kept = {path for path, when in written.items() if path.stat().st_mtime_ns == when}
    told = {"README.md", "export.json", "Modelfile", "serve.json", "proof.npz"}
    assert {path.name for path in set(written) - kept} == told
    assert file in kept
    assert figures(resumed) == figures(whole)
    assert resumed.finish.checks["gguf"].agreement == whole.finish.checks["gguf"].agreement
    assert "| test |" in (folders[0] / "README.md").read_text()
    assert repeat(folders[0], threads=1).check is not None
    # A single changed bit makes the search write the file again.
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    again = search(request(inputs, out, trials=1, resume=True))
    assert file.read_bytes() != bytes(damaged)
    assert again.finish.checks["gguf"].positions == whole.finish.checks["gguf"].positions
    repeat(folders[0], threads=1)


def test_a_file_that_is_written_over_another_one_is_not_told_of_by_what_was_found_of_that(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        stopped(request(inputs, tmp_path))
    run = RunFolder.open(tmp_path, "run")
    folder = run.student("gguf")
    assert {"export.json", "proof.npz", "README.md"} <= {path.name for path in folder.iterdir()}
    proof = json.loads((folder / "export.json").read_text())["proof"]
    assert abs(proof["excess"]) < 0.01
    assert 0 < proof["same_written"] <= 64
    # This is as if the trial had been trained to other weights since: the file there is no longer its student.
    monkeypatch.setattr("autodistill.search.finish.exported_row.verify", Mock(side_effect=VerificationError("differs")))
    killed_at("export_row.compare", request(inputs, tmp_path, resume=True), monkeypatch)
    assert {path.name for path in folder.iterdir()} == {"student.gguf", "Modelfile", "serve.json"}


def test_a_student_that_its_training_ruined_is_not_what_is_exported(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its untrained state is evaluated first, even if the search is stopped. The teacher itself does not fit."""
    (tmp_path / "ruin.yaml").write_text(SPACE.replace("low: 1e-3, high: 3e-3", "low: 1e-2, high: 3e-2"))
    spec = spec_from_config(json.loads((inputs / "teacher" / "config.json").read_text()))
    q8 = load_space(tmp_path / "ruin.yaml").deployments[0]
    budget = Budget(memory_bytes=memory(spec, q8, context=256, batch=1).total_bytes - 1, context=256)
    interrupted_after(1, monkeypatch)
    said = stopped(request(inputs, tmp_path, budget=budget, space=str(tmp_path / "ruin.yaml"), metric="kl"))
    run = RunFolder.open(tmp_path, "run")
    rows = run.events.rows(split="validation")
    (ruined,) = [row for row, _ in worsened(rows, "kl", "min")]
    best = best_of(run, rows)
    assert best is not None
    assert (best.kind, best.trial) == ("initial", f"{ruined.trial}i")
    assert f"the best so far, untrained {ruined.trial}" in said
    assert (run.student("gguf") / "student.gguf").exists()


# The command runs in a process that leaves out the steps that searches of other tests here leave out too.
COMMAND = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from autodistill.cli.app import main
from tests.search.conftest import untimed
with untimed():
    sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("runner", ["inline", "ray"])
def test_the_command_ends_with_a_student_and_the_code_of_its_signal(
    inputs: Path, tmp_path: Path, number: signal.Signals, code: int, runner: str
) -> None:
    words = [
        "search",
        "--budget",
        "16GB",
        "--context",
        "256",
        "--space",
        str(inputs / "small.yaml"),
        "--runner",
        runner,
    ]
    words += [
        "--teacher",
        str(inputs / "teacher"),
        "--data",
        str(inputs / "text"),
        "--trials",
        "3",
        "--tokens",
        "23040",
    ]
    process = start([sys.executable, "-c", COMMAND, *words, "--name", "run", "--json"], tmp_path)
    out = tmp_path / "results" / "runs"
    wait_for(process, lambda: (out / "run" / "search.json").exists() and bool(events(out, "trial")))
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors.decode()
    document = json.loads(output)
    assert document["exit_code"] == code
    assert "is exported and verified" in document["error"]
    assert "Traceback" not in errors.decode()
    assert (out / "run" / "student" / "gguf" / "student.gguf").exists()

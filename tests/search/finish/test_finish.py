"""What may be exported, and in which order: never what was not measured, whichever way the metric is better."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.errors import InputError, MissingDependencyError, RuntimeDiffersError, VerificationError
from autodistill.evaluation.base import Direction, Measurement
from autodistill.export.base import Artifact
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.runs.events import RowAdded, RowTested, TrialEnded, of_kind, rows_of
from autodistill.runs.results.row import DAMAGED, DIFFERS, RUNTIME_LOSS, Row, Status
from autodistill.runs.results.selection import in_order
from autodistill.runs.test_split_ledger import recorded_test_openings
from autodistill.search.campaign.state import Question
from autodistill.search.finish import test_split
from autodistill.search.finish.export_choice import candidates, next_candidate, passed_over, trained_rows
from autodistill.search.finish.export_row import with_measured
from autodistill.search.finish.exported_row import ExportedRow
from autodistill.search.finish.finish import _first_that_fits, _gguf_beside, _leave_out_removed, export_best
from autodistill.search.finish.forgetting import Gate
from autodistill.search.finish.notes import notes_on, nothing_fits
from autodistill.search.finish.test_split import (
    best_untrained,
    compared_with,
    gains_on_test,
    known_on_test,
    on_test,
    score_on_test,
    spent,
)
from autodistill.search.planning.durations import Speed
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import load_space
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
FORMATS = {
    "f16": {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0},
    "q8_0": {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32},
    "vllm": {"runtime": "vllm", "format": "huggingface", "bits": 16, "group_size": 0},
}

UNDIVIDED = SimpleNamespace(teacher_spec=None, divided=1)


def question(metric: str, direction: Direction) -> Question:
    space = load_space("declared")
    return Question(
        space=space,
        deployments=space.deployments,
        budget=Budget(memory_bytes=10**9),
        plan=small_plan(),
        speed=Speed(cache=1.0, score=1.0, worker_train=1.0, worker_score=1.0),
        teacher_spec=spec_from_config(CONFIG),
        teacher_accuracy=0.5,
        metric=metric,
        direction=direction,
    )


def row(trial: str, metric: str, value: float | None, packing: str = "f16", **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": f"{trial}-{packing}",
        "trial": trial,
        "kind": "student",
        "name": trial,
        "deployment": FORMATS[packing],
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "fidelity": 1.0,
        "memory_bytes": 100,
        "seed": 0,
        metric: value,
    }
    return Row.from_json(least | fields)


@pytest.mark.parametrize(("metric", "direction"), [("accuracy", "max"), ("perplexity", "min")])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_never_exported(metric: str, direction: Direction, missing: float | None) -> None:
    rows = [row("t000", metric, 0.5), row("t001", metric, missing), row("t002", metric, 0.4)]
    found = in_order(trained_rows(rows, metric, lambda _: True), metric, direction, students_only=True)
    assert [one.trial for one in found] == (["t000", "t002"] if direction == "max" else ["t002", "t000"])
    assert trained_rows(rows[1:2], metric, lambda _: True) == []
    assert in_order(rows[1:2], metric, direction, students_only=True) == []


def test_only_students_at_full_fidelity_that_are_on_disk_and_fit() -> None:
    rows = [
        row("gone", "accuracy", 0.9),
        row("early", "accuracy", 0.9, fidelity=0.5),
        row("teacher", "accuracy", 0.9, kind="teacher"),
        row("over", "accuracy", 0.9, feasible=False),
        row("b000", "accuracy", 0.3, kind="baseline"),
    ]
    students = trained_rows(rows, "accuracy", lambda one: one.trial != "gone")
    assert [one.trial for one in students] == ["over", "b000"]
    assert [one.trial for one in in_order(students, "accuracy", "max", students_only=True)] == ["b000"]


def test_where_none_that_reached_the_end_fits_those_that_came_furthest_are_exported() -> None:
    rows = [
        row("t000", "accuracy", 0.9, fidelity=1 / 9),
        row("t001", "accuracy", 0.3, fidelity=1 / 3),
        row("t002", "accuracy", 0.4, fidelity=1 / 3),
        row("t003", "accuracy", 0.5, fidelity=1 / 3, feasible=False),
        row("gone", "accuracy", 0.6, fidelity=1 / 3),
        row("t004", "accuracy", None, fidelity=1 / 3),
        row("over", "accuracy", 0.9, feasible=False),
        row("teacher", "accuracy", 0.9, kind="teacher", fidelity=None),
    ]

    def found(rows: list[Row]) -> list[str]:
        students = candidates(rows, "accuracy", lambda one: one.trial != "gone")
        others = [one for one in rows if one.kind == "teacher"]
        return [one.trial for one in in_order([*students, *others], "accuracy", "max", students_only=True)]

    assert found(rows) == ["t002", "t001", "t000"]
    assert found([*rows, row("b000", "accuracy", 0.1, kind="baseline")]) == ["b000"]
    assert found(rows[-2:]) == []


def measured(one: Row, more: int) -> Row:
    """Return the row with a measured memory that exceeds the prediction by `more` bytes."""
    other = {**one.other, "memory_bytes_predicted": one.memory_bytes}
    need = (one.memory_bytes or 0) + more
    return replace(one, memory_bytes=need, memory_source="measured", other=other, feasible=need <= LIMIT)


LIMIT = 1000


def test_a_row_that_would_break_the_limit_as_those_before_it_did_is_passed_over() -> None:
    ranked = [
        row("t000", "accuracy", 0.5, memory_bytes=990),
        row("t001", "accuracy", 0.4, memory_bytes=960),
        row("t002", "accuracy", 0.3, memory_bytes=949),
        row("t003", "accuracy", 0.2, memory_bytes=980, deployment=FORMATS["vllm"]),
    ]
    asked = replace(question("accuracy", "max"), budget=Budget(memory_bytes=LIMIT))
    assert next_candidate(ranked, [], asked) == ranked[0]
    # In llama.cpp it took 50 bytes more than predicted, so t001 would need 1,010 bytes, and t002 999.
    rejected = [measured(ranked[0], 50)]
    assert next_candidate(ranked, rejected, asked) == ranked[2]
    rejected.append(measured(ranked[2], 60))
    (over,) = passed_over(ranked, rejected[:1], LIMIT)
    assert (over.trial, over.feasible, over.memory_bytes) == ("t001", False, 960)
    assert over.reason == (
        "memory: 960 bytes predicted, 1010 with the excess that llama.cpp showed for another student, 10 over the "
        "budget of 1000"
    )
    # Memory in llama.cpp says nothing about another runtime.
    assert next_candidate(ranked, rejected, asked) == ranked[3]
    rejected.append(measured(ranked[3], 21))
    assert next_candidate(ranked, rejected, asked) is None
    # A row that was measured itself is not predicted.
    known = measured(row("t004", "accuracy", 0.1, memory_bytes=900), 90)
    assert next_candidate([*ranked, known], rejected, asked) == known


def test_what_does_not_fit_once_measured_is_not_left_to_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of five students takes 50 bytes more than predicted. Only the fifth fits; it is made second."""
    students = [row(f"t{number:03d}", "accuracy", 0.5 - number / 10, memory_bytes=960) for number in range(4)]
    students.append(row("t004", "accuracy", 0.05, memory_bytes=940))
    made, lines = [], []

    def export(one: Row, _: object) -> ExportedRow:
        made.append(one.trial)
        folder = tmp_path / "gguf"
        folder.mkdir()
        return ExportedRow(row=measured(one, 50), deployment=one.deployment, path=folder / "student.gguf")

    monkeypatch.setattr("autodistill.search.finish.finish.export_row", export)
    monkeypatch.setattr("autodistill.search.finish.finish.with_runtime_loss", lambda row, finisher: row)
    finisher = SimpleNamespace(
        write=lambda row: None,
        question=replace(question("accuracy", "max"), budget=Budget(memory_bytes=LIMIT)),
        run=SimpleNamespace(student=lambda container: tmp_path / container),
        line=lines.append,
        whole=lambda row: True,
    )
    found, rejected = _first_that_fits(students, [], finisher, Gate(finisher), [])  # type: ignore[arg-type]
    assert (found and found.row.trial, made, [one.trial for one in rejected]) == ("t004", ["t000", "t004"], ["t000"])
    assert len(lines) == 1
    assert (tmp_path / "gguf").is_dir()
    (tmp_path / "gguf").rmdir()
    written: list[Row] = []
    made.clear()
    finisher.whole, finisher.write = (lambda row: row.trial != "t004"), written.append
    assert _first_that_fits(students, [], finisher, Gate(finisher), [])[0] is None  # type: ignore[arg-type]
    assert "t004" not in made
    assert [(row.trial, row.feasible, row.reason) for row in written] == [("t004", False, DAMAGED)]
    finisher.whole = lambda row: True
    assert _first_that_fits(students[:4], [], finisher, Gate(finisher), [])[0] is None  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [InputError("no such cut"), VerificationError("another weight")])
def test_a_gguf_file_that_fails_does_not_end_what_has_a_verified_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    folder = tmp_path / "gguf"
    finisher = SimpleNamespace(
        question=question("accuracy", "max"),
        run=SimpleNamespace(student=lambda name: folder),
        whole=lambda row: True,
        write=lambda row: None,
        line=lambda text: None,
    )

    def export(row: Row, finisher: object) -> Row:
        folder.mkdir()
        raise failure

    monkeypatch.setattr("autodistill.search.finish.finish.with_runtime_loss", lambda row, finisher: row)
    monkeypatch.setattr("autodistill.search.finish.finish.export_row", export)
    beside, notes = _gguf_beside([row("t000", "accuracy", 0.5)], [], finisher, Gate(finisher))  # type: ignore[arg-type]
    assert beside is None
    assert notes == (f"t000 as gguf-f16 is passed over: {failure}",)
    assert not folder.exists()


def read(one: Row, *losses: float) -> Row:
    """Return a row that its runtime has read: nats of three documents of ten tokens."""
    sums = [10 * loss for loss in (losses * 3)[:3]]
    by_document = {"ids": [0, 1, 2], "count": [10, 10, 10], "sum": sums, "unit": "nats"}
    kept = {"ids": [0], "count": [1], "sum": [1], "others": {RUNTIME_LOSS: by_document}}
    return replace(one, other={**one.other, RUNTIME_LOSS: sum(sums) / 30}, documents=kept)


class Runtimes:
    """Stands for packing and running: what each row loses in its runtime, or how that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, **found: Any) -> None:
        self.found, self.asked, self.written, self.lines = found, list[str](), list[Row](), list[str]()
        module = "autodistill.search.finish.finish"
        for name in ("with_runtime_loss", "export_row", "pack", "plain_rows"):
            monkeypatch.setattr(f"{module}.{name}", getattr(self, f"_{name}"))
        self.finisher: Any = SimpleNamespace(
            question=question("accuracy", "max"),
            run=SimpleNamespace(student=lambda name: folder, events=SimpleNamespace(rows=list)),
            whole=lambda row: True,
            write=self.written.append,
            line=self.lines.append,
        )

    def _with_runtime_loss(self, one: Row, _: object) -> Row:
        self.asked.append(one.trial)
        found = self.found[one.trial]
        if isinstance(found, Exception):
            raise found
        return read(one, *found)

    def _export_row(self, one: Row, _: object) -> ExportedRow:
        if isinstance(found := self.found[one.trial], Exception):
            raise found
        return ExportedRow(row=one, deployment=one.deployment, path=Path("student.gguf"))

    def _plain_rows(self, rows: object, _: object) -> list[Row]:
        return [row("plain", "accuracy", 0.1, kind="teacher")] if "plain" in self.found else []

    def _pack(self, one: Row, *_: object) -> tuple[Artifact, None]:
        return Artifact(path=Path("student.gguf"), size_bytes=1), None

    def export(self, rows: list[Row]) -> tuple[str, str]:
        """Return the trial that is exported, and "proven" or "not proven"."""
        exported, *_ = export_best(rows, self.finisher, Gate(self.finisher))
        assert exported is not None
        unproven = any("without proof" in line for line in self.lines)
        return exported.row.trial, "not proven" if unproven else "proven"


def two_and_teacher() -> list[Row]:
    """Return two students and the teacher, in the order in which torch ranks them."""
    students = [row("t000", "accuracy", 0.5), row("t001", "accuracy", 0.4)]
    return [*students, row("teacher", "accuracy", 0.3, kind="teacher", memory_bytes=90)]


def test_the_loss_in_the_runtime_decides_and_of_equal_ones_the_smallest(monkeypatch, tmp_path) -> None:
    """Torch prefers the student; the runtime loses more of it than of the teacher."""
    worse = Runtimes(monkeypatch, tmp_path, t000=(3.0,), teacher=(2.0,))
    assert worse.export(two_and_teacher()) == ("teacher", "proven")
    assert worse.asked == ["teacher", "t000"]  # not the second student
    better = Runtimes(monkeypatch, tmp_path, t000=(2.0,), teacher=(3.0,))
    assert better.export(two_and_teacher()) == ("t000", "proven")
    # By document .02 less, -.01 more: within one standard error.
    level = Runtimes(monkeypatch, tmp_path, t000=(2.0, 2.0, 2.0), teacher=(2.04, 1.98, 2.01))
    assert level.export(two_and_teacher()) == ("teacher", "proven")


def test_another_metric_than_accuracy_and_perplexity_has_the_last_word(monkeypatch, tmp_path) -> None:
    made = Runtimes(monkeypatch, tmp_path, t000=(3.0,), teacher=(2.0,))
    made.finisher.question = question("agreement", "max")
    rows = [row("t000", "agreement", 0.5), row("teacher", "agreement", 0.3, kind="teacher")]
    assert made.export(rows) == ("t000", "proven")
    assert made.asked == []


@pytest.mark.parametrize("failure", [RuntimeDiffersError("half"), VerificationError("llama.cpp died")])
def test_what_a_runtime_refuses_is_followed_by_the_next_then_by_plain_types(monkeypatch, tmp_path, failure) -> None:
    made = Runtimes(monkeypatch, tmp_path, t000=failure, t001=(2.0,), teacher=failure)
    assert made.export(two_and_teacher()) == ("t001", "proven")
    refused = {one.trial for one in made.written if one.reason == DIFFERS and not one.feasible}
    assert refused == {"t000", "teacher"}
    assert [line for line in made.lines if str(failure) in line]
    made = Runtimes(monkeypatch, tmp_path, t000=failure, t001=failure, teacher=failure, plain=(2.5,))
    assert made.export(two_and_teacher()) == ("plain", "proven")


@pytest.mark.parametrize(
    ("failure", "exported"),
    [
        (VerificationError("llama.cpp died"), "t000"),
        (MissingDependencyError("install it"), "t000"),
        (RuntimeDiffersError("half"), "teacher"),
    ],
)
def test_without_any_proof_the_best_is_exported_whose_runtime_only_did_not_answer(
    monkeypatch, tmp_path, failure, exported
) -> None:
    """What a runtime computes plainly wrong is left for a row that needs no training."""
    made = Runtimes(monkeypatch, tmp_path, t000=failure, t001=failure, teacher=failure, plain=failure)
    assert made.export(two_and_teacher()) == (exported, "not proven")
    assert [one.trial for one in made.written if one.feasible][-1] == exported
    assert isinstance(failure, MissingDependencyError) == ("plain" not in {one.trial for one in made.written})


def test_what_was_predicted_stays_beside_a_measurement_that_is_made_again() -> None:
    finisher = SimpleNamespace(question=question("accuracy", "max"))
    once, twice = (
        {"memory_bytes": Measurement(name="memory_bytes", value=need, unit="bytes", direction="min", source="measured")}
        for need in (150, 155)
    )
    first = with_measured(row("t000", "accuracy", 0.5), once, finisher)  # type: ignore[arg-type]
    again = with_measured(first, twice, finisher)  # type: ignore[arg-type]
    assert (first.figure("memory_bytes_predicted"), first.memory_bytes) == (100, 150)
    assert (again.figure("memory_bytes_predicted"), again.memory_bytes) == (100, 155)


@pytest.mark.parametrize(("on_gpu", "before"), [(True, {}), (False, {"memory_on": "discrete-gpu"})])
def test_a_measurement_says_whose_memory_it_is_of_and_what_was_predicted_there(
    on_gpu: bool, before: dict[str, str]
) -> None:
    finisher = SimpleNamespace(question=question("accuracy", "max"))
    detail = {"on_gpu": on_gpu, "predicted_bytes": 140}
    made = {"name": "memory_bytes", "value": 150, "unit": "bytes", "direction": "min", "source": "measured"}
    measured = {"memory_bytes": Measurement(**made, detail=detail)}  # type: ignore[arg-type]
    found = with_measured(row("t000", "accuracy", 0.5, other=before), measured, finisher)  # type: ignore[arg-type]
    assert (found.memory_bytes, found.figure("memory_bytes_predicted")) == (150, 140)
    assert found.other.get("memory_on") == ("discrete-gpu" if on_gpu else None)


def test_rows_whose_student_is_gone_are_not_chosen_by_who_reads_the_log() -> None:
    rows = [
        row("t000", "accuracy", 0.9),
        row("t001", "accuracy", 0.8, packing="q8_0"),
        row("t002", "accuracy", 0.7),
        row("t003", "accuracy", 0.6),
        row("early", "accuracy", 0.95, fidelity=0.5),
        row("t004", "accuracy", 0.99, feasible=False),
    ]
    events = [RowAdded(row=one) for one in rows]
    finisher: Any = SimpleNamespace(
        question=question("accuracy", "max"),
        run=SimpleNamespace(events=SimpleNamespace(rows=lambda: rows_of(events))),
        has=lambda one: one.trial in ("t000", "t002"),
        write=lambda one: events.append(RowAdded(row=one)),
    )
    _leave_out_removed(rows[0], finisher)
    assert len(events) == len(rows)
    _leave_out_removed(rows[2], finisher)
    (written,) = rows_of(events[len(rows) :])
    assert (written.trial, written.feasible, written.accuracy) == ("t001", False, 0.8)
    assert "removed" in str(written.reason)
    # In the log that is left, the exported t002 comes right after t000, which still exists and ranks higher.
    assert [one.trial for one in in_order(rows_of(events), "accuracy", "max", students_only=True)][:2] == [
        "t000",
        "t002",
    ]


def test_rows_on_test_are_taken_from_the_log_where_they_are_of_all_that_would_be_scored() -> None:
    strategy, other = ({"init": {"depth": depth}} for depth in (0.8, 0.7))
    best = row("t000", "accuracy", 0.5, "q8_0", strategy=strategy, train_tokens=100)
    baseline = row("b000", "accuracy", 0.4, kind="baseline", strategy=other, train_tokens=100)
    compared = [(baseline, baseline.deployment)]
    plain = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
    expected = [
        row("teacher", "accuracy", 0.6, kind="teacher", deployment=plain, row_id="teacher-huggingface", train_tokens=0),
        row("teacher", "accuracy", 0.6, "q8_0", kind="teacher", train_tokens=0),
        row("initial", "accuracy", 0.1, "q8_0", kind="initial", strategy=strategy, train_tokens=0),
        best,
        baseline,
    ]
    expected = [replace(one, split="test", row_id=f"{one.row_id}-test") for one in expected]

    def known(rows: list[Row], of: Row = best, untrained: Row | None = None) -> tuple[Row, ...] | None:
        events = [RowTested(row=one) for one in rows]
        finisher: Any = SimpleNamespace(
            run=SimpleNamespace(events=SimpleNamespace(rows=lambda kind: rows_of(events, [kind]))), setting=UNDIVIDED
        )
        return known_on_test(of, untrained, compared, finisher)

    assert known(expected) == tuple(expected)
    # Other rows scored in between do not matter.
    assert known([*expected, replace(expected[3], trial="t001", row_id="t001-q8_0-test")]) == tuple(expected)
    for missing in range(5):
        assert known(expected[:missing] + expected[missing + 1 :]) is None, "that opening was killed"
    assert known(expected, of=replace(best, deployment=Deployment.from_json(FORMATS["f16"]))) is None
    assert known(expected, of=replace(best, trial="t001")) is None
    assert known(expected, of=replace(best, train_tokens=200)) is None, "it was trained on since"
    untouched = (*expected[:3], replace(expected[3], train_tokens=0), expected[4])
    assert known(list(untouched), of=replace(best, train_tokens=None)) == untouched, "no tokens are none"
    assert known(expected, of=replace(best, strategy=Strategy.from_json(other))) is None
    beside = replace(expected[1], split="validation", row_id="teacher-gguf-q8_0")
    assert known(expected, untrained=beside) == tuple(expected), "it is scored as the teacher of that deployment"
    assert known(expected, untrained=replace(beside, deployment=Deployment.from_json(FORMATS["f16"]))) is None
    begun = replace(expected[2], trial="t000i", split="validation", row_id="t000i-gguf-q8_0")
    assert known(expected, untrained=begun) == tuple(expected), "it is the beginning of what is exported"
    assert known(expected, untrained=replace(begun, strategy=Strategy.from_json({"init": {"depth": 0.5}}))) is None
    packed = replace(begun, deployment=Deployment.from_json(FORMATS["f16"]))
    assert known(expected, untrained=packed) is None, "it begins alike, but in another packing"
    without = (*expected[:2], expected[4])
    assert known(list(without), of=beside) == without, "a teacher that is exported has no beginning"


def test_the_best_that_needs_no_training_is_the_best_of_what_fits() -> None:
    finisher: Any = SimpleNamespace(question=question("accuracy", "max"))
    teacher = row("teacher", "accuracy", 0.6, kind="teacher")
    over = row("over", "accuracy", 0.7, "q8_0", kind="teacher", feasible=False)
    begun = row("t000i", "accuracy", 0.2, "q8_0", kind="initial")
    student = row("t000", "accuracy", 0.9)
    assert best_untrained([begun, student, over, teacher], finisher) == teacher
    assert best_untrained([begun, student, over], finisher) == begun
    assert best_untrained([student, over], finisher) is None


def test_an_opening_of_the_test_split_is_recorded_before_anything_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def read(folder: Path, split: str, rendering: str = "") -> None:
        raise Killed

    monkeypatch.setattr(test_split, "load_split", read)
    best = row("t000", "accuracy", 0.5, "q8_0", strategy={"init": {"depth": 0.8}}, train_tokens=100)
    run = SimpleNamespace(path=tmp_path / "run", name="run", events=SimpleNamespace(rows=lambda kind: []))
    data = SimpleNamespace(fingerprint="abc", folder=tmp_path)
    finisher: Any = SimpleNamespace(run=run, data=data, question=question("accuracy", "max"), setting=UNDIVIDED)
    monkeypatch.setattr(test_split, "compared_with", lambda *given: [])
    with pytest.raises(Killed):
        score_on_test(best, None, [best], finisher)
    assert [(one["run"], one["data"]) for one in recorded_test_openings(tmp_path)] == [("run", "abc")]


def test_a_student_that_was_trained_on_is_held_to_the_baseline_by_what_it_was_after_as_many_tokens() -> None:
    """The gain compares equal numbers of tokens: all tokens of the best, if the baseline was trained as far."""
    strategy, b, c, d = ({"init": {"depth": depth}} for depth in (0.8, 0.7, 0.6, 0.5))
    plain = row("t000", "accuracy", 0.5, "q8_0", strategy=strategy, train_tokens=100)
    other = row("t001", "accuracy", 0.6, strategy=b, train_tokens=100)
    best = row("t000x", "accuracy", 0.7, strategy=strategy, train_tokens=400)
    baseline = row("b000", "accuracy", 0.4, kind="baseline", strategy=c, train_tokens=100)
    worse = row("b001", "accuracy", 0.3, kind="baseline", strategy=d, train_tokens=100)
    further = row("b000x", "accuracy", 0.45, kind="baseline", strategy=c, train_tokens=350)
    as_far = replace(further, row_id="far", train_tokens=400)
    finisher = SimpleNamespace(
        question=question("accuracy", "max"), has=lambda row: True, whole=lambda row: row.trial not in damaged
    )
    damaged: list[str] = []

    def compared(*rows: Row, of: Row = best) -> list[tuple[str, str]]:
        return [(one.trial, packing.name) for one, packing in compared_with(of, rows, finisher)]  # type: ignore[arg-type]

    # Both are packed as the best is, although they were not evaluated in that packing so far.
    pair = [("b000", "gguf-f16"), ("t000", "gguf-f16")]
    assert compared(plain, other, best, baseline, worse) == pair
    assert compared(plain, other, best, baseline, further) == pair, "that one has neither as many tokens nor a pair"
    assert compared(plain, other, best, baseline, as_far) == [("b000x", "gguf-f16")]
    assert compared(best, baseline) == [("b000", "gguf-f16")]
    assert compared(plain, best) == []
    assert compared(baseline, further, of=further) == []
    assert compared(plain, other, baseline, of=other) == [("b000", "gguf-f16")]
    assert compared(plain, other, best, baseline, worse, of=other) == [("b000", "gguf-f16")]
    damaged.append("b000")
    assert compared(plain, other, best, baseline, worse, of=other) == [("b001", "gguf-f16")], "the next one is whole"
    damaged.clear()

    def tested(one: Row, right: list[int]) -> Row:
        return replace(one, documents={"ids": [1, 2], "count": [100, 100], "sum": right})

    def over_baseline(rows: list[Row], metric: str = "accuracy", direction: Direction = "max") -> Any:
        return gains_on_test(best, None, rows, metric, direction).baseline

    rows = [tested(best, [70, 72]), tested(baseline, [40, 41]), tested(plain, [50, 50])]
    assert over_baseline(rows).value == pytest.approx(0.095)
    assert over_baseline([rows[0], tested(as_far, [60, 60]), rows[2]]).value == pytest.approx(0.11)
    single = [replace(one, documents={"ids": [1], "count": [100], "sum": [50 + n]}) for n, one in enumerate(rows[:2])]
    one = over_baseline(single)
    assert (one.value, one.stderr) == (pytest.approx(-0.01), None), "of one document nobody knows the error"
    assert over_baseline([rows[0], rows[2]]) is None
    unpaired = over_baseline(rows, "ece", "min")
    assert unpaired.value is None, "these are sums of accuracy, of which fewer are not better"
    assert "unknown" in unpaired.shown()
    # The model that needs no training is compared with the exported student, not with an earlier stage of it.
    teacher = tested(row("teacher", "accuracy", 0.6, kind="teacher"), [60, 62])
    gains = gains_on_test(best, teacher, [*rows, teacher], "accuracy", "max")
    assert gains.untrained is not None
    assert gains.untrained.value == pytest.approx(0.1)
    assert gains.describe().startswith(
        "Gain on test over the best that needs no training (the teacher itself as gguf-f16), paired: +0.1000 ± "
    )
    exported = gains_on_test(teacher, teacher, [*rows, teacher], "accuracy", "max")
    assert exported.untrained is None
    assert exported.describe().startswith("No trained student is better than the teacher itself as gguf-f16")
    assert exported.baseline is not None
    assert exported.baseline.value == pytest.approx(0.205)


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        ("q8_0", "quantising the teacher beats distilling it here: the teacher itself as gguf-q8_0 has accuracy 0.6"),
        ("f16", "the unchanged teacher is better here: the teacher itself as gguf-f16 has accuracy 0.6"),
    ],
)
def test_a_teacher_that_is_not_quantized_is_not_said_to_be(packing: str, said: str) -> None:
    finisher: Any = SimpleNamespace(
        question=question("accuracy", "max"), setting=SimpleNamespace(teacher_spec=spec_from_config(CONFIG))
    )
    best = row("t000", "accuracy", 0.5, memory_source="predicted")
    teacher = row("teacher", "accuracy", 0.6, packing, kind="teacher", fidelity=None)
    (note,) = (note for note in notes_on(best, [best, teacher], finisher) if "has accuracy" in note)
    assert note.startswith(said)


def test_a_gain_over_a_baseline_is_told_where_there_is_one() -> None:
    finisher: Any = SimpleNamespace(
        question=question("accuracy", "max"), setting=SimpleNamespace(teacher_spec=spec_from_config(CONFIG))
    )
    best = row("t000x", "accuracy", 0.5, memory_source="predicted", fidelity=3.0, train_tokens=27_648)
    (note,) = (note for note in notes_on(best, [best], finisher) if "27,648 tokens" in note)
    assert note == "the best student was trained on 27,648 tokens, while a trial has 9,216"
    baseline = row("b000", "accuracy", 0.4, kind="baseline")
    (note,) = (note for note in notes_on(best, [best, baseline], finisher) if "27,648 tokens" in note)
    assert "gain over the baseline" in note


def test_a_search_whose_trainings_all_failed_names_the_failure() -> None:
    events = [TrialEnded(trial="t000", status=Status.FAILED, reason="nan: the loss is not finite")]
    run = SimpleNamespace(events=SimpleNamespace(of=lambda kind: of_kind(events, kind)))
    finisher: Any = SimpleNamespace(question=question("accuracy", "max"), run=run)
    assert "1 training failed, the first by nan: the loss is not finite" in nothing_fits([], False, finisher)
    events.clear()
    assert nothing_fits([], False, finisher).startswith("no training reached a rung")


def test_each_row_on_test_is_of_its_own_model_with_its_own_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that reads or runs a model is replaced by its name, so what goes into each row is told by hand."""
    cut, whole = ({"init": {"depth": depth}} for depth in (0.8, 1.0))
    trained = {"train_tokens": 100, "train_seconds": 7.5}
    best = row("t000", "accuracy", 0.5, "q8_0", strategy=cut, interpolation=0.25, **trained)
    baseline = row("b000", "accuracy", 0.4, kind="baseline", strategy=cut, **trained)
    other = row("t001i", "accuracy", 0.3, kind="initial", strategy=whole)
    as_teacher = replace(other, deployment=Deployment.from_json(FORMATS["q8_0"]))
    split = SimpleNamespace(head=lambda tokens: f"{tokens} tokens of test")
    names = {
        "load_split": lambda folder, name, rendering="": split if name == "test" else None,
        "load_teacher": lambda *given: "teacher",
        "scored_in": lambda *given: nullcontext(),
        "score_teacher": lambda *given, device: ("its scores", "its outputs"),
        "begun": lambda setting, strategy, seed: (f"begun at {strategy.init.depth}", "first scales"),
        "scales_as": lambda scales, strategy, spec, packing: f"{scales} of {spec} as {packing.name}",
        "read_scales": lambda folder, packing: f"scales in {folder} as {packing.name}",
        "compared_with": lambda *given: [(baseline, baseline.deployment)],
    }
    for name, stand_in in names.items():
        monkeypatch.setattr(test_split, name, stand_in)
    calls: list[tuple[Any, ...]] = []
    rows: list[dict[str, Any]] = []

    def evaluate(model: Any, spec: Any, packing: Any, data: Any, reference: Any, init: Any, **more: Any) -> int:
        assert (data, reference, more["split"]) == (f"{plan.test_tokens} tokens of test", "its outputs", "test")
        calls.append((model, spec, packing.name, init and init.depth, more["scales"], more["unpacked"]))
        return len(calls) - 1

    def made(evaluation: int, **fields: Any) -> Row:
        rows.append(fields | {"evaluation": evaluation})
        return row(fields["trial"], "accuracy", 0.5, kind=fields["kind"])

    monkeypatch.setattr(test_split, "make_row", made)
    asked = question("accuracy", "max")
    plan, written = asked.plan, []
    finisher: Any = SimpleNamespace(
        question=asked,
        run=SimpleNamespace(path=tmp_path / "run", name="run", events=SimpleNamespace(rows=lambda kind: [])),
        data=SimpleNamespace(fingerprint="abc", folder=tmp_path),
        teacher=SimpleNamespace(folder=tmp_path),
        setting=SimpleNamespace(
            held_type="float32",
            device="cpu",
            divided=1,
            scoring="float32",
            teacher="the teacher",
            teacher_spec="whole",
            rendering=lambda init: "",
            evaluate=evaluate,
        ),
        spec=lambda strategy: "whole" if strategy is None or strategy.init.depth == 1 else "cut",
        load=lambda one: f"loaded {one.trial}",
        student=lambda one: f"folder {one.trial}",
        write=written.append,
        line=lambda said: None,
    )
    found = score_on_test(best, as_teacher, [best, baseline, as_teacher], finisher)
    assert calls == [
        ("teacher", "whole", "huggingface", None, "scales in the teacher as huggingface", "its scores"),
        ("teacher", "whole", "gguf-q8_0", None, "scales in the teacher as gguf-q8_0", "its scores"),
        ("begun at 0.8", "cut", "gguf-q8_0", 0.8, "first scales of cut as gguf-q8_0", None),
        ("loaded t000", "cut", "gguf-q8_0", 0.8, "scales in folder t000 as gguf-q8_0", None),
        ("loaded b000", "cut", "gguf-f16", 0.8, "scales in folder b000 as gguf-f16", None),
    ]
    told = [(one["trial"], one["kind"], one["evaluation"], one["train_tokens"], one["train_seconds"]) for one in rows]
    assert told == [
        ("teacher", "teacher", 0, 0, 0.0),
        ("teacher", "teacher", 1, 0, 0.0),
        ("initial", "initial", 2, 0, 0.0),
        ("t000", "student", 3, 100, 7.5),
        # It has the teacher's shape and weights, so it is scored as the teacher was.
        ("t001i", "initial", 1, 0, 0.0),
        ("b000", "baseline", 4, 100, 7.5),
    ]
    assert {one["seed"] for one in rows} == {plan.seed}
    assert [one.interpolation for one in found] == [None, None, None, 0.25, None, None]
    assert written == list(found)
    # The same student with a packing in which the teacher is not scored, or with trained codes, is scored by itself.
    for untrained, model in ((other, "begun at 1.0"), (replace(as_teacher, kind="student"), "loaded t001i")):
        calls.clear()
        score_on_test(best, untrained, [best], finisher)
        assert calls[4][0] == model


def test_a_row_is_found_on_test_by_its_model_and_packing() -> None:
    cut, other = ({"init": {"depth": depth}} for depth in (0.8, 0.7))
    test = [
        row("teacher", "accuracy", 0.6, kind="teacher"),
        row("initial", "accuracy", 0.1, "q8_0", kind="initial", strategy=cut),
        row("t000", "accuracy", 0.5, "q8_0", strategy=cut),
        row("t001", "accuracy", 0.4, "q8_0", kind="baseline", strategy=cut),
    ]
    for one in test:
        assert on_test(one, test) is one
        assert on_test(replace(one, deployment=Deployment.from_json(FORMATS["vllm"])), test) is None
    # A student without training is found under another name if it begins alike, and no trained one is.
    assert on_test(replace(test[1], trial="t000i"), test) is test[1]
    assert on_test(replace(test[1], trial="t000i", strategy=Strategy.from_json(other)), test) is None
    assert on_test(replace(test[1], trial="t000i", strategy=None), test) is None
    assert on_test(replace(test[2], trial="t002"), test) is None
    assert on_test(replace(test[2], kind="baseline"), test) is None
    assert on_test(test[0], []) is None


def test_a_run_says_how_often_it_read_the_test_split_before(monkeypatch: pytest.MonkeyPatch) -> None:
    finisher: Any = SimpleNamespace(run="run", data=SimpleNamespace(fingerprint="abc"))
    for opened, said in ((0, None), (1, None), (2, "(1 time)"), (3, "(2 times)")):
        monkeypatch.setattr(test_split, "times_opened", lambda *given, opened=opened: opened)
        assert all(said is not None and said in note for note in spent(finisher))
        assert len(spent(finisher)) == (said is not None)


def test_an_untrained_student_is_the_teacher_if_it_has_its_shape_and_weights() -> None:
    finisher: Any = SimpleNamespace(
        spec=lambda strategy: strategy.shape, setting=SimpleNamespace(teacher_spec="the teacher's")
    )
    whole = {"codes": False, "init": SimpleNamespace(source="teacher"), "shape": "the teacher's"}
    for kind, changes, expected in (
        ("initial", {}, True),
        ("student", {}, False),
        ("initial", {"codes": True}, False),
        ("initial", {"init": SimpleNamespace(source="scratch")}, False),
        ("initial", {"shape": "another"}, False),
    ):
        one: Any = SimpleNamespace(kind=kind, strategy=SimpleNamespace(**whole | changes))
        assert test_split._begins_as_teacher(one, finisher) is expected, (kind, changes)
    nothing: Any = SimpleNamespace(kind="initial", strategy=None)
    assert test_split._begins_as_teacher(nothing, finisher) is False

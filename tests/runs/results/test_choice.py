"""Which row is chosen. All code that names the best student must name the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.export.gguf import GgufExporter
from autodistill.hardware.budget import Budget
from autodistill.runs import report
from autodistill.runs.events import RowAdded
from autodistill.runs.results.beginnings import worsened
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import KIND, chosen, contenders, in_order, students_only
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import leaderboard_of
from autodistill.search.explain import explain
from autodistill.search.finish import export_run
from autodistill.search.finish.export_choice import next_candidate, trained_rows
from autodistill.strategy.space import Space
from autodistill.testing import small_plan
from autodistill.utils.json_files import write_json

PACKINGS: dict[str, dict[str, Any]] = {
    "f16": {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0},
    "q8_0": {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32},
}


SCRATCH = {"init": {"source": "scratch"}, "distillation": {"train_embeddings": True}}


def row(trial: str, accuracy: float, packing: str = "f16", **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": f"{trial}-{packing}",
        "trial": trial,
        "kind": "student",
        "name": trial,
        "deployment": PACKINGS[packing],
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "fidelity": 1.0,
        "accuracy": accuracy,
        "memory_bytes": 100,
        "memory_source": "predicted",
        "seed": 0,
    }
    return Row.from_json(least | fields)


def on_seeds(trial: str, *accuracies: float, **fields: Any) -> list[Row]:
    """Return a student's rows on the search's seed and on further seeds."""
    again = [row(f"{trial}s{seed}", one, kind=KIND, seed=seed) for seed, one in enumerate(accuracies) if seed]
    return [row(trial, accuracies[0], **fields), *again]


def test_without_further_seeds_it_is_the_student_that_ranks_first_beside_the_teacher() -> None:
    teacher = row("teacher", 0.9, kind="teacher")
    rows = [teacher, row("t000", 0.4), row("b000", 0.5, kind="baseline"), row("t001", 0.6, feasible=False)]
    assert [one.trial for one in in_order(rows, "accuracy", "max", students_only=True)] == ["b000", "t000"]
    assert chosen([teacher, rows[3], row("t002", float("nan"))], "accuracy", "max", students_only=True) is None


def test_what_is_best_on_several_seeds_goes_first_in_its_best_deployment() -> None:
    rows = [*on_seeds("t000", 0.60, 0.40), *on_seeds("t001", 0.55, 0.55), row("t001", 0.56, "q8_0")]
    assert [one.row_id for one in in_order(rows, "accuracy", "max", students_only=True)] == [
        "t001-q8_0",
        "t001-f16",
        "t000-f16",
    ]


def test_a_run_of_an_earlier_version_chooses_among_trained_students() -> None:
    assert students_only({}) is True
    assert students_only({"students_only": False}) is False


def test_a_lucky_seed_is_no_row_of_its_own() -> None:
    rows = on_seeds("t000", 0.4, 0.9, 0.3)
    assert contenders([*rows, row("t000", 0.4, split="test")]) == rows[:1]


# The luckiest student on the search's own seed, the best one, and a baseline that was luckier on a further seed.
LUCKY = on_seeds("t001", 0.55, 0.40, 0.41)
BEST = on_seeds("t002", 0.53, 0.52, 0.53)
ROWS = [*LUCKY, *BEST, *on_seeds("b000", 0.30, 0.29, 0.70, kind="baseline")]
SPACE = Space.from_json({"dimensions": {"init.depth": {"low": 0.2, "high": 0.8}}, "deployments": [PACKINGS["f16"]]})


def test_what_breaks_the_budget_once_measured_is_followed_by_what_a_later_reader_of_the_log_would_choose() -> None:
    """It has the second best mean, and is not the luckiest on the search's seed.

    The baseline's mean lies between them.
    """
    rows = [*LUCKY, *BEST, *on_seeds("t003", 0.51, 0.50, 0.51)]
    asked: Any = type("Asked", (), {"metric": "accuracy", "direction": "max", "students_only": False})
    asked.budget = Budget(memory_bytes=1000)
    assert next_candidate(rows, [], asked) == BEST[0]
    over = row("t002", 0.53, memory_bytes=1001, memory_source="measured", feasible=False)
    logged = [over if one.row_id == over.row_id else one for one in rows]
    again = next_candidate(rows, [over], asked)
    assert again is not None
    assert again.trial == "t003"
    assert again == chosen(logged, "accuracy", "max", students_only=True)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    asked = {"name": "run", "plan": small_plan().to_json(), "space_definition": SPACE.to_json(), "metric": "accuracy"}
    with RunFolder.create(tmp_path, "run") as folder:
        named = {name: {"name": name, "reference": name} for name in ("teacher", "data")} | {"licences": {}}
        limits = {"direction": "max", "budget": {"memory_bytes": 200}, "students_only": False}
        write_json(folder.search_file, {**asked, **named, **limits})
        folder.events.append({"event": "trial", "trial": "t000", "point": None})
        for one in ROWS:
            folder.events.append({"event": "row", "row": one.to_json()})
            (folder.checkpoints / one.trial / "student").mkdir(parents=True)
    return folder


def test_all_who_name_the_best_student_name_the_same_one(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Any = type("Asked", (), {"metric": "accuracy", "direction": "max", "students_only": False})
    asked.budget = Budget(memory_bytes=200)
    others = [one for one in ROWS if one.kind == KIND]
    at_the_end = next_candidate([*trained_rows(ROWS, "accuracy", lambda _: True), *others], [], asked)
    assert at_the_end == BEST[0]

    def pack(exporter: object, student: Path, deployment: object, out: Path, **label: object) -> Any:
        out.mkdir(parents=True, exist_ok=True)
        packed.append(student)
        return SimpleNamespace(path=out)

    packed: list[Path] = []
    monkeypatch.setattr(GgufExporter, "export", pack)
    for name in ("verify", "write_record"):
        monkeypatch.setattr(export_run, name, lambda *given: None)
    export_run.export_run(run, None, ["gguf"], tmp_path / "out", verified=False)
    assert [student.parent.name for student in packed] == ["t002"]
    assert explain(run).binding.startswith("The best, t002 as gguf-f16, ")
    report.write_report(run)
    page = (run.path / "report.md").read_text()
    answer = page.split("## Answer")[1].split("##")[0]
    assert "**t002** (student) as gguf-f16: accuracy 0.5300" in answer
    assert "chosen by its mean on 2 seeds" in answer
    assert "not distilled" not in answer
    board, _ = leaderboard_of(run)
    assert [one.row.trial for one in board] == ["t001", "t002", "b000"]


def test_the_page_has_the_means_and_their_differences(run: RunFolder) -> None:
    report.write_report(run)
    page = (run.path / "report.md").read_text()
    table = page.split("## Further seeds")[1].split("\n##")[0]
    # The means are of 0.52 and 0.53, of 0.29 and 0.70, and of 0.40 and 0.41. Their errors are half of each difference,
    # times 1.84 because there are only two values.
    assert "| t002 | t002 | gguf-f16 | 0.5250 ± 0.0092 | +0.0000 ± 0.0000 |" in table
    assert "| t001 | t001 | gguf-f16 | 0.4050 ± 0.0092 | -0.1200 ± 0.0000 |" in table
    assert "seeds 1, 2" in table
    assert "t001s1" not in page


def test_a_teacher_that_is_better_than_the_chosen_student_is_the_answer() -> None:
    """The teacher is worse than the luckiest student's row, which must not be chosen."""
    teacher = row("teacher", 0.54, kind="teacher", fidelity=None)
    rows = [teacher, *ROWS]
    events = [RowAdded(row=one) for one in rows]
    page = report.report_markdown({"name": "run", "students_only": False}, rank(contenders(rows)), events)
    assert "**teacher** (teacher)" in page
    assert "no trained student is better. The first trained student is t002 as gguf-f16, accuracy 0.53" in page
    assert chosen(rows, "accuracy", "max", students_only=False) == teacher
    # If a run asked only for students, or comes from an earlier version, the teacher is named next to the student.
    page = report.report_markdown({"name": "run"}, rank(contenders(rows)), events)
    assert "**t002** (student)" in page
    assert "Better is the teacher itself as gguf-f16, accuracy 0.5400, which needs no training" in page


def begun(trial: str, accuracy: float, **fields: Any) -> Row:
    """Return the row of a trial's student before training."""
    return row(f"{trial}i", accuracy, kind="initial", strategy=HALF, train_tokens=0, fidelity=None, **fields)


HALF = {"init": {"source": "teacher", "depth": 0.5}, "finishing": None}


def test_a_student_below_its_own_beginning_is_passed_over_and_the_beginning_may_be_chosen() -> None:
    rows = [
        row("t000", 0.5, strategy=HALF),
        row("t001", 0.4, strategy=SCRATCH),
        row("teacher", 0.3, kind="teacher", fidelity=None),
    ]

    def order(*more: Row, students_only: bool = False) -> list[str]:
        return [one.trial for one in in_order([*rows, *more], "accuracy", "max", students_only=students_only)]

    assert order() == ["t000", "t001", "teacher"]
    assert order(begun("t000", 0.45)) == ["t000", "t000i", "t001", "teacher"]
    worse = begun("t000", 0.55)
    assert order(worse) == ["t000i", "t001", "teacher"]
    assert order(worse, students_only=True) == ["t000", "t001"]
    assert worsened([*rows, worse], "accuracy", "max") == [(rows[0], worse)]
    assert worsened([*rows, worse], "accuracy", "min") == []
    # A row of another packing or seed does not count.
    for other in (begun("t000", 0.55, packing="q8_0"), begun("t000", 0.55, seed=1)):
        assert worsened([*rows, other], "accuracy", "max") == []
    # This untrained student breaks the budget and cannot be exported. Even so, training made it worse.
    assert order(begun("t000", 0.55, feasible=False)) == ["t001", "teacher"]


def test_a_student_that_begins_as_the_whole_teacher_is_held_to_the_teachers_row() -> None:
    whole = {"init": {"source": "teacher", "depth": 1.0}}
    shape = {"num_hidden_layers": 4}
    student = row("t000", 0.2, strategy=whole, shape=shape)
    teacher = row("teacher", 0.3, kind="teacher", fidelity=None, shape=shape)
    assert worsened([student, teacher], "accuracy", "max") == [(student, teacher)]
    for other in (
        row("t000", 0.2, strategy=SCRATCH, shape=shape),
        row("t000", 0.2, strategy=whole, shape={"num_hidden_layers": 2}),
        row("t000", 0.2, strategy=whole, shape=shape, packing="q8_0"),
    ):
        assert worsened([other, teacher], "accuracy", "max") == []


def test_ties_hold_across_kinds_and_the_smallest_wins() -> None:
    def documents(*right: int) -> dict[str, Any]:
        return {"ids": list(range(len(right))), "count": [100] * len(right), "sum": list(right)}

    student = row("t000", 0.5025, documents=documents(52, 49, 51, 49), memory_bytes=200)
    teacher = row("teacher", 0.5, kind="teacher", fidelity=None, documents=documents(50, 50, 50, 50), memory_bytes=100)
    assert chosen([student, teacher], "accuracy", "max", students_only=False) == teacher
    large = replace(teacher, memory_bytes=300)
    assert chosen([student, large], "accuracy", "max", students_only=False) == student
    # A row that is better beyond doubt wins, however large it is.
    sure = replace(large, accuracy=0.6, documents=documents(60, 60, 60, 60))
    assert chosen([student, sure], "accuracy", "max", students_only=False) == sure


def test_a_student_short_of_the_end_is_held_to_the_teacher_by_its_metric() -> None:
    early = [row("t000", 0.5, fidelity=1 / 3), row("t001", 0.9, fidelity=1 / 9)]
    for accuracy, first in ((0.4, "t000"), (0.6, "teacher")):
        rows = [*early, row("teacher", accuracy, kind="teacher", fidelity=None, memory_bytes=100)]
        best = chosen(rows, "accuracy", "max", students_only=False)
        assert best is not None
        assert best.trial == first
        assert best in rows, "it is told as it is, not as if it had been trained to the end"


def test_of_several_seeds_a_strategy_that_training_made_worse_is_passed_over() -> None:
    rows = [*on_seeds("t000", 0.60, 0.58, strategy=HALF), *on_seeds("t001", 0.55, 0.55, strategy={"init": {}})]
    assert chosen(rows, "accuracy", "max", students_only=False) == rows[0]
    worse = begun("t000", 0.61)
    order = in_order([*rows, worse], "accuracy", "max", students_only=False)
    assert [one.trial for one in order] == ["t000i", "t001"]

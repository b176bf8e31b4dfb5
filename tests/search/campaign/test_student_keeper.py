"""Which students a limit keeps: those in use, or that may be exported or compared. The others go by worth."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.runs.checkpoints import open_stages
from autodistill.runs.results.objectives import OBJECTIVES
from autodistill.runs.results.row import Row, Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.results.selection import chosen, confirming
from autodistill.runs.run_log import RunLog
from autodistill.runs.students import remove_student, send_student, student_bytes
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.disk_limit import StudentKeeper, needed
from autodistill.search.campaign.state import Candidate, Question, TrialState
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import RungReport, TrialTask
from autodistill.strategy.strategy import Strategy
from autodistill.utils.storage import Storage
from tests.search.campaign.test_campaign import PLAN, campaign, question, worker
from tests.search.finish.test_finish import row as finished

BYTES = 100


def student(folder: Path, name: str) -> Path:
    """Write a trial's student to disk and return its folder."""
    made = folder / "checkpoints" / name / "student"
    made.mkdir(parents=True, exist_ok=True)
    (made / "model.safetensors").write_bytes(b"x" * BYTES)
    return made


def saving(folder: Path, assignment: Assignment) -> RungReport:
    """Work as a worker does: save the student before its last rung is reported; an evaluation reads it."""
    if assignment.deployment is not None:
        assert (folder / "checkpoints" / assignment.task.id / "student").is_dir()
    elif assignment.rung == len(PLAN.rungs) - 1:
        student(folder, assignment.task.id)
    return worker(assignment)


def asked(**changes: Any) -> Question:
    """Return a search whose trials all reach the end."""
    return replace(question(), plan=replace(PLAN, keep=(9, 9)), **changes)


def there(folder: Path) -> set[str]:
    return set(student_bytes(folder / "checkpoints", None))


def validation(folder: Path) -> list[Row]:
    return RunLog(folder / "trials.jsonl").rows()


def run(search: Campaign, folder: Path) -> None:
    while (assignment := search.next()) is not None:
        search.report(assignment, saving(folder, assignment))
        best = chosen(search.log.rows(), "accuracy", "max", students_only=True)  # the log caches its lines
        if best is not None and best.full:
            assert best.trial in there(folder)
        assert {name for name, one in search.trials.items() if one.unseen or one.evaluating} <= there(folder)
    search.close()


@pytest.mark.parametrize("limit", [1, 700, 10**6])
def test_a_limit_is_held_but_for_what_is_needed(tmp_path: Path, limit: int) -> None:
    search = campaign(tmp_path, asked(), limit=limit)
    run(search, tmp_path)
    ended = [one for one in search.trials.values() if one.status is Status.COMPLETED]
    assert len(ended) == 10
    best = sorted(ended, key=lambda one: -(one.value or 0.0))
    # The first three, and the baseline that the best is compared with, are safe.
    safe = {one.task.id for one in best[:3]} | {"b000"}
    count = min(10, max(len(safe), limit // BYTES))
    # The worst students were evaluated last. They were in use while better ones were removed.
    assert safe <= there(tmp_path)
    assert len(there(tmp_path)) == count
    events = [one for one in RunLog(tmp_path / "trials.jsonl").read() if one["event"] == "students-collected"]
    assert sum(one["bytes"] for one in events) == BYTES * (10 - count)
    assert {name for one in events for name in one["trials"]} == {one.task.id for one in ended if one.collected}
    # Each was evaluated under all of its deployments before it was removed.
    rows = validation(tmp_path)
    for one in ended:
        assert sum(row.trial == one.task.id for row in rows) == len(one.task.deployments)


def test_without_a_limit_nothing_goes(tmp_path: Path) -> None:
    run(campaign(tmp_path, asked()), tmp_path)
    assert len(there(tmp_path)) == 10


@pytest.mark.slow
def test_what_a_kill_left_is_removed_and_never_asked_for_again(tmp_path: Path) -> None:
    """A kill can leave a removed student on the disk.

    It can also end the log before the removal that follows a rung.
    """
    whole = tmp_path / "whole"
    search = campaign(whole, asked(), limit=500)
    run(search, whole)
    log = RunLog(whole / "trials.jsonl").read()
    places = [place for place, event in enumerate(log) if event["event"] == "students-collected"]
    assert len(places) > 1
    for kept in (places[0], places[0] + 1, places[1], len(log)):
        cut = tmp_path / f"cut{kept}"
        for event in log[:kept]:
            cut.mkdir(exist_ok=True)
            RunLog(cut / "trials.jsonl").append(event)
            if event["event"] == "row":
                student(cut, event["row"]["trial"])
        again = campaign(cut, asked(), limit=500)
        again.replay(RunLog(cut / "trials.jsonl").all())
        gone = {name for event in log[: kept + 1] for name in event.get("trials", ())}
        assert {name for name, one in again.trials.items() if one.collected} >= gone
        run(again, cut)
        ended = {name for name, one in again.trials.items() if one.status is Status.COMPLETED}
        assert there(cut) & ended == there(whole)


def test_checkpoints_have_what_students_leave_of_the_limit(tmp_path: Path) -> None:
    store = open_stages(tmp_path / "checkpoints")
    for limit, held in ((1000, True), (BYTES + 150, False)):
        shutil.rmtree(tmp_path, ignore_errors=True)
        search = campaign(tmp_path, question(), limit=limit)
        assignment = search.next()
        assert assignment is not None
        for tokens in (768, 2560):
            store.save("nobody", tokens, lambda path: path.write_bytes(b"x" * BYTES) and None)
        search.report(assignment, saving(tmp_path, assignment))
        assert (len(store.checkpoints()) == 2) is held
        assert there(tmp_path) == {"b000"}


def made_by(trial: str) -> dict[str, Any]:
    """Return a strategy that no other trial has, as plain data."""
    return {"distillation": {"learning_rate": 1e-5 * (1 + sum(map(ord, trial)))}}


def row(trial: str, value: float, packing: str = "f16", **fields: Any) -> Row:
    trained: dict[str, Any] = {"train_tokens": 1000, "strategy": made_by(trial)}
    return finished(trial, "accuracy", value, packing, **trained | fields)


def states(*names: str, **fields: Any) -> dict[str, TrialState]:
    found = {}
    for name in names:
        task = TrialTask(id=name, strategy=Strategy(), seed=0, deployments=(), probe=question().deployments[0])
        known = {
            "number": 0,
            "kind": "student",
            "name": name,
            "point": None,
            "candidate": Candidate(strategy=Strategy()),
            "status": Status.COMPLETED,
        }
        found[name] = TrialState(task=task, **known | fields)
    return found


ROWS = [row(f"t{number:03d}", 0.5 + number / 100) for number in range(8)]
NAMES = [one.trial for one in ROWS]


def safe(rows: list[Row], trials: dict[str, TrialState] | None = None, **changes: Any) -> set[str]:
    names = dict.fromkeys(one.trial for one in rows)
    return needed((trials or states(*names)).values(), rows, replace(question(), **changes))


def test_the_first_overall_and_in_each_container_and_the_smallest_are_needed() -> None:
    assert safe(ROWS) == {"t007", "t006", "t005"}
    vllm = [row(name, 0.1 + number / 100, "vllm") for number, name in enumerate(NAMES[:5])]
    assert safe([*ROWS, *vllm]) == {"t007", "t006", "t005", "t004", "t003", "t002"}
    assert safe([*ROWS, row("t001", 0.3, "q8_0", memory_bytes=10)]) == {"t007", "t006", "t005", "t001"}
    over = [replace(one, feasible=False) if one.trial > "t004" else one for one in ROWS]
    assert safe(over) == {"t004", "t003", "t002"}
    perplexities = [replace(one, perplexity=one.accuracy) for one in ROWS]
    assert safe(perplexities, metric="perplexity", direction="min") == {"t000", "t001", "t002"}


def test_what_cannot_be_told_from_the_best_is_needed() -> None:
    def documents(right: tuple[int, int]) -> dict[str, list[int]]:
        return {"ids": [1, 2], "count": [100, 100], "sum": list(right)}

    rows = [
        replace(ROWS[7], accuracy=0.57, documents=documents((57, 57))),
        *(replace(one, accuracy=0.56, documents=documents((56, 56))) for one in ROWS[3:7]),
        # It is better on one document, and worse on the other.
        replace(ROWS[0], accuracy=0.555, documents=documents((91, 20))),
    ]
    assert safe(rows) >= {"t007", "t000"}
    # A teacher that is clearly better is not a student.
    teacher = row("teacher", 0.9, kind="teacher", strategy=None, documents=documents((90, 90)))
    assert safe([*rows, teacher]) >= {"t007", "t000"}
    rows[-1] = replace(rows[-1], documents=documents((55, 56)))
    assert "t000" not in safe(rows)


def test_what_further_seeds_choose_among_is_needed_before_and_after_they_are_trained() -> None:
    baseline = row("b000", 0.9, kind="baseline")
    trials = states("b000", kind="baseline")
    for one in ROWS:
        trials |= states(one.trial, value=one.accuracy, judged=one.accuracy)
    assert "t005" not in safe([baseline, *ROWS], trials)
    assert safe([baseline, *ROWS], trials, confirm=2) == {"b000", "t007", "t006", "t005"}
    worst = min(ROWS, key=lambda one: one.accuracy or 0.0)
    again = replace(worst, row_id="t000s1-f16", trial=confirming("t000", 1), kind=CONFIRMATION, seed=1)
    assert "t000" in safe([*ROWS, again])


def test_what_is_in_use_is_needed() -> None:
    for fields in ({"running": True}, {"evaluating": 1}, {"status": None}, {"status": Status.FAILED}):
        trials = states(*NAMES) | states("t000", **fields)
        assert safe(ROWS, trials) == {"t007", "t006", "t005", "t000"}
    lacking = states(*NAMES)
    lacking["t001"].task = replace(lacking["t001"].task, deployments=question().deployments)
    assert "t001" in safe(ROWS, lacking)
    lacking["t001"].settled = {one.name for one in question().deployments}
    assert "t001" not in safe(ROWS, lacking)


def test_what_the_best_is_compared_with_is_needed() -> None:
    baselines = [
        row("b000", 0.2, kind="baseline"),
        row("b001", 0.1, kind="baseline"),
        row("b001x", 0.15, kind="baseline", train_tokens=2000, strategy=made_by("b001")),
    ]
    # Needed are the better of two with as many tokens, the only one with more, and the one that it continued.
    assert safe([*ROWS, *baselines]) == {"t007", "t006", "t005", "b000", "b001x", "b001"}
    further = row("t000x", 0.9, strategy=made_by("t000"), train_tokens=3000)
    assert safe([*ROWS, further]) == {"t000x", "t007", "t006", "t000"}


def test_of_several_objectives_the_front_is_needed() -> None:
    rows = [replace(one, memory_bytes=100 + 10 * number) for number, one in enumerate(ROWS)]
    assert safe(rows) == {"t007", "t006", "t005", "t000"}
    assert safe(rows, further=(OBJECTIVES["memory"],)) == set(NAMES)
    rows[3] = replace(rows[3], memory_bytes=1000)
    assert safe(rows, further=(OBJECTIVES["memory"],)) == set(NAMES) - {"t003"}


def test_further_seeds_go_first_then_what_does_not_fit_then_the_worst(tmp_path: Path) -> None:
    rows = [*ROWS, row("t008", 0.9, feasible=False), row("t007s1", 0.57, kind=CONFIRMATION, seed=1)]
    trials = states(*NAMES, "t008") | states("t007s1", kind=CONFIRMATION)
    keeper = StudentKeeper(tmp_path, None, question())
    sizes = dict.fromkeys([*trials, "of nobody"], BYTES)
    order = ["t007s1", "t008", "t000", "t001", "t002", "t003", "t004"]
    for count in range(8):
        assert keeper.surplus(trials, rows, sizes, count * BYTES) == order[:count]
    assert keeper.surplus(trials, rows, sizes, 10**9) == order
    trials["t004"].collected = True
    assert keeper.surplus(trials, rows, sizes, -1) == ["t004"]
    assert keeper.surplus(trials, rows, sizes, 2 * BYTES) == ["t004", "t007s1"]


def test_students_on_a_storage_are_counted_and_removed_there(tmp_path: Path) -> None:
    shared, checkpoints = Storage(f"file://{tmp_path}/shared"), tmp_path / "checkpoints"
    for name in ("t000", "t001"):
        student(tmp_path, name)
        send_student(checkpoints / name, shared)
    # A student that was kept before the end is no finished student.
    shutil.copytree(checkpoints / "t001" / "student", checkpoints / "t001" / "student-512")
    send_student(checkpoints / "t001", shared, 512)
    marks = shared.list("students/t000")["students/t000/.whole"]
    assert student_bytes(checkpoints, shared) == {"t000": BYTES + marks, "t001": BYTES + marks}
    remove_student(checkpoints / "t001", shared)
    assert set(student_bytes(checkpoints, shared)) == set(student_bytes(checkpoints, None)) == {"t000"}
    assert shared.has_folder("students/t001-512")
    remove_student(checkpoints / "t001", shared)
    assert not list((checkpoints / "t001").glob(".student*"))

"""Differences to every other row of the test split, each with its own name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import autodistill as ad
from autodistill.evaluation.base import Subject
from autodistill.evaluation.statistics import widening
from autodistill.evaluators.calibration import Calibration
from autodistill.hardware.budget import Budget
from autodistill.inference.outputs import TokenScores
from autodistill.models.config import spec_from_config
from autodistill.runs.results.differences import differences, shown
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish.test_split import gains_on_test
from autodistill.strategy.deployment import Deployment
from autodistill.testing import tiny_config
from autodistill.utils.json_files import write_json

FULL = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
F16 = {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0}
Q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
SUBJECT = Subject(
    spec=spec_from_config(tiny_config()),
    deployment=Deployment(**Q8),
    budget=Budget(memory_bytes=10**9),
)


def row(kind: str, deployment: dict[str, Any], right: list[int]) -> Row:
    return Row(
        row_id=f"{kind}-{deployment['format']}",
        trial=kind,
        kind=kind,
        name=kind,
        deployment=Deployment.from_json(deployment),
        status="completed",
        feasible=True,
        split="test",
        documents={"ids": list(range(len(right))), "count": [100] * len(right), "sum": right},
    )


def test_differences_and_their_errors_are_those_of_the_documents() -> None:
    mine, theirs = [50, 60, 40, 50], [46, 58, 41, 49]
    (found,) = differences([row("student", Q8, mine), row("teacher", FULL, theirs)])
    gaps = np.subtract(mine, theirs) / 100
    assert (found.to, found.documents) == ("teacher", 4)
    assert found.difference == pytest.approx(gaps.mean())
    assert found.stderr == pytest.approx(scipy.stats.sem(gaps) * widening(4), rel=0.1)
    (alone,) = differences([row("student", Q8, mine[:1]), row("teacher", FULL, theirs[:1])])
    assert alone.stderr is None


def test_without_an_exported_student_or_its_documents_there_are_no_differences() -> None:
    teacher, student = row("teacher", FULL, [50, 60]), row("student", Q8, [50, 60])
    assert differences([teacher]) == []
    assert differences([student, teacher], exported="another") == []
    assert differences([replace(student, documents=None), teacher]) == []


def test_two_teachers_of_16_bits_are_told_apart_and_fill_a_column_each() -> None:
    teachers = [row("teacher", FULL, [60, 60]), row("teacher", F16, [70, 70])]
    found = differences([row("student", F16, [50, 50]), *teachers])
    assert [item.to for item in found] == ["teacher as huggingface", "teacher as gguf-f16"]
    head, line = shown(found)
    assert head[1:] == ["teacher as huggingface", "teacher as gguf-f16"]
    assert [cell.split()[0] for cell in line[1:]] == ["-0.1000", "-0.2000"]
    found = differences([row("student", Q8, [50, 50]), teachers[0], row("teacher", Q8, [60, 60])])
    assert [item.to for item in found] == ["teacher", "quantised teacher"]


def binned(kind: str, confidence: np.ndarray, right: np.ndarray, documents: np.ndarray) -> Row:
    """Return a row whose calibration error is measured as in a search."""
    nothing = np.zeros(len(right))
    scores = TokenScores(nll=nothing, correct=right, agrees=right, documents=documents, confidence=confidence)
    (ece,) = Calibration().evaluate(replace(SUBJECT, scores=scores))
    plain = row(kind, Q8 if kind == "student" else FULL, [0] * len(ece.bins["ids"]))
    return replace(plain, documents={**(plain.documents or {}), "others": {"ece": json.loads(json.dumps(ece.bins))}})


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return Guo et al.'s sum, computed from tokens."""
    inside = np.digitize(confidence, np.linspace(0, 1, 16)[1:-1], right=True)
    found = [(inside == one).mean() * abs((right - confidence)[inside == one].mean()) for one in set(inside)]
    return float(sum(found))


@pytest.mark.slow
def test_calibration_errors_differ_by_what_tokens_say_and_draws_of_documents_scatter() -> None:
    dice = np.random.default_rng(4)
    # Thirty documents have different lengths, and some are hard for both models.
    lengths = dice.integers(20, 200, size=30)
    documents = np.repeat(np.arange(30, dtype=np.int32), lengths)
    hard = np.repeat(dice.uniform(-0.15, 0.15, size=30), lengths)
    sure = [dice.uniform(0.2, 1, size=len(documents)) for _ in range(2)]
    right = [dice.random(len(documents)) < one - lost - hard for one, lost in zip(sure, (0.05, 0.2), strict=True)]
    rows = [binned("student", sure[0], right[0], documents), binned("teacher", sure[1], right[1], documents)]
    (found,) = (item for item in differences(rows) if item.metric == "ece")

    def difference(tokens: np.ndarray) -> float:
        mine, theirs = (calibration_error(one[tokens], hits[tokens]) for one, hits in zip(sure, right, strict=True))
        return mine - theirs

    assert found.difference == pytest.approx(difference(np.arange(len(documents))), abs=1e-6)
    places = [np.flatnonzero(documents == one) for one in range(30)]
    draws = [difference(np.concatenate([places[one] for one in dice.integers(0, 30, size=30)])) for _ in range(1500)]
    assert found.stderr == pytest.approx(np.std(draws) * (30 / 29) ** 0.5 * widening(30), rel=0.1)
    assert (found.to, found.unit, found.documents) == ("teacher", "", 30)
    # A pair has the same difference, whatever else is compared.
    more = [*rows, *(replace(rows[1], row_id=f"b{number}", kind="baseline") for number in range(3))]
    assert next(item for item in differences(more) if item.metric == "ece") == found
    gain = gains_on_test(rows[0], None, [rows[0], replace(rows[1], kind="baseline")], "ece", "min").baseline
    assert gain is not None
    assert (gain.value, gain.stderr) == (-found.difference, found.stderr)


def test_calibration_of_one_document_or_of_other_ones_has_no_error_or_no_difference() -> None:
    sure, right, one = np.array([0.5, 0.9]), np.array([True, False]), np.zeros(2, np.int32)
    mine = binned("student", sure, right, one)
    (found,) = (item for item in differences([mine, binned("teacher", sure, ~right, one)]) if item.metric == "ece")
    assert found.stderr is None
    assert found.difference == pytest.approx((abs(1 - 0.5) + abs(0 - 0.9)) / 2 - (abs(0 - 0.5) + abs(1 - 0.9)) / 2)
    others = binned("teacher", sure, ~right, one + 1)
    assert not [item for item in differences([mine, others]) if item.metric == "ece"]


def test_a_mean_and_bins_of_one_metric_are_not_compared() -> None:
    sure, right = np.array([0.5, 0.9]), np.array([True, False])
    mine, theirs = (binned(kind, sure, right, np.arange(2, dtype=np.int32)) for kind in ("student", "teacher"))
    ece = (theirs.documents or {})["others"]["ece"]
    mean = {"ids": ece["ids"], "count": ece["count"], "sum": [0.5, 0.1]}
    other = replace(theirs, documents={**(theirs.documents or {}), "others": {"ece": mean}})
    assert [item.metric for item in differences([mine, theirs])] == ["accuracy", "ece"]
    assert [item.metric for item in differences([mine, other])] == ["accuracy"]
    (found, swapped) = replace(other, kind="student"), replace(mine, kind="teacher")
    assert [item.metric for item in differences([found, swapped])] == ["accuracy"]


def test_the_way_from_python_gives_the_difference_of_any_two_students(tmp_path: Path) -> None:
    mine, theirs = [50, 60, 40, 50], [46, 58, 41, 49]
    with RunFolder.create(tmp_path / "results" / "runs", "first") as folder:
        write_json(folder.search_file, {"metric": "accuracy", "direction": "max"})
        for kind, trial, right in (("student", "t001", mine), ("baseline", "b000", theirs)):
            named = {"trial": trial, "row_id": f"{trial}-gguf-q8_0", "split": "validation"}
            one = replace(row(kind, Q8, right), **named, accuracy=float(np.mean(right)) / 100)
            folder.events.append({"event": "row", "row": one.to_json()})
    students = {one.id.partition("-")[0]: one for one in ad.load_run(tmp_path / "results" / "runs" / "first").students}
    found = students["t001"].difference(students["b000"], "accuracy")
    gaps = np.subtract(mine, theirs) / 100
    assert found.value == pytest.approx(gaps.mean())
    assert found.stderr == pytest.approx(scipy.stats.sem(gaps) * widening(4), rel=0.1)

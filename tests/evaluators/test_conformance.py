"""Our own evaluators pass the conformance suite that authors of plug-ins subclass, and faulty ones fail it."""

from __future__ import annotations

import json
import math
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from autodistill.data.task_files import read_tasks
from autodistill.evaluation.base import Evaluator, Measurement, Quantity, Subject
from autodistill.evaluators.tasks.command import parse_command
from autodistill.evaluators.tasks.task import evaluator_of
from autodistill.plugins import load, names
from autodistill.runtimes.timing import Load
from autodistill.strategy.deployment import Deployment
from autodistill.testing import EvaluatorConformance

PACKED = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
TASKS = """
tasks:
  - {name: choices, files: q.jsonl, metric: multiple_choice,
     template: {prompt: "{question}", choices: "{choices}", answer: "{gold}"}}
  - {name: written, files: q.jsonl, metric: exact_match, max_tokens: 4,
     template: {prompt: "{question}", answer: "{gold}"}}
  - {name: texts, files: q.jsonl, metric: perplexity, window: 16, stride: 8,
     template: {text: "{question} {question} {question}"}}
"""


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time one short answer: the usual many long ones would show no more here."""
    monkeypatch.setattr("autodistill.evaluators.latency.Load", partial(Load, rounds=1, decoded=8))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"The miller carries {number} boats and the fox", "choices": ["two apples", "a lamp"], "gold": 0}
        for number in range(24)
    ]
    (folder / "q.jsonl").write_text("\n".join(json.dumps(one) for one in questions))
    (folder / "tasks.yaml").write_text(TASKS)
    return {task.name: task for task in read_tasks(folder / "tasks.yaml")}


class Installed(EvaluatorConformance):
    """One of the installed evaluators, whose name is in the name of the test class."""

    def evaluator(self) -> Evaluator:
        return load("evaluators", type(self).__name__.removeprefix("Test").lower())


def suite(name: str, **attributes: Any) -> type:
    return type(f"Test{name.capitalize()}", (Installed,), {"__module__": __name__, **attributes})


for _name in names("evaluators"):
    _class = suite(_name, timed=_name == "latency")
    globals()[_class.__name__] = _class


class OfTask(EvaluatorConformance):
    @pytest.fixture(autouse=True)
    def given(self, tasks: dict[str, Any]) -> None:
        self.task = tasks[type(self).__name__.removeprefix("Test").lower()]

    def evaluator(self) -> Evaluator:
        return evaluator_of(self.task)


class TestChoices(OfTask):
    pass


class TestTexts(OfTask):
    pass


class TestWritten(OfTask):
    pass


class TestCommand(EvaluatorConformance):
    program = "import sys; print([float(len(line)) for line in open(sys.argv[2])])"

    def evaluator(self) -> Evaluator:
        return parse_command(f"{sys.executable} -c '{self.program}' {{student}} {{data}}")

    # The result depends on the command's own program.
    def test_a_bad_model_is_an_error(self, tmp_path: Path) -> None:
        pass


class Fault:
    """An evaluator that does one thing wrong."""

    name = "fault"
    needs = "scores"
    measures: ClassVar = {"fault": Quantity("fraction", "max")}

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        if subject.scores is None or not subject.scores.nll.size:
            raise ValueError("no scores")
        one = Measurement(name="fault", value=0.5, unit="fraction", direction="max", source="simulated")
        return (replace(one, **getattr(self, "changes", {})),)

    def supports(self, deployment: Deployment) -> bool:
        return True


@pytest.mark.parametrize(
    ("test", "changes"),
    [
        ("test_measurements_are_what_was_declared", {"unit": "percent"}),
        ("test_measurements_are_what_was_declared", {"direction": "min"}),
        ("test_measurements_are_what_was_declared", {"name": "other"}),
        ("test_measurements_are_what_was_declared", {"value": math.nan}),
        ("test_measurements_are_what_was_declared", {"source": "measured"}),
        ("test_measurements_are_what_was_declared", {"stderr": -1.0}),
        ("test_a_mean_is_that_of_its_documents", {"documents": {"ids": [1, 2], "count": [2, 2], "sum": [1, 2]}}),
        (
            "test_a_binned_figure_is_that_of_its_documents",
            {"bins": {"ids": [1, 2], "count": [2, 2], "bins": [[1.0, 0.0], [-1.0, 1.0]]}},
        ),
        ("test_one_document_has_no_standard_error", {"stderr": 0.1}),
    ],
)
def test_the_suite_finds_a_fault(test: str, changes: dict[str, Any], tmp_path: Path) -> None:
    class Suite(EvaluatorConformance):
        def evaluator(self) -> Any:
            fault = Fault()
            fault.changes = changes  # type: ignore[attr-defined]
            return fault

    with pytest.raises(AssertionError):
        getattr(Suite(), test)(tmp_path)


def test_the_suite_finds_what_is_made_up_or_changes(tmp_path: Path) -> None:
    class Careless(Fault):
        calls = 0

        def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
            type(self).calls += 1
            value = 1 / self.calls
            return (Measurement(name="fault", value=value, unit="fraction", direction="max", source="simulated"),)

    class Suite(EvaluatorConformance):
        def evaluator(self) -> Any:
            return Careless()

    for name in ("it_gives_the_same_each_time", "what_is_missing_is_an_error", "a_bad_model_is_an_error"):
        with pytest.raises(AssertionError):
            getattr(Suite(), f"test_{name}")(tmp_path / name)


def test_names_are_unique_to_one_evaluator() -> None:
    found = [figure for name in names("evaluators") for figure in load("evaluators", name).measures]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", names("evaluators"))
def test_what_is_read_before_the_export_is_tied_to_no_runtime(name: str, subject: Subject) -> None:
    evaluator = load("evaluators", name)
    assert evaluator.supports(subject.deployment)
    assert evaluator.supports(PACKED) == (evaluator.needs != "artifact")


@pytest.mark.parametrize("name", names("evaluators"))
def test_nothing_is_fetched_or_left_behind(
    name: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an evaluator reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    if load("evaluators", name).needs != "artifact":
        load("evaluators", name).evaluate(subject)
    assert list(tmp_path.iterdir()) == []

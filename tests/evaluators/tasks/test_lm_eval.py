"""Measure lm-eval's tasks on the packed student: a local task, against lm-eval's own model class."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from autodistill.errors import InputError, MissingDependencyError
from autodistill.evaluation.base import Subject
from autodistill.evaluators.tasks.lm_eval import _load, find_task
from autodistill.inference.packed_student import PackedStudent

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")


@pytest.fixture(scope="module", autouse=True)
def one_index() -> Iterator[None]:
    """lm-eval reads all twelve thousand task files whenever it lists its tasks. Here the list is kept."""
    if importlib.util.find_spec("lm_eval") is None:
        yield
        return
    from lm_eval import evaluator, tasks

    make = tasks.TaskManager

    @cache
    def kept() -> Any:
        return make()

    def manager(*, include_defaults: bool = True, **more: Any) -> Any:
        return kept() if include_defaults else make(include_defaults=False, **more)

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluator, tasks):
            patch.setattr(module, "TaskManager", manager)
        yield


def write(folder: Path, **changes: object) -> Path:
    records = [
        {"q": f"The fox number {number}", "choices": ["runs", "carries the wooden boat"], "gold": number % 2}
        for number in range(30)
    ]
    (folder / "q.json").write_text("\n".join(json.dumps(one) for one in records))
    config = {
        "task": "fox",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "q.json")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    path = folder / "fox.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


@pytest.mark.slow  # lm-eval's own model is loaded and asked in addition to ours
@needs_lm_eval
def test_a_task_gives_what_lm_evals_own_model_does(tmp_path: Path, subject: Subject) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    student = subject.student
    assert isinstance(student, PackedStudent)
    path = write(tmp_path)
    task = find_task(f"lm-eval:{path}")
    assert (task.metric, task.direction) == ("acc_norm", "max")
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=student.model, tokenizer=tokenizer, device="cpu", batch_size=1),
        tasks=list(TaskManager(include_defaults=False).load(str(path))["tasks"].values()),
        samples={"fox": list(range(0, 30, 2))},
        bootstrap_iters=0,
    )["results"]["fox"]
    (found,) = task.evaluate(subject)
    assert found.name == f"lm-eval:{path}"
    assert found.value == pytest.approx(theirs["acc_norm,none"])
    assert found.detail["examples"] == len(found.documents["ids"]) == 15
    (plain,) = find_task(f"lm-eval:{path}:acc").evaluate(subject)
    assert plain.value == pytest.approx(theirs["acc,none"])
    # The other half is the test split.
    (test,) = task.evaluate(replace(subject, student=replace(student, split="test")))
    assert not set(test.documents["ids"]) & set(found.documents["ids"])
    (few,) = task.evaluate(replace(subject, student=replace(student, share=0.0)))
    assert few.detail["examples"] == 8


@pytest.mark.slow
@needs_lm_eval
def test_written_answers(tmp_path: Path, subject: Subject) -> None:
    student = subject.student
    assert isinstance(student, PackedStudent)
    texts = student.write([f"The fox number {number}" for number in range(30)], max_tokens=4, stops=("\n",))
    path = write(
        tmp_path,
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    lines = [
        json.dumps({"q": f"The fox number {number}", "answer": text if number % 4 else "other"})
        for number, text in enumerate(texts)
    ]
    (tmp_path / "q.json").write_text("\n".join(lines))
    (found,) = find_task(f"lm-eval:{path}").evaluate(subject)
    expected = [number % 4 != 0 for number in range(0, 30, 2)]
    assert found.value == pytest.approx(sum(expected) / len(expected))


@pytest.mark.slow
@needs_lm_eval
def test_a_worker_in_another_folder_finds_the_file_that_was_named(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    task = find_task("lm-eval:fox.yaml")
    (expected,) = task.evaluate(subject)
    _load.cache_clear()  # as in another process
    monkeypatch.chdir("/")
    (found,) = task.evaluate(subject)
    assert found == expected
    assert (found.name, task.files) == ("lm-eval:fox.yaml", (tmp_path / "fox.yaml",))


@needs_lm_eval
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        # Names are looked up in the library's whole index of tasks, which takes seconds to make.
        pytest.param(
            "lm-eval:hellaswagg", "knows no task 'hellaswagg'; similar ones are .*hellaswag", marks=pytest.mark.slow
        ),
        ("lm-eval:none.yaml", "lm-eval:none.yaml: there is no file /.*/none.yaml"),
        ("lm-eval:", "'lm-eval:' names no task: write one like lm-eval:hellaswag"),
        ("lm-eval::acc", "'lm-eval::acc' names no task"),
    ],
)
def test_what_is_unknown_is_said(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_task(reference)


@needs_lm_eval
def test_metrics_and_data_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(InputError, match="no metric 'f1'; its metrics are acc, acc_norm"):
        find_task(f"lm-eval:{path}:f1")
    (tmp_path / "q.json").unlink()
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace("task: fox", "task: fox2"))
    with pytest.raises(InputError, match="lm-eval cannot make the task"):
        find_task(f"lm-eval:{other}")


def test_without_the_package_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'autodistill-search\[lm-eval\]'"):
        find_task("lm-eval:hellaswag")

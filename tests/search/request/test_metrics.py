"""Searches that rank by a task, by a command, or by an evaluator from a third-party package."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autodistill import plugins
from autodistill.cli.summary import search_summary
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.runs.results.differences import differences
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import leaderboard_of
from autodistill.search.preview import plan_search
from autodistill.search.request.metrics import moved, requested_metrics
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import Outcome, search
from autodistill.testing import save_tiny_teacher, tiny_text

PROGRAM = """
import json, sys
from pathlib import Path
size = sum(path.stat().st_size for path in Path(sys.argv[1]).glob("*.safetensors"))
print(json.dumps([{"id": json.loads(line)["id"], "score": size / 1e6} for line in open(sys.argv[2])]))
"""

SPACE = """
dimensions:
  distillation.learning_rate: {low: 1e-4, high: 1e-2, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
  - {runtime: transformers, format: huggingface, bits: 16, group_size: 0}
baselines: [logit_kd]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> SearchRequest:
    folder = tmp_path_factory.mktemp("asked")
    questions = [
        {"q": f"The miller number {number}", "choices": ["carries", "paints"], "gold": number % 2}
        for number in range(60)
    ]
    (folder / "q.jsonl").write_text("\n".join(json.dumps(one) for one in questions))
    task = {
        "name": "miller",
        "files": "q.jsonl",
        "metric": "multiple_choice",
        "template": {"prompt": "{q}", "choices": "{choices}", "answer": "{gold}"},
    }
    texts = {"name": "long", "files": "q.jsonl", "metric": "perplexity", "template": {"text": "{q} {q} {q}"}}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": [task, texts]}))
    (folder / "score.py").write_text(PROGRAM)
    (folder / "space.yaml").write_text(SPACE)
    return SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=str(save_tiny_teacher(folder / "teacher", layers=3)),
        data=str(tiny_text(folder / "text", documents=30, sentences=24)),
        space=str(folder / "space.yaml"),
        task=(folder / "tasks.yaml",),
        students_only=True,
        trials=2,
        tokens=2304,
        runner="inline",
        runs=folder / "runs",
        cache=folder / "cache",
    )


@pytest.fixture(scope="module")
def by_task(base: SearchRequest) -> tuple[Outcome, SearchRequest]:
    request = replace(base, name="task", metric="task:miller")
    return search(request), request


def test_a_task_ranks_and_is_measured_on_both_splits(by_task: tuple[Outcome, SearchRequest]) -> None:
    outcome, request = by_task
    ranked, metric = leaderboard_of(RunFolder.open(request.runs, "task"))
    assert metric == "task:miller"
    for row in outcome.rows:
        assert row.figure("task:miller") is not None
        assert row.figure("task:miller_stderr") is not None
        assert row.figure("task:long") is not None
        assert row.documents is not None
        assert row.documents["metric"] == "task:miller"
    # One of the ties comes first. After the ties, the metric decides.
    rest = [row.figure("task:miller") for one in ranked for row in [one.row] if row.full and not one.tied]
    assert rest == sorted(rest, reverse=True)  # type: ignore[type-var]
    validation = {name for row in outcome.rows for name in row.documents["ids"]}  # type: ignore[index]
    test = {name for row in outcome.finish.test for name in row.documents["ids"]}  # type: ignore[index]
    assert validation
    assert test
    assert not validation & test


def test_a_rung_reads_its_share_of_a_task(by_task: tuple[Outcome, SearchRequest]) -> None:
    rows = by_task[0].rows
    counts = {row.full: sum(row.documents["count"]) for row in rows}  # type: ignore[index]
    if False in counts:
        assert counts[False] <= counts[True]


def test_differences_to_teacher_and_baseline_are_paired(by_task: tuple[Outcome, SearchRequest]) -> None:
    outcome, request = by_task
    found = outcome.document["differences_on_test"]
    to = {item["to"] for item in found}
    assert {"teacher", "untrained student"} <= to
    assert {item["metric"] for item in found} >= {"task:miller", "accuracy", "kl", "perplexity", "task:long", "ece"}
    student, teacher = outcome.finish.best.kind, next(row for row in outcome.finish.test if row.kind == "teacher")
    mine = next(row for row in outcome.finish.test if row.kind == student)
    accuracy = next(item for item in found if item["metric"] == "accuracy" and item["to"] == "teacher")
    assert accuracy["difference"] == pytest.approx((mine.accuracy or 0) - (teacher.accuracy or 0), abs=1e-6)
    # The calibration error is not a mean. What it is computed from is only kept for this split.
    ece = next(item for item in found if item["metric"] == "ece" and item["to"] == "teacher")
    assert ece["difference"] == pytest.approx(mine.figure("ece") - teacher.figure("ece"), abs=1e-5)  # type: ignore[operator]
    assert (ece["documents"], ece["stderr"] is None) == (accuracy["documents"], accuracy["stderr"] is None)
    assert not any("ece" in (row.documents or {})["others"] for row in outcome.rows)
    assert "exported less" in (request.runs / "task" / "report.md").read_text()
    json.dumps(found, allow_nan=False)
    assert "task:miller" in search_summary(outcome.document, rank(outcome.rows, "task:miller"), "task:miller")


def test_differences_need_the_same_examples(by_task: tuple[Outcome, SearchRequest]) -> None:
    rows = list(by_task[0].finish.test)
    assert differences(rows)
    assert differences([]) == []
    documents = {**(rows[0].documents or {}), "ids": [-1], "count": [1], "sum": [1], "others": {}}
    strange = Row.from_json({**rows[0].to_json(), "documents": documents})
    found = differences([strange, *rows[1:]])
    assert not [item for item in found if item.to == "teacher" and item.metric == "kl" and strange.kind != "teacher"]


def test_a_run_is_resumed_with_the_same_tasks_alone(by_task: tuple[Outcome, SearchRequest], tmp_path: Path) -> None:
    request = by_task[1]
    again = check_request(replace(request, resume=True, task=None, metric=None))
    assert again.metric == "task:miller"
    assert moved(again.requested.record, again.requested.record) == ()
    # The same files may lie elsewhere by now, under other names.
    copy = shutil.copy((request.task or ())[0], tmp_path / "copy.yaml")
    shutil.copy((request.task or ())[0].with_name("q.jsonl"), tmp_path)
    elsewhere = check_request(replace(request, resume=True, task=(copy,)))
    (told,) = moved(elsewhere.requested.record, again.requested.record)
    assert told.startswith(f"the task files are read from {copy.resolve()}; before, from")
    with pytest.raises(InputError, match=r"task file is not at /gone/tasks.yaml: give it by --task"):
        requested_metrics(replace(request, task=None), {"asked": {"tasks": ["/gone/tasks.yaml"]}})
    changed = yaml.safe_load((request.task or ())[0].read_text())
    changed["tasks"][0]["limit"] = 5
    other = (request.task or ())[0].with_name("other.yaml")
    other.write_text(yaml.safe_dump(changed))
    with pytest.raises(InputError, match="another task or command"):
        check_request(replace(request, resume=True, task=(other,)))


def test_a_command_ranks_by_its_own_direction(base: SearchRequest) -> None:
    program = (base.task or ())[0].with_name("score.py")
    outcome = search(
        replace(
            base,
            name="command",
            task=None,
            metric_command=f"{sys.executable} {program} {{student}} {{data}}",
            metric_direction="min",
        )
    )
    assert outcome.finish.best.figure("command") == pytest.approx(
        min(row.figure("command") or 0 for row in outcome.rows if row.full and row.kind in ("student", "baseline"))
    )
    stored = json.loads((base.runs / "command" / "search.json").read_text())
    assert (stored["metric"], stored["direction"], stored["asked"]["command_direction"]) == ("command", "min", "min")


def test_every_node_is_asked_for_the_files_of_a_command(base: SearchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens before anything is loaded. The storage carries folders, but not the files of a metric."""

    class Joined(Exception):
        pass

    def join(*given: object) -> None:
        raise Joined(*given)

    monkeypatch.setattr("autodistill.search.runners.ray_cluster.join", join)
    monkeypatch.chdir(base.runs.parent)
    asked = replace(
        base,
        runner="ray",
        ray_address="10.0.0.1:6379",
        storage=f"file://{base.runs}-there",
        metric_command="./score.py {student} {data}",
    )
    (base.runs.parent / "score.py").chmod(0o755)
    with pytest.raises(Joined) as joined:
        plan_search(asked)
    *given, storage = joined.value.args
    assert given == ["10.0.0.1:6379", [], (base.runs.parent / "score.py",)]
    assert storage.uri == asked.storage


def test_a_command_is_run_where_it_was_typed_also_when_its_run_goes_on_elsewhere(
    base: SearchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "score").touch(0o755)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = replace(base, task=None, metric=None, metric_command="./score {student}")
    record = requested_metrics(asked, {})[0].record
    known = {"asked": record, "folder": str(tmp_path), "metric": "command", "directions": {"command": "max"}}
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = replace(asked, metric_command=None)
    assert requested_metrics(resumed, known)[0].files == (tmp_path / "score",)
    (tmp_path / "score").rename(tmp_path / "elsewhere" / "score")
    with pytest.raises(InputError, match=rf"no program './score' in {tmp_path}: give --metric-command"):
        requested_metrics(resumed, known)
    again = requested_metrics(asked, known)[0]
    assert (again.files, again.record) == ((tmp_path / "elsewhere" / "score",), record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "task:other"}, "'task:other' is no metric that can rank; the metrics are .*task:miller"),
        ({"metric": "latency_ms"}, "no metric that can rank"),
        ({"metric": "accuracyy"}, "no metric that can rank; the metrics are .*accuracy, agreement, .*ece"),
        ({"metric_direction": "min"}, "give --metric-command"),
        ({"metric_command": "no-such-program {student}"}, "no program"),
        ({"task": (Path("none.yaml"),)}, "none.yaml cannot be read"),
        ({"metric": "exact_match"}, "needs questions with answers"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    base: SearchRequest, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_request(replace(base, name="refused", **changes))  # type: ignore[arg-type]


def test_two_files_with_a_task_of_one_name(base: SearchRequest) -> None:
    with pytest.raises(InputError, match="two of the task files have a task miller"):
        check_request(replace(base, name="twice", task=(base.task or ()) * 2))


def test_a_command_that_fails_on_the_teacher_ends_the_search_before_its_trials(base: SearchRequest) -> None:
    program = (base.task or ())[0].with_name("wrong.py")
    program.write_text("print('[NaN]')")
    with pytest.raises(InputError, match="does not work on the teacher: item 0"):
        search(replace(base, name="wrong", metric_command=f"{sys.executable} {program} {{student}}"))


THIRD = """
from autodistill.evaluation.base import Measurement, Quantity
from autodistill.evaluation.statistics import clustered_mean, per_document

class Surprise:
    name = "surprise"
    needs = "scores"
    measures = {"surprising": Quantity("fraction", "min")}

    def evaluate(self, subject):
        if subject.scores is None:
            raise ValueError("surprise is read from scores, and the subject has none")
        high = subject.scores.nll > 3
        value, stderr = clustered_mean(high, subject.scores.documents)
        return (Measurement(name="surprising", value=value, unit="fraction", direction="min", source="simulated",
                            stderr=stderr, documents=per_document(high, subject.scores.documents)),)

    def supports(self, deployment):
        return True
"""
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "somebodys-evaluators"
version = "1.0"

[project.entry-points."autodistill.evaluators"]
surprise = "somebodys_evaluators:Surprise"

[tool.setuptools]
py-modules = ["somebodys_evaluators"]
"""


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a third-party distribution, installed as pip does it."""
    import subprocess

    folder = tmp_path_factory.mktemp("third")
    source, target = folder / "source", folder / "site"
    source.mkdir()
    (source / "somebodys_evaluators.py").write_text(THIRD)
    (source / "pyproject.toml").write_text(PYPROJECT)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No module named pip" in done.stderr:
        pytest.skip("no pip here to install a package with")
    assert not done.returncode, done.stderr
    return target


@pytest.fixture
def installed(third: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(third))


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_a_third_partys_evaluator_is_found_conforms_and_ranks(base: SearchRequest, tmp_path: Path) -> None:
    from autodistill.testing import EvaluatorConformance

    assert "surprise" in plugins.names("evaluators")

    class Suite(EvaluatorConformance):
        def evaluator(self):  # type: ignore[no-untyped-def]
            return plugins.load("evaluators", "surprise")

    for name in [name for name in dir(Suite) if name.startswith("test_")]:
        test = getattr(Suite(), name)
        (tmp_path / name).mkdir()
        test(*([tmp_path / name] if test.__code__.co_argcount > 1 else []))
    config = check_request(replace(base, name="third", task=None, metric="surprising"))
    assert (config.metric, config.direction) == ("surprising", "min")
    outcome = search(replace(base, name="third", task=None, metric="surprising"))
    assert all(row.figure("surprising") is not None for row in outcome.rows)
    assert all((row.documents or {})["metric"] == "surprising" for row in outcome.rows)


def test_a_small_box_reads_fewer_examples_and_says_so(base: SearchRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.search.setup.answering._ASKED_SHARE", 1e-9)
    plan = plan_search(replace(base, name="box", trials=None, tokens=None, time=300.0))["plan"]
    assert 0 <= plan["example_share"] < 0.01
    assert any("of the tasks' examples" in note for note in plan["notes"])
    whole = plan_search(replace(base, name="box", task=None))
    assert (whole["plan"]["example_share"], whole["speed"]["asked"]) == (1.0, 0.0)

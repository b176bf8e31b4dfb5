"""The whole path on a tiny teacher, in one process: the same log twice, and runs resumed, refused and exported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from autodistill.cli.summary import search_summary
from autodistill.data.dataset import TokenSet, load_split
from autodistill.distillation.training import trainer
from autodistill.errors import InputError, InterruptedSearchError, NothingFitsError, VerificationError
from autodistill.estimates import training_fit
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluators.memory import Memory
from autodistill.export.base import Ran
from autodistill.export.gguf import GgufExporter
from autodistill.hardware.budget import Budget, DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import detect, machine_name
from autodistill.models.config import spec_from_config
from autodistill.runs.events import RunEvent, SessionBegan, TeacherScored, read_events
from autodistill.runs.results.row import Decision, Row
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.sessions import by_phase
from autodistill.runs.standing import leaderboard_of
from autodistill.runs.test_split_ledger import recorded_test_openings
from autodistill.search.callbacks import Callback, TrialStarted
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.explain import explain
from autodistill.search.finish import test_split as held_out
from autodistill.search.finish.export_run import export_run
from autodistill.search.preview import plan_search
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import Outcome, _deadline, search
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import RungReport
from autodistill.testing import save_tiny_teacher, tiny_config, tiny_text
from autodistill.units import parse_bytes
from autodistill.utils.storage import Storage
from tests.runs.results.test_table import read_parquet
from tests.search.test_stopped import figures

TIMES = ("time", "seconds", "train_seconds", "steps", "latency_ms", "tokens_per_second", "answer_ms")
TOLD = ("latency_detail", "latency_doubts", "memory_parts")  # from the same measurements


# Most of these tests use these three of the declared space's eight deployments, because each takes time.
FEW = ("gguf-q8_0", "gguf-q4_0", "bits: 4, group_size: 32")
SPACES = Path(__file__).parents[2] / "search_spaces"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    teacher = save_tiny_teacher(folder / "teacher", layers=5)
    lines = (SPACES / "declared.yaml").read_text(encoding="utf-8").splitlines()
    few = [line for line in lines if not line.lstrip().startswith("- {runtime") or any(name in line for name in FEW)]
    (folder / "few.yaml").write_text("\n".join(few), encoding="utf-8")
    return teacher, tiny_text(folder / "text", documents=30, sentences=24), folder / "cache"


def request(inputs: tuple[Path, Path, Path], out: Path, **changes: object) -> SearchRequest:
    teacher, text, cache = inputs
    fields: dict[str, object] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "space": str(text.parent / "few.yaml"),
        "teacher": str(teacher),
        "data": str(text),
        "trials": 3,
        "tokens": 2304,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": cache,
    }
    return SearchRequest(**(fields | changes))  # type: ignore[arg-type]


SMALL = """
name: small
dimensions:
  init.depth: {low: 0.6, high: 0.8, step: 0.2}
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [logit_kd]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a space of one deployment, for tests that are not about deployments: each takes seconds."""
    path = tmp_path_factory.mktemp("small") / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def free_memory() -> Iterator[None]:
    """Fix the free memory: searches plan by it and record it, and other processes change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autodistill.hardware.machine._free", lambda cgroup: 4 * 10**9)
        yield


@pytest.fixture(scope="module")
def outcome(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("runs")
    return search(request(inputs, out)), out


class Said(Observer):
    """Keeps the lines that the user sees, with a mark before phases."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def phase(self, name: str) -> None:
        self.lines.append(f"# {name}")


def without_times(value: object) -> object:
    """Return a value without its times and without the resident memory of a runtime, which differs by some pages."""
    if isinstance(value, dict):
        resident = ("memory_bytes",) if value.get("memory_source") == "measured" else ()
        left_out = (*TIMES, *TOLD, *resident)
        return {key: without_times(item) for key, item in value.items() if key not in left_out and "ttft" not in key}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def events(out: Path) -> list[object]:
    return [without_times(json.loads(line)) for line in (out / "run" / "trials.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_was_promised(outcome: tuple[Outcome, Path]) -> None:
    run = outcome[1] / "run"
    for name in ("search.json", "trials.jsonl", "leaderboard.parquet", "report.md", "student/gguf/student.gguf"):
        assert (run / name).is_file(), name
    document = outcome[0].document
    for key in ("best", "rows", "baseline", "teacher", "rejected", "failed", "budget", "plan", "seconds", "paths"):
        assert key in document
    assert set(document["seconds"]) == {
        *("load", "solve", "plan", "cache", "train", "evaluate", "export", "overhead", "total")
    }
    json.dumps(document, allow_nan=False)
    assert {row.row_id for row in read_parquet(run / "leaderboard.parquet")} == {row.row_id for row in outcome[0].rows}
    name = json.loads((run / "search.json").read_text())["teacher"]["name"]
    fields = GGUFReader(run / "student" / "gguf" / "student.gguf").fields
    assert fields["general.name"].contents() == f"Student of {name}"


def test_the_best_row_is_exported_and_generates(outcome: tuple[Outcome, Path]) -> None:
    best, folder = outcome[0].finish.best, outcome[1] / "run" / "student" / "huggingface"
    assert best.feasible
    assert best.kind in ("student", "baseline")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The miller", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1] == prompt.shape[1] + 5
    assert outcome[0].finish.checks["gguf"].agreement > 0.9
    assert abs(outcome[0].finish.checks["gguf"].excess) < 0.02


def test_the_teacher_is_a_row_under_each_deployment(outcome: tuple[Outcome, Path]) -> None:
    assert len([row for row in outcome[0].rows if row.kind == "teacher"]) == len(FEW)


def test_the_test_split_was_opened_once(outcome: tuple[Outcome, Path]) -> None:
    assert [opening["run"] for opening in recorded_test_openings(outcome[1])] == ["run"]
    assert {row.split for row in outcome[0].rows} == {"validation"}
    kinds = [row.kind for row in outcome[0].finish.test]
    assert {"teacher", "initial"} < set(kinds)


def test_figures_on_test_are_of_the_test_split_as_transformers_alone_finds_them(
    inputs: tuple[Path, Path, Path], outcome: tuple[Outcome, Path]
) -> None:
    header = json.loads((outcome[1] / "run" / "search.json").read_text())
    folder = inputs[2] / "data" / header["data"]["fingerprint"]
    test, validation = (load_split(folder, name).head(header["plan"]["test_tokens"]) for name in ("test", "validation"))
    model = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.float32)

    def figures(data: TokenSet, model: Any = model) -> tuple[float, float]:
        """Return a model's accuracy and perplexity of next tokens; the teacher's by default."""
        ids = torch.from_numpy(data.tokens.astype("int64"))
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].double()
        right = (logits.argmax(-1) == ids[:, 1:]).double().mean()
        surprise = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return float(right), float(surprise.exp())

    rows = outcome[0].finish.test
    teacher, other = figures(test), figures(validation)
    assert abs(teacher[1] / other[1] - 1) > 5e-3, "the two splits cannot be told apart"
    plain = next(row for row in rows if row.kind == "teacher")
    # The teacher's row is for weights in 16 bits.
    assert plain.accuracy == pytest.approx(teacher[0], abs=2e-3)
    assert plain.perplexity == pytest.approx(teacher[1], rel=1e-3)
    # The student's row is for what was trained and exported. The row next to it is for the student before training.
    exported = AutoModelForCausalLM.from_pretrained(outcome[1] / "run" / "student" / "huggingface", dtype=torch.float32)
    best, (_, surprise) = outcome[0].finish.best, figures(test, exported)
    begun, trained = (next(row for row in rows if row.trial == trial) for trial in ("initial", best.trial))
    assert trained.perplexity == pytest.approx(surprise, rel=0.05), "four bits and 16 are near to each other"
    assert begun.perplexity > 1.1 * surprise
    # Its agreement compares its own outputs for the same tokens.
    assert plain.agreement == pytest.approx(1, abs=0.02)
    for row in rows:
        assert row.split == "test"
        assert row.retention == pytest.approx((row.accuracy or 0) / teacher[0], rel=1e-6)


@pytest.mark.slow  # tests/search/test_kill.py checks it for a smaller search, over two processes
def test_two_runs_give_the_same_log_but_for_times(
    inputs: tuple[Path, Path, Path], outcome: tuple[Outcome, Path], tmp_path: Path
) -> None:
    search(request(inputs, tmp_path))
    assert events(tmp_path) == events(outcome[1])


def test_a_finished_run_is_refused_without_resume_and_changed_with(
    inputs: tuple[Path, Path, Path], outcome: tuple[Outcome, Path]
) -> None:
    with pytest.raises(InputError, match="--resume"):
        search(request(inputs, outcome[1]))
    with pytest.raises(InputError, match="another data"):
        check_request(request(inputs, outcome[1], resume=True, data="pydoc"))
    with pytest.raises(InputError, match="another budget"):
        check_request(request(inputs, outcome[1], resume=True, budget=Budget(memory_bytes=10**9, context=256)))
    with pytest.raises(InputError, match="planned with 3 trials"):
        check_request(request(inputs, outcome[1], resume=True, trials=2))
    with pytest.raises(InputError, match="another sampler"):
        check_request(request(inputs, outcome[1], resume=True, sampler="random"))


@pytest.mark.slow
def test_a_finished_search_is_extended_and_says_that_its_test_is_spent(
    inputs: tuple[Path, Path, Path], outcome: tuple[Outcome, Path], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(outcome[1], out)
    # The last test row is removed from the log, so the test split must be opened again, whichever row is best.
    log = out / "run" / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    last = max(place for place, line in enumerate(lines) if json.loads(line)["event"] == "test")
    log.write_text("".join(lines[:last] + lines[last + 1 :]))
    before = {row.row_id: row for row in outcome[0].rows}
    said = Said()
    longer = search(request(inputs, out, resume=True, trials=5, confirm=1), said)
    spent = "this run's test split was used before (1 time)"
    (warned,) = (place for place, line in enumerate(said.lines) if line.startswith(spent))
    assert warned < said.lines.index("# trials")
    proposed = {row.trial for row in longer.rows if row.kind == "student"}
    assert len(proposed) == 5  # without rejected ones
    assert {row.trial for row in before.values() if row.kind == "student"} < proposed
    # Finished training is neither repeated nor lost.
    kept = {row.row_id: row for row in longer.rows if row.full}
    full = [row for row in before.values() if row.full]
    assert all(kept[row.row_id].accuracy == row.accuracy for row in full)
    trained = [event for event in events(out) if event["event"] == "rung" and event["trial"] == "b000"]
    assert len(trained) == 1
    assert json.loads((out / "run" / "search.json").read_text())["plan"]["trials"] == 5
    assert any("test split was used before (1 time)" in note for note in longer.document["notes"])
    # The best few and the baseline were trained on another seed. The exported student is the best on both seeds.
    confirmed = longer.document["confirmation"]
    assert {item["trial"] for item in confirmed} > {"b000"}
    assert all(item["seeds"] == [0, 1] for item in confirmed)
    assert confirmed[0]["trial"] == longer.finish.best.trial
    by_id = {row.row_id: row for row in longer.rows}
    for item in confirmed:
        again = by_id[item["row_id"].replace(item["trial"], f"{item['trial']}s1")]
        assert (again.kind, again.seed) == ("confirmation", 1)
        assert again.perplexity != by_id[item["row_id"]].perplexity  # another order of the data


@pytest.mark.slow
def test_a_search_of_16_bit_states_is_the_same_when_it_is_interrupted(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a trial's segments, the optimiser's moments are in a checkpoint. Random draws follow from its steps."""
    made: list[str] = []
    means, make, report = training_fit.training_fits, trainer.adamw, Campaign.report
    # The tiny students would also fit in faster ways.
    monkeypatch.setattr(training_fit, "training_fits", partial(means, setups=[(True, "bfloat16")]))
    monkeypatch.setattr(trainer, "adamw", lambda groups, state: made.append(state) or make(groups, state))
    # The plan has two rungs, and both trials pass the first.
    whole = search(request(inputs, tmp_path / "whole", space=small, trials=2, tokens=3072))
    plan = whole.document["plan"]
    assert (plan["optimizer_state"], set(made), tuple(plan["keep"])) == ("bfloat16", {"bfloat16"}, (2,))
    asked, reports = request(inputs, tmp_path / "cut", space=small, trials=2, tokens=3072), []

    def interrupted(self: Campaign, assignment: Assignment, found: Any) -> None:
        report(self, assignment, found)
        reports.append(assignment)
        if len(reports) in (2, 4):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Campaign, "report", interrupted)
        for resume in (False, True):
            with pytest.raises(InterruptedSearchError):
                search(replace(asked, resume=resume))
    assert figures(search(replace(asked, resume=True))) == figures(whole)
    assert set(made) == {"bfloat16"}


@pytest.fixture
def buckets(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return a function that starts the server of a kind of object store, and gives the URI of a prefix on it."""
    return request.getfixturevalue


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_search_goes_on_elsewhere_with_nothing_but_what_a_bucket_has(
    inputs: tuple[Path, Path, Path],
    outcome: tuple[Outcome, Path],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    buckets: Callable[[str], str],
) -> None:
    """It goes on from other folders, as on another machine.

    The result equals an uninterrupted search without a storage.
    """
    reports, report = [], Campaign.report

    def interrupted(self: Campaign, assignment: Assignment, found: Any) -> None:
        report(self, assignment, found)
        reports.append((assignment.task.id, assignment.rung, assignment.deployment))
        if len(reports) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Campaign, "report", interrupted)
    bucket = buckets(kind)
    asked = request(inputs, tmp_path / "here", storage=bucket)
    with pytest.raises(InterruptedSearchError):
        search(asked)
    there = tmp_path / "there"
    with pytest.raises(InputError, match="there is a run on"):
        check_request(replace(asked, runs=there))
    resumed = search(replace(asked, runs=there, cache=tmp_path / "cache", resume=True))
    assert figures(resumed) == figures(outcome[0])
    assert len(set(reports)) == len(reports), "a segment was run twice"
    kept = {key.partition("/")[0] for key in Storage(bucket).at("run").list()}
    assert kept >= {"events", "search.json"}
    assert "lease.json" not in kept


def test_a_longer_search_that_is_killed_goes_on_as_what_it_was_extended_to(
    inputs: tuple[Path, Path, Path],
    outcome: tuple[Outcome, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain --resume does not extend it again; nor does the printed command, which repeats its --time."""
    out = tmp_path / "runs"
    shutil.copytree(outcome[1], out)

    def interrupt(campaign: Campaign, setting: object, until: float | None) -> None:
        assert until is not None
        raise KeyboardInterrupt

    def seen() -> float:
        """Return the seconds of the latest session up to its last sign of life."""
        return float(json.loads((out / "run" / "alive.json").read_text())["seconds"]["total"])

    boxes, totals, plans = [], [seen()], []
    assert totals[0] >= outcome[0].document["seconds"]["total"]
    for time_seconds in (300.0, 300.0, None):
        again = request(inputs, out, resume=True, trials=None, tokens=None, time=time_seconds)
        with monkeypatch.context() as patch:
            patch.setattr("autodistill.search.workplace.run_inline", interrupt)
            with pytest.raises(InterruptedSearchError):
                search(again)
        stored = json.loads((out / "run" / "search.json").read_text())
        assert "seconds" not in stored, "it has not finished"
        boxes.append(stored["box"])
        plans.append(stored["plan"])
        totals.append(seen())
    assert boxes[0] == boxes[1] == boxes[2]
    assert boxes[0]["seconds"] == 300.0
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["trials"] > outcome[0].document["plan"]["trials"]
    log = [json.loads(line) for line in (out / "run" / "trials.jsonl").read_text().splitlines()]
    ended = [event["seconds"]["total"] for event in log if event["event"] == "ended"]
    assert ended == totals[:3]
    assert by_phase(read_events(log))["total"] == pytest.approx(sum(ended))


def test_a_budget_that_holds_no_trial_says_so() -> None:
    """One finished run gets less time than export and test take. For another, an earlier session used up the time."""
    lines: list[str] = []
    observer, clock = SimpleNamespace(line=lines.append), SimpleNamespace(started=100.0)
    plan = SimpleNamespace(seconds={"export": 20.0, "test": 10.0})

    def deadline(seconds: float | None, earlier: Sequence[RunEvent] = ()) -> float | None:
        planned: Any = SimpleNamespace(document={"box": {"seconds": seconds, "since": 0.0}}, plan=plan)
        return _deadline(planned, earlier, cast(Any, clock), cast(Any, observer))

    assert deadline(None) is None
    assert deadline(40.0) == 110.0
    assert lines == []
    assert deadline(25.0) == 95.0
    assert deadline(40.0, [SessionBegan(time=0.0), TeacherScored(teacher_accuracy=0.5, time=15.0)]) == 95.0
    assert "25.0s does not hold export and test (30.0s)" in lines[0]
    assert "40.0s was used up before (15.0s)" in lines[1]


def test_a_ray_of_its_own_is_left_where_a_search_fails_before_its_trials(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    class Local:
        def __init__(self, machine: object, dashboard: object = None) -> None:
            left.append("started")

        def leave(self) -> None:
            left.append("left")

    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autodistill.search.runners.ray_local.LocalRay", Local)
    monkeypatch.setattr("autodistill.search.search.prepare_trials", interrupt)
    with pytest.raises(InterruptedSearchError, match="To go on"):
        search(request(inputs, tmp_path, runner="ray"))
    assert left == ["started", "left"]


def test_nothing_fits_is_known_before_anything_is_loaded(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autodistill.search.prepare.load", lambda config, place: pytest.fail("a model was loaded"))
    with pytest.raises(
        NothingFitsError, match=r"nothing fits, not even the student with the lowest requirements \(.*\).*over the"
    ):
        search(request(inputs, tmp_path, budget=Budget(memory_bytes=10**6, context=256)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_was_trained_is_reported_where_nothing_fits_once_measured(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every runtime turns out to take a hundred times the budget."""

    evaluate = Memory.evaluate

    def large(self: Memory, subject: Subject) -> tuple[Measurement, ...]:
        (found,) = evaluate(self, subject)
        if subject.artifact is None:
            return (found,)
        return (replace(found, value=100 * subject.budget.memory_bytes, source="measured"),)

    monkeypatch.setattr(Memory, "evaluate", large)
    with pytest.raises(NothingFitsError, match=r"100 times the limit.*report\.md"):
        search(request(inputs, tmp_path, space="declared", strategy="logit_kd", trials=None))
    # With what the runtimes turned out to take, the teacher does not fit either.
    assert "Nothing fits the budget." in (tmp_path / "run" / "report.md").read_text()
    assert not (tmp_path / "run" / "student" / "gguf").exists()
    students = [row for row in read_parquet(tmp_path / "run" / "leaderboard.parquet") if row.kind == "baseline"]
    assert len(students) == 8
    assert not any(row.feasible for row in students)
    assert sum(row.memory_source == "measured" for row in students) == 3


WITHOUT_BASELINE = """
name: small
dimensions:
  init.depth: {low: 0.5, high: 0.75, step: 0.25}
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
  finishing: {choices: {none: null, q8_0: {format: gguf-q8_0, bits: 8, group_size: 32}}}
deployments:
  - {runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
"""


@pytest.mark.slow  # two searches; scoring it again would give the same figures
def test_a_student_that_begins_as_the_teacher_is_not_scored_again_untrained(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    build = held_out.begun
    monkeypatch.setattr(held_out, "begun", lambda *given: made.append(given) or build(*given))
    found = {}
    for depth in ("1.0", "0.8"):
        shape = f"{{choices: {{only: {depth}}}}}"
        (tmp_path / "space.yaml").write_text(WITHOUT_BASELINE.replace("{low: 0.5, high: 0.75, step: 0.25}", shape))
        out = tmp_path / depth
        outcome = search(request(inputs, out, space=str(tmp_path / "space.yaml"), trials=1))
        # Another teacher row has the deployment that suits the teacher best. It does not count here.
        (student,) = (row for row in outcome.finish.test if row.kind == "student")
        alike = {row.kind: row for row in outcome.finish.test if row.deployment == student.deployment}
        quantized, initial = alike["teacher"], alike["initial"]
        assert initial.strategy == student.strategy
        found[depth] = [(row.accuracy, row.perplexity, row.agreement) for row in (initial, quantized)]
    whole, cut = found.values()
    assert whole[0] == whole[1]
    assert cut[0] != cut[1]
    assert len(made) == 1


@pytest.mark.slow
def test_where_no_trial_reaches_the_end_the_best_of_the_furthest_rung_is_exported(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is like a machine that becomes so slow that the time ends after two trials.

    A longer search goes on with them.
    """
    report = Campaign.report

    def last(self: Campaign, assignment: Assignment, found: RungReport) -> Decision:
        decision = report(self, assignment, found)
        if sum(trial.rung >= 0 for trial in self.trials.values()) == 2:
            self.time_budget.close()
        return decision

    (tmp_path / "space.yaml").write_text(WITHOUT_BASELINE)
    asked = request(
        inputs,
        tmp_path / "runs",
        space=str(tmp_path / "space.yaml"),
        time=3600.0,
        trials=3,
        tokens=4608,
        explore=1.0,
        command="autodistill search",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Campaign, "report", last)
        outcome = search(asked)
    best, plan = outcome.finish.best, outcome.document["plan"]
    judged = [row for row in outcome.rows if row.kind == "student"]
    assert len(judged) == 2
    assert (best.full, best.train_tokens) == (False, plan["rungs"][0])
    assert best.accuracy == max(row.accuracy or 0.0 for row in judged)
    assert set(outcome.finish.paths) == {"gguf", "huggingface"}
    assert [row.kind for row in outcome.finish.test] == ["teacher"] * 2 + ["initial", "student"]
    assert outcome.finish.gains.baseline is None
    (said,) = (note for note in outcome.document["notes"] if note.startswith("no trial reached the end"))
    assert f"after {best.fidelity:.0%} of the plan's tokens ({best.train_tokens:,} of {plan['tokens']:,})" in said
    assert said.endswith("to continue for the same time again: autodistill search --resume")
    run = RunFolder.open(tmp_path / "runs", "run")
    assert f"{best.fidelity:.0%} of the plan's tokens only" in (run.path / "report.md").read_text()
    teachers = [row.accuracy or 0.0 for row in outcome.rows if row.kind == "teacher"]
    assert (best.accuracy or 0.0) > max(teachers), "the tiny teacher is random"
    assert not any("quantising the teacher beats" in note for note in outcome.document["notes"])
    assert f"for {best.fidelity:.0%} of the tokens" in (run.student("huggingface") / "README.md").read_text()
    assert said in search_summary(outcome.document, *leaderboard_of(run), 120).replace("No trial", "no trial")
    assert explain(run).describe()
    # This is another packing of the same student, which is compared with the evaluated weights.
    again = export_run(run, None, ["huggingface"], tmp_path / "again")["huggingface"]
    weights = [load_file(path / "model.safetensors") for path in (again, outcome.finish.paths["huggingface"])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    longer = search(replace(asked, resume=True))
    assert longer.finish.best.full
    assert not any("no trial reached the end" in note for note in longer.document["notes"])


def test_a_box_in_which_nothing_is_trained_says_how_to_go_on(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Campaign, "next", lambda self: None)
    with pytest.raises(NothingFitsError, match=r"no training reached a rung: go on with --resume and more"):
        search(request(inputs, tmp_path / "students", space=small, students_only=True))
    # What needs no training still fits.
    asked = request(inputs, tmp_path / "all", space=small, time=600.0, command="autodistill search")
    outcome = search(asked)
    assert outcome.finish.best.kind == "teacher"
    (said,) = (note for note in outcome.document["notes"] if note.startswith("no training reached a rung: "))
    assert said.endswith("to continue for the same time again: autodistill search --resume")


@pytest.mark.slow
def test_the_full_recipe_alone(inputs: tuple[Path, Path, Path], small: str, tmp_path: Path) -> None:
    result = search(request(inputs, tmp_path, space=small, strategy="full_recipe", trials=None))
    assert result.finish.best.name == "full_recipe"


def test_a_strategy_that_the_teacher_does_not_allow_is_refused_before_anything_is_loaded(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("init: {depth: 0.8}\ndistillation: {attention: {kind: relations, relation_heads: 5}}")
    monkeypatch.setattr("autodistill.search.prepare.load", lambda config, place: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=r"relation_heads is 5, which does not divide the student's 64 channels"):
        search(request(inputs, tmp_path, strategy=str(path), trials=None))


@pytest.mark.slow
def test_an_online_strategy_that_is_distilled_alone_caches_nothing(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    result = search(request(inputs, tmp_path, space=small, strategy="gkd", trials=None, cache=cache))
    assert {row.kind for row in result.rows} == {"teacher", "baseline", "initial"}
    assert result.finish.best.name == "gkd"
    assert not (cache / "teacher-outputs").exists()
    assert "approximate" not in result.finish.best.other


@pytest.mark.slow
def test_what_stands_in_for_a_divergence_is_in_the_record(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path
) -> None:
    strategy = tmp_path / "mode_seeking.yaml"
    strategy.write_text("init: {depth: 0.8}\ndistillation: {divergence: reverse_kl, signal_tokens: 8}")
    result = search(request(inputs, tmp_path, space=small, strategy=str(strategy), trials=None))
    said = "reverse_kl of 8 tokens and the rest as one outcome: a lower bound"
    assert {row.other["approximate"] for row in result.rows if row.kind == "baseline"} == {said}
    stored = read_parquet(tmp_path / "run" / "leaderboard.parquet")
    assert {row.other.get("approximate") for row in stored} == {said, None}


def teacher_of_few_tokens(folder: Path, text: Path) -> Path:
    """Write a tiny teacher whose tokens are the characters of a text, fewer than 64."""
    characters = sorted(set("".join(path.read_text() for path in text.iterdir())))
    words = {piece: place for place, piece in enumerate(["</s>", "<unk>", *characters])}
    assert len(words) < 64
    pieces = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    pieces.decoder = decoders.Fuse()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        changes = {"vocab_size": len(words), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        AutoModelForCausalLM.from_config(LlamaConfig(**(tiny_config() | changes))).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_of_a_teacher_of_few_tokens_the_likeliest_are_all(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The default asks for the 64 likeliest tokens. Such a teacher is not refused, and all its tokens are exact."""
    teacher, space = teacher_of_few_tokens(tmp_path / "teacher", inputs[1]), tmp_path / "space.yaml"
    gguf = "{runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}"
    plain = "{runtime: transformers, format: huggingface, bits: 16, group_size: 0}"  # GGUF cannot hold such a tokenizer
    space.write_text(SMALL.replace(gguf, plain))
    result = search(request((teacher, *inputs[1:]), tmp_path, space=str(space)))
    assert result.document["rejected"] == []
    trained = [row for row in result.rows if row.strategy is not None]
    recipes = [row.strategy.distillation for row in trained if row.strategy is not None]
    assert {(recipe.signal, recipe.signal_tokens) for recipe in recipes} == {("top-k", 64)}
    assert any(row.fidelity == 1.0 for row in trained)
    assert not any("approximate" in row.other for row in result.rows)


def test_a_search_that_ends_once_more_with_what_it_had_does_not_open_the_test_split_again(
    inputs: tuple[Path, Path, Path],
    outcome: tuple[Outcome, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(outcome[1], out)
    logged = [event for event in events(out) if event["event"] == "test"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "autodistill.search.finish.test_split.score_teacher",
            lambda *given, **more: pytest.fail("the teacher was scored"),
        )
        said = Said()
        again = search(request(inputs, out, resume=True), said)
    assert not any("test split was used before" in line for line in said.lines)
    assert [event for event in events(out) if event["event"] == "test"] == logged
    assert [opening["run"] for opening in recorded_test_openings(out)] == ["run"]
    assert again.document["test"] == outcome[0].document["test"]
    for name in ("exported", "gain_over_untrained", "gain_over_baseline"):
        assert again.document[name] == outcome[0].document[name]
    assert not any("test split was opened before" in note for note in again.document["notes"])


def test_a_run_that_goes_on_has_its_plan_already(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave out --plan or --resume"):
        plan_search(request(inputs, tmp_path, resume=True))


def test_a_plan_writes_no_run(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    document = plan_search(request(inputs, tmp_path))
    assert document["plan"]["trials"] == 3
    assert document["cache_bytes"] > 0
    parts = document["training_bytes"]
    assert {name.rpartition("_")[2] for name in parts} == {"bytes"}
    assert max(parts.values()) == parts["total_bytes"] <= sum(parts.values()) - parts["total_bytes"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_records_that_are_left_out_are_told_of_in_the_plan_and_at_the_end(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path
) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(inputs[1].iterdir())]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, None, " "]), encoding="utf-8")
    asked = request(inputs, tmp_path, data=str(data), trials=1, tokens=1024)
    told = "2 of 32 records are left out: they have no text"
    document = plan_search(asked)
    assert told in document["notes"]
    assert document["baselines"] == ["hand_designed"]
    assert told in search(replace(asked, space=small)).document["notes"]


@pytest.mark.slow
def test_a_search_may_rank_by_answers_in_writing(inputs: tuple[Path, Path, Path], small: str, tmp_path: Path) -> None:
    task = "reasoning-gym:chain_sum?size=300&max_terms=3&max_digits=1&worked=false"
    outcome = search(request(inputs, tmp_path, space=small, data=task, metric="exact_match", trials=1, tokens=1024))
    rows = read_parquet(tmp_path / "run" / "leaderboard.parquet")
    full = [row for row in rows if row.full]
    assert {row.kind for row in full} >= {"teacher", "baseline"}
    for row in full:
        assert row.figure("exact_match") is not None
        assert row.documents is not None
        assert row.documents["metric"] == "exact_match"
        assert sum(row.documents["sum"]) / sum(row.documents["count"]) == row.figure("exact_match")
    document = outcome.document
    assert all("exact_match" in row["other"] for row in document["test"])
    assert "exact_match" in search_summary(document, *leaderboard_of(RunFolder.open(tmp_path, "run")), 120)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "exact_match" in report


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("here", [True, False])
def test_limits_of_latency_are_held_to_the_device(inputs: tuple[Path, Path, Path], tmp_path: Path, here: bool) -> None:
    pi = find_device("pi 5", devices())
    device = replace(pi, name=machine_name(detect(), accelerated=False)) if here else pi
    limits = parse_latency("ttft_p50=9s,tpot_p99=9s@streams=2")
    budget = DeviceBudget(memory_bytes=10**9, context=256, device=device, latency=limits)
    found = search(request(inputs, tmp_path, budget=budget, strategy="logit_kd", trials=None))
    (before,) = [row for row in found.rows if row.trial == "b000" and row.row_id != found.finish.best.row_id][:1]
    assert (before.latency_source, before.machine) == ("predicted", device.name)
    best = found.finish.best
    assert best.latency_source == "measured"
    assert best.machine == machine_name(detect(), accelerated=False)
    assert best.other["latency_detail"]["loads"][0]["streams"] == 1
    assert best.other["latency_ms_predicted"] > 0
    # On this machine measurement shows that the limits are met. On another only prediction does, and the notes say so.
    measured = [load for load in best.other["latency_detail"]["loads"] if load["streams"] == 2]
    same = best.other["tpot_p99@streams=2"] == pytest.approx(measured[0]["tpot_p99_ms"], rel=1e-9)
    assert same == here
    assert any("met by prediction only" in note for note in found.finish.notes) != here
    tight = replace(budget, latency=parse_latency("1us"))
    with pytest.raises(NothingFitsError, match="is too slow for"):
        search(request(inputs, tmp_path, budget=tight, strategy="logit_kd", trials=None, name="tight"))


@pytest.mark.slow  # it times a runtime in processes that load torch; `test_finish` and `test_memory` check each part
@pytest.mark.timed
def test_a_search_for_a_gpu_that_is_not_here_stays_with_what_is_predicted_of_its_memory(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    device = find_device("4090", devices())
    budget = DeviceBudget(memory_bytes=300_000_000, context=256, device=device, latency=parse_latency("9s"))
    found = search(request(inputs, tmp_path, space="declared", budget=budget, strategy="logit_kd", trials=None))
    best = found.finish.best
    spec, deployment = spec_from_config(best.shape), best.deployment
    guess = memory(spec, deployment, context=256, batch=1, on_gpu=True).total_bytes
    assert (best.memory_bytes, best.memory_source, best.feasible) == (guess, "predicted", True)
    assert {row.other["memory_on"] for row in found.rows} == {"discrete-gpu"}
    assert any("predicted, not measured on a GPU" in note for note in found.finish.notes)
    # As a process, transformers would break the budget by itself. Nothing was timed on a GPU.
    held = {row.deployment.runtime: row for row in found.rows if row.trial == "b000"}
    assert held["transformers"].feasible
    assert "published rates" in held["transformers"].other["latency_assumed"]
    assert "latency_assumed" not in held["llama.cpp"].other


@pytest.mark.slow
def test_a_search_of_several_objectives_ends_in_a_front(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path
) -> None:
    second = "  - {runtime: llama.cpp, format: gguf-q4_0, bits: 4, group_size: 32}\n"
    space = Path(small).with_name("two.yaml")
    space.write_text(SMALL.replace("baselines:", second + "baselines:"))
    asked = request(inputs, tmp_path, space=str(space), objectives="accuracy,memory,latency", device="pi 5")
    document = search(asked).document
    rows = [Row.from_json(row) for row in document["rows"]]
    names = {row["row_id"] for row in document["front"]}
    figures = {
        row.row_id: (-(row.accuracy or 0), row.memory_bytes or 0, row.figure("latency_ms_predicted") or 0)
        for row in rows
        if row.full and row.feasible and row.kind != "confirmation"
    }
    beaten = {
        one
        for one, mine in figures.items()
        for other in figures.values()
        if other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
    }
    assert names == set(figures) - beaten
    assert min(figures.values())[0] == min(figures[name][0] for name in names)
    stored = json.loads((tmp_path / "run" / "search.json").read_text())
    assert stored["objectives"] == ["accuracy", "memory", "latency"]
    assert stored["device"]["name"] == "Raspberry Pi 5 8GB"
    # The prediction uses the roofline of the named device, whatever this machine is.
    best = Row.from_json(document["best"])
    spec = spec_from_config(json.loads((tmp_path / "run" / "student" / "huggingface" / "config.json").read_text()))
    guess = speed(spec, best.deployment, find_device("pi 5", devices()), context=256)
    assert best.figure("latency_ms_predicted") == pytest.approx(guess.decode_ms_high)
    rungs = [event for event in events(tmp_path) if event["event"] == "rung"]
    assert rungs
    assert all(len(event["further"]) == 2 for event in rungs)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Pareto front" in text
    assert "Latencies are predicted for Raspberry Pi 5 8GB" in text
    board, metric = leaderboard_of(RunFolder.open(tmp_path, "run"))
    assert {one.row.row_id for one in board if one.front} == names
    assert "* on the front" in search_summary(document, board, metric, 120)
    with pytest.raises(InputError, match="another objectives"):
        check_request(replace(asked, resume=True, objectives="accuracy"))
    with pytest.raises(InputError, match="another device"):
        check_request(replace(asked, resume=True, device="4090"))
    assert check_request(replace(asked, resume=True, objectives=None, device=None)).device == find_device(
        "pi 5", devices()
    )


@pytest.mark.slow
def test_sequences_have_the_length_that_was_asked_for(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path
) -> None:
    lengths = {"sequence_length": 64, "step_tokens": 128, "tokens": 1152}
    short = request(inputs, tmp_path, space=small, strategy="logit_kd", trials=None, **lengths)
    outcome = search(short)
    plan = outcome.document["plan"]
    assert (plan["sequence_length"], plan["batch_tokens"], plan["tokens"]) == (64, 128, 1152)
    # In each sequence, all tokens except the first are predicted.
    scored = next(row.documents for row in outcome.rows if row.kind == "baseline")
    assert scored is not None
    assert sum(scored["count"]) == plan["eval_tokens"] // 64 * 63
    with pytest.raises(InputError, match="planned with 64 sequence-length, not 128"):
        check_request(replace(short, resume=True, sequence_length=128))


def test_sequences_that_cannot_be_are_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--sequence-length must be at least 8 tokens, not 1"):
        check_request(request(inputs, tmp_path, sequence_length=1))
    with pytest.raises(InputError, match=r"reads at most \d+ tokens at once, and sequences have 999999"):
        check_request(request(inputs, tmp_path, sequence_length=999999))
    with pytest.raises(InputError, match="--step-tokens must be a multiple of 64, a sequence, not 250"):
        check_request(request(inputs, tmp_path, sequence_length=64, step_tokens=250))


@pytest.mark.parametrize("do", [search, plan_search])
def test_a_cache_limit_that_holds_nothing_is_refused_before_anything_is_measured(
    inputs: tuple[Path, Path, Path], tmp_path: Path, do: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []

    class Phases(Observer):
        def phase(self, name: str) -> None:
            phases.append(name)

    with pytest.raises(InputError, match=r"at least .* for trials of 2,304 tokens.*--cache-limit \d+\wB or more") as no:
        do(request(inputs, tmp_path, cache_limit=1000), Phases())
    assert phases == ["loading teacher and data"]
    assert not (tmp_path / "run").exists()
    least = parse_bytes(str(no.value).rpartition("--cache-limit ")[2].removesuffix(" or more"))
    # Nine sequences have 255 predicted tokens each, and a token needs at least 4 bytes for each of 64 likeliest ones.
    assert 9 * 255 * 64 * 4 < least < 10**8
    monkeypatch.setattr("autodistill.search.setup.measure_plan.measure_speed", measured)
    with pytest.raises(AssertionError, match="measured"):
        do(request(inputs, tmp_path, cache_limit=least), Phases())


def measured(*given: object, **more: object) -> None:
    raise AssertionError("measured")


@pytest.mark.parametrize(("box", "more"), [(1.0, {"trials": None, "tokens": None}), (3.0, {"trials": 2})])
def test_a_box_without_room_for_the_baseline_is_refused_before_anything_is_trained(
    inputs: tuple[Path, Path, Path], tmp_path: Path, box: float, more: dict[str, object]
) -> None:
    with pytest.raises(InputError, match=r"is too short for the training of the baseline.*give --time \d+s or more"):
        search(request(inputs, tmp_path, time=box, **more))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_anything_is_planned_leaves_nothing(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(config: object, place: object) -> None:
        assert (tmp_path / "run").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("autodistill.search.prepare.load", interrupt)
    with pytest.raises(InterruptedSearchError, match="nothing to resume"):
        search(request(inputs, tmp_path))
    assert not (tmp_path / "run").exists()

    def refuse(config: object, place: object) -> None:
        raise InputError("bad data")

    monkeypatch.setattr("autodistill.search.prepare.load", refuse)
    with pytest.raises(InputError, match="bad data"):
        search(request(inputs, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_run_that_is_held_is_not_gone_on_with(
    inputs: tuple[Path, Path, Path],
    outcome: tuple[Outcome, Path],
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
) -> None:
    """No cluster is joined for it, and no model is loaded."""
    monkeypatch.setattr("autodistill.search.prepare.load", lambda config, place: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        "autodistill.search.runners.ray_cluster.join", lambda *given: pytest.fail("a cluster was joined")
    )
    with (
        RunFolder.open(outcome[1], "run", lock=True),
        pytest.raises(InputError, match=rf"held by the running process {os.getpid()}: wait for it, or stop it"),
    ):
        search(request(inputs, outcome[1], resume=True, ray_address=address, runner="ray" if address else "inline"))


def test_a_cluster_that_is_not_joined_leaves_no_run(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(*given: object) -> None:
        assert RunFolder(tmp_path, "run").state == "under way"
        raise InputError("nobody answers")

    monkeypatch.setattr("autodistill.search.runners.ray_cluster.join", join)
    with pytest.raises(InputError, match="nobody answers"):
        search(request(inputs, tmp_path, ray_address="10.0.0.1:6379", runner="ray"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_small_data_does_not_fail_after_training(small: str, tmp_path: Path) -> None:
    """The validation split is one document, of a few hundred tokens."""
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=5)
    text = tiny_text(tmp_path / "text", documents=8, sentences=12)
    asked = request((teacher, text, tmp_path / "cache"), tmp_path / "runs", space=small, trials=1, tokens=1024)
    found = search(replace(asked, sequence_length=64, step_tokens=128, name="small"))
    check = found.finish.checks["gguf"]
    assert check.positions < 500
    recorded = json.loads((tmp_path / "runs" / "small" / "search.json").read_text())["runtime"]["gguf"]
    assert recorded == asdict(check)
    assert f"of {check.positions}" in (tmp_path / "runs" / "small" / "report.md").read_text()


class FirstFile(Callback):
    """Notes whether something exported was on disk when the first trial began."""

    def __init__(self, run: Path) -> None:
        self.files = run / "student" / "gguf"
        self.found: list[bool] = []

    def trial_started(self, event: TrialStarted) -> None:
        self.found.append((self.files / "student.gguf").is_file() and (self.files / "export.json").is_file())


def _died(*_: object) -> None:
    raise VerificationError("llama.cpp died while it ran student.gguf")


def _garbage(self: GgufExporter, path: Path, sequences: np.ndarray, *_: object) -> Ran:
    shape = (len(sequences), sequences.shape[1] - 1)
    return Ran(np.full(shape, 7, np.int32), np.full(shape, 99.0), "seven")


@pytest.mark.parametrize(
    ("run", "said"),
    [(_died, "llama.cpp died"), (_garbage, "nats a token more of")],
    ids=["dies", "computes something else"],
)
def test_a_runtime_that_refuses_everything_ends_no_search(
    inputs: tuple[Path, Path, Path], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run, said: str
) -> None:
    monkeypatch.setattr(GgufExporter, "run", run)
    lines, first = Said(), FirstFile(tmp_path / "run")
    found = search(request(inputs, tmp_path, space=small, trials=1), lines, callbacks=[first])
    assert first.found[0]
    assert found.finish.paths["gguf"].is_file()
    assert "gguf" not in found.finish.checks
    assert any(said in note for note in found.finish.notes)
    assert (found.finish.best.kind in ("teacher", "initial")) == (run is _garbage)
    assert json.loads((tmp_path / "run" / "student" / "gguf" / "export.json").read_text())["proof"] is None
    assert any("is exported without proof" in line for line in lines.lines)

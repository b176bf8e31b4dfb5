"""A divergence and an evaluator that a Python session registers: in a search, in its rows, and after a resume."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from autodistill import plugins
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.evaluation.base import Measurement, Quantity, Subject, register_evaluator
from autodistill.hardware.budget import Budget
from autodistill.objects.run import Run
from autodistill.runs.events import TrialAdded
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.run_folder import RunFolder
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.divergence import register_divergence
from autodistill.testing import save_tiny_teacher, tiny_text


class Surprise:
    """The largest surprise of a token."""

    name = "surprise"
    needs = "scores"
    measures: ClassVar = {"surprise": Quantity("nats", "min")}

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        if subject.scores is None:
            raise ValueError("surprise is read from scores")
        value = self.scale * float(subject.scores.nll.max())
        return (Measurement(name="surprise", value=value, unit="nats", direction="min", source="simulated"),)

    def supports(self, deployment: Deployment) -> bool:
        return True


def total_variation(log_p, log_q):
    return (log_p.exp() - log_q.exp()).abs().sum(dim=1) / 2


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    """Provide a session that has registered both."""
    register_divergence("tvd", nonnegative=True)(total_variation)
    register_evaluator(Surprise())
    yield
    forget()


def forget() -> None:
    for kind in plugins.KINDS:
        for name in plugins.registered(kind):
            plugins.forget(kind, name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher", layers=2, ffn=192)
    tiny_text(folder / "text", documents=30, sentences=24)
    space = {
        "dimensions": {
            "distillation.divergence": {"choices": ["tvd"]},
            "distillation.learning_rate": {"low": 1e-4, "high": 1e-3},
        },
        "deployments": [{"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}],
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder


def request(inputs: Path, out: Path, **changes: object) -> SearchRequest:
    fields: dict[str, object] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "teacher": str(inputs / "teacher"),
        "data": str(inputs / "text"),
        "space": str(inputs / "space.yaml"),
        "evaluators": ("surprise",),
        "trials": 1,
        "tokens": 1024,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": inputs / "cache",
    }
    return SearchRequest(**(fields | changes))  # type: ignore[arg-type]


def resumed(asked: SearchRequest) -> SearchRequest:
    return SearchRequest(
        budget=asked.budget, runs=asked.runs, cache=asked.cache, name="run", resume=True, runner=asked.runner
    )


def check_rows(out: Path) -> None:
    """Check that students' rows say what they were made with, even if the session's objects are not registered."""
    sources = {kind: plugins.registered(kind) for kind in plugins.KINDS}
    forget()
    rows = RunFolder.open(out, "run").events.rows()
    trained = [row for row in rows if row.kind in DISTILLED]
    assert trained
    for row in trained:
        assert row.other["surprise"] > 0
        assert row.other["registered"] == {
            "tvd": sources["divergences"]["tvd"].source,
            "surprise": sources["evaluators"]["surprise"].source,
        }
    asked = json.loads((out / "run" / "search.json").read_text())["asked"]
    assert asked["divergences"] == {"tvd": sources["divergences"]["tvd"].source}
    assert list(asked["evaluators"]) == ["surprise"]


def test_a_search_uses_both_and_is_resumed_with_the_same(inputs: Path, tmp_path: Path) -> None:
    asked = request(inputs, tmp_path)
    search(asked)
    assert check_request(resumed(asked)).requested.divergences[0].name == "tvd"
    register_evaluator(Surprise(2.0))
    with pytest.raises(InputError, match=r"evaluator 'surprise' .* the one given now has another source"):
        check_request(resumed(asked))
    register_evaluator(Surprise())
    register_divergence("tvd")(lambda log_p, log_q: 2 * total_variation(log_p, log_q))
    with pytest.raises(InputError, match=r"divergence 'tvd' .* the one given now has another source"):
        check_request(resumed(asked))
    register_divergence("tvd", nonnegative=True)(total_variation)
    check_rows(tmp_path)
    with pytest.raises(InputError, match=r"used the divergence 'tvd' .* resume it from Python, .* register_divergence"):
        check_request(resumed(asked))


def test_a_row_is_reproduced_with_the_same_ones_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "results" / "runs"
    search(request(inputs, runs))
    run = Run(RunFolder.open(runs, "run"), cache=inputs / "cache")
    row = next(student.id for student in run.students if student.kind == "student")
    made = run.reproduce(row)
    assert made["verdict"] == "identical"
    assert made["row"] == row

    monkeypatch.chdir(tmp_path)

    def refused(words: str) -> None:
        """Check that the command line in this session refuses, in one line and with exit code 2."""
        assert main(["reproduce", row, "--cache", str(inputs / "cache")]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(words, said)
        assert "resume" not in said

    register_evaluator(Surprise(2.0))
    refused(r"evaluator 'surprise' .* the one given now has another source \(\w+\): give the same one$")
    plugins.forget("evaluators", "surprise")
    refused(r"used the evaluator 'surprise' .* Run\.reproduce, with the same one given again by register_evaluator$")
    plugins.forget("divergences", "tvd")
    refused(r"used the divergence 'tvd' .* reproduce its rows from Python .* register_divergence$")


def test_a_divergence_that_gives_no_number_fails_its_trial_in_one_line_and_the_search_goes_on(
    inputs: Path, tmp_path: Path
) -> None:
    """It gives numbers for distributions that are near each other.

    Those that it is tried on before any work are near.
    """
    register_divergence("root")(lambda log_p, log_q: (0.27 - total_variation(log_p, log_q)).sqrt())
    space = yaml.safe_load((inputs / "space.yaml").read_text())
    space["dimensions"]["distillation.divergence"]["choices"].append("root")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    outcome = search(request(inputs, tmp_path, space=str(tmp_path / "space.yaml"), trials=4, evaluators=None))
    divergences = {
        event.trial: event.strategy.distillation.divergence
        for event in RunFolder.open(tmp_path, "run").events.all()
        if isinstance(event, TrialAdded) and event.strategy
    }
    failed = {one["trial"]: one["reason"] for one in outcome.document["failed"]}
    assert {divergences[trial] for trial in failed} == {"root"}
    assert set(failed.values()) == {"nan: loss or gradient was not finite in 3 steps in a row"}
    assert outcome.finish.best.strategy.distillation.divergence == "tvd"


@pytest.mark.slow
def test_ray_s_serialiser_carries_both_to_the_workers(inputs: Path, tmp_path: Path) -> None:
    """Functions and classes of a notebook, for example, belong to no module of a worker."""
    here: dict = {**vars(sys.modules[__name__]), "__name__": "__main__"}
    exec(inspect.getsource(total_variation) + inspect.getsource(Surprise), here)
    forget()
    register_divergence("tvd")(here["total_variation"])
    register_evaluator(here["Surprise"]())
    search(request(inputs, tmp_path, runner="ray"))
    check_rows(tmp_path)


def test_one_that_ranks_is_sent_and_recorded_without_being_named_again(inputs: Path, tmp_path: Path) -> None:
    config = check_request(request(inputs, tmp_path, evaluators=None, metric="surprise"))
    assert config.metric == "surprise"
    assert [type(item).__name__ for item in config.requested.evaluators] == ["Surprise"]
    assert config.requested.record["evaluators"] == {"surprise": plugins.registered("evaluators")["surprise"].source}
    installed = check_request(request(inputs, tmp_path, evaluators=("agreement",)))
    assert "agreement" in installed.requested.evaluators
    assert installed.requested.record["evaluators"] == {"agreement": None}


def test_an_evaluator_that_cannot_be_used_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no evaluator 'nothing'"):
        check_request(request(inputs, tmp_path, evaluators=("nothing",)))
    with pytest.raises(InputError, match="latency reads an exported file"):
        check_request(request(inputs, tmp_path, evaluators=("latency",)))
    with pytest.raises(InputError, match="it is a class: give an object of it"):
        register_evaluator(Surprise)  # type: ignore[type-var]
    with pytest.raises(InputError, match="it lacks needs"):
        register_evaluator(type("One", (), {"name": "one"})())
    double = Surprise()
    double.name, double.measures = "double", {"perplexity": Quantity("nats", "min")}  # type: ignore[misc]
    register_evaluator(double)
    with pytest.raises(InputError, match="the evaluator perplexity measures perplexity already"):
        check_request(request(inputs, tmp_path, evaluators=("double",)))

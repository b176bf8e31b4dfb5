"""A search from Python: a data set and a model in memory, a space of objects, and callbacks."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.data.loaded import data_reference
from autodistill.distillation.teacher.loaded import teacher_reference
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.search.callbacks import (
    Callback,
    Exported,
    RungReached,
    SearchFinished,
    Step,
    TrialFinished,
    TrialStarted,
)
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.domains import Choice, Float
from autodistill.strategy.space import Space, load_space, space_reference
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json


class Recorded(Callback):
    def __init__(self) -> None:
        self.started: list[TrialStarted] = []
        self.steps: list[Step] = []
        self.rungs: list[RungReached] = []
        self.finished: list[TrialFinished] = []
        self.exports: list[Exported] = []
        self.ends: list[SearchFinished] = []

    def trial_started(self, event: TrialStarted) -> None:
        self.started.append(event)

    def step(self, event: Step) -> None:
        self.steps.append(event)

    def rung_reached(self, event: RungReached) -> None:
        self.rungs.append(event)

    def trial_finished(self, event: TrialFinished) -> None:
        self.finished.append(event)

    def exported(self, event: Exported) -> None:
        self.exports.append(event)

    def search_finished(self, event: SearchFinished) -> None:
        self.ends.append(event)


class Broken(Callback):
    def step(self, event: Step) -> None:
        raise ZeroDivisionError("a person's mistake")


@pytest.mark.slow
def test_all_of_it_at_once(tmp_path: Path, logged: list[logging.LogRecord]) -> None:
    folder, cache = save_tiny_teacher(tmp_path / "tiny", layers=5), tmp_path / "cache"
    texts = [path.read_text() for path in sorted(tiny_text(tmp_path / "text", documents=30, sentences=24).iterdir())]
    space = Space(
        {"init.depth": Float(0.4, 0.8, step=0.2), "distillation.divergence": Choice("forward_kl", "reverse_kl")},
        name="python",
        deployments=[Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)],
    )
    request = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=teacher_reference(
            AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), cache
        ),
        data=data_reference(datasets.Dataset.from_dict({"text": texts}), cache),
        space=space_reference(space, cache),
        trials=2,
        tokens=2304,
        runner="inline",
        runs=tmp_path / "runs",
        name="run",
        cache=cache,
        students_only=True,
    )
    seen = Recorded()
    outcome = search(request, callbacks=[Broken(), seen])

    assert {event.trial for event in seen.started} == {row.trial for row in outcome.rows if row.kind == "student"}
    assert [event.trial for event in seen.started] == list(dict.fromkeys(event.trial for event in seen.rungs))
    by_rung = {(event.trial, event.rung): event for event in seen.rungs}
    assert len(by_rung) == len(seen.rungs)
    assert all(event.metric == "accuracy" and event.value is not None for event in seen.rungs)
    assert seen.steps
    assert all(step.tokens <= 2304 and step.loss > 0 for step in seen.steps)
    assert {event.trial: event.status for event in seen.finished} == {
        row.trial: row.status for row in outcome.rows if row.kind == "student"
    }
    completed = [event for event in seen.finished if event.status == "completed"]
    best = outcome.finish.best
    assert best.figure("accuracy") == max(event.value for event in completed if event.value is not None)
    assert {event.container: event.path for event in seen.exports} == dict(outcome.finish.paths)
    (end,) = seen.ends
    assert (end.best, end.run) == (best, tmp_path / "runs" / "run")
    assert (end.run / "report.md").exists()

    # A failure in a callback is reported once, by name, and does not end the search.
    (failure,) = [one for one in logged if one.name == "autodistill" and one.levelno >= logging.ERROR]
    assert "the callback Broken failed in step" in failure.getMessage()
    # The run stores the space that was searched, and can read it again.
    asked = read_json(end.run / "search.json")
    assert asked["space_hash"] == load_space(asked["space"]).hash == space.hash
    assert Space.from_json(asked["space_definition"]) == space


def test_a_callback_is_one() -> None:
    request = SearchRequest(budget=Budget(memory_bytes=10**9))
    with pytest.raises(InputError, match=r"callbacks\[0\] is of type function: give objects of classes that inherit"):
        search(request, callbacks=[lambda event: None])  # type: ignore[list-item]

"""A search sends its trials while it runs, and continues if a tracker is down."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.objects.run import run_search
from autodistill.runs.run_folder import RunFolder
from autodistill.trackers import base
from autodistill.trackers.trials import Point, TrackedTrial
from tests.search.conftest import untimed
from tests.search.small_search import small_inputs, small_request


class Broken(base.Tracker):
    """A tracker that is down."""

    asked = 0

    def send(self, trial: TrackedTrial, points: Sequence[Point], *, first: bool, last: bool) -> None:
        """Fail like a client that cannot reach its server."""
        type(self).asked += 1
        raise ConnectionError("no route to host\nwith much beneath")

    @classmethod
    def check(cls, place: str | None) -> None:
        """Take any place."""

    @property
    def opened_by(self) -> str:
        """Nothing."""
        return ""

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_inputs(tmp_path_factory.mktemp("live"))


def test_trials_are_in_the_tracker_when_a_search_ends(inputs: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    with untimed():
        result = run_search(small_request(inputs, tmp_path, trials=2, log=["tensorboard"]))
    log = [json.loads(line) for line in (result.path / "trials.jsonl").read_text().splitlines()]
    rungs = [event for event in log if event["event"] == "rung"]
    assert rungs
    for trial in {rung["trial"] for rung in rungs}:
        steps = [step for rung in rungs if rung["trial"] == trial for step in rung["steps"]]
        found = reader.EventAccumulator(str(result.path / "tensorboard" / trial), size_guidance={reader.TENSORS: 0})
        found.Reload()
        read = {event.step: float(make_ndarray(event.tensor_proto)) for event in found.Tensors("train/loss")}
        assert read == pytest.approx({step["tokens"]: step["loss"] for step in steps}, rel=1e-6)
        assert found.Tensors("final/accuracy")


@pytest.mark.slow
def test_a_run_that_goes_on_has_each_trial_once(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with untimed():
        result = run_search(small_request(inputs, tmp_path, log=["tensorboard"]))
        before = {path.parent.name for path in (result.path / "tensorboard").rglob("events*")}
        result.resume(trials=2, log=["tensorboard"])
    files = [path.parent.name for path in (result.path / "tensorboard").rglob("events*")]
    assert before == {"teacher", "t000"}
    assert sorted(files) == ["t000", "t001", "teacher"]


def test_a_tracker_that_is_down_is_told_of_once_and_ends_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(base.Destination, "parse", classmethod(lambda cls, text: cls(name=text, place=None)))
    monkeypatch.setattr(base.Destination, "open", lambda self, run: Broken(run, None))
    with untimed():
        result = run_search(small_request(inputs, tmp_path, trials=2, log=["mlflow"]))
    told = [record.getMessage() for record in logged if "takes no trials" in record.getMessage()]
    assert told == [
        "mlflow takes no trials (ConnectionError: no route to host); the search goes on, and further failures of it "
        f"are not reported: autodistill log {result.path} --to mlflow sends them later"
    ]
    assert Broken.asked >= 2
    assert RunFolder.open(tmp_path, "run").state == "finished"


def test_a_destination_that_is_none_is_refused_before_any_work(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a known tracker"):
        run_search(small_request(inputs, tmp_path, log=["neptune"]))
    assert not (tmp_path / "run").exists()

"""Trackers received what the log says, according to each tracker's own reader."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autodistill.cli.app import main
from autodistill.errors import AutoDistillError, InputError, MissingDependencyError
from autodistill.runs.run_folder import RunFolder
from autodistill.trackers.base import Destination
from autodistill.trackers.trials import tracked_trials
from autodistill.trackers.writing import send_run

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
NAME = "search-20261126-101010"


def logged(event: str) -> list[dict[str, Any]]:
    """Return events of one kind from the reference run's log, unchanged."""
    lines = (REFERENCE / NAME / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [found for found in map(json.loads, lines) if found["event"] == event]


def losses(trial: str) -> dict[int, float]:
    """Return a trial's loss from the log, by tokens."""
    steps = [step for rung in logged("rung") if rung["trial"] == trial for step in rung["steps"]]
    return {step["tokens"]: step["loss"] for step in steps}


def values(trial: str) -> dict[int, float]:
    """Return the metric at a trial's rungs from the log, by tokens."""
    found = {rung["tokens"]: rung["value"] for rung in logged("rung") if rung["trial"] == trial}
    return {tokens: value for tokens, value in found.items() if value is not None}


def most_accurate(trial: str) -> float:
    rows = [row["row"] for row in logged("row") if row["row"]["trial"] == trial and row["row"]["kind"] != "initial"]
    rows = [row for row in rows if row["feasible"]]
    longest = max(row["fidelity"] for row in rows)
    return max(row["accuracy"] for row in rows if row["fidelity"] == longest)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A copy of the reference run. Trackers may write next to it."""
    shutil.copytree(REFERENCE / NAME, tmp_path / "runs" / NAME)
    return RunFolder.open(tmp_path / "runs", NAME)


def test_trials_are_those_of_the_log(run: RunFolder) -> None:
    trials = {trial.trial: trial for trial in tracked_trials(run)}
    assert list(trials) == ["teacher", *(event["trial"] for event in logged("trial"))]
    ends = {event["trial"]: event["status"] for event in logged("status")}
    assert {name: trial.status for name, trial in trials.items() if name != "teacher"} == {
        name: ends.get(name) for name in trials if name != "teacher"
    }
    first = logged("trial")[0]
    mine = trials[first["trial"]]
    assert mine.params["distillation.learning_rate"] == first["strategy"]["distillation"]["learning_rate"]
    assert mine.params["distillation.temperature.start"] == first["strategy"]["distillation"]["temperature"]["start"]
    assert (mine.params["seed"], mine.tags["run"], mine.tags["metric"]) == (first["seed"], NAME, "accuracy")
    for name, trial in trials.items():
        assert {point.tokens: point.values["train/loss"] for point in trial.points if "train/loss" in point.values} == {
            tokens: loss for tokens, loss in losses(name).items() if loss is not None
        }
        tokens = [point.tokens for point in trial.points]
        assert tokens == sorted(set(tokens))


class TestTensorBoard:
    def scalars(self, folder: Path) -> dict[str, dict[int, float]]:
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        found = reader.EventAccumulator(str(folder), size_guidance={reader.TENSORS: 0, reader.SCALARS: 0})
        found.Reload()
        from tensorboard.util.tensor_util import make_ndarray

        return {
            tag: {event.step: float(make_ndarray(event.tensor_proto)) for event in found.Tensors(tag)}
            for tag in found.Tags()["tensors"]
            if found.summary_metadata.get(tag) and found.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
        }

    def test_its_own_reader_finds_what_the_log_says(self, run: RunFolder, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        count, opened_by = send_run(run, f"tensorboard={tmp_path / 'board'}")
        assert count == len(logged("trial")) + 1
        assert opened_by == f"tensorboard --logdir {tmp_path / 'board'}"
        for event in logged("trial"):
            trial = event["trial"]
            read = self.scalars(tmp_path / "board" / NAME / trial)
            assert read.get("train/loss", {}) == pytest.approx(losses(trial), rel=1e-6)
            assert read.get("rung/accuracy", {}) == pytest.approx(values(trial), rel=1e-6)
            if values(trial):
                assert [*read["final/accuracy"].values()] == pytest.approx([most_accurate(trial)], rel=1e-6)

    def test_settings_are_those_that_its_plugin_reads(self, run: RunFolder, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams import plugin_data_pb2

        send_run(run, f"tensorboard={tmp_path / 'board'}")
        event = next(one for one in logged("trial") if values(one["trial"]))
        found = EventAccumulator(str(tmp_path / "board" / NAME / event["trial"]))
        found.Reload()
        content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        data = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        asked = event["strategy"]["distillation"]["learning_rate"]
        assert data["distillation.learning_rate"].number_value == pytest.approx(asked)

    def test_a_second_time_leaves_one_copy(self, run: RunFolder, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        for _ in range(2):
            send_run(run, f"tensorboard={tmp_path}")
        trial = next(one["trial"] for one in logged("trial") if values(one["trial"]))
        assert len([*(tmp_path / NAME / trial).glob("events*")]) == 1

    def test_another_run_of_this_name_is_not_mixed_in(self, run: RunFolder, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        send_run(run, f"tensorboard={tmp_path / 'board'}")
        before = {path: path.read_bytes() for path in (tmp_path / "board").rglob("*") if path.is_file()}
        log = run.events.path
        first, _, rest = log.read_text().partition("\n")
        log.write_text(json.dumps(json.loads(first) | {"time": 1.0}) + "\n" + rest)
        with pytest.raises(InputError, match="has the trials of another run of this name"):
            send_run(RunFolder.open(run.path.parent, NAME), f"tensorboard={tmp_path / 'board'}")
        assert {path: path.read_bytes() for path in (tmp_path / "board").rglob("*") if path.is_file()} == before

    def test_a_place_that_is_a_file_is_refused(self, run: RunFolder, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        (tmp_path / "board").write_text("mine")
        with pytest.raises(InputError, match="is a file: name a folder"):
            send_run(run, f"tensorboard={tmp_path / 'board'}")

    def test_the_command_line_prints_how_it_is_opened(self, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("tensorboard")
        assert main(["log", str(run.path), "--to", "tensorboard"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"open: tensorboard --logdir {run.path / 'tensorboard'}"
        assert (run.path / "tensorboard" / "teacher").is_dir()


class TestMlflow:
    def test_its_own_client_finds_what_the_log_says_once(
        self, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = pytest.importorskip("mlflow")
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        for _ in range(2):
            count, opened_by = send_run(run, f"mlflow={uri}")
        assert opened_by == f"mlflow ui --backend-store-uri {uri}"
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(NAME)
        found = {one.data.tags["autodistill.trial"]: one for one in client.search_runs([experiment.experiment_id])}
        assert len(found) == count == len(logged("trial")) + 1
        states = {"completed": "FINISHED", "stopped": "FINISHED", "rejected": "KILLED", "failed": "FAILED"}
        for event in logged("status"):
            assert found[event["trial"]].info.status == states[event["status"]]
        for event in logged("trial"):
            one = found[event["trial"]]
            assert one.data.params["distillation.learning_rate"] == str(
                event["strategy"]["distillation"]["learning_rate"]
            )
            history = client.get_metric_history(one.info.run_id, "train/loss")
            assert [metric.step for metric in history] == sorted(losses(event["trial"])), "each is there once"
            assert {metric.step: metric.value for metric in history} == losses(event["trial"])
            rungs = {m.step: m.value for m in client.get_metric_history(one.info.run_id, "rung/accuracy")}
            assert rungs == values(event["trial"])
            if rungs:
                assert one.data.metrics["final/accuracy"] == most_accurate(event["trial"])

    @pytest.mark.parametrize("place", ["mlruns", "file:///tmp/mlruns"])
    def test_a_folder_is_refused(self, run: RunFolder, place: str) -> None:
        pytest.importorskip("mlflow")
        with pytest.raises(InputError, match="MLflow keeps runs in a database or on a server"):
            send_run(run, f"mlflow={place}")

    @pytest.mark.slow
    def test_a_server_that_is_down_is_said_in_one_line(self, run: RunFolder) -> None:
        pytest.importorskip("mlflow")
        with pytest.raises(AutoDistillError, match=r"did not take the trials .*is it running") as raised:
            send_run(run, "mlflow=http://127.0.0.1:9")
        assert "\n" not in str(raised.value)


class TestWandb:
    def records(self, path: Path) -> list[Any]:
        """Return the messages of a wandb file.

        The file is a log like LevelDB's, in blocks of 32 KiB, after a header of seven bytes.
        """
        messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
        data, place, parts, found = path.read_bytes(), 7, [], []
        assert data[:4] == b":W&B"
        while place + 7 <= len(data):
            if (left := 2**15 - place % 2**15) < 7:
                place += left
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            parts.append(data[place + 7 : place + 7 + length])
            place += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                found.append(messages.Record.FromString(b"".join(parts)))
                parts = []
        return found

    def test_what_it_wrote_offline_is_what_the_log_says(
        self, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("wandb")
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        count, opened_by = send_run(run, "wandb=mine")
        files = {path.stem.rpartition("-")[2]: path for path in (tmp_path / "wandb").rglob("*.wandb")}
        assert len(files) == count == len(logged("trial")) + 1
        assert opened_by.startswith("wandb sync ")
        for event in logged("trial"):
            loss, config, summary = {}, {}, {}
            for record in self.records(files[event["trial"]]):
                if record.HasField("history"):
                    items = {
                        item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
                    }
                    if "train/loss" in items:
                        loss[record.history.step.num or items["_step"]] = items["train/loss"]
                if record.HasField("run"):
                    assert (record.run.project, record.run.run_group) == ("mine", NAME)
                    config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                if record.HasField("summary"):
                    summary |= {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.summary.update}
            assert loss == losses(event["trial"])
            assert config["distillation.learning_rate"] == event["strategy"]["distillation"]["learning_rate"]
            if values(event["trial"]):
                assert summary["final/accuracy"] == most_accurate(event["trial"])

    def test_a_name_of_no_project_is_refused(self, run: RunFolder) -> None:
        pytest.importorskip("wandb")
        with pytest.raises(InputError, match="names no project"):
            send_run(run, "wandb=a/b")


def test_a_run_without_a_trial_has_nothing_to_log(run: RunFolder) -> None:
    run.events.path.write_text("")
    with pytest.raises(InputError, match="has no trial yet"):
        send_run(RunFolder.open(run.path.parent, NAME), "tensorboard")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "'tensorbord' is not a known tracker: choose one of mlflow, tensorboard, wandb"),
        ("tensorboard=", "names no place"),
        ("tensorboard=board,mlflow", "more than one tracker"),
        ("tensorboard=a\udcff", "not UTF-8 text"),
        ("=here", "is not a known tracker"),
    ],
)
def test_a_destination_that_is_none_is_refused_with_what_there_is(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Destination.parse(text)


def test_a_package_that_is_not_installed_is_named_with_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'autodistill-search\[wandb\]'"):
        Destination.parse("wandb")


def test_nothing_of_a_tracker_is_imported_by_the_command_line() -> None:
    program = (
        "import sys, autodistill.cli.app, autodistill.trackers.writing;"
        "print({'mlflow', 'wandb', 'tensorboard', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ, timeout=120
    )
    assert done.stdout.strip() == "set()"


def test_figures_that_are_not_finite_are_left_out(run: RunFolder) -> None:
    assert all(
        math.isfinite(value) for trial in tracked_trials(run) for p in trial.points for value in p.values.values()
    )

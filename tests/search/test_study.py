"""A run's trials are a study that Optuna can read, with their points, values, rungs and ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.study import write_study

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


@pytest.mark.parametrize("name", ["search-20261128-114135", "search-20261126-101010"])
def test_a_journal_has_the_trials_of_the_log(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / "study.journal"
    assert write_study(RunFolder.open(REFERENCE, name), path) == f"optuna-dashboard {path}"
    assert [one.name for one in path.parent.iterdir()] == ["study.journal"]
    study = optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(path))))
    log = [json.loads(line) for line in (REFERENCE / name / "trials.jsonl").read_text().splitlines()]
    added = [one for one in log if one["event"] == "trial" and one["point"] is not None]
    assert [trial.user_attrs["trial"] for trial in study.trials] == [one["trial"] for one in added]
    for trial, event in zip(study.trials, added, strict=True):
        assert trial.params == event["point"]
        rungs = [one for one in log if one["event"] == "rung" and one["trial"] == event["trial"]]
        assert trial.intermediate_values == {one["tokens"]: one["value"] for one in rungs}
    best = max(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]), key=lambda trial: trial.value or 0.0)
    assert study.best_trial.number == best.number


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists, and a journal is only ever added to: name another file with --out"):
        write_study(RunFolder.open(REFERENCE, "search-20261128-114135"), path)
    assert path.read_text() == "mine"


def test_a_run_without_a_trial_has_no_study(tmp_path: Path) -> None:
    run = shutil.copytree(REFERENCE / "search-20261128-114135", tmp_path / "run")
    (run / "trials.jsonl").write_text("")
    with pytest.raises(InputError, match="has no trial within its space yet"):
        write_study(RunFolder.open(tmp_path, "run"), tmp_path / "study.journal")

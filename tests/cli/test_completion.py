"""What a shell is offered to complete a word, asked for as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autodistill.cli.app import main
from autodistill.cli.completion import devices, formats, runs
from autodistill.hardware.catalog import devices as known
from autodistill.hardware.lookup import find_device
from autodistill.quantization.formats import FORMATS
from autodistill.runs.run_folder import known_runs


class Given:
    """The context of a command with these options."""

    def __init__(self, **params: object) -> None:
        self.params = params


def _asked(line: str) -> dict[str, str]:
    """Return the environment in which bash asks for the last word of a line."""
    place = str(len(line.split(" ")) - 1)
    return {"_AUTODISTILL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": place}


@pytest.fixture
def folder(tmp_path):
    for run in ("results/runs/first", "results/runs/second", "other/third", "other/no run"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "search.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("autodistill ex", ["explain", "export"]),
        ("autodistill explain ", ["first", "second"]),
        ("autodistill leaderboard s", ["second"]),
        ("autodistill search --runs other --warm-start ", ["third"]),
        ("autodistill report --out page.html --runs other ", ["third"]),
        ("autodistill compare ", ["first", "second"]),
        ("autodistill search --device 409", ["4090"]),
        ("autodistill distill logit", ["logit_kd"]),
        ("autodistill search --space def", ["default"]),
        ("autodistill estimate --format gguf-q8", ["gguf-q8_0"]),
    ],
)
def test_bash_is_offered_what_there_is(folder, line, expected, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    for name, value in _asked(line).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert not ended.value.code
    assert capfd.readouterr().out.split() == expected


def test_the_command_itself_answers_bash(folder):
    environment = os.environ | _asked("autodistill explain ")
    call = [sys.executable, "-m", "autodistill"]
    found = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["first", "second"]


def test_every_device_that_is_offered_is_found():
    offered = devices(Given(), "")
    assert {"local", "4090", "raspberry-pi-5", "CM5"} <= set(offered)
    assert not any(" " in name for name in offered)
    for name in offered:
        assert name == "local" or find_device(name, known())


def test_own_devices_are_offered_and_a_file_that_cannot_be_read_is_no_complaint(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("devices: {My board: {class: board, memory: 8GB, bandwidth: 50GB, rates: {fp16: 1}}}")
    assert devices(Given(devices=[own]), "MY") == ["my-board"]
    assert devices(Given(devices=[tmp_path / "none.yaml"]), "4090") == []


def test_names_begin_like_the_word_whatever_its_case(folder):
    assert runs(Given(runs=str(folder / "results" / "runs")), "F") == ["first"]
    assert runs(Given(runs=folder / "results" / "runs"), "") == known_runs(folder / "results" / "runs")
    assert runs(Given(), "f") == []
    assert set(formats(Given(), "")) == set(FORMATS)

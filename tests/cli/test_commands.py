"""From a command line to a request. What a hub is asked for is decided before a library that would ask is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.cli.app import main
from autodistill.cli.commands import explain, exported_text, leaderboard
from autodistill.cli.options import typed

SPACE = """
dimensions:
  init.depth: {{low: 0.5, high: 0.75}}
deployments:
  - {{runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}}
baselines: [{baseline}]
"""
SMALLER = """
dimensions:
  init.source: {choices: [teacher, pretrained]}
  init.model: {choices: [owner/name], when: {init.source: [pretrained]}}
  init.depth: {choices: [1.0]}
deployments:
  - {runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}
"""
PRETRAINED = "init: {{source: pretrained, model: {model}, depth: 1.0}}"


def test_a_command_takes_its_values_from_the_call_and_what_was_typed_from_the_context() -> None:
    """Typer below 0.29 keeps the text of a path in the context, and makes the path for the call alone."""
    sources = {"out": SimpleNamespace(name="COMMANDLINE"), "runs": SimpleNamespace(name="DEFAULT")}
    context: Any = SimpleNamespace(params={"out": "x", "runs": "r"}, get_parameter_source=sources.get)
    assert typed(context, {"out": Path("x"), "runs": Path("r")}) == {"out": Path("x")}


class _StoppedError(Exception):
    """Raised at the point where the work would begin."""


def _stop() -> None:
    raise _StoppedError


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write spaces and strategies into the working folder: some begin from a model on a hub, some from none."""
    (tmp_path / "models" / "small").mkdir(parents=True)
    texts = {
        "local.yaml": PRETRAINED.format(model="models/small"),
        "hub.yaml": PRETRAINED.format(model="owner/name"),
        "plain.yaml": SPACE.format(baseline="hand_designed"),
        "baseline.yaml": SPACE.format(baseline="./hub.yaml"),
        "smaller.yaml": SMALLER,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "offline"),
    [
        ("search", True),
        ("search --metric accuracy", True),
        ("search --objectives accuracy,memory --space plain.yaml --baseline local.yaml", True),
        ("distill local.yaml", True),
        ("search --metric lm-eval:arc_easy", False),
        ("search --metric lm-eval:own.yaml:acc", False),
        ("search --objectives accuracy,\tlm-eval:arc_easy", False),
        ("search --space smaller.yaml", False),
        ("search --space baseline.yaml", False),
        ("search --baseline hand_designed --baseline hub.yaml", False),
        ("distill hub.yaml", False),
        ("distill logit_kd --metric lm-eval:arc_easy", False),
        ("search --data owner/name", False),
    ],
)
def test_a_hub_is_reached_where_anything_of_the_request_lies_on_one(
    files: Path, command: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr("autodistill.cli.app.open_view", _stop)
    with pytest.raises(_StoppedError):
        main([*command.split(" "), "--budget", "1GB"])
    assert [environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")] == ["1" if offline else None] * 2


def test_what_a_request_names_is_known_before_a_library_that_asks_hubs_is_imported(files: Path) -> None:
    given = {"metric": "lm-eval:arc_easy", "space": "smaller.yaml", "baseline": ["hub.yaml"]}
    program = (
        f"import sys\nfrom autodistill.cli.commands import hub_references\nprint(*hub_references({given}))\n"
        "print({'datasets', 'huggingface_hub', 'lm_eval', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=files, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["lm-eval:arc_easy owner/name owner/name", "set()"]


def test_a_run_may_be_given_by_its_folder() -> None:
    folder = Path(__file__).parents[2] / "results" / "postgresql" / "postgresql-175MB"
    assert explain(str(folder)) == explain(folder.name, runs=folder.parent)


@pytest.mark.slow
def test_what_is_asked_of_one_run_is_asked_of_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).parents[2] / "results" / "postgresql" / "postgresql-175MB"
    # The time of creation decides, not the names or the order in which they were copied.
    for name, created in (("b", "2026-11-02T00:00:00+00:00"), ("c", "2026-11-01T00:00:00+00:00")):
        shutil.copytree(shipped, tmp_path / "runs" / name)
        search = tmp_path / "runs" / name / "search.json"
        search.write_text(json.dumps(json.loads(search.read_text()) | {"created": created}))
    assert main(["explain", "--json", "--runs", "runs"]) == 0
    said = capsys.readouterr()
    assert said.err == "run b, the newest in runs\n"
    assert main(["explain", "b", "--json", "--runs", "runs"]) == 0
    assert capsys.readouterr() == (said.out, "")
    assert main(["report", "--runs", "runs", "--out", "page.html"]) == 0
    assert main(["study", "--runs", "runs"]) == 0
    assert Path("page.html").is_file()
    assert Path("b.journal").is_file()
    for command in ("explain", "report", "study", "log --to tensorboard", "export --to gguf --out students"):
        assert main(command.split()) == 2
        assert "there are no runs in results/runs: make one with autodistill search" in capsys.readouterr().err


def test_what_an_export_does_is_told_with_its_path_and_how_it_is_served(tmp_path: Path) -> None:
    proof = {
        "agreement": 0.995,
        "positions": 4000,
        "text": "words",
        "loss": 2.5,
        "excess": 0.01,
        "excess_stderr": 0.002,
    }
    for name, found in (("gguf", proof), ("onnx", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "export.json").write_text(json.dumps({"proof": found}))
    file = tmp_path / "gguf" / "student.gguf"
    file.write_bytes(b"GGUF")
    told = exported_text({"gguf": str(file), "onnx": str(tmp_path / "onnx")}).splitlines()
    assert told[0] == f"gguf: {file}"
    assert "student's token at 99.50% of 4,000 places, and a loss of 2.5000 nats a token (+0.0100 ± 0.0020)." in told[1]
    assert told[3] == "  not run, as asked"
    assert told[4] == f"To serve it: autodistill serve {file}"


def test_a_run_is_named_by_its_folder_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "search.json").write_text('{"metric": "accuracy", "direction": "max"}')
    monkeypatch.chdir(tmp_path)
    for name in ("./mine", str(tmp_path / "mine")):
        assert [run.path for run, _ in leaderboard([name])] == [tmp_path / "mine"]


REFERENCE = Path(__file__).parents[2] / "results" / "reference"
WHOLE, DAMAGED = "search-20261129-210357", "search-20261128-114135"


@pytest.mark.parametrize("damage", ["search.json", "trials.jsonl"])
def test_one_damaged_run_is_left_out_with_a_line_unless_it_was_named(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A damaged run used to end every command that reads all runs of a folder."""
    monkeypatch.chdir(tmp_path)
    for name in (WHOLE, DAMAGED):
        shutil.copytree(REFERENCE / name, tmp_path / "runs" / name)
    run = tmp_path / "runs" / DAMAGED
    (run / "leaderboard.parquet").unlink()
    (run / damage).write_text("{}\n" if damage == "search.json" else '{"event": "row"}\n')
    row = "t000x-gguf-q4_1"
    for line in (
        "pick --budget 1GB --runs runs",
        "leaderboard --runs runs",
        "leaderboard --merge --runs runs",
        *([f"show {row} --runs runs", "estimate --layers 2 --width 64 --heads 4 --ffn 128 --vocab 300 --runs runs"])
        * (damage == "trials.jsonl"),
    ):
        assert main(line.split()) == 0, line
        out, err = capfd.readouterr()
        (warned,) = (text for text in err.splitlines() if text.startswith("warning: "))
        assert warned.startswith(f"warning: the run {DAMAGED} is left out: "), line
        assert WHOLE in out or "estimate" in line
    named = (f"pick {WHOLE} {DAMAGED} --budget 1GB", f"leaderboard {WHOLE} {DAMAGED}", f"leaderboard --merge {DAMAGED}")
    for line in named:
        assert main([*line.split(), "--runs", "runs"]) == 2, line
        assert "warning" not in capfd.readouterr().err
    shutil.rmtree(tmp_path / "runs" / WHOLE)
    assert main(["pick", "--budget", "1GB", "--runs", "runs"]) == 2, "and where none is whole"

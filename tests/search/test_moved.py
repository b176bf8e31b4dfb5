"""A run whose inputs were given by relative paths: every command finds them from another folder, or says what moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import autodistill as ad
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.search import search
from autodistill.strategy.space import Space
from autodistill.testing import tiny_text
from tests.search import test_candidates

FOUND = {
    "search": ["search", "--resume", "--name", "run", "--runner", "inline", "--runs", "runs", "--cache", "cache"],
    "reproduce": ["reproduce", "candidate-gguf-file", "--runs", "runs", "--cache", "cache"],
    "cascade": ["cascade", "runs/run", "--rows", "t000-gguf-q4_0,teacher", "--cache", "cache"],
    "export": ["export", "runs/run", "--to", "huggingface", "--row", "teacher-gguf-f16", "--out", "OUT"],
    "report": ["report", "runs/run", "--out", "OUT.html"],
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which a search was run, with all of its inputs given by relative paths."""
    folder = tmp_path_factory.mktemp("begun")
    test_candidates.made(folder)
    tiny_text(folder / "text", documents=20, sentences=24)
    tiny_text(folder / "general", documents=4, sentences=24)
    space = Space({"distillation.learning_rate": {"choices": [0.5]}}, solved=True)
    (folder / "space.yaml").write_text(space.to_yaml())
    given = {"teacher": "teacher", "data": "./text", "space": "space.yaml", "general_text": "general"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        search(test_candidates.request(folder, **given, candidate=["made/student.gguf"]))
    return folder


@pytest.fixture
def moved(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return another working folder, which has the run and its cache. The inputs stay where they were."""
    for name in ("runs", "cache"):
        shutil.copytree(begun / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("autodistill.options.Path.home", lambda: tmp_path)
    yield tmp_path
    for path in begun.glob("*-moved"):
        path.rename(path.with_name(path.name.removesuffix("-moved")))


def _line(command: str, folder: Path) -> list[str]:
    return [word.replace("OUT", str(folder / "out")) for word in FOUND[command]]


@pytest.mark.parametrize("command", FOUND)
def test_every_command_finds_the_inputs_from_another_folder(
    moved: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_line(command, moved)) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "part", "option"),
    [
        ("search", "teacher", "--teacher"),
        ("search", "text", "--data"),
        ("search", "general", "--general-text"),
        ("search", "space.yaml", "--space"),
        ("reproduce", "teacher", "--teacher"),
        ("reproduce", "text", "--data"),
        ("reproduce", "general", "--general-text"),
        ("cascade", "teacher", "--teacher"),
        ("export", "teacher", "--teacher"),
    ],
)
def test_what_was_moved_away_is_named_with_the_option_that_says_where_it_is(
    begun: Path, moved: Path, command: str, part: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (begun / part).rename(begun / f"{part}-moved")
    assert main(_line(command, moved)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"is not at {begun / part}: give it by {option}, wherever it lies now" in said
    assert main([*_line(command, moved), option, str(begun / f"{part}-moved")]) == 0, capsys.readouterr().err
    if command == "search":  # which stores where it is now
        assert main(_line("search", moved)) == 0, capsys.readouterr().err


def test_a_candidate_that_was_moved_away_has_to_be_put_back(begun: Path, moved: Path) -> None:
    (begun / "made").rename(begun / "made-moved")
    with pytest.raises(InputError, match=r"candidate is not at .*/made/student.gguf: put it back, or a link to it"):
        ad.load_run(moved / "runs" / "run").reproduce("candidate-gguf-file")


def test_another_teacher_in_place_of_the_one_that_was_moved_is_refused(begun: Path, moved: Path) -> None:
    other = shutil.copytree(begun / "teacher", moved / "other")
    (begun / "teacher").rename(begun / "teacher-moved")
    config = other / "generation_config.json"
    config.write_text('{"eos_token_id": 1}')
    run = ad.Run(RunFolder.open(moved / "runs", "run"), cache=moved / "cache")
    with pytest.raises(InputError, match="the teacher of the run 'run' has changed since"):
        run.reproduce("candidate-gguf-file", teacher=other)

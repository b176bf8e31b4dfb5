"""The page of a run in real headless Chromium: drawn, sorted and filtered, without errors, requests or barriers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import autodistill as ad
from autodistill.hardware.budget import Budget
from autodistill.report.comparison import comparison
from autodistill.report.writing import write_page
from autodistill.runs.run_folder import RunFolder
from autodistill.search.explain import FEWEST_RESULTS
from autodistill.search.search import search
from tests.report.test_comparison import BUDGET
from tests.report.test_page import POSTGRESQL, README, contents
from tests.search.conftest import untimed
from tests.search.small_search import small_inputs, small_request

pytestmark = pytest.mark.system
MODULES = Path(os.environ.get("AUTODISTILL_NODE_MODULES", "node_modules"))
NEEDS = "needs chromium, node, and playwright-core and axe-core in the folder that AUTODISTILL_NODE_MODULES names"
NO_BARRIER: dict[str, list[Any]] = {
    f"{device}-{theme}": [] for device in ("desktop", "phone") for theme in ("light", "dark")
}


def drive(script: Path, *words: str, shots: Path, check: str = "") -> dict[str, Any]:
    """Run a node script in the browser and return what it found. Screenshots go to a folder.

    Without a browser, the test is skipped.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    node = shutil.which("node")
    if not (chromium and node and all((MODULES / name).is_dir() for name in ("playwright-core", "axe-core"))):
        pytest.skip(NEEDS)
    shots.mkdir(exist_ok=True)
    done = subprocess.run(
        [node, str(script), *words, str(shots), str(MODULES.absolute()), chromium],
        env={**os.environ, "CHECK": check},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def browse(page: Path, shots: Path, check: str = "") -> dict[str, dict[str, Any]]:
    """Return what the browser found on desktop and phone, in light and dark mode."""
    return drive(Path(__file__).with_name("browser.mjs"), str(page), shots=shots, check=check)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with enough trials to say what mattered, and a cascade of two of its rows."""
    folder = small_inputs(tmp_path_factory.mktemp("searched"))
    questions = [{"prompt": f"Is {n} near the river?", "answer": f"the river, {n % 7}"} for n in range(150)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    asked = {"data": str(folder / "questions.jsonl"), "sequence_length": 64, "tokens": 1024}
    budget = Budget(memory_bytes=16 * 10**9, context=128)
    with untimed():
        search(small_request(folder, folder / "runs", budget=budget, trials=FEWEST_RESULTS + 2, **asked))
    run = RunFolder.open(folder / "runs", "run")
    student = next(row.row_id for row in run.events.rows() if row.kind == "student" and row.full)
    ad.cascade(run.path, f"{student},teacher", cache=folder / "cache")
    return run.path


@pytest.fixture(scope="module", params=["reference", "postgresql", "searched"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run."""
    runs = {"reference": README, "postgresql": POSTGRESQL}
    run = runs[request.param] if request.param in runs else request.getfixturevalue(request.param)
    return write_page(RunFolder.open(run.parent, run.name), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module", params=[(README, BUDGET), (README, POSTGRESQL)], ids=["one-text", "two-texts"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about two runs."""
    out = tmp_path_factory.mktemp("compared") / "compared.html"
    out.write_text(comparison([contents(run) for run in request.param]), encoding="utf-8")
    return out


def quiet(told: dict[str, Any]) -> bool:
    """Whether a page was drawn without an error, a request, a cut text, or a part wider than the screen."""
    return (told["errors"], told["requests"], told["faults"], told["sideways"]) == ([], [], [], 0)


def test_the_page_is_drawn_and_used(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    drawn = {"budget", "storage", "learning", "rungs", "phases"}
    if "searched" in request.node.name:
        drawn |= {"importance", "cascade"}
    for name, told in browse(page, tmp_path / "shots").items():
        assert quiet(told), (name, told)
        assert {chart.partition("-")[0] for chart in told["charts"]} == drawn
        assert told["marks"] > 50
        assert len(set(told["curves"])) == 2, "chosen by the keyboard"
        assert len(told["lists"]) >= 6
        assert told["curves"][1] in told["lists"]
        assert "strategy" in told["hover"]
        assert told["by_mouse"] == sorted(told["first"], key=str.lower) != told["first"]
        assert told["sorted"] == "ascending"
        sizes = [float(text.split()[0]) for text in told["by_keyboard"]]
        assert sizes == sorted(sizes)
        assert sizes[::-1] == [float(text.split()[0]) for text in told["reversed"]]
        assert told["filtered"]
        assert all("teacher" in row for row in told["filtered"])
        assert told["shown"] == f"{len(told['filtered'])} of {len(told['first'])} rows"
        assert len(told["fits_by_mouse"]) == len(told["first"]) - told["over"]
        assert len(told["again"]) == len(told["first"]), "chosen back by the keyboard"


def test_a_comparison_is_drawn(compared: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for name, told in browse(compared, tmp_path / "shots").items():
        assert quiet(told), (name, told)
        assert told["charts"] == ["curve-0", "curve-1"][: len(told["charts"])]
        assert len(told["charts"]) == (1 if "one-text" in request.node.name else 2)
        assert "run" in told["hover"]


def test_a_page_has_no_barrier(page: Path, tmp_path: Path) -> None:
    assert violations(page, tmp_path) == NO_BARRIER


def test_a_comparison_has_no_barrier(compared: Path, tmp_path: Path) -> None:
    assert violations(compared, tmp_path) == NO_BARRIER


def violations(page: Path, folder: Path) -> dict[str, list[Any]]:
    """Return what axe finds wrong with a page, by device and theme."""
    return {name: told["violations"] for name, told in browse(page, folder / "shots", "axe").items()}

"""The page of a run in real headless Chromium: drawn, sorted and filtered, without errors, requests or barriers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from autodistill.report.writing import write_page
from autodistill.runs.run_folder import RunFolder
from tests.report.test_page import POSTGRESQL, README

pytestmark = pytest.mark.system
MODULES = Path(os.environ.get("AUTODISTILL_NODE_MODULES", "node_modules"))
NEEDS = "needs chromium, node, and playwright-core and axe-core in the folder that AUTODISTILL_NODE_MODULES names"


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


@pytest.fixture(scope="module", params=[README, POSTGRESQL], ids=lambda run: run.name)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: Path = request.param
    return write_page(RunFolder.open(run.parent, run.name), tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_is_drawn_and_used(page: Path, tmp_path: Path) -> None:
    for name, told in browse(page, tmp_path / "shots").items():
        assert told["errors"] == [], name
        assert told["requests"] == [], name
        assert told["sideways"] == 0, "the page itself is no wider than the screen"
        assert told["charts"] >= 5
        assert told["marks"] > 50
        assert told["curves"] == ["budget-nll-memory", "budget-nll-size"], "chosen by the keyboard"
        assert "strategy" in told["hover"]
        assert told["by_mouse"] == sorted(told["first"], key=str.lower) != told["first"]
        assert told["sorted"] == "ascending"
        sizes = [float(text.split()[0]) for text in told["by_keyboard"]]
        assert sizes == sorted(sizes)
        assert told["reversed"] == told["by_keyboard"][::-1] or sizes[::-1] == [
            float(text.split()[0]) for text in told["reversed"]
        ]
        assert told["filtered"]
        assert all("teacher" in row for row in told["filtered"])
        assert told["shown"] == f"{len(told['filtered'])} of {len(told['first'])} rows"


def test_the_page_has_no_barrier(page: Path, tmp_path: Path) -> None:
    assert {name: told["violations"] for name, told in browse(page, tmp_path / "shots", "axe").items()} == {
        f"{device}-{theme}": [] for device in ("desktop", "phone") for theme in ("light", "dark")
    }

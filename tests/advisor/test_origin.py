"""A run's records say what made a row. An unknown row is answered with similar ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from autodistill.advisor.origin import origin, said
from autodistill.errors import InputError

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
RUN = "search-20261128-114135"


def test_all_that_made_a_row_is_told() -> None:
    asked = json.loads((REFERENCE / RUN / "search.json").read_text())
    found = origin("t001-gguf-q4_1", REFERENCE, RUN).to_json()
    assert found["teacher"]["hash"] == asked["teacher"]["fingerprint"]
    assert found["data"]["hash"] == asked["data"]["fingerprint"]
    assert found["data"]["read"].startswith("2,048 of 11,008 tokens of validation")
    assert found["space"] == {"name": "default", "hash": asked["space_hash"], "seed": 0}
    assert found["packages"] == asked["versions"]
    assert found["training"]["seed"] == 0
    assert found["training"]["threads"] == asked["plan"]["threads"]
    assert found["training"]["fidelity"] == 1.0
    assert "not recorded" in found["code"]["version"]
    text = said(found)
    assert "75aa30fb9b308dc7" in text
    assert "None" not in text


def test_a_row_that_was_trained_on_alone_had_all_threads() -> None:
    found = origin(f"{RUN}/t001xx-gguf-q4_1", REFERENCE).to_json()
    assert found["training"]["threads"] == 2
    assert found["training"]["tokens"] == 33_792


def test_an_unknown_row_is_met_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no row 't001-gguf-q4': near it are .*t001-gguf-q4_1"):
        origin("t001-gguf-q4", REFERENCE, RUN)
    with pytest.raises(InputError, match="no row 'xyz': autodistill leaderboard shows the existing ones"):
        origin("xyz", REFERENCE)
    with pytest.raises(InputError, match=f"that is a run: .* autodistill leaderboard {RUN} shows"):
        origin(RUN, REFERENCE)
    with pytest.raises(InputError, match="there is no run 'gone'"):
        origin("t001-gguf-q4_1", REFERENCE, "gone")
    with pytest.raises(InputError, match="there are no runs in"):
        origin("t001", tmp_path)


def test_a_row_of_several_runs_is_to_be_named_with_its_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(REFERENCE / RUN, tmp_path / name)
    with pytest.raises(InputError, match=r"several runs have a row 't001-gguf-q4_1' \(one, two\): name one .* --on"):
        origin("t001-gguf-q4_1", tmp_path)
    assert origin("t001-gguf-q4_1", tmp_path, "two").run.name == "two"

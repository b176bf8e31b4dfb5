"""The gauges of a search show what its log says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.gauges import SearchGauges

RUN = Path(__file__).parents[2] / "results" / "reference" / "search-20261128-114135"
EVENTS = [json.loads(line) for line in (RUN / "trials.jsonl").read_text().splitlines()]
CACHED = 12_345


def cache_of(folder: Path) -> Path:
    """Return a cache with a teacher's outputs of `CACHED` bytes."""
    (folder / "teacher-outputs" / "one").mkdir(parents=True)
    (folder / "teacher-outputs" / "one" / "outputs.arrow").write_bytes(b"x" * CACHED)
    return folder


def test_a_run_is_shown_as_its_log_has_it(tmp_path: Path) -> None:
    gauges = SearchGauges(RunFolder(RUN.parent, RUN.name), cache_of(tmp_path), 8_000_000_000)
    found = {one.name.removeprefix("autodistill_search_"): one for one in gauges.read()}
    rungs = [event for event in EVENTS if event["event"] == "rung"]
    rows = {event["row"]["row_id"]: event["row"] for event in EVENTS if event["event"] == "row"}
    best = rows["t001xx-gguf-q4_1"]  # the first of its leaderboard
    trained, seconds = sum(rung["trained"] for rung in rungs), sum(rung["seconds"]["train"] for rung in rungs)
    longer = sum(rung["seconds"]["train"] for rung in rungs if rung["trial"] in ("t001x", "t001xx"))
    assert {name: one.values[()] for name, one in found.items() if not one.labels} == {
        "best_nll_nats": pytest.approx(math.log(best["perplexity"])),
        "best_memory_bytes": best["memory_bytes"],
        "budget_bytes": 16e9,
        "trained_tokens": trained,
        "tokens_per_second": pytest.approx(trained / seconds * 2),
        "final_student_share": pytest.approx(longer / 600),
        "cache_bytes": CACHED,
        "cache_limit_bytes": 8e9,
    }
    assert found["best"].labels == ("metric", "of")
    assert found["best"].values == {
        ("accuracy", "best"): best["accuracy"],
        ("accuracy", "untrained"): rows["teacher-gguf-q4_1"]["accuracy"],
    }
    states = {"running": 0, "completed": 5, "stopped": 0, "rejected": 0, "failed": 0}
    assert found["trials"].values == {(state,): count for state, count in states.items()}


def test_a_log_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"search\.json"):
        list(SearchGauges(RunFolder(tmp_path, "gone"), tmp_path, 1).read())

"""Each chart of a run is drawn, and a run that has nothing to draw says so in a line."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import vl_convert

import autodistill as ad
from autodistill.objects.plots import Plots
from autodistill.runs.results.cascades import VERSION, write_cascade
from tests.report.test_charts import FOUND, explanation

RUN = Path(__file__).parents[2] / "results" / "reference" / "search-20261129-210357"
TITLES = {
    "pareto": "accuracy against memory",
    "storage": "stored bytes by block and type",
    "learning": "training loss",
    "rungs": "accuracy at rungs",
    "phases": "seconds by phase",
    "importance": "What mattered for accuracy",
    "cascades": "t000-gguf-q4_1 deferring to teacher-gguf-f16, by position",
}


def cascade() -> dict[str, Any]:
    point: dict[str, Any] = {"threshold": 0.5, "deferred": 0.0, "accuracy": 0.42, "accuracy_stderr": 0.01}
    point |= {"over_chance": 0.0, "latency_ms": None, "memory_bytes": 10**8}
    unit = {"items": 9, "documents": 3, "small_accuracy": 0.42, "large_accuracy": 0.5, "suggestion": {}}
    unit["curve"] = [point, point | {"deferred": 1.0, "accuracy": 0.5}]
    rows = {"small": {"row_id": "t000-gguf-q4_1"}, "large": {"row_id": "teacher-gguf-f16"}}
    record = {"version": VERSION, "run": RUN.name, "split": "validation", "parquet": "items", "notes": []}
    return record | rows | {"units": {"position": unit}}


@pytest.fixture
def run(tmp_path: Path) -> ad.Run:
    shutil.copytree(RUN, tmp_path / RUN.name)
    return ad.load_run(RUN.name, runs=tmp_path)


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(Plots, inspect.isfunction) if name[0] != "_"])
def test_each_chart_is_drawn(name: str, run: ad.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cascade(run.path, "t000-gguf-q4_1", "teacher-gguf-f16", cascade())
    # No tracked run has the eight trials that importance takes.
    monkeypatch.setattr("autodistill.search.explain.explain", lambda folder: explanation(accuracy=FOUND))
    drawn = getattr(run.plot, name)()
    for chart in drawn.values() if isinstance(drawn, dict) else (drawn,):
        assert chart.to_dict()["title"] == TITLES[name]
        svg = vl_convert.vegalite_to_svg(chart.to_dict())
        assert "role-mark" in svg


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pareto", "no row has both accuracy and memory"),
        ("storage", "nothing keeps to the budget yet"),
        ("learning", "no trial has reached a rung"),
        ("rungs", "no trial has accuracy at a rung"),
        ("phases", "the run does not say how long its phases took"),
        ("importance", "has no trial yet: nothing to explain"),
        ("cascades", "has no cascade: autodistill cascade writes one"),
    ],
)
def test_what_cannot_be_drawn_yet_is_said(name: str, said: str, run: ad.Run) -> None:
    log, asked = run.path / "trials.jsonl", json.loads((run.path / "search.json").read_text())
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    (run.path / "leaderboard.parquet").unlink()
    kept = {key: asked[key] for key in asked if key not in ("seconds", "exported", "test", "gain_over_untrained")}
    (run.path / "search.json").write_text(json.dumps(kept))
    with pytest.raises(ad.InputError, match=said) as told:
        getattr(run.plot, name)()
    assert "\n" not in str(told.value)

"""A cascade of two rows of a real small search: its ends have the rows' own figures, and what it writes."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import autodistill as ad
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.report.contents import Contents, charts_of
from autodistill.report.writing import write_page
from autodistill.runs.results.cascades import read_cascades
from autodistill.runs.run_folder import RunFolder
from autodistill.search.search import search
from tests.search.small_search import small_inputs, small_request

QUESTIONS = [{"prompt": f"Is {n} near the river?", "answer": f"the river, {n % 7}"} for n in range(150)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two runs, one on text and one on questions, with their inputs and cache."""
    folder = small_inputs(tmp_path_factory.mktemp("cascade"))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    search(small_request(folder, folder / "runs"))
    asked = {"data": str(folder / "questions.jsonl"), "name": "asked", "metric": "exact_match", "sequence_length": 64}
    search(small_request(folder, folder / "runs", budget=Budget(memory_bytes=16 * 10**9, context=128), **asked))
    return folder


@functools.cache
def _cascade(made: Path, run: str, rows: str = "t000-gguf-q8_0,teacher", **options: Any) -> dict[str, Any]:
    return ad.cascade(made / "runs" / run, rows, cache=made / "cache", **options)


def _row(made: Path, run: str, row_id: str) -> Any:
    rows = RunFolder.open(made / "runs", run).events.rows()
    return next(row for row in rows if row.row_id == row_id)


def test_its_ends_are_the_rows_as_they_were_evaluated(made: Path) -> None:
    found = _cascade(made, "run")
    points = found["units"]["position"]["curve"]
    large = found["large"]["row_id"]
    assert large.startswith("teacher")
    assert points[0]["accuracy"] == _row(made, "run", "t000-gguf-q8_0").accuracy
    assert points[0]["accuracy_stderr"] is not None
    assert points[-1]["accuracy"] == pytest.approx(_row(made, "run", large).accuracy, abs=1e-12)
    assert found["units"].keys() == {"position"}
    assert any("no questions" in note for note in found["notes"])


def test_items_lie_in_a_table_that_says_what_it_is(made: Path) -> None:
    found = _cascade(made, "run")
    table = pq.read_table(found["paths"]["items"])
    said = json.loads(table.schema.metadata[b"autodistill"])
    assert (said["split"], said["run"], said["small"]) == ("validation", "run", "t000-gguf-q8_0")
    items = table.to_pydict()
    assert set(items["unit"]) == {"position"}
    assert items["item"] == list(range(table.num_rows))
    assert sum(items["small_correct"]) / table.num_rows == found["units"]["position"]["small_accuracy"]
    point = found["units"]["position"]["curve"][40]
    rights = zip(items["small_confidence"], items["small_correct"], items["large_correct"], strict=True)
    routed = [large if sure < point["threshold"] else small for sure, small, large in rights]
    assert sum(routed) / len(routed) == pytest.approx(point["accuracy"])


def test_questions_have_a_curve_by_answer(made: Path) -> None:
    found = _cascade(made, "asked")
    answers = found["units"]["answer"]
    assert answers["small_accuracy"] == _row(made, "asked", "t000-gguf-q8_0").figure("exact_match")
    table = pq.read_table(found["paths"]["items"]).to_pydict()
    own = [place for place, unit in enumerate(table["unit"]) if unit == "answer"]
    assert len(own) == answers["items"]
    assert all(0 < table["small_confidence"][place] <= 1 and table["small_tokens"][place] > 0 for place in own)


def test_the_test_split_stays_closed(made: Path) -> None:
    ledger = made / "runs" / "test_openings.jsonl"
    before = ledger.read_text()
    ad.cascade(made / "runs" / "run", "t000-gguf-q8_0,teacher", cache=made / "cache")
    assert ledger.read_text() == before


@pytest.mark.timed  # draws charts
def test_the_page_shows_the_curve(made: Path) -> None:
    found = _cascade(made, "asked")
    run = RunFolder.open(made / "runs", "asked")
    assert [one["small"]["row_id"] for one in read_cascades(run.path)] == ["t000-gguf-q8_0"]
    charts = charts_of(Contents.of(run))
    names = [name for name in charts if name.startswith("cascade-")]
    assert [name.rpartition("-")[2] for name in names] == ["position", "answer"]
    drawn = charts[names[0]].to_dict()
    (values,) = [one["data"]["values"] for one in drawn["layer"] if len(one["data"]["values"]) > 2][:1]
    curve = found["units"]["position"]["curve"]
    assert [one["accuracy"] for one in values] == [one["accuracy"] for one in curve]
    assert "Two models together" in Path(found["paths"]["page"]).read_text(encoding="utf-8")
    assert f'data-chart="{names[1]}"' in write_page(run).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timed
def test_measured_rows_have_times_and_memory(made: Path) -> None:
    # llama.cpp serves both for a moment.
    found = _cascade(made, "asked", "t000-gguf-q8_0,teacher-gguf-q8_0", measure=True)
    for part in (found["small"], found["large"]):
        assert part["speed_source"] == part["memory_source"] == "measured"
    for unit in ("position", "answer"):
        first, *middle, last = found["units"][unit]["curve"]
        assert first["latency_ms"] > 0
        assert last["memory_bytes"] == found["large"]["memory_bytes"]
        both = found["small"]["memory_bytes"] + found["large"]["memory_bytes"]
        assert {one["memory_bytes"] for one in middle} <= {both}
        # A deferred answer costs the time of both models.
        assert all(one["latency_ms"] > first["latency_ms"] for one in middle)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("t000-gguf-q8_0", "must name two rows"),
        ("t000-gguf-q8_0,teacher,teacher", "must name two rows"),
        ("t000-gguf-q8_0,", "must name two rows"),
        ("t000-gguf-q8_0,t000-gguf-q8_0", "twice"),
        ("t777-gguf-q8_0,teacher", "has no row 't777-gguf-q8_0'"),
    ],
)
def test_rows_that_are_no_pair_are_one_line(made: Path, rows: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        _cascade(made, "run", rows)


def test_what_is_gone_is_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"data that 'run' read are not in .* name another --cache"):
        ad.cascade(made / "runs" / "run", "t000-gguf-q8_0,teacher", cache=tmp_path)
    shutil.copytree(made / "runs" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "t000")
    rows = ["--rows", "t000-gguf-q8_0,teacher", "--cache", str(made / "cache")]
    assert main(["cascade", str(tmp_path / "run"), *rows]) == 2
    assert "was removed" in capsys.readouterr().err


def test_a_damaged_curve_is_one_line(made: Path, tmp_path: Path) -> None:
    _cascade(made, "run")
    shutil.copytree(made / "runs" / "run", tmp_path / "run")
    (curve,) = (tmp_path / "run" / "cascades").glob("*.json")
    document = json.loads(curve.read_text())
    for change, said in (({"units": 3}, "units"), ({"version": 99}, "upgrade")):
        curve.write_text(json.dumps(document | change))
        with pytest.raises(InputError, match=said):
            read_cascades(tmp_path / "run")


def test_the_command_prints_a_table_and_json(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["cascade", str(made / "runs" / "run"), "--rows", "t000-gguf-q8_0,teacher", "--cache", str(made / "cache")]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert re.search(r"By position: [\d,]+ of them, in ([\d,]{2,} documents|[2-9] documents|1 document)\.", said)
    assert "over chance" in said
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "validation"

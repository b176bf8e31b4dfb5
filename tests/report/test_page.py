"""The page of a run shows its records, escaped, in one file that makes no requests."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.report import page as pages
from autodistill.report.charts import construction_of
from autodistill.report.contents import MOST_ROWS, Contents, charts_of
from autodistill.report.page import page
from autodistill.report.storage_chart import bytes_by_block, cut
from autodistill.report.writing import Refresher, write_charts, write_page
from autodistill.runs.run_folder import RunFolder
from autodistill.search.callbacks import RungReached, SearchStarted
from autodistill.search.construction.construction import Construction

RESULTS = Path(__file__).parents[2] / "results"
README = RESULTS / "reference" / "search-20261128-114135"
POSTGRESQL = RESULTS / "postgresql" / "postgresql-175MB"


class Page(HTMLParser):
    """The contents of a page: its elements with their attributes, its visible text, its scripts and data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self._script: str | None = None
        self._said: list[str] = []
        self.feed(text)
        self.text = " ".join("".join(self._said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or ""
            self.scripts += [""] if not self._script else []
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            if self._script:
                self.data[self._script] = json.loads(data)
            else:
                self.scripts[-1] += data
        elif "style" not in self._open:
            self._said.append(data + " ")
            if {"td", "th"} & set(self._open):
                self.tables[-1][-1][-1] += data

    def table(self, *titles: str) -> list[dict[str, str]]:
        """Return the rows, by column title, of the table that has these titles."""
        (found,) = (table for table in self.tables if table and set(titles) <= set(table[0]))
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def contents(run: Path) -> Contents:
    return Contents.of(RunFolder.open(run.parent, run.name))


def exported_megabytes(run: Path) -> str:
    """Return the measured memory of what a run exported, whichever day its tracked records are from."""
    exported = json.loads((run / "search.json").read_text())["exported"]["row_id"]
    events = map(json.loads, (run / "trials.jsonl").read_text().splitlines())
    rows = [event["row"] for event in events if event["event"] == "row" and event["row"]["row_id"] == exported]
    return f"{rows[-1]['memory_bytes'] / 1e6:.0f} MB"


@pytest.fixture(scope="module")
def drawn() -> Page:
    return Page(page(contents(POSTGRESQL)))


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a run with other fields in its `search.json`."""

    def change(run: Path = README, **fields: Any) -> Path:
        folder = tmp_path / run.name
        shutil.copytree(run, folder)
        path = folder / "search.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return change


@pytest.mark.parametrize("run", [pytest.param(README, marks=pytest.mark.slow), POSTGRESQL])
def test_what_was_found_is_said_first_with_its_gain(run: Path) -> None:
    asked = json.loads((run / "search.json").read_text())
    text = Page(page(contents(run))).text
    gain = asked["gain_over_untrained"]
    said = f"paired: {gain['value']:+.4f} ± {gain['stderr']:.4f} of accuracy"
    first = text.index(asked["exported"]["named"])
    assert text.index(asked["teacher"]["name"]) < first < text.index(said) < text.index("Each point is a student")


def test_sections_stand_in_their_order(drawn: Page) -> None:
    found = [attributes["id"] for tag, attributes in drawn.elements if tag == "section"]
    assert found == [
        *("budget", "bytes", "learning", "race", "importance", "rejected", "predicted", "leaderboard", "test"),
        *("seconds", "request", "repeat", "versions", "licences"),
    ]


def test_the_table_has_each_row_with_its_figures(drawn: Page) -> None:
    log = [json.loads(line) for line in (POSTGRESQL / "trials.jsonl").read_text().splitlines()]
    kept = {event["row"]["row_id"]: event["row"] for event in log if event["event"] == "row"}
    shown = {row["row"]: row for row in drawn.table("row", "kind", "to make it again")}
    assert set(shown) == set(kept)
    for name, row in kept.items():
        assert shown[name]["accuracy"] == f"{row['accuracy']:.4f} ± {row['accuracy_stderr']:.4f}"
        assert name in shown[name]["to make it again"]
    over = {tag[1].get("data-fits") for tag in drawn.elements if tag[0] == "tr"}
    assert over >= {"yes", "no"}


def test_what_was_predicted_stands_beside_what_was_measured(drawn: Page) -> None:
    found = drawn.table("predicted", "measured", "what")
    by_what = {row["what"]: row for row in found}
    assert by_what["memory"]["predicted"] == "175 MB"
    assert by_what["memory"]["measured"] == exported_megabytes(POSTGRESQL)
    took = round(json.loads((POSTGRESQL / "search.json").read_text())["seconds"]["total"])
    assert by_what["time"]["measured"] == f"{took // 60}m {took % 60}s"
    kl = next(row for row in found if row["of"].startswith("teacher-gguf-q4_1+types"))
    assert kl["predicted"] == "0.0121 nats"


def test_bytes_of_blocks_are_those_of_the_stored_weights() -> None:
    of = contents(POSTGRESQL)
    assert of.best is not None
    predicted = of.best.figure("size_bytes_predicted")
    blocks = bytes_by_block(of.best)
    assert sum(block["bytes"] for block in blocks) == predicted
    assert {block["block"] for block in blocks} == {*map(str, range(30)), "embeddings", "the rest"}
    assert cut(of.best, of.best.shape).startswith("Nothing was cut")
    smaller = {**of.best.shape, "num_hidden_layers": 29} if of.best.shape else {}
    assert "It keeps 30 of 29 layers" in cut(of.best, smaller)


def test_what_each_block_cost_stands_beside_its_bytes() -> None:
    """Runs of earlier versions say only what all of it cost."""
    of = contents(POSTGRESQL)
    assert of.best is not None
    whole = "without training, it is 0.0121 ± 0.0006 nats a token from the teacher."
    assert whole in Page(page(of)).text
    one = construction_of(of.best, of.solved)
    assert one is not None
    stored = {**{str(layer): 0.001 for layer in range(30)}, "embeddings": 0.002, "cache": 0.0005}
    scored = replace(one, stored_kl=tuple(stored.items()), cut_kl=(("29", 0.25), ("layers left out", 0.5)))
    assert Construction.from_json(json.loads(json.dumps(scored.to_json()))) == scored
    of.solved[of.solved.index(one)] = scored
    found = Page(page(of))
    assert f"{whole} The scores of its parts, from which the solver chose, add up to 0.7825." in found.text
    lines = {line["layer"]: line for line in found.table("layer", "storage costs", "cut costs")}
    assert list(lines) == [*map(str, range(30)), "embeddings", "cache", "layers left out"]
    assert (lines["29"]["storage costs"], lines["29"]["cut costs"]) == ("0.00100", "0.25000")
    assert lines["29"]["both cost (nats)"] == "0.25100"
    assert lines["cache"]["bytes"] == lines["layers left out"]["bytes"] == "-"
    assert lines["embeddings"]["stored as"] == "gguf-q5_1"
    assert lines["layers left out"]["storage costs"] == "-"


def test_it_is_one_file_that_asks_for_nothing(drawn: Page) -> None:
    text = page(contents(POSTGRESQL))
    assert len(text.encode()) < 3_000_000
    assert not [attributes for _, attributes in drawn.elements if {"src", "action", "ping"} & set(attributes)]
    links = [attributes["href"] for _, attributes in drawn.elements if "href" in attributes]
    assert links
    assert all(link is not None and link.startswith("#") for link in links)
    policy = next(a["content"] for t, a in drawn.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for script in drawn.scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_charts_hold_their_data_once(drawn: Page) -> None:
    charts, shared = drawn.data["charts"], drawn.data["data"]
    places = [a["data-chart"] for _, a in drawn.elements if "data-chart" in a]
    assert set(places) <= set(charts)
    curves = {name for name in charts if name.startswith("budget-")}
    assert {f"budget-{y}-{x}" for y in ("accuracy", "nll", "kl") for x in ("memory", "size", "latency")} == curves
    named = set(re.findall(r'"name": "(d\d+)"', json.dumps(charts)))
    assert named == set(shared)
    rows = [name for name, values in shared.items() if values and "strategy" in values[0]]
    assert len(rows) == 1


def test_solved_students_are_a_line_where_their_figures_are_known() -> None:
    charts = charts_of(contents(POSTGRESQL), against=["memory"])
    layers = charts["budget-kl-memory"].to_dict()["layer"]
    front = next(one["data"]["values"] for one in layers if one["mark"].get("color") == "#2ca02c")
    assert [round(point["kl"], 4) for point in front] == [0.1528, 0.1274, 0.022, 0.0121]
    assert [point["memory"] for point in front] == sorted(point["memory"] for point in front)
    assert "Green bars are what was solved before training" in Page(page(contents(POSTGRESQL))).text
    assert "Green bars" not in Page(page(contents(README.parent / "budget-210MB"))).text, "nothing was solved"


@pytest.mark.parametrize(
    ("metric", "figures"),
    [("accuracy", [0.4755, 0.4819]), pytest.param("nll", [2.8040, 2.8010], marks=pytest.mark.slow)],
)
def test_of_other_figures_the_line_is_that_of_the_untrained_rows(metric: str, figures: list[float]) -> None:
    charts = charts_of(contents(POSTGRESQL))
    for against in ("memory", "size"):
        line, marks = (
            one["data"]["values"]
            for one in charts[f"budget-{metric}-{against}"].to_dict()["layer"]
            if one["mark"].get("color") == "#2ca02c"
        )
        assert [round(point[metric], 4) for point in line] == figures
        assert {mark["row"] for mark in marks} == {
            "teacher-gguf-q4_1+types-cf5875d0+kv-q8_0",
            "teacher-gguf-q4_1+embeddings-q5_0+kv-q8_0",
        }
    # A single untrained student, and none.
    for run, count in ((RESULTS / "small" / "small-36MB", 1), (README.parent / "budget-210MB", 0)):
        layers = charts_of(contents(run), against=["memory"])[f"budget-{metric}-memory"].to_dict()["layer"]
        lines = [one["data"]["values"] for one in layers if one["mark"].get("color") == "#2ca02c"]
        assert [len(values) for values in lines] == [count] * 2 * bool(count)


HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>"


def test_names_from_outside_are_text(changed: Callable[..., Path]) -> None:
    asked = json.loads((README / "search.json").read_text())
    folder = changed(
        teacher={**asked["teacher"], "name": HOSTILE},
        licences={HOSTILE: HOSTILE},
        versions={"x": HOSTILE},
        notes=[HOSTILE],
        command=HOSTILE,
    )
    log = folder / "trials.jsonl"
    log.write_text(log.read_text().replace("scales alone", json.dumps(HOSTILE)[1:-1]))
    before, after = Page(page(contents(README))), Page(page(contents(folder)))
    assert HOSTILE in after.text
    tags = [tag for tag, _ in after.elements]
    assert "img" not in tags
    assert len(after.scripts) == len(before.scripts) == 2
    assert after.scripts == before.scripts


def test_without_charts_the_page_says_how_to_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("altair", "vl_convert"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    found = Page(page(contents(README)))
    assert "pip install 'autodistill-search[plots]'" in found.text
    assert not [a for _, a in found.elements if "data-chart" in a]
    assert len(found.table("row", "to make it again")) == 7


def test_more_rows_than_a_page_holds_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_ROWS == 500
    monkeypatch.setattr(pages, "MOST_ROWS", 2)
    found = Page(page(contents(README)))
    assert len(found.table("row", "to make it again")) == 2
    assert "The best 2 of 7 rows are shown." in found.text


@pytest.mark.slow
def test_a_run_under_way_has_a_page(tmp_path: Path, changed: Callable[..., Path]) -> None:
    folder = changed()
    asked = json.loads((folder / "search.json").read_text())
    for name in ("exported", "gain_over_untrained", "gain_over_baseline", "gain_unit", "seconds", "test", "runtime"):
        asked.pop(name)
    (folder / "search.json").write_text(json.dumps(asked))
    (folder / "leaderboard.parquet").unlink()
    log = folder / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1]))
    assert "nothing fits yet" in Page(page(contents(folder))).text
    log.write_text("".join(lines[:9]))
    with RunFolder.open(tmp_path, folder.name, lock=True):
        found = Page(page(contents(folder)))
    assert "so far: the teacher itself" not in found.text
    assert "The run is under way." in found.text
    assert "reload" in {a.get("id") for _, a in found.elements}


@pytest.mark.slow
def test_the_page_and_its_charts_are_files(tmp_path: Path) -> None:
    run = RunFolder.open(README.parent, README.name)
    path = write_page(run, tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    written = {path.name: path for path in write_charts(run, tmp_path / "plots")}
    assert written["learning.png"].read_bytes().startswith(b"\x89PNG")
    assert written["budget-accuracy-memory.svg"].read_text().startswith("<svg")
    assert json.loads(written["storage.json"].read_text())["title"] == "stored bytes by block and type"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_page(run, tmp_path / "file" / "page.html")


def test_a_page_that_cannot_be_written_ends_nothing(
    changed: Callable[..., Path], logged: list[logging.LogRecord]
) -> None:
    folder = changed()
    refresher = Refresher()
    refresher.close()  # belongs to a search that never had a folder
    refresher.search_started(SearchStarted(run=folder))
    event = RungReached(trial="t000", rung=0, tokens=1, metric="accuracy", value=0.1, decision="stop")
    refresher.rung_reached(event)
    assert not (folder / "report.html").exists(), "a short search writes its page at the end"
    refresher.close()
    assert (folder / "report.html").is_file()
    (folder / "search.json").write_text("{")
    refresher.close()
    refresher.close()
    (said,) = [record.getMessage() for record in logged]
    assert "the search goes on" in said


def test_the_command_writes_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", README.name, "--runs", str(README.parent), "--out", str(tmp_path / "page.html")]
    assert main([*words, "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"page: {tmp_path / 'page.html'}"
    assert (tmp_path / "plots" / "phases.svg").is_file()
    assert main([*words, "--plots", str(tmp_path / "page.html")]) == 2
    assert "--plots names a folder" in capsys.readouterr().err
    assert main(["report", "gone", "--runs", str(README.parent)]) == 2
    assert "there is no run 'gone'" in capsys.readouterr().err

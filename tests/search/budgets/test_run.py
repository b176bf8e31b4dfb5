"""A search for several budgets: shared work is done once, students are shared, and a kill loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from autodistill.cli.app import main
from autodistill.errors import InputError, InterruptedSearchError, NothingFitsError
from autodistill.runs.events import SessionBegan, TeacherScored
from autodistill.runs.results.table import read_rows, read_table
from autodistill.runs.run_folder import RunFolder, known_runs
from autodistill.search.budgets.record import BudgetsFolder, Record, runs_of
from autodistill.search.budgets.request import BudgetsRequest
from autodistill.search.budgets.run import plan_budgets, search_budgets
from autodistill.search.budgets.summary import _better, cells, sentences
from autodistill.search.campaign.observer import Observer
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.search.setup import measure_plan, solve_phase
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.small_search import middle_budget

NAME = "several"


class Killed(BaseException):
    """Stands for a kill: nothing in the search catches it."""


def small(folder: Path) -> str:
    """Return a budget so small that the types have to be solved for."""
    return f"{middle_budget(folder / 'teacher', 64).memory_bytes}B"


def request(folder: Path, out: str, **changes: Any) -> BudgetsRequest:
    fields: dict[str, Any] = {
        "budgets": f"{small(folder)},1MB,1GB,16GB",
        "context": 64,
        "teacher": str(folder / "teacher"),
        "data": str(folder / "text"),
        "trials": 1,
        "tokens": 512,
        "sequence_length": 64,
        "runner": "inline",
        "runs": folder / out,
        "name": NAME,
        "cache": folder / "cache",
    }
    return BudgetsRequest(**(fields | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("budgets")
    save_tiny_teacher(made / "teacher", layers=4, width=128, ffn=512)
    tiny_text(made / "text", documents=20, sentences=24)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[dict[str, Any], Counter[str]]:
    """Return the result of a search, and how often it loaded the teacher to solve and measured the machine."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((measure_plan, "measure_speed"), (solve_phase, "load_bench")):
            before = getattr(module, name)

            def counted(*given: Any, name: str = name, before: Any = before, **more: Any) -> Any:
                counts[name] += 1
                return before(*given, **more)

            patch.setattr(module, name, counted)
        return search_budgets(request(folder, "whole")), counts


def results(folder: Path, out: str) -> dict[tuple[str, str, str | None], tuple[object, ...]]:
    """Return the accuracy, perplexity and tokens of all rows of all runs."""
    return {
        (name, row.row_id, row.split): (row.accuracy, row.perplexity, row.train_tokens)
        for name in runs_of(folder / out, NAME)
        for row in RunFolder.open(folder / out, name).events.rows()
    }


def test_each_budget_has_a_student_and_those_that_do_not_bind_share_it(folder: Path, found: Any) -> None:
    tight, none, wide, wider = found[0]["budgets"]
    assert tight["label"] == small(folder)
    assert "nothing fits" in none["nothing_fits"]
    assert none["run"] is None
    assert wide["run"] == wider["run"] == f"{NAME}-1GB"
    assert (wide["same_as"], wider["same_as"]) == (None, "1GB")
    assert runs_of(folder / "whole", NAME) == [f"{NAME}-{small(folder)}", f"{NAME}-1GB"]
    assert set(known_runs(folder / "whole")) == set(runs_of(folder / "whole", NAME))
    for one in (tight, wide):
        row = one["best"]
        assert row["memory_bytes"] <= one["budget"]["memory_bytes"]
        assert (Path(one["path"]) / "student.gguf").exists()
        assert one["exported"]["row_id"] == row["row_id"]
        assert one["gain_over_untrained"] or not one["exported"]["trained"]


def test_what_budgets_share_is_made_once(folder: Path, found: Any) -> None:
    assert found[1] == {"load_bench": 1, "measure_speed": 1}
    # The second run scored no teacher. It got the first run's scores before its own first session.
    events = RunFolder.open(folder / "whole", f"{NAME}-1GB").events.all()
    assert [type(event) for event in events].count(TeacherScored) == 1
    assert isinstance(events[0], TeacherScored)
    assert isinstance(events[1], SessionBegan)


def test_the_report_has_a_line_for_each_budget_and_the_table_all_rows(folder: Path, found: Any) -> None:
    report = (folder / "whole" / NAME / "report.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in report.splitlines() if line.startswith("| ")][2:] == [
        one["label"] for one in found[0]["budgets"]
    ]
    assert "16GB: the same student as 1GB; the budget does not bind." in sentences(found[0])
    assert [line[0] for line in cells(found[0])] == [small(folder), "1MB", "1GB", "16GB"]
    table, told = read_table(folder / "whole" / NAME / "leaderboard.parquet")
    assert {run: about["budget"]["memory_bytes"] for run, about in told.items()} == {
        one["run"]: one["budget"]["memory_bytes"] for one in found[0]["budgets"][:3:2]
    }
    assert len(read_rows(table, "here")) == len([key for key in results(folder, "whole") if key[2] == "validation"])


@pytest.mark.slow
def test_kills_lead_to_the_same_rows(folder: Path, found: Any) -> None:
    def killed(asked: SearchRequest, observer: Observer) -> None:
        raise Killed

    def first_alone(asked: SearchRequest, observer: Observer) -> None:
        killed(asked, observer) if asked.name == f"{NAME}-1GB" else search(asked, observer)

    def before_its_trials(asked: SearchRequest, observer: Observer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("autodistill.search.search.prepare_trials", lambda *_: killed(asked, observer))
            search(asked, observer)

    # Kill it between the two runs, then within the second run, and then run it to the end.
    for number, run in enumerate((first_alone, before_its_trials)):
        with pytest.raises(Killed):
            search_budgets(request(folder, "killed", resume=number > 0), run=run)
    again = search_budgets(request(folder, "killed", resume=True))
    assert results(folder, "killed") == results(folder, "whole")
    for one, other in zip(again["budgets"], found[0]["budgets"], strict=True):
        assert (one["label"], one["run"], one["exported"]) == (other["label"], other["run"], other["exported"])


def test_a_finished_search_is_left_as_it_is(folder: Path, found: Any) -> None:
    before = (folder / "whole" / f"{NAME}-1GB" / "trials.jsonl").read_bytes()
    again = search_budgets(request(folder, "whole", resume=True, budgets=None))
    assert again == found[0]
    assert (folder / "whole" / f"{NAME}-1GB" / "trials.jsonl").read_bytes() == before


@pytest.mark.slow
def test_time_is_divided_and_what_one_run_leaves_goes_to_the_next(folder: Path) -> None:
    asked = request(folder, "timed", time="600s", explore=1.0, trials=1)
    seconds: list[float] = []

    def run(one: SearchRequest, observer: Observer) -> None:
        record = BudgetsFolder.open(folder / "timed", NAME).read()
        assert one.time == next(part.seconds for part in record.own if part.run == one.name)
        seconds.append(float(one.time or 0))
        search(one, observer)

    search_budgets(asked, run=run)
    record = BudgetsFolder.open(folder / "timed", NAME).read()
    left = 600 - record.prepared_seconds
    plans = [part.search["plan"]["box_seconds"] for part in record.own if part.search]
    assert plans == [pytest.approx(left / 2, abs=10)] * 2
    assert seconds[0] == pytest.approx(left / 2, abs=1)
    # The first run used a few seconds of its part, and the second gets the rest.
    assert left / 2 < seconds[1] < left
    stored = json.loads((folder / "timed" / f"{NAME}-1GB" / "search.json").read_text())
    assert stored["box"]["seconds"] == seconds[1]


def test_a_time_that_holds_no_search_for_each_is_refused_with_the_least(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a search for each of the 2 budgets.*give --time \d+[sm] or more"):
        search_budgets(request(folder, "short", budgets=f"{small(folder)},1GB", time="2s"))
    assert known_runs(folder / "short") == []
    assert not (folder / "short" / NAME).exists()


def test_nothing_that_fits_any_budget_is_an_error(folder: Path) -> None:
    with pytest.raises(NothingFitsError, match="nothing fits any of these budgets; of 2MB: nothing fits"):
        search_budgets(request(folder, "none", budgets="1MB,2MB"))


def test_other_budgets_than_before_are_refused(folder: Path, found: Any) -> None:
    with pytest.raises(InputError, match=r"was begun for .*, not for 1GB, 2GB"):
        search_budgets(request(folder, "whole", resume=True, budgets="1GB,2GB"))


def test_a_name_that_is_taken_is_refused(folder: Path, found: Any) -> None:
    with pytest.raises(InputError, match=r"exists in .*: go on with it by --resume"):
        search_budgets(request(folder, "whole"))


def test_an_interrupt_says_how_all_budgets_go_on(folder: Path) -> None:
    def run(asked: SearchRequest, observer: Observer) -> None:
        raise InterruptedSearchError("stopped; to go on: this one")

    command = f"autodistill search --budgets 1GB,2GB --name {NAME}"
    asked = request(folder, "stopped", budgets="1GB,2GB", command=command)
    with pytest.raises(InterruptedSearchError, match=r"all budgets go on with: autodistill search .* --resume"):
        search_budgets(asked, run=run)


def test_an_interrupt_before_there_is_a_plan_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autodistill.search.budgets.prepare.construct_each", interrupted)
    with pytest.raises(InterruptedSearchError, match="stopped before the first trial: nothing to resume"):
        search_budgets(request(folder, "early", budgets="1GB,2GB"))
    assert list((folder / "early").iterdir()) == []


@pytest.mark.slow
def test_a_plan_of_each_is_shown_and_nothing_written(folder: Path) -> None:
    tight, none, wide, wider = plan_budgets(request(folder, "planned"))["budgets"]
    assert tight["plan"]["plan"]["tokens"] == wide["plan"]["plan"]["tokens"] == 512
    assert none["plan"] is wider["plan"] is None
    assert not (folder / "planned").exists()


def test_a_damaged_record_is_refused(folder: Path, found: Any) -> None:
    data = json.loads((folder / "whole" / NAME / "budgets.json").read_text())
    with pytest.raises(InputError, match=r"budgets\.json\.parts\[0\]\.seconds must be a finite number"):
        Record.from_json({**data, "parts": [{**data["parts"][0], "seconds": "many"}]})
    with pytest.raises(InputError, match="is not whole"):
        Record.from_json({**data, "parts": data["parts"][3:]})
    with pytest.raises(InputError, match="is of version 9"):
        Record.from_json({**data, "schema_version": 9})


def test_a_better_student_of_a_smaller_budget_is_named(folder: Path, found: Any) -> None:
    record = BudgetsFolder.open(folder / "whole", NAME).read()
    tight, wide = record.own
    rows = RunFolder.open(folder / "whole", str(wide.run)).events.rows(split="validation")
    first, *_, last = sorted(rows, key=lambda row: row.accuracy or 0.0)
    as_found = {tight.label: {"best": last.to_json()}, wide.label: {"best": first.to_json()}}
    better = _better(wide, wide, record, as_found)
    assert better is not None
    assert better["label"] == tight.label
    assert better["value"] == pytest.approx((last.accuracy or 0) - (first.accuracy or 0))
    assert _better(tight, tight, record, as_found) is None
    swapped = {tight.label: {"best": first.to_json()}, wide.label: {"best": last.to_json()}}
    assert _better(wide, wide, record, swapped) is None


@pytest.mark.slow
def test_the_command_line_has_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--context", "64", "--teacher", str(folder / "teacher"), "--data", str(folder / "text"), "--trials", "1"]
    words += ["--tokens", "256", "--sequence-length", "64", "--runner", "inline", "--cache", str(folder / "cache")]
    out = ["--runs", str(folder / "typed")]
    assert main(["search", "--budgets", f"{small(folder)},1GB", *words, *out, "--name", "typed"]) == 0
    shown = capsys.readouterr().out
    assert f"typed-{small(folder)}" in shown
    assert "report.md" in shown
    assert main(["leaderboard", "typed", *out, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["run"] for row in rows} == {f"typed-{small(folder)}", "typed-1GB"}
    assert main(["explain", "typed", *out]) == 2
    assert "is a search for several budgets: name one of its runs, typed-" in capsys.readouterr().err
    # More trials extend each of its runs.
    more = ["--resume", "--name", "typed", "--trials", "2", "--runner", "inline", "--cache", str(folder / "cache")]
    assert main(["search", *more, *out, "--json"]) == 0
    assert [one["label"] for one in json.loads(capsys.readouterr().out)["budgets"]] == [small(folder), "1GB"]
    for run in runs_of(folder / "typed", "typed"):
        assert json.loads((folder / "typed" / run / "search.json").read_text())["plan"]["trials"] == 2

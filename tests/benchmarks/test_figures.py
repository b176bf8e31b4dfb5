"""The figures of README and docs match the tracked reports, and the program that checks this notices a change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.common import program, report
from benchmarks.documents import translation
from benchmarks.reliability import figures


def test_what_documents_quote_is_what_reports_have():
    assert [*figures.check(figures.quotes()), *figures.boards()] == []


@pytest.fixture(scope="module")
def sources():
    """The quotes and the constants, which take longer to read than a page takes to check."""
    return figures.quotes(), figures.constants()


@pytest.mark.parametrize("page", figures.pages())
def test_every_figure_of_a_page_is_held_to_a_report_or_is_a_constant(page, sources):
    assert [*figures.without_source(page, *sources)] == []


def test_the_translation_has_the_figures_of_the_readme():
    """Which stand in which paragraph is checked in `test_translation.py`, except for paragraphs of its own."""
    english, chinese = (path.read_text(encoding="utf-8") for path in (translation.ENGLISH, translation.CHINESE))
    assert sorted(figures.DECIMAL.findall(chinese)) == sorted(figures.DECIMAL.findall(english))


def test_every_constant_is_in_a_page_and_holds_a_figure():
    text = "\n".join((figures.ROOT / page).read_text(encoding="utf-8") for page in figures.pages())
    assert [one for one in figures.constants() if not figures.pattern(one).search(text)] == []
    assert [one for one in figures.constants() if not re.search(r"\d\.\d", one)] == []


def test_every_claim_has_a_verdict_and_a_program():
    """A row names the program that printed its figure, or says that there is none."""
    text = (figures.ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(cells[1]) for cells in rows] == list(range(1, 18))
    verdicts = ("confirmed", "refuted", "predicted", "not measured", "nothing to confirm")
    assert all(any(word in cells[3] for word in verdicts) and cells[4].strip() and cells[5].strip() for cells in rows)


def test_a_figure_without_a_source_is_named(quoted):
    one, document = quoted(
        "Of 2.3M weights students have 36.5 ± 0.2%, and `0.1`\n```sh\nrun 0.5\n```\nloses 0.25 nats."
    )
    (fault,) = figures.without_source("page.md", [one], ["2.3M weights"])
    assert "page.md says 0.25 in" in fault
    document.write_text("12.3M weights, 127.0.0.1, and 5 ± 1 of Qwen2.5")
    assert [fault.split()[2] for fault in figures.without_source("page.md", [one], ["2.3M weights"])] == [
        "12.3",
        "5",
        "1",
    ]


@pytest.fixture
def quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "reports").mkdir(parents=True)
    (tmp_path / "benchmarks" / "reports" / "r.md").write_text("| students | 0.3652 ± 0.0018 |\n")
    document = tmp_path / "page.md"

    def quote(text: str) -> tuple[figures.Quote, Path]:
        document.write_text(text)
        says, where = "students have {} ± {}%", "| students | {} ± {} |"
        return figures.Quote(document="page.md", says=says, report="r.md", where=where, times=100), document

    return quote


@pytest.mark.parametrize("text", ["students have 36.52 ± 0.18%", "students\nhave 36.5 ± 0.2%", "students have 37 ± 0%"])
def test_a_figure_may_be_rounded_and_its_line_broken(quoted, text):
    one, _ = quoted(text)
    assert [*figures.check([one])] == []


@pytest.mark.parametrize("text", ["students have 36.6 ± 0.2%", "students have 36.5 ± 0.1%", "teachers have 1 ± 1%"])
def test_a_figure_or_a_sentence_that_is_another_is_named(quoted, text):
    one, document = quoted(text)
    (fault,) = figures.check([one])
    assert "page.md" in fault
    assert document.read_text() == text


def test_a_stale_figure_is_written_anew_with_as_many_digits(quoted):
    one, document = quoted("Of a dozen students have 30.1 ± 1.00%, which is little.")
    assert [*figures.check([one], write=True)] == []
    assert document.read_text() == "Of a dozen students have 36.5 ± 0.18%, which is little."


@pytest.mark.parametrize("path", sorted(program.TRACKED.glob("*.md")), ids=lambda path: path.stem)
def test_a_report_has_the_date_and_machine_of_its_records_or_says_that_they_have_none(path):
    header, told = path.read_text(encoding="utf-8").split("\n\n")[1:3]
    records = [path.parent / name for name in dict.fromkeys(re.findall(r"\]\(([\w.-]+\.jsonl?)\)", header + told))]
    stamps = [stamp for record in records for stamp in _stamps(record)]
    if "Without records" in told:
        # Parts that were measured again have records and say when.
        assert all(f"{one['date']}, {one['machine']}" in told for one in stamps)
        assert bool(stamps) == path.with_suffix(".json").exists()
    elif stamps:
        machines = " and ".join(dict.fromkeys(one["machine"] for one in stamps))
        assert header.splitlines()[0] == f"{max(one['date'] for one in stamps)}, {machines}."
    else:
        assert records
        assert "of this rendering." in told


def _stamps(record: Path) -> list[dict[str, str]]:
    if record.suffix == ".jsonl":
        return [*report.stamps_of(record)]
    data = json.loads(record.read_text(encoding="utf-8"))
    made = [data[name] for name in ("made", "amended") if isinstance(data.get(name), dict)]
    return made + [{"date": made[0]["date"], "machine": one} for one in data.get("machines", ())]


def test_a_report_is_written_with_its_record_and_the_date_of_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "REPORTS", tmp_path)
    monkeypatch.setattr(report, "_NOTED", {})
    monkeypatch.setattr(report, "_MADE", [])
    with pytest.raises(ValueError, match="noted nothing"):
        report.write("some-thing", "Some thing", ["text"])
    report.note("seconds", {("a", 1): [0.5, 0.25]}, made={"date": "2026-01-02", "machine": "a machine"})
    path = report.write("some-thing", "Some thing", ["text"])
    assert path.name == "2026-01-02-some-thing.md"
    assert "2026-01-02, a machine." in path.read_text()
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["record"] == {"seconds": [{"a x 1": [0.5, 0.25]}]}


def test_a_store_keeps_when_and_where_each_line_was_measured(tmp_path, monkeypatch):
    store = tmp_path / "store.jsonl"
    store.write_text('{"name": "older"}\n')
    report.add_line(store, {"name": "newer"})
    assert report.lines_of(store) == [{"name": "older"}, {"name": "newer"}]
    monkeypatch.setattr(program, "REPORTS", tmp_path)
    path = report.write("kept", "Kept", ["text"], store)
    assert "from [store.jsonl](store.jsonl)" in path.read_text()
    assert report.UNSTAMPED not in path.read_text()
    store.write_text('{"name": "older"}\n')
    assert f"\n\n{report.UNSTAMPED}\n\ntext" in report.write("kept", "Kept", ["text"], store).read_text()

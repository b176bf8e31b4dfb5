"""The log of a run: rows are parsed once, and the file is only read again if another process has changed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.runs.events import RowAdded, RowTested, read_events, rows_of
from autodistill.runs.results import row as row_module
from autodistill.runs.results.row import Row
from autodistill.runs.run_log import RunLog
from autodistill.utils.event_log import EventLog


def row(trial: str, accuracy: float, event: str = "row") -> dict[str, Any]:
    least: dict[str, Any] = {
        "row_id": f"{trial}-gguf-q8_0" + ("-test" if event == "test" else ""),
        "trial": trial,
        "kind": "student",
        "name": trial,
        "deployment": {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32},
        "status": "completed",
        "feasible": True,
        "split": "test" if event == "test" else "validation",
        "accuracy": accuracy,
    }
    return {"event": event, "row": Row.from_json(least).to_json()}


EVENTS = [row("t000", 0.1), row("t001", 0.2), row("t000", 0.25, "test"), row("t000", 0.3)]


@pytest.mark.parametrize("read", [0, 1, 2, 4])
def test_rows_are_those_of_the_file_whenever_it_was_read(tmp_path: Path, read: int) -> None:
    log = RunLog(tmp_path / "trials.jsonl")
    for number, event in enumerate(EVENTS):
        if number == read:
            log.read()
        log.append(event)
    written = EventLog(log.path).read()
    assert log.read() == written == EVENTS
    for kinds in ((RowAdded,), (RowTested,), (RowAdded, RowTested)):
        assert log.rows(*kinds) == rows_of(read_events(written), kinds)
    assert [event.to_json() for event in log.all()] == EVENTS
    assert [one.accuracy for one in log.rows(split="validation")] == [0.3, 0.2]
    assert log.rows(split="test") == []


def test_what_others_wrote_is_read_and_what_they_removed_is_gone(tmp_path: Path) -> None:
    log, other = RunLog(tmp_path / "trials.jsonl"), RunLog(tmp_path / "trials.jsonl")
    log.append(EVENTS[0])
    assert other.read() == log.read() == EVENTS[:1]
    other.append(EVENTS[1])
    log.append(EVENTS[2])
    assert [one.trial for one in log.rows()] == ["t000", "t001"]
    assert log.read() == other.read() == EVENTS[:3]
    log.path.write_text(json.dumps(EVENTS[1]) + "\n")
    assert [one.trial for one in log.rows()] == ["t001"]
    log.path.unlink()
    assert (log.read(), log.rows()) == ([], [])


def test_a_row_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "trials.jsonl")
    for event in EVENTS:
        log.append(event)
    parsed: list[str] = []
    convert = row_module._convert

    def counting(value: Any, name: str) -> Any:
        parsed.extend([value] if name == "row_id" else [])
        return convert(value, name)

    monkeypatch.setattr(row_module, "_convert", counting)
    for _ in range(3):
        log.rows()
    log.append(EVENTS[0])
    log.rows()
    assert parsed == [event["row"]["row_id"] for event in (*EVENTS, EVENTS[0])]


def test_of_a_line_of_a_later_version_only_an_upgrade_is_asked(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "trials.jsonl")
    log.append({"event": "row", "row": EVENTS[0]["row"] | {"schema_version": 99}})
    with pytest.raises(InputError) as refused:
        log.rows()
    said = str(refused.value)
    assert said.startswith(f"line 1 of {log.path}: a row has schema version 99")
    assert said.endswith("upgrade autodistill to read it")


def test_a_line_that_is_wrong_is_named_each_time(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "trials.jsonl")
    log.append(EVENTS[0])
    log.append({"event": "row", "row": {"row_id": "t001"}})
    for _ in range(2):
        with pytest.raises(InputError, match=r"line 2 of .* is not what was written"):
            log.rows()

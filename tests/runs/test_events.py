"""Events of a run's log: their JSON, what it leaves out, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.runs.events import (
    KINDS,
    RowAdded,
    RunEvent,
    RungReached,
    SessionBegan,
    TrialAdded,
    TrialEnded,
    read_event,
    read_events,
    rows_of,
)
from autodistill.runs.results.row import Decision, Row, Status
from autodistill.runs.run_log import RunLog
from autodistill.strategy.strategy import Strategy

LEAST: dict[str, Any] = {
    "row_id": "t001-gguf-q8_0",
    "trial": "t001",
    "kind": "student",
    "name": "t001",
    "deployment": {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32},
    "status": "completed",
    "feasible": True,
    "split": "validation",
}
RUNG = {"event": "rung", "trial": "t000", "rung": 1, "tokens": 1024, "value": 0.25}


def example(kind: type[RunEvent]) -> RunEvent:
    """Return an event of a kind with all required fields."""
    values: dict[str, Any] = {
        "trial": "t000",
        "status": Status.FAILED,
        "reason": "so",
        "strategy": Strategy(),
        "deployment": "gguf-q8_0",
        "kept": True,
        "row": Row.from_json(LEAST),
        "trials": ("t000",),
    }
    values |= {"point": {"init.depth": 0.5}, "session": 1.0, "seconds": {"train": 2.0}, "teacher_accuracy": 0.5}
    values |= {
        "rung": 1,
        "tokens": 1024,
        "value": None,
        "work": None,
        "kills": 0,
        "trained": 9,
        "branches": ({"share": 0.5, "tokens": 512, "cost": 0.05, "kept": True},),
    }
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_what_is_written_reads_back_as_the_same_event(kind: type[RunEvent], tmp_path: Path) -> None:
    log, event = RunLog(tmp_path / "trials.jsonl"), example(kind)
    log.add(event)
    (read,) = log.all()
    assert read.time is not None
    assert dataclasses.replace(read, time=None) == event
    assert log.read() == [read.to_json()]
    assert log.of(kind) == [read]


def test_the_log_says_what_a_rung_has_and_leaves_out_what_it_has_not() -> None:
    event = RungReached(
        trial="t000", rung=1, tokens=1024, value=0.25, judged=-1.5, decision=Decision.PAUSE, seconds={"train": 1.0}
    )
    expected = RUNG | {"judged": -1.5, "further": [], "decision": "pause", "seconds": {"train": 1.0}, "steps": []}
    assert event.to_json() == expected | {"trained": 0, "shared": 0}
    more = dataclasses.replace(event, resumed=5, workers=2, student="abc", unsaved="full").to_json()
    assert (more["resumed"], more["workers"], more["student"], more["unsaved"]) == (5, 2, "abc", "full")


def test_a_trial_has_the_id_of_its_strategy_beside_it() -> None:
    event = TrialAdded(trial="t000", point=None, strategy=Strategy())
    assert event.to_json()["strategy_id"] == Strategy().id
    assert "strategy" not in TrialAdded(trial="t000", point=None).to_json()


def test_a_rung_of_an_earlier_version_was_judged_by_its_value() -> None:
    assert read_event(RUNG) == RungReached(trial="t000", rung=1, tokens=1024, value=0.25, judged=0.25)


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert read_event({"event": "later", "more": 1}) is None
    assert read_event(RUNG | {"more": 1}) == read_event(RUNG)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"event": 3}, "event must be text"),
        ({"event": "row"}, "row lacks row"),
        ({"time": "now"}, "time must be a finite number"),
        ({"tokens": None}, "rung.tokens must be a whole number"),
        ({"trial": "../t000"}, "trial must be the name of one, like t003"),
        ({"decision": "go"}, "rung.decision must be one of pause, stop"),
        ({"further": 3}, "rung.further must be a list"),
    ],
)
def test_what_is_no_event_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_event(RUNG | change)


def test_an_end_says_how_a_trial_ended() -> None:
    event = TrialEnded(trial="t0", status=Status.REJECTED, reason="too large", miss={"limit": "memory", "slack": 0.5})
    assert event.to_json() == {
        "event": "status",
        "trial": "t0",
        "status": "rejected",
        "reason": "too large",
        "miss": {"limit": "memory", "slack": 0.5},
    }


def test_a_later_row_takes_the_place_of_an_earlier_one() -> None:
    lines = [
        {"event": "row", "row": LEAST | {"accuracy": 0.1}},
        SessionBegan().to_json(),
        {"event": "row", "row": LEAST | {"row_id": "other"}},
        {"event": "row", "row": LEAST | {"accuracy": 0.2}},
        {"event": "test", "row": LEAST | {"split": "test"}},
        {"event": "test", "rows": []},
    ]
    found = rows_of(read_events(lines))
    assert [(row.row_id, row.accuracy) for row in found] == [("t001-gguf-q8_0", 0.2), ("other", None)]
    assert rows_of([RowAdded(row=found[0])]) == found[:1]

"""How long the sessions of a run lasted, including those that were killed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.runs import sessions
from autodistill.runs.events import CheckpointsRemoved, SessionBegan, SessionEnded, TrialAdded
from autodistill.runs.sessions import SignsOfLife, by_phase, last_ended, lasted
from autodistill.utils.storage import Storage

KILLED = [SessionBegan(time=100.0), TrialAdded(trial="t000", point=None), CheckpointsRemoved(time=130.0)]


def sign(folder: Path, storage: Storage | None, started: float, train: float) -> None:
    """Leave the sign of life that a killed session leaves."""
    SignsOfLife(folder, storage, started, lambda: {"train": train}).give()


def test_a_session_that_was_killed_lasted_until_its_last_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last_ended([], tmp_path, None) is None
    assert last_ended(KILLED, tmp_path, None) is None, "nothing tells"
    monkeypatch.setattr(sessions, "now", lambda: 430.0)
    sign(tmp_path, None, 100.0, 250.0)
    ended = last_ended(KILLED, tmp_path, None)
    assert ended == SessionEnded(session=100.0, time=430.0, seconds={"train": 250.0})
    again = [*KILLED, ended, SessionBegan(time=1000.0), CheckpointsRemoved(time=1010.0)]
    assert (lasted(KILLED), lasted(again)) == (30.0, 330.0 + 10.0)
    assert lasted(again, since=1000.0) == 10.0
    assert by_phase([*again, replace(ended, session=1000.0)]) == {"train": 500.0}
    # The sign is from the session before, whose end is already known.
    assert last_ended(again, tmp_path, None) is None
    assert last_ended([*KILLED, ended], tmp_path, None) is None


@pytest.mark.parametrize("here", [False, True])
def test_of_two_machines_the_one_that_lived_last_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    storage = Storage(f"file://{tmp_path}/shared")
    monkeypatch.setattr(sessions, "now", lambda: 200.0)
    sign(tmp_path / "a", storage, 100.0, 1.0)
    monkeypatch.setattr(sessions, "now", lambda: 300.0)
    sign(tmp_path / "a" if here else tmp_path / "b", None if here else storage, 100.0, 2.0)
    ended = last_ended(KILLED, tmp_path / "a", storage)
    assert ended is not None
    assert (ended.time, ended.seconds) == (300.0, {"train": 2.0})
    (tmp_path / "a" / "alive.json").write_text("{")
    (tmp_path / "shared" / "alive.json").write_text("{")
    assert last_ended(KILLED, tmp_path / "a", storage) is None


def test_signs_are_given_at_both_ends_and_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_BEAT_SECONDS", 0.01)
    seen: list[float] = []

    def seconds() -> dict[str, float]:
        seen.append(time.monotonic())
        return {}

    with SignsOfLife(tmp_path, None, 1.0, seconds):
        while len(seen) < 3:
            time.sleep(0.01)
        inside = len(seen)
    assert len(seen) > inside
    # A folder that cannot be written ends nothing.
    SignsOfLife(tmp_path / "alive.json", None, 1.0, seconds).give()


def test_sessions_count_in_their_order_whatever_the_clock_was_set_to_between_them() -> None:
    """The run was extended at 10,000. Before the next session, the clock was set back by an hour."""
    events = [
        SessionBegan(time=5000.0),
        CheckpointsRemoved(time=5100.0),
        SessionBegan(time=10_000.0),
        CheckpointsRemoved(time=10_030.0),
        SessionBegan(time=6450.0),
        CheckpointsRemoved(time=6457.0),
    ]
    assert lasted(events, since=10_000.0) == 37.0
    assert lasted(events) == 137.0

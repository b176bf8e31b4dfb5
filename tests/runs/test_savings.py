"""Saved compute, counted by hand from a log."""

from __future__ import annotations

from typing import Any

import pytest

from autodistill.runs.events import RungReached, SessionBegan, StudentKept, TrialAdded, TrialEnded, WorkLost
from autodistill.runs.results.row import Status
from autodistill.runs.savings import saved
from autodistill.testing import small_plan

PLAN = small_plan()  # its first rung is at 1,024 tokens


def rung(trial: str, trained: int, shared: int, seconds: float, **more: int) -> RungReached:
    reached: dict[str, Any] = {"rung": 0, "tokens": 1024, "value": None, "seconds": {"train": seconds}}
    return RungReached(trial=trial, trained=trained, shared=shared, **reached, **more)


EVENTS = [
    SessionBegan(),
    TrialAdded(trial="t000", point=None, parameters=1000),
    TrialAdded(trial="t001", point=None, parameters=1000),
    TrialAdded(trial="t002", point=None, parameters=4000),
    TrialAdded(trial="t003", point=None, parameters=None),  # it contradicts the teacher
    rung("t000", 1024, 0, 10.0),
    rung("t001", 256, 768, 3.0),
    rung("t001", 512, 1792, 7.0),
    TrialEnded(trial="t002", status=Status.REJECTED, reason="too large"),
    TrialEnded(trial="t003", status=Status.REJECTED, reason="no such student"),
    TrialEnded(trial="t000", status=Status.STOPPED, reason=None),
]


def test_what_was_saved_is_what_the_log_says() -> None:
    found = saved(EVENTS, PLAN)
    assert (found.trained_tokens, found.shared_tokens, found.sharing) == (1792, 2560, 1)
    assert found.trained_flops == 6 * 1000 * 1792
    assert found.shared_flops == 6 * 1000 * 2560
    assert found.shared_seconds == pytest.approx(20.0 * 2560 / 1792)
    # One rejected trial has no student, so no training of it was saved.
    assert (found.rejected, found.without_student, found.rejected_tokens) == (2, 1, 1024)
    assert found.rejected_flops == 6 * 4000 * 1024
    assert found.rejected_seconds == pytest.approx(20.0 * 4 * 1024 / 1792)
    shared, rejected = found.describe()
    assert shared == (
        "1 trial went on from stages that others had trained: 2,560 tokens (about 1.5e+07 FLOPs, 28.6s of a worker) "
        "saved, 1,792 tokens trained, decays at rungs among them"
    )
    amount = "1,024 tokens (about 2.5e+07 FLOPs, 45.7s of a worker)"
    assert rejected == (
        f"2 proposals were rejected without training: up to the first rung {amount} saved; 1 of them count nothing, as "
        "the teacher has no such student"
    )
    alone = [event for event in EVENTS if getattr(event, "trial", None) in (None, "t003")]
    assert saved(alone, PLAN).describe() == (
        "1 proposal was rejected without training, the teacher having no such student: nothing is counted as saved",
    )


def test_nothing_saved_says_nothing() -> None:
    assert saved(EVENTS[:2], PLAN).describe() == ()
    old = rung("t000", 0, 0, 5.0)  # from before stages were shared
    assert saved([*EVENTS[:2], old], PLAN).shared_seconds == 0.0


def test_what_failed_was_interrupted_or_had_all_threads_counts() -> None:
    """Rates come from work with a result, whose seconds are known.

    Work on all threads takes the time of four workers.
    """
    events = [
        *EVENTS[:2],
        WorkLost(trial="t000", trained=300),
        rung("t000", 1000, 500, 10.0, resumed=200),
        rung("t000", 1000, 0, 10.0, workers=4),
        StudentKept(trial="t000", kept=True, trained=500, seconds={"train": 5.0}),
    ]
    found = saved(events, PLAN)
    assert found.trained_tokens == 300 + 1000 + 200 + 1000 + 500
    assert found.trained_flops == 6 * 1000 * 3000
    assert found.trained_seconds == 10 + 40 + 5
    assert found.shared_seconds == pytest.approx(55 * 500 / 2500)

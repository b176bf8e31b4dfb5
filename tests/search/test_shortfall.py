"""A shortfall is only blamed on the time budget if there is one, and if work was left because of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from autodistill.runs.results.row import Status
from autodistill.search.campaign.agenda import REJECTIONS_IN_A_ROW
from autodistill.search.shortfall import shortfall

PLAN: Any = SimpleNamespace(trials=9, keep=(5, 2))


def trial(status: Status | None, rung: int = 0, kind: str = "student", **more: Any) -> Any:
    number = 0 if kind == "student" else None
    least = {"value": 0.4 if rung >= 0 else None, "number": number, "candidate": SimpleNamespace(training=None)}
    least |= {"task": SimpleNamespace(length=1)}
    return SimpleNamespace(**least | {"status": status, "rung": rung, "kind": kind} | more)


STOPPED, WHOLE = trial(Status.STOPPED), trial(Status.COMPLETED, 2)
FAILED, REJECTED, UNBEGUN = (trial(status, -1) for status in (Status.FAILED, Status.REJECTED, Status.STOPPED))


def told(*trials: Any, box: bool, exhausted: bool = False, confirm: int = 0, untrained: list[str] | None = None) -> str:
    campaign: Any = SimpleNamespace(
        trials=dict(enumerate(trials)),
        exhausted=exhausted,
        time_budget=SimpleNamespace(deadline=1.0 if box else None),
        question=SimpleNamespace(confirm=confirm),
        untrained_baselines=lambda: untrained or [],
    )
    return "; ".join(shortfall(campaign, PLAN))


def test_what_failed_or_did_not_fit_was_tried_and_is_no_fault_of_a_box() -> None:
    trials = [*[STOPPED] * 7, WHOLE, FAILED]
    assert told(*trials, box=False) == ""
    assert (
        told(*trials, REJECTED, box=True) == "the time budget took 1 of 2 trials to full fidelity: give it more --time"
    )
    # None of the other trials could have gone on.
    assert told(*[trial(Status.STOPPED, value=None)] * 7, WHOLE, FAILED, box=True) == ""
    assert told(*[STOPPED] * 7, WHOLE, WHOLE, box=True) == ""


def test_a_box_that_ended_early_is_said_to() -> None:
    assert told(*[STOPPED] * 3, WHOLE, WHOLE, UNBEGUN, REJECTED, FAILED, box=True) == (
        "the time budget was enough for 6 of the 9 planned trials: give it more --time"
    )
    late = told(*[STOPPED] * 7, WHOLE, WHOLE, box=True, untrained=["hand_designed"])
    assert late.startswith("the time budget was too short for the baseline hand_designed")
    assert told(*[STOPPED] * 7, WHOLE, WHOLE, box=False, untrained=["hand_designed"]) == ""


def test_a_space_that_holds_no_more_or_of_which_nothing_fits_is_said_to() -> None:
    few = [*[STOPPED] * 3, WHOLE, WHOLE]
    for box in (True, False):
        said = told(*few, REJECTED, box=box, exhausted=True)
        assert said == "the space holds no more strategies, so that the search tried 5 of the 9 planned trials: " + (
            "widen it with --space"
        )
        said = told(*few, *[REJECTED] * REJECTIONS_IN_A_ROW, box=box, exhausted=True)
        assert said.startswith(f"the last {REJECTIONS_IN_A_ROW} strategies that were proposed did not fit")
        assert "tried 5 of the 9 planned trials: raise --budget" in said
        miss = SimpleNamespace(text="its training needs 20 GB")
        large = trial(Status.REJECTED, -1, candidate=SimpleNamespace(training=SimpleNamespace(miss=miss)))
        said = told(*few, *[large] * REJECTIONS_IN_A_ROW, box=box, exhausted=True)
        assert "cannot be trained here or do not fit" in said
        assert said.endswith("its training needs 20 GB")
    assert told(*[STOPPED] * 7, WHOLE, WHOLE, box=False, exhausted=True) == ""


def test_trainings_on_further_seeds_are_counted_of_what_there_was_to_be_trained() -> None:
    baseline = trial(Status.COMPLETED, 2, "baseline")
    again = trial(Status.COMPLETED, 2, "confirmation")
    ended = [*[STOPPED] * 7, WHOLE, WHOLE, baseline]
    assert told(*ended, *[again] * 6, box=True, confirm=2) == ""
    late = trial(Status.STOPPED, -1, "confirmation")
    said = "the time budget was enough for 4 of the 6 trainings on further seeds: give it more --time"
    assert told(*ended, *[again] * 3, trial(Status.FAILED, -1, "confirmation"), late, box=True, confirm=2) == said
    assert told(*ended, *[again] * 3, late, box=False, confirm=2) == ""

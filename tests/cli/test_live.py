"""The progress of a search, as its view shows it."""

import io
from types import SimpleNamespace
from typing import Any

from autodistill.cli.live import SearchView
from autodistill.cli.tables import View
from autodistill.runs.results.row import Status


def trial(
    status: Status | None = None,
    *,
    running: bool = False,
    rung: int = -1,
    seconds: float = 0.0,
    tokens: int = 0,
    kind: str = "student",
    length: float = 1.0,
) -> Any:
    return SimpleNamespace(
        status=status,
        running=running,
        rung=rung,
        train_seconds=seconds,
        trained_tokens=tokens,
        kind=kind,
        task=SimpleNamespace(length=length),
    )


def campaign(metric: str = "accuracy", deadline: float | None = 1000.0, confirm: int = 0) -> Any:
    """Return a campaign of two workers with rungs at 256 and 768 tokens.

    One trial is a fork that only trained its decay.
    """
    trials = [
        trial(Status.COMPLETED, rung=1, seconds=6.0, tokens=900),
        trial(Status.STOPPED, rung=0, seconds=3.0, tokens=256),
        trial(rung=0, seconds=1.0, tokens=64),
        trial(running=True),
        trial(Status.REJECTED),
        trial(Status.FAILED),
    ]
    seconds = {"load": 9.0, "export": 20.0, "test": 4.0}
    plan = SimpleNamespace(rungs=(256, 768), keep=(2,), workers=2, trials=9, seconds=seconds, alone=2)
    question = SimpleNamespace(
        plan=plan, space=SimpleNamespace(baselines={"one": 1}), metric=metric, teacher_accuracy=0.5, confirm=confirm
    )
    return SimpleNamespace(
        question=question,
        time_budget=SimpleNamespace(deadline=deadline),
        trials={str(number): one for number, one in enumerate(trials)},
    )


def shown(given: Any, *, best: float | None = 0.4, baseline: float | None = 0.375) -> list[str]:
    stream = io.StringIO()
    view = SearchView(View(stream), clock=lambda: 940.0)
    view.phase("teacher cache")
    view.line("worth a line")
    view.campaign(given, best, baseline)
    view.phase("test split")
    return stream.getvalue().splitlines()


def test_what_is_trained_on_alone_has_nothing_beside_it() -> None:
    given = campaign()
    # A trial on all threads trained 2,000 tokens in 5 seconds. The two workers took another 5 seconds each.
    given.trials["x"] = trial(Status.COMPLETED, rung=1, seconds=5.0, tokens=2000, length=8.0)
    assert f"{(900 + 256 + 64 + 2000) / (10 / 2 + 5):,.0f} tokens/s" in shown(given)[2]


def test_a_person_sees_phase_trials_quality_speed_and_time_left() -> None:
    # Each of two workers trained for 5 seconds, (900 + 256 + 64) tokens in all. Then come deadline, export and test.
    assert shown(campaign()) == [
        "teacher cache",
        "worth a line",
        "trials: 1 of 10 done, 1 running, 1 paused, 1 stopped, 1 rejected, 1 failed; "
        "accuracy: best 0.4000, baseline 0.3750, teacher 0.5000; 244 tokens/s, 1m 24s left",
        "test split: 1m 24s left",
    ]


def test_the_teacher_is_shown_by_the_metric_that_it_was_scored_on() -> None:
    assert "perplexity: best 12.0000; 244 tokens/s" in shown(campaign("perplexity", None), best=12.0, baseline=None)[2]


def test_further_seeds_count_among_what_is_to_be_done() -> None:
    """Two finalists and a baseline are trained on three more seeds."""
    assert any("of 19 done" in line for line in shown(campaign(confirm=3)))


def test_more_are_never_done_than_there_are_to_do() -> None:
    """With the time that was left, a third student reached the end and is confirmed too. Each counts once."""
    given = campaign(confirm=1)
    again = [trial(Status.COMPLETED, rung=1, kind="confirmation", length=2.0) for _ in range(4)]
    given.trials |= {f"s{number}": one for number, one in enumerate(again)}
    # Nine trials, a baseline, and four on another seed, although three were planned.
    assert any("trials: 5 of 14 done" in line for line in shown(given))

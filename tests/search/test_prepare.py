"""What is reported about loaded data before a search is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.data.conversations import single_turn
from autodistill.data.dataset import load_split
from autodistill.data.documents import DataSource
from autodistill.data.prepare import prepare
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError, MissingDependencyError
from autodistill.models.config import spec_from_config
from autodistill.search.algorithms.successive_halving import SuccessiveHalving
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Workers
from autodistill.search.planning.plan import extend
from autodistill.search.prepare import (
    _adapted_to_machines,
    _check_fingerprints,
    _extended,
    _time_budget,
    _too_long_questions,
)
from autodistill.testing import small_plan, tiny_config, tiny_tokenizer


def test_questions_that_no_student_can_be_asked_are_counted_and_all_of_them_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chats = tuple(single_turn(f"Question {number}: " + "which? " * (number % 2 * 40), "Yes.") for number in range(80))
    source = DataSource(name="chats", kind="jsonl", documents=chats, license=None, fingerprint="chats")
    data = prepare(source, tmp_path / "tokenizer", "tiny", 512, tmp_path)
    questions = load_split(data.folder, "validation").questions
    assert questions is not None
    sizes = sorted(len(one.prompt) + one.answer_tokens for one in questions.entries)
    longest, count = sizes[-1], len(sizes)

    def said(context: int, written: str = "exact_match") -> tuple[str, ...]:
        budget = SimpleNamespace(context=context)
        config: Any = SimpleNamespace(budget=budget, requested=SimpleNamespace(written=written))
        loaded: Any = SimpleNamespace(data=data)
        return _too_long_questions(config, loaded)

    assert said(longest) == said(1, written="") == ()
    long = sum(size > 100 for size in sizes)
    assert 0 < long < count
    assert said(100) == (
        f"{long} of {count} questions of the validation split do not fit a context of 100 with their answers, and "
        "count as not answered",
    )
    with pytest.raises(InputError, match=f"{count} of {count} questions .* give a larger --context"):
        said(5)


SPEED = Speed(cache=1e4, score=1e4, worker_train=1e4, worker_score=1e4)


def extended(
    plan: Plan,
    *,
    finished: bool = True,
    strategy: str | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    **asked: Any,
) -> Plan:
    fields = {"trials": None, "time_seconds": None, "strategy": strategy} | asked
    config: Any = SimpleNamespace(stored={"seconds": {}} if finished else {}, explore=1.0, **fields)
    log: Any = SimpleNamespace(of=lambda kind: [SimpleNamespace(**one) for one in events if one["event"] == kind.event])
    return _extended(config, plan, spec_from_config(tiny_config()), SPEED, log)


def test_a_run_of_one_strategy_stays_one_however_much_time_it_is_given() -> None:
    plan = small_plan(trials=0, keep=(0, 0))
    assert extended(plan, strategy="logit_kd", time_seconds=600.0) == plan
    assert extended(plan, time_seconds=600.0).trials > 0, "a search has more"


def test_trials_that_a_finished_run_is_given_without_time_are_in_no_box() -> None:
    """The time budget was for the planned trials, which have used it up."""
    plan = extend(small_plan(box_seconds=600.0), 9)
    more = extended(plan, trials=40)
    assert (more.trials, more.box_seconds) == (40, None)
    assert extended(more).box_seconds is None, "nor when it is interrupted and goes on"
    # In other cases the time budget stays: no more trials are asked for, there is more time, or planned work is left.
    assert extended(plan) == extended(plan, trials=plan.trials) == plan
    assert extended(plan, trials=40, time_seconds=60.0).box_seconds == 600.0
    assert extended(plan, finished=False, trials=40).box_seconds == 600.0


def test_trials_that_are_added_have_places_whatever_went_on_in_time_that_was_left() -> None:
    """Three of three trials went to the end.

    Even so, there must be places left for the added trial, which may be the best.
    """
    plan = small_plan(trials=3, rungs=(1024, 9216), keep=(2,))
    events: list[dict[str, Any]] = [{"event": "session", "time": 0.0}]
    for name, number, rungs in (
        ("b000", None, (1,)),
        ("t000", 0, (0, 1)),
        ("t001", 1, (0, 1)),
        ("t002", 2, (0, 1)),
        ("t000x", None, (1,)),
    ):
        events.append({"event": "trial", "trial": name, "number": number})
        events += [{"event": "rung", "trial": name, "rung": rung} for rung in rungs]
    more = extended(plan, trials=4, events=events)
    assert (more.trials, more.keep) == (4, (4,))
    assert extended(plan, trials=4, events=events[:5]).keep == (2,), "one went on: there is a place left as planned"

    scheduler = SuccessiveHalving(trials=4, rungs=more.rungs, keep=more.keep)
    for name in ("t000", "t001", "t002"):
        for rung in (0, 1):
            scheduler.report(name, rung, 0.5)
    scheduler.report("t003", 0, 0.9)
    assert scheduler.next_to_promote((), all_proposed=True) == "t003"


def test_a_box_is_for_the_whole_run_and_an_extension_has_its_own() -> None:
    planned = {"plan": small_plan(box_seconds=600.0).to_json()}

    def box(stored: dict[str, Any] | None, at: float, **asked: Any) -> dict[str, float | None]:
        config: Any = SimpleNamespace(**{"trials": None, "time_seconds": None, "stored": stored} | asked)
        return _time_budget(config, small_plan(box_seconds=600.0), at)

    first = box(None, 100.0)
    assert first == {"seconds": 600.0, "since": 100.0}
    killed = planned | {"box": first}
    # The printed command repeats the time that was typed, and plain --resume has none. Both keep the same time budget.
    assert box(killed, 500.0, time_seconds=600.0) == box(killed, 500.0) == first
    assert box(killed, 500.0, time_seconds=900.0) == {"seconds": 900.0, "since": 100.0}
    finished = killed | {"seconds": {"total": 590.0}}
    assert box(finished, 800.0) == first
    longer = box(finished, 800.0, time_seconds=300.0)
    assert longer == {"seconds": 300.0, "since": 800.0}
    assert box(killed | {"box": longer}, 950.0) == box(killed | {"box": longer}, 950.0, time_seconds=300.0) == longer
    assert box(finished, 800.0, trials=40) == {"seconds": None, "since": 800.0}
    assert box(finished, 800.0, trials=1) == first
    # Runs of earlier versions do not store a time budget.
    assert box(planned, 500.0) == {"seconds": 600.0, "since": 0.0}


def test_a_run_of_8_bit_states_is_not_resumed_where_their_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(count=2, threads=1, bf16=False, device="cpu")
    loaded: Any = SimpleNamespace(workers=workers)
    plans = {state: small_plan(optimizer_state=state) for state in ("float32", "bfloat16", "int8")}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert {state: _adapted_to_machines(plan, loaded).optimizer_state for state, plan in plans.items()} == {
        name: name for name in plans
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _adapted_to_machines(plans["bfloat16"], loaded).optimizer_state == "bfloat16", "which need no package"
    with pytest.raises(
        MissingDependencyError, match=r"8-bit optimiser states.*pip install 'autodistill-search\[8bit\]'"
    ):
        _adapted_to_machines(plans["int8"], loaded)


def test_a_run_is_not_resumed_with_another_model_than_its_students_started_from() -> None:
    def resumed(now: str, stored: dict[str, Any]) -> None:
        same = {"fingerprint": "1"}
        config: Any = SimpleNamespace(name="mine", stored={"teacher": same, "data": same} | stored)
        one = SimpleNamespace(fingerprint="1")
        pretrained = {"somebody/model": SimpleNamespace(fingerprint=now)}
        loaded: Any = SimpleNamespace(teacher=one, data=one, pretrained_models=pretrained)
        _check_fingerprints(config, loaded)

    known = {"pretrained": {"somebody/model": {"fingerprint": "2", "revision": "a" * 40}}}
    resumed("2", known)
    resumed("3", {})  # a run of an older version
    with pytest.raises(InputError, match=r"the model somebody/model of the run 'mine' has changed since \(2, now 3\)"):
        resumed("3", known)

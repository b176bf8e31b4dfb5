"""The basis of the search's benchmarks: rank correlation, halving, replayed campaigns, the cost of their work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from autodistill.distillation.student.check import probe_deployment, student_spec
from autodistill.runs.events import RungReached
from autodistill.runs.results.row import Decision
from autodistill.strategy.strategy import Strategy
from benchmarks.common import (
    curves,
    expenses,
    math_search,
    math_table,
    prepared,
    program,
    recorded,
    report,
    simulate,
    timed_parts,
)
from benchmarks.common.expenses import Expense
from benchmarks.reliability import kill, orchestration
from benchmarks.search import rank_flip, replay, search_efficiency, search_efficiency_report


@pytest.fixture
def table() -> recorded.Table:
    """A synthetic table: the later a rung, the closer its accuracy to the final one."""
    space = math_search.space()
    dice = np.random.default_rng(0)
    lines = []
    for point in space.points(lambda dimension: dimension.domain.grid or ()):
        strategy = space.strategy(point)
        allowed = recorded.allowed(student_spec(strategy, recorded.teacher_spec()), space.deployments)
        if not allowed:
            continue
        probe, final = probe_deployment(strategy, allowed).name, float(dice.uniform(0.9, 1.0))
        lines.append(
            math_table.Line(
                strategy=strategy.to_json(),
                seed=0,
                tokens=math_table.RUNGS,
                initial=0.5,
                decayed=(final - 0.3, final - 0.2, final - 0.1, final),
                plain=(final - 0.35, final - 0.25, final - 0.15),
                rows={one.name: final - 0.01 * (one.name != probe) for one in allowed},
                probe=probe,
                train_seconds=1e-4,
                evaluate_seconds=0.5,
            )
        )
    parts = timed_parts.Parts(
        machine="made up", step=0.1, live_step=0.125, cache=15.0, evaluation=0.5, teacher_rows=2.0
    )
    return recorded.Table(lines, parts)


def test_tau_is_scipys() -> None:
    dice = np.random.default_rng(1)
    for _ in range(20):
        a, b = dice.integers(0, 6, (2, 30)).astype(float)  # with ties
        assert rank_flip.tau(a, b) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)


def test_half_of_the_shapes_do_not_fit_and_the_recipe_lies_in_the_space(table: recorded.Table) -> None:
    points = recorded.points(table.space)
    assert len(table.recorded) == len(points) // 2
    (recipe,) = table.space.baselines.values()
    assert table.space.point(recipe) is not None
    assert recipe.id in table.lines


def test_a_replayed_search_finds_what_was_recorded_at_the_cost_of_its_training(table: recorded.Table) -> None:
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    spent, campaign = simulate.simulate(table, plan, seed=3, sharing=False)
    again, _ = simulate.simulate(table, plan, seed=3, sharing=False)
    assert spent == again
    tokens, costs = 0, simulate.Worker(table, plan).costs
    for event in campaign.log.of(RungReached):
        trial = campaign.trials[event.trial]
        line = table.line(trial.task.strategy)
        place = table.lines and line.tokens.index(event.tokens)
        assert event.value == line.decayed[place]
        # A baseline trains straight to the end. Others continue from where the decay to the rung before began.
        before = -1 if trial.task.straight else event.rung - 1
        tokens += costs.stretch_tokens(event.rung, before)
    assert spent.trained == tokens
    assert spent.shared == 0
    ended = {trial.task.id for trial in campaign.trials.values() if trial.status == "completed"}
    assert len(ended) == 3  # two of the plan and the recipe
    best = max(max(table.line(campaign.trials[trial].task.strategy).rows.values()) for trial in ended)
    assert spent.best[2] == best


def test_a_replayed_search_waits_while_all_of_its_workers_are_away(table: simulate.Table) -> None:
    """The work of a lost worker is repeated, and the search ends with as many trials as one that loses no worker."""
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2), workers=1)
    whole, calm = simulate.simulate(table, plan, seed=3)
    typical = plan.rungs[-1] * 1e-4
    spent, campaign = simulate.simulate(table, plan, seed=3, life=5 * typical, away=typical)
    assert spent.lost > 0
    assert spent.seconds > whole.seconds + spent.lost * typical
    assert len(campaign.trials) == len(calm.trials)
    assert all(trial.status is not None for trial in campaign.trials.values())


def test_samplers_are_compared_with_the_searchs_own_whichever_are_asked_for() -> None:
    pairs = replay.pairs
    reference = [0.5, 0.52, 0.54]
    (line,) = pairs(reference, [("random", "to the end", [0.48, 0.51, 0.51])]).splitlines()
    # Differences of 2, 1 and 3 points: their mean, and their standard deviation of 1 divided by the root of 3.
    assert line == "- tpe, pauses and promotes, less random, to the end: +2.000 ± 0.577 points, clear"
    every = [("tpe", "pauses and promotes", reference), ("random", "pauses and promotes", [0.5, 0.52, 0.54])]
    (line,) = pairs(reference, every).splitlines()
    assert line == "- tpe, pauses and promotes, less random, pauses and promotes: +0.000 ± 0.000 points, not clear"
    assert pairs([0.5], [("random", "to the end", [0.4])]).endswith("+10.000 points, of one seed")


def test_sharing_trains_fewer_tokens_for_the_same_values(table: recorded.Table) -> None:
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    shared = [simulate.simulate(table, plan, seed=seed)[0] for seed in range(6)]
    assert sum(one.shared for one in shared) > 0
    own = [simulate.simulate(table, plan, seed=seed, sharing=False)[0] for seed in range(6)]
    assert sum(one.trained for one in shared) < sum(one.trained for one in own)


def test_without_rejection_what_cannot_fit_is_trained_to_its_first_rung(table: recorded.Table) -> None:
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    _, campaign = simulate.simulate(table, plan, seed=0, rejection=False)
    unfit = [trial for trial in campaign.trials.values() if not trial.task.deployments]
    assert unfit
    assert {trial.rung for trial in unfit} == {0}
    assert all(trial.value is None for trial in unfit)


def test_a_search_without_a_cache_pays_for_the_teacher(table: recorded.Table) -> None:
    plan = simulate.plan(4, (simulate.TOKENS,), ())
    cached, campaign = simulate.simulate(table, plan, seed=0, sharing=False)
    live, _ = simulate.simulate(table, plan, seed=0, sharing=False, live_teacher=True)
    costs = simulate.Worker(table, plan).costs
    trained = [trial.task.strategy for trial in campaign.trials.values() if trial.rung == 0]
    taught = sum(prepared.learns_from_teacher(strategy) for strategy in trained)
    assert live.operations - cached.operations == taught * costs.online(simulate.TOKENS) - costs.cache
    # From the timed parts and the recipe's 1e-4 s per token: a live teacher adds a quarter of the training time, and
    # caching takes one and a half times the training time.
    training = 1e-4 * simulate.TOKENS
    assert live.seconds - cached.seconds == pytest.approx(taught * 0.25 * training - 1.5 * training)
    assert [one[2] for one in live.curve] == [one[2] for one in cached.curve]


def test_the_seconds_of_a_search_hold_all_that_its_operations_do(table: recorded.Table) -> None:
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    spent, campaign = simulate.simulate(table, plan, seed=3, sharing=False)
    # The same for every student: 0.5 s for the average evaluation in the table, which has three rungs and the end.
    question = 0.5 / ((3 * math_search.RUNG_QUESTIONS + math_search.QUESTIONS) / 4)
    judged = 0
    for event in campaign.log.of(RungReached):
        judged += math_search.QUESTIONS if event.rung == len(plan.rungs) - 1 else math_search.RUNG_QUESTIONS
    more = sum(len(trial.task.deployments) - 1 for trial in campaign.trials.values() if trial.status == "completed")
    cache, teacher = 1.5 * 1e-4 * simulate.TOKENS, 4 * question * math_search.QUESTIONS
    evaluated = question * (judged + more * math_search.QUESTIONS)
    assert spent.seconds == pytest.approx(1e-4 * spent.trained + evaluated + cache + teacher)
    assert spent.curve[-1][1] <= spent.seconds
    assert spent.curve[0][1] >= cache + teacher + 1e-4 * simulate.TOKENS


def test_two_workers_spend_the_same_in_fewer_seconds_of_the_box(table: recorded.Table) -> None:
    alone, beside = (
        simulate.simulate(
            table, simulate.plan(6, (simulate.TOKENS,), (), workers=workers), sampler="random", sharing=False
        )[0]
        for workers in (1, 2)
    )
    start = simulate.Worker(table, simulate.plan(6, (simulate.TOKENS,), ())).start.seconds
    assert beside.operations == alone.operations
    assert start + 0.5 * (alone.seconds - start) <= beside.seconds < alone.seconds


def test_a_search_is_broken_off_once_both_operations_and_seconds_are_spent(table: recorded.Table) -> None:
    plan = simulate.plan(40, (simulate.TOKENS,), ())
    settings = {"sampler": "random", "sharing": False}
    whole, _ = simulate.simulate(table, plan, **settings)
    assert len(whole.curve) > 12
    fourth, eighth = whole.curve[3], whole.curve[7]
    for operations, seconds, last in (
        (fourth[0], 0.0, fourth),
        (fourth[0], eighth[1], eighth),
        (eighth[0], fourth[1], eighth),
    ):
        spent, _ = simulate.simulate(table, plan, limit=Expense(operations=operations, seconds=seconds), **settings)
        assert spent.curve == whole.curve[: whole.curve.index(last) + 1]


def test_a_kind_of_student_takes_the_median_of_its_records_and_an_unrecorded_one_by_its_size(
    table: recorded.Table,
) -> None:
    from dataclasses import replace

    recipe = table.space.baselines[math_search.RECIPE]
    lines = list(table.every.values())
    mine = [
        line
        for line in lines
        if (one := Strategy.from_json(line.strategy)).init == recipe.init and prepared.learns_from_teacher(one)
    ]
    # One of them is slow, and all others of this kind are twice as fast.
    odd = {line.id: 1.0 if line is mine[0] else 5e-5 for line in mine}
    told = [replace(line, train_seconds=odd.get(line.id, line.train_seconds)) for line in lines]
    parts = timed_parts.Parts(machine="", step=0.1, live_step=0.1, cache=1.0, evaluation=0.5, teacher_rows=2.0)
    clock = expenses.Clock(told, parts, recipe, table.teacher)
    assert clock.train(recipe, 1000) == pytest.approx(0.05)
    plain = math_table.without_teacher(recipe)
    assert clock.train(plain, 1000) == pytest.approx(0.1)
    large = next(
        strategy
        for point in recorded.points(table.space)
        if (strategy := table.space.strategy(point)).id not in table.lines
    )
    size = student_spec(large, table.teacher).parameters
    rates = sorted(
        line.train_seconds / student_spec(Strategy.from_json(line.strategy), table.teacher).parameters for line in told
    )
    assert clock.train(large, 1000) == pytest.approx(1000 * size * float(np.median(rates)))


def test_what_an_arm_knew_and_when_it_passed_is_told_by_either_Expense() -> None:
    known = search_efficiency_report.Known
    of = {"strategy": "s", "seed": 0, "deployment": "d"}
    slow = [known(operations=1, seconds=10.0, value=0.5, **of), known(operations=2, seconds=20.0, value=0.7, **of)]
    large = [known(operations=5, seconds=12.0, value=0.5, **of), known(operations=30, seconds=24.0, value=0.8, **of)]
    assert curves.at(slow, 2).value == 0.7
    assert curves.at(slow, 15.0, "seconds").value == 0.5
    assert curves.at(slow, 9.0, "seconds") is None
    assert curves.passes(large, 0.6) == 30
    assert curves.passes(large, 0.6, "seconds") == 24.0
    assert curves.speedup([slow], [large], 0.6, [30]) == "held: 15.0 times."
    assert curves.speedup([slow], [large], 0.6, [30.0], "seconds") == "not held: 1.2 times."
    assert curves.speedup([slow], [large[:1]], 0.6, [100.0], "seconds").startswith("held: more than 5.0 times")


def test_an_arm_passes_within_the_boxes_of_the_expense_that_is_counted(table: recorded.Table) -> None:

    def known(operations: float, seconds: float, value: float) -> Any:
        given = {"strategy": "s", "seed": 0, "deployment": "d"}
        return search_efficiency_report.Known(operations=operations, seconds=seconds, value=value, **given)

    recipe = known(1.0, 1.0, 0.5)
    arms = {
        "a": [[known(2.0, 30.0, 0.7)]],
        "b": [[known(3.0, 50.0, 0.7)]],
        "c": [[known(1.0, 8.0, 0.4), known(9.0, 10.0, 0.7)]],
        "d": [[recipe]],
    }
    outcome = search_efficiency_report.Outcome(
        table=table, arms=arms, box=Expense(operations=1.0, seconds=5.0), followed=8, chosen={}, test={}, checks=[]
    )

    def cells(text: str) -> dict[str, list[str]]:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
        return {row[0][1]: row[1:] for row in rows}

    # Script c does not pass within 8 operations, but it does within 40 seconds. Random search (b) is the other way
    # round.
    by_operations = cells(search_efficiency_report.compute_to_pass(outcome, "operations"))
    by_seconds = cells(search_efficiency_report.compute_to_pass(outcome, "seconds"))
    assert [by_operations[name][0] for name in "abc"] == ["100%", "100%", "0%"]
    assert [by_seconds[name][0] for name in "abc"] == ["100%", "0%", "100%"]
    unit = outcome.recipe.seconds
    assert by_seconds["c"][1] == f"{10 / unit:.1f} (10 s)"
    # At twice the budget: 2 operations, or 10 seconds.
    assert cells(search_efficiency_report.best_by_compute(outcome, "operations"))["c"][3] == "40.00"
    assert cells(search_efficiency_report.best_by_compute(outcome, "seconds"))["c"][3] == "70.00"


def test_the_script_pays_for_a_live_teacher_and_tuning_without_one_for_no_cache(table: recorded.Table) -> None:
    costs = simulate.Worker(table, simulate.plan(1, math_table.RUNGS, (1, 1, 1))).expenses
    recipe = table.space.baselines[math_search.RECIPE]
    evaluated = [costs.evaluation(recipe, costs.costs.read_at(rung)) for rung in range(4)]
    by_hand = costs.teacher_rows + costs.train(recipe, simulate.TOKENS, live=True)
    (student,) = search_efficiency.script(table, 0, costs.teacher_rows + Expense(operations=1))
    assert student.operations == pytest.approx((by_hand + sum(evaluated, Expense())).operations)
    assert student.seconds == pytest.approx((by_hand + sum(evaluated, Expense())).seconds)
    taught = search_efficiency.tuned(table, recipe, Expense(operations=1, seconds=1.0), taught=True)
    plain = search_efficiency.tuned(
        table, math_table.without_teacher(recipe), Expense(operations=1, seconds=1.0), taught=False
    )
    assert taught[0].seconds - plain[0].seconds == pytest.approx(1.5 * 1e-4 * simulate.TOKENS)
    assert taught[0].operations - plain[0].operations == costs.costs.cache


def test_who_is_not_among_the_best_on_reporting_is_stopped_for_good(table: recorded.Table) -> None:
    scheduler = simulate.Stopping(trials=9, rungs=(1, 3, 9), keep=(3, 1))
    assert scheduler.report("a", 0, 0.5) is Decision.PAUSE
    assert scheduler.next_to_promote((), all_proposed=False) == "a"  # the first is the best so far
    scheduler.report("b", 0, 0.4)
    scheduler.report("c", 0, 0.6)
    assert scheduler.next_to_promote(("a",), all_proposed=False) == "c"
    assert scheduler.next_to_promote(("a", "c"), all_proposed=True) is None  # b was stopped, and is not taken up again


def test_halving_keeps_the_best_at_each_rung(table: recorded.Table) -> None:
    lines = table.recorded
    halving = rank_flip.Halving(table, (1, 2), (6, 2))
    behind, cost = halving.run(np.arange(12))
    assert behind == pytest.approx(0)  # no ranks change in the synthetic table
    costs = prepared.Costs(table.teacher, simulate.plan(12, simulate.default_rungs(), ()))
    drawn = sorted(lines[:12], key=lambda line: -line.final)
    by_hand = 0
    for rung, kept in enumerate((12, 6, 2)):
        by_hand += sum(costs.segment(Strategy.from_json(line.strategy), rung, rung - 1) for line in drawn[:kept])
    whole = prepared.Costs(table.teacher, simulate.plan(12, (simulate.TOKENS,), ()))
    assert cost == pytest.approx(
        by_hand / sum(whole.segment(Strategy.from_json(line.strategy), 0, -1) for line in drawn)
    )


def test_halvings_are_tried_on_the_same_draws_until_the_time_is_over(
    table: recorded.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(table.recorded)
    halving = rank_flip.Halving(table, (1, 2), (6, 2))
    one, other = rank_flip.on_draws([halving, halving], count, 40, float("inf"))
    assert one == other
    assert len(one) == 40
    assert len({cost for _, cost in one}) > 1
    said = capsys.readouterr().err.splitlines()
    assert (said[0], said[-1]) == ("draw 2 of 40", "draw 40 of 40")
    assert rank_flip.on_draws([halving], count, 40, 0.0) == [one[:2]]


def test_results_are_made_once_for_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "cache_folder", lambda: tmp_path / "cache")
    asked: list[int] = []

    def make() -> int:
        asked.append(1)
        return len(asked)

    assert report.Kept("x", "1").get("a", make) == 1
    assert report.Kept("x", "1").get("a", make) == 1
    assert report.Kept("x", "2").get("a", make) == 2


def test_differences_of_killed_searches_leave_times_out() -> None:
    from dataclasses import replace

    from autodistill.runs.results.row import Row
    from autodistill.strategy.deployment import IN_16_BITS

    row = Row(
        row_id="t000-a", trial="t000", kind="student", name="x", deployment=IN_16_BITS, status="completed",
        feasible=True, accuracy=0.5, train_seconds=3.0, memory_bytes=10, memory_source="measured",
    )  # fmt: skip
    same = replace(row, train_seconds=4.0, memory_bytes=11)
    assert list(kill.differences({"a": same}, {"a": row})) == []
    assert list(kill.differences({"a": replace(row, accuracy=0.6)}, {"a": row})) == ["a: accuracy is 0.6, not 0.5"]
    assert list(kill.differences({}, {"a": row})) == ["a is missing"]
    # Each search measures the memory of llama.cpp's process again, and predicts with that measurement.
    row, same, other = (
        replace(row, memory_bytes=size, memory_source="predicted") for size in (25_091_732, 25_112_212, 26_091_732)
    )
    assert list(kill.differences({"a": same}, {"a": row})) == []
    assert list(kill.differences({"a": other}, {"a": row})) == ["a: memory_bytes is 26091732, not 25091732"]


def test_the_cost_of_orchestration_is_measured_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, int, float]] = []
    started: list[str] = []

    class Ray:
        def __init__(self, machine: object) -> None:
            pass

        def wait(self) -> None:
            started.append("begun")

        def leave(self) -> None:
            started.append("left")

    def measure(run: Callable[..., object], count: int, seconds: float, workers: int) -> Any:
        measured.append((run.__name__, count, seconds))
        if len(measured) in (3, 5):
            raise KeyboardInterrupt
        fields = {"wall": 2.0, "spent": 1.0, "share": 0.5, "first": 0.5, "gaps": (0.25, 0.5), "processors": 3.0}
        return orchestration.Cost(trials=count, workers=workers, **fields)

    monkeypatch.setattr(report, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(program, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(orchestration, "LocalRay", Ray)
    monkeypatch.setattr(orchestration, "measure", measure)
    monkeypatch.setattr("sys.argv", ["orchestration.py", "--seconds", "0", "30"])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            orchestration.main()
    monkeypatch.setattr("sys.argv", ["orchestration.py", "--seconds", "0", "30", "--time", "1us"])
    with pytest.raises(SystemExit, match="the time is over with 4 results: call again for the rest"):
        orchestration.main()
    monkeypatch.setattr("sys.argv", ["orchestration.py", "--seconds", "0", "30", "--time", "5m"])
    orchestration.main()
    once = [("ours", 12, 0.0), ("plain", 8, 0.0), ("ours", 12, 30.0), ("plain", 8, 30.0)]
    assert measured == [*once[:3], once[2], once[3], once[3]]
    assert "0.38 (most 0.50)" in capsys.readouterr().err
    (written,) = (tmp_path / "reports").glob("*.md")
    assert written.read_text().count("plain Ray Tune") == 2
    # Nothing is started for results that are already known.
    count = len(started)
    orchestration.main()
    assert (len(started), len(measured)) == (count, 6)
    assert started == ["begun", "left"] * (count // 2)


def test_a_search_is_killed_in_each_part_of_its_end_once_its_trials_are_over() -> None:
    events = [
        {"event": "trial", "trial": "b000", "number": None},
        {"event": "status", "trial": "b000", "status": "completed"},
        {"event": "trial", "trial": "t000", "number": 0},
        {"event": "status", "trial": "t000", "status": "rejected"},
        {"event": "trial", "trial": "t001", "number": 1},
    ]
    ended = {"event": "status", "trial": "t001", "status": "stopped"}
    assert not kill.over(events, 1)
    assert kill.over([*events, ended], 1)
    assert not kill.over([*events, ended], 2)
    assert kill.stage_of([*events, ended], "loading teacher and data\n") == "status"
    for said, part in (
        ("trials\nexporting t001 as gguf-q8_0\nWriting model shards\n", "exporting and verifying"),
        ("exporting t001 as gguf-q8_0\nlatency of the gguf-q8_0 student\n", "timing the exported student"),
        ("exporting t001 as gguf-q8_0\nexporting the 16-bit folder\n", "exporting the 16-bit folder"),
        ("exporting the 16-bit folder\ntest split\n", "scoring on test"),
    ):
        assert kill.stage_of([*events, ended], said) == part

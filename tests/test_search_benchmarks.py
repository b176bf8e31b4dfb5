"""What the benchmarks of the search rest on: rank correlation, halving, replayed campaigns, the cost of their work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from autodistill.applied import probe_deployment, student_spec
from autodistill.contracts import Decision
from autodistill.strategy import Strategy

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@dataclass
class Made:
    """A table made up: the later a rung, the nearer its accuracy to the last."""

    simulate: ModuleType
    table: Any


@pytest.fixture
def made(load: Load) -> Made:
    simulate, table = load("simulate"), load("math_table")
    space = load("math_search").space()
    dice = np.random.default_rng(0)
    lines = []
    for point in space.points(lambda dimension: dimension.domain.grid or ()):
        strategy = space.strategy(point)
        allowed = simulate.allowed(student_spec(strategy, simulate.teacher_spec()), space.deployments)
        if not allowed:
            continue
        probe, final = probe_deployment(strategy, allowed).name, float(dice.uniform(0.9, 1.0))
        lines.append(
            table.Line(
                strategy=strategy.to_json(),
                seed=0,
                tokens=table.RUNGS,
                initial=0.5,
                decayed=(final - 0.3, final - 0.2, final - 0.1, final),
                plain=(final - 0.35, final - 0.25, final - 0.15),
                rows={one.name: final - 0.01 * (one.name != probe) for one in allowed},
                probe=probe,
                train_seconds=1e-4,
                evaluate_seconds=0.5,
            )
        )
    return Made(simulate, simulate.Table(lines))


def test_tau_is_scipys(load: Load) -> None:
    dice = np.random.default_rng(1)
    for _ in range(20):
        a, b = dice.integers(0, 6, (2, 30)).astype(float)  # with ties
        assert load("rank_flip").tau(a, b) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)


def test_half_of_the_shapes_do_not_fit_and_the_recipe_lies_in_the_space(made: Made) -> None:
    points = made.simulate.points(made.table.space)
    assert len(made.table.recorded) == len(points) // 2
    (recipe,) = made.table.space.baselines.values()
    assert made.table.space.point(recipe) is not None
    assert recipe.id in made.table.lines


def test_a_replayed_search_finds_what_was_recorded_at_the_cost_of_its_training(made: Made) -> None:
    simulate, table = made.simulate, made.table
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    spent, campaign = simulate.simulate(table, plan, seed=3, sharing=False)
    again, _ = simulate.simulate(table, plan, seed=3, sharing=False)
    assert spent == again
    events = campaign._log.read()
    tokens, costs = 0, simulate.Worker(table, plan).costs
    for event in events:
        if event["event"] == "rung":
            trial = campaign.trials[event["trial"]]
            line = table.line(trial.task.strategy)
            place = table.lines and line.tokens.index(event["tokens"])
            assert event["value"] == line.decayed[place]
            # A baseline goes straight to the end; others begin where the decay to the rung before left.
            before = -1 if trial.task.straight else event["rung"] - 1
            tokens += costs.stretch_tokens(event["rung"], before)
    assert spent.trained == tokens
    assert spent.shared == 0
    ended = {trial.task.id for trial in campaign.trials.values() if trial.status == "completed"}
    assert len(ended) == 3  # two of the plan and the recipe
    best = max(max(table.line(campaign.trials[trial].task.strategy).rows.values()) for trial in ended)
    assert spent.best[2] == best


def test_sharing_trains_fewer_tokens_for_the_same_values(made: Made) -> None:
    simulate, table = made.simulate, made.table
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    shared = [simulate.simulate(table, plan, seed=seed)[0] for seed in range(6)]
    assert sum(one.shared for one in shared) > 0
    own = [simulate.simulate(table, plan, seed=seed, sharing=False)[0] for seed in range(6)]
    assert sum(one.trained for one in shared) < sum(one.trained for one in own)


def test_without_rejection_what_cannot_fit_is_trained_to_its_first_rung(made: Made) -> None:
    simulate, table = made.simulate, made.table
    plan = simulate.plan(12, simulate.default_rungs(), (6, 2))
    _, campaign = simulate.simulate(table, plan, seed=0, rejection=False)
    unfit = [trial for trial in campaign.trials.values() if not trial.task.deployments]
    assert unfit
    assert {trial.rung for trial in unfit} == {0}
    assert all(trial.value is None for trial in unfit)


def test_a_search_without_a_cache_pays_for_the_teacher(made: Made) -> None:
    simulate, table = made.simulate, made.table
    plan = simulate.plan(4, (simulate.TOKENS,), ())
    cached, campaign = simulate.simulate(table, plan, seed=0, sharing=False)
    live, _ = simulate.simulate(table, plan, seed=0, sharing=False, live_teacher=True)
    costs = simulate.Worker(table, plan).costs
    trained = [trial.task.strategy for trial in campaign.trials.values() if trial.rung == 0]
    taught = sum(simulate.learns_from_teacher(strategy) for strategy in trained)
    assert live.operations - cached.operations == taught * costs.online(simulate.TOKENS) - costs.cache
    assert [one[2] for one in live.curve] == [one[2] for one in cached.curve]


def test_who_is_not_among_the_best_on_reporting_is_stopped_for_good(made: Made) -> None:
    scheduler = made.simulate.Stopping(trials=9, rungs=(1, 3, 9), keep=(3, 1))
    assert scheduler.report("a", 0, 0.5) is Decision.PAUSE
    assert scheduler.next_to_promote((), all_proposed=False) == "a"  # the first is the best of those before it
    scheduler.report("b", 0, 0.4)
    scheduler.report("c", 0, 0.6)
    assert scheduler.next_to_promote(("a",), all_proposed=False) == "c"
    assert scheduler.next_to_promote(("a", "c"), all_proposed=True) is None  # b was stopped, and is not taken up again


def test_halving_keeps_the_best_at_each_rung(load: Load, made: Made) -> None:
    lines = made.table.recorded
    halving = load("rank_flip").Halving(made.table, (1, 2), (6, 2))
    behind, cost = halving.run(np.arange(12))
    assert behind == pytest.approx(0)  # in the made-up table nobody changes places
    costs = load("prepared").Costs(made.table.teacher, made.simulate.plan(12, made.simulate.default_rungs(), ()))
    drawn = sorted(lines[:12], key=lambda line: -line.final)
    by_hand = 0
    for rung, kept in enumerate((12, 6, 2)):
        by_hand += sum(costs.stretch(Strategy.from_json(line.strategy), rung, rung - 1) for line in drawn[:kept])
    whole = load("prepared").Costs(made.table.teacher, made.simulate.plan(12, (made.simulate.TOKENS,), ()))
    assert cost == pytest.approx(
        by_hand / sum(whole.stretch(Strategy.from_json(line.strategy), 0, -1) for line in drawn)
    )


def test_halvings_are_tried_on_the_same_draws_until_the_time_is_over(
    load: Load, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    flip, count = load("rank_flip"), len(made.table.recorded)
    halving = flip.Halving(made.table, (1, 2), (6, 2))
    one, other = flip.on_draws([halving, halving], count, 40, float("inf"))
    assert one == other
    assert len(one) == 40
    assert len({cost for _, cost in one}) > 1
    said = capsys.readouterr().err.splitlines()
    assert (said[0], said[-1]) == ("draw 2 of 40", "draw 40 of 40")
    assert flip.on_draws([halving], count, 40, 0.0) == [one[:2]]


def test_results_are_made_once_for_the_same_source(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load("kept")
    monkeypatch.setattr(kept, "default_cache", lambda: tmp_path / "cache")
    asked: list[int] = []

    def make() -> int:
        asked.append(1)
        return len(asked)

    assert kept.Kept("x", "1").get("a", make) == 1
    assert kept.Kept("x", "1").get("a", make) == 1
    assert kept.Kept("x", "2").get("a", make) == 2


def test_differences_of_killed_searches_leave_times_out(load: Load) -> None:
    from dataclasses import replace

    from autodistill.records.row import Row

    row = Row(
        row_id="t000-a", trial="t000", kind="student", name="x", deployment={}, status="completed", feasible=True,
        accuracy=0.5, train_seconds=3.0, memory_bytes=10, memory_source="measured",
    )  # fmt: skip
    kill = load("kill")
    same = replace(row, train_seconds=4.0, memory_bytes=11)
    assert list(kill.differences({"a": same}, {"a": row})) == []
    assert list(kill.differences({"a": replace(row, accuracy=0.6)}, {"a": row})) == ["a: accuracy is 0.6, not 0.5"]
    assert list(kill.differences({}, {"a": row})) == ["a is missing"]


def test_the_cost_of_orchestration_is_measured_where_it_stopped(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load("orchestration")
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
        return program.Cost(trials=count, workers=workers, **fields)

    monkeypatch.setattr(load("kept"), "default_cache", lambda: tmp_path)
    monkeypatch.setattr(load("report"), "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(program, "LocalRay", Ray)
    monkeypatch.setattr(program, "measure", measure)
    monkeypatch.setattr("sys.argv", ["orchestration.py", "--seconds", "0", "30"])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            program.main()
    monkeypatch.setattr("sys.argv", ["orchestration.py", "--seconds", "0", "30", "--time", "1us"])
    with pytest.raises(SystemExit, match="the time is over with 4 results: call again for the rest"):
        program.main()
    monkeypatch.setattr("sys.argv", ["orchestration.py", "--seconds", "0", "30", "--time", "5m"])
    program.main()
    once = [("ours", 12, 0.0), ("plain", 8, 0.0), ("ours", 12, 30.0), ("plain", 8, 30.0)]
    assert measured == [*once[:3], once[2], once[3], once[3]]
    assert "0.38 (most 0.50)" in capsys.readouterr().err
    (written,) = (tmp_path / "reports").glob("*.md")
    assert written.read_text().count("plain Ray Tune") == 2
    # Of what is known already nothing is started.
    count = len(started)
    program.main()
    assert (len(started), len(measured)) == (count, 6)
    assert started == ["begun", "left"] * (count // 2)


def test_a_search_is_killed_in_each_part_of_its_end_once_its_trials_are_over(load: Callable[[str], Any]) -> None:
    kill = load("kill")
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

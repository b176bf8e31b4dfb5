"""The default search from solver to export: solved constructions are raced, trained, exported as trained, and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.distillation.student.shapes import cut_spec
from autodistill.errors import InputError
from autodistill.estimates.block_times import keep_times
from autodistill.hardware.budget import Budget, DeviceBudget, LatencyLimit
from autodistill.hardware.catalog import listed
from autodistill.models.config import spec_from_config
from autodistill.models.tensors import Role
from autodistill.quantization.formats import TYPES
from autodistill.runs.run_folder import RunFolder
from autodistill.search.campaign.observer import Observer
from autodistill.search.construction.construction import Construction, arms
from autodistill.search.preview import plan_search
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import Outcome, search
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import WHOLE
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.small_search import middle_budget
from tests.search.solve.timed import quick_in_8_bits


def _request(folder: Path) -> SearchRequest:
    return SearchRequest(
        budget=Budget(memory_bytes=25 * 10**6, context=64),
        teacher=str(folder / "teacher"),
        data=str(folder / "text"),
        trials=3,
        tokens=1024,
        sequence_length=64,
        runner="inline",
        runs=folder / "runs",
        name="run",
        cache=folder / "cache",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("solved")
    save_tiny_teacher(folder / "teacher", layers=4, width=128, ffn=512)
    tiny_text(folder / "text", documents=20, sentences=24)
    request = _request(folder)
    # The budget lies between the teacher in its fewest bits and in 16 bits.
    return search(replace(request, budget=middle_budget(folder / "teacher", 64))), folder


def test_what_was_solved_is_written_down_and_raced(run: tuple[Outcome, Path]) -> None:
    folder = run[1] / "runs" / "run"
    asked = json.loads((folder / "search.json").read_text())
    found = asked["constructions"]
    assert any(one["solved"] for one in found)
    assert all(one["bytes"] <= asked["budget"]["memory_bytes"] and one["kl"] >= 0 for one in found)
    layers = {str(layer) for layer in range(4)}
    for one in found:
        assert one["stored_kl"].keys() == {*layers, "embeddings", "cache"}
        heads = {"heads left out"} if one["init"]["heads"] < 1 else set()
        assert one["init"]["ffn"] == 1 or one["cut_kl"].keys() == layers | heads
        assert all(cost >= 0 for cost in one["stored_kl"].values())
    assert "no search" in asked["space_definition"]["starts"]
    assert "cache" not in asked["seconds"] or not (run[1] / "cache" / "teacher-outputs").exists()


def test_a_student_is_packed_on_the_grid_that_it_was_trained_on(run: tuple[Outcome, Path]) -> None:
    trained = [row for row in run[0].rows if row.kind == "student" and row.strategy and row.strategy.finishing]
    assert trained
    assert all(row.strategy and row.strategy.finishing.scheme == row.deployment.scheme for row in trained)


def test_the_untrained_solution_is_a_rival_and_the_export_fits(run: tuple[Outcome, Path]) -> None:
    asked = json.loads((run[1] / "runs" / "run" / "search.json").read_text())
    raced = arms([Construction.from_json(one) for one in asked["constructions"]])
    whole = {one.deployment for one in raced if one.whole}
    teachers = {row.deployment for row in run[0].rows if row.kind == "teacher"}
    assert len(whole) > 1
    assert whole <= teachers
    best = run[0].finish.best
    assert best.feasible
    assert run[0].finish.gains.untrained is not None
    assert (run[1] / "runs" / "run" / "student" / "gguf" / "student.gguf").exists()


def test_rungs_are_judged_by_likelihood(run: tuple[Outcome, Path]) -> None:
    folder = RunFolder.open(run[1] / "runs", "run")
    rungs = [event for event in folder.events.read() if event["event"] == "rung"]
    rows = {row.trial: row for row in run[0].rows if row.kind == "student"}
    assert rungs
    assert all(rungs[-1]["judged"] != event["value"] for event in rungs)
    last = {event["trial"]: event["judged"] for event in rungs}
    assert all(last[name] == pytest.approx(row.perplexity) for name, row in rows.items() if row.trial in last)


def test_a_limit_of_latency_goes_by_times_of_blocks_if_they_were_measured(run: tuple[Outcome, Path]) -> None:
    folder = run[1]
    device = next(one for one in listed() if "llama.cpp" in one.runtimes and not one.discrete)
    limit = LatencyLimit(quantity="tpot", percentile=50, seconds=0.05, streams=1)
    budget = DeviceBudget(memory_bytes=10**9, context=64, device=device, latency=(limit,))
    request = replace(_request(folder), name="timed", budget=budget)

    def linear() -> set[str]:
        """Return the types of the linear layers' matrices in all constructions."""
        found = [Construction.from_json(one) for one in plan_search(request)["constructions"]]
        shapes = [(cut_spec(one.init, spec), one.deployment) for one in found]
        every = ((one, held) for shape, held in shapes for one in shape.tensors if one.role is Role.LINEAR)
        return {str(held.storage(one)) for one, held in every}

    spec = spec_from_config(json.loads((folder / "teacher" / "config.json").read_text()))
    assert len(linear()) > 1
    path = keep_times(request.cache, quick_in_8_bits(device.name, spec, 64))
    try:
        assert linear() == {str(TYPES["q8_0"])}
    finally:
        path.unlink()


def test_a_space_that_restricts_the_solver_is_kept_to(run: tuple[Outcome, Path]) -> None:
    folder = run[1]
    dimensions = {
        "finishing.bits": {"choices": [5]},
        "init.depth": {"choices": [1.0]},
        "init.ffn": {"choices": [1.0]},
        "init.heads": {"choices": [1.0]},
        "distillation.learning_rate": {"low": 1e-5, "high": 1e-3},
    }
    space = Space(dimensions, solved=True)
    (folder / "restricted.yaml").write_text(space.to_yaml())
    request = replace(
        _request(folder),
        name="planned",
        space=str(folder / "restricted.yaml"),
        budget=Budget(memory_bytes=40 * 10**6, context=64),
    )
    planned = plan_search(request)
    found = [Construction.from_json(one) for one in planned["constructions"]]
    assert any(one.solved for one in found)
    assert {one.init for one in found} == {WHOLE}
    assert {one.deployment.bits for one in found} == {5}
    cached = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    cached |= {"cache_type_k": "q4_0", "cache_type_v": "q4_0"}
    one = Space({"init.depth": {"choices": [1.0]}}, deployments=[cached], solved=True)
    with pytest.raises(InputError, match=r"--kv-type q8_0 and the deployment gguf-q8_0\+kv-q4_0 contradict"):
        plan_search(replace(request, space=one, kv_type="q8_0"))


@pytest.mark.slow
def test_nothing_is_solved_in_a_short_time_where_a_plain_storage_loses_hardly_anything(
    run: tuple[Outcome, Path],
) -> None:
    """Training gains more in that time than solving could.

    If the user gives no time, solving takes none from training.
    """
    timed = {"trials": None, "tokens": None, "time": 600.0, "budget": Budget(memory_bytes=10**9, context=64)}
    told: list[str] = []

    class Listening(Observer):
        def line(self, text: str) -> None:
            told.append(text)

    planned = plan_search(replace(_request(run[1]), name="short", **timed), Listening())
    (one,) = [Construction.from_json(found) for found in planned["constructions"]]
    assert (one.whole, one.solved, one.deployment.name) == (True, False, "gguf-f16")
    assert one.kl is not None
    assert one.kl < 1e-4
    assert any(line.startswith("nothing is solved: gguf-f16 fits and loses 0.0000") for line in told)
    # A single construction is not raced. A race that needs more time does not affect the speed in the plan.
    assert planned["plan"]["trials"] == 1
    assert any("one construction is left" in note for note in planned["plan"]["notes"])
    asked = plan_search(replace(_request(run[1]), name="asked", **timed | {"trials": 5}))
    assert asked["plan"]["trials"] == 5
    longer = plan_search(replace(_request(run[1]), name="long", **timed | {"time": 3600.0}))
    assert len(longer["constructions"]) > 1
    assert longer["plan"]["trials"] > 1


@pytest.mark.slow
def test_a_short_time_that_holds_many_tokens_a_weight_trains_the_nearest_construction_without_a_race(
    run: tuple[Outcome, Path],
) -> None:
    budget = middle_budget(run[1] / "teacher", 64)
    timed = {"trials": None, "tokens": None, "time": 600.0, "budget": budget}
    short = plan_search(replace(_request(run[1]), name="nearest", **timed))
    assert len(arms([Construction.from_json(one) for one in short["constructions"]])) > 1
    assert short["plan"]["trials"] == 1
    (said,) = [note for note in short["plan"]["notes"] if "without a race" in note]
    assert said.startswith("only the construction that is nearest to its teacher is trained")
    raced = plan_search(replace(_request(run[1]), name="raced", **timed | {"time": 1800.0}))
    assert raced["plan"]["trials"] > 1
    assert not [note for note in raced["plan"]["notes"] if "without a race" in note]


@pytest.mark.slow
def test_it_goes_on_with_the_space_that_was_solved(run: tuple[Outcome, Path]) -> None:
    before = json.loads((run[1] / "runs" / "run" / "search.json").read_text())
    more = replace(_request(run[1]), budget=None, resume=True, trials=4)
    again = search(more)
    after = json.loads((run[1] / "runs" / "run" / "search.json").read_text())
    assert after["constructions"] == before["constructions"]
    assert after["space_definition"] == before["space_definition"]
    assert {row.row_id for row in run[0].rows} <= {row.row_id for row in again.rows}
    with pytest.raises(InputError, match="began without --kv-type q8_0"):
        search(replace(more, kv_type="q8_0"))

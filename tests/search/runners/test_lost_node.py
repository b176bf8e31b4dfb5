"""A solved search on two nodes. One is lost while types are scored, a student is made, or the best is trained."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.runs.run_folder import RunFolder
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.runners.lost_nodes import LONGEST, NodeKiller
from tests.search.small_search import middle_budget


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Provide a cluster whose head has no worker, so that either of the other two nodes may be lost."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def held_in(phase: str, folder: Path) -> Callable[..., Any]:
    """Return a function that makes a worker's work like the runner's own, but holds the first worker in a phase.

    It is held there until its node is removed. A file in the folder names this node and the trial.
    """

    # The function is nested so that Ray sends it by value: a node cannot import it from the tests.
    def worker(setting: Any, deadline: Any) -> Callable[[Any], dict[str, Any]]:
        import json
        import os

        import ray

        from autodistill.search.runners import ray as ray_runner
        from autodistill.search.worker import trial as trials

        node = ray.get_runtime_context().get_node_id()
        given: dict[str, Any] = {}

        def hold() -> None:
            mine = folder / f"held-{node}"
            mine.write_text(json.dumps(given))
            try:
                os.link(mine, folder / "held")  # the first of several wins
            except FileExistsError:
                return
            time.sleep(LONGEST)

        made, guard = trials.student_of, ray_runner.step_guard(deadline)

        def student_of(*asked: Any, **more: Any) -> Any:
            found = made(*asked, **more)
            if phase == "heal":
                hold()
            return found

        def step(record: Any) -> None:
            if phase == "trunk" and given["further"]:
                hold()
            guard(record)

        trials.student_of = student_of
        ray_runner.step_guard = lambda deadline: step
        work = ray_runner._worker(setting, deadline)

        def begin(assignment: Any) -> dict[str, Any]:
            further = assignment.until is not None or assignment.task.length > 1
            given.update(node=node, trial=assignment.task.id, further=further)
            return work(assignment)

        return begin

    return worker


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["library", "heal", "trunk"])
def test_a_solved_search_outlives_a_node_in_each_phase(
    phase: str, nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_teacher(tmp_path / "teacher", layers=4, width=128, ffn=512)
    tiny_text(tmp_path / "text", documents=20, sentences=24)
    held = tmp_path / "seen" / "held"
    held.parent.mkdir()
    monkeypatch.setattr("autodistill.search.runners.ray._worker", held_in(phase, held.parent))
    killer = NodeKiller(nodes, held, scoring=phase == "library")
    request = SearchRequest(
        budget=middle_budget(tmp_path / "teacher", 64),
        teacher=str(tmp_path / "teacher"),
        data=str(tmp_path / "text"),
        trials=2,
        tokens=1024,
        sequence_length=64,
        runs=tmp_path / "runs",
        name="run",
        cache=tmp_path / "cache",
        ray_address=nodes.address,
        storage=f"file://{tmp_path}/shared",
    )
    if phase == "trunk":
        # Only one trial, so that no other trial stops it: the time budget is for what follows the trials. Reading so
        # few tokens takes almost no time, so a process that begins slowly makes the machine look slow. The search then
        # expects the rest to be as slow, and would reserve all of a shorter time for it. The passes over the data end
        # the trunk here, not the time.
        request = replace(request, trials=1, tokens=None, time=900.0)
    outcome = search(request, killer)
    assert killer.lost is not None
    # The exported student fits the budget, and is the best that was found.
    best = outcome.finish.best
    assert best.feasible
    assert (tmp_path / "runs" / "run" / "student" / "gguf" / "student.gguf").exists()
    events = RunFolder.open(tmp_path / "runs", "run").events.read()
    assert any(one["solved"] for one in json.loads((tmp_path / "runs/run/search.json").read_text())["constructions"])
    if phase == "library":
        assert [row for row in outcome.rows if row.kind == "student" and row.full]
        return
    lost = json.loads(held.read_text())["trial"]
    assert lost in {event["trial"] for event in events if event["event"] == "retry"}
    again = [event for event in events if event["event"] == "rung" and event["trial"] == lost]
    assert again, "the lost piece was not done again"
    assert not [event for event in events if event.get("status") == "failed"]

"""The node of a worker is asked whether its kernel killed a process for lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from autodistill.hardware.machine import detect
from autodistill.hardware.process_memory import killed_for_memory
from autodistill.search.runners import oom_kills as kills
from autodistill.search.runners import process_group as group
from autodistill.search.runners.oom_kills import Kills
from autodistill.search.runners.ray_local import LocalRay
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.failures import KILLED
from autodistill.search.worker.messages import TrialTask
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan
from tests.search.runners.test_process_group import Q4

SAID = (
    "The actor died unexpectedly before finishing this task.\n\tpid: 1\n\tip: {}\nThe actor is dead because its worker"
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the kill counts of the nodes of a made-up cluster, by address. A node without a count does not answer."""
    found = {"10.0.0.1": 5, "10.0.0.2": 7, "10.0.0.3": 0}
    here = {"10.0.0.1": ""}
    monkeypatch.setattr(kills, "killed_for_memory", lambda: found["10.0.0.1"])
    monkeypatch.setattr(kills, "_nodes", lambda: {address: here.get(address, f"id {address}") for address in found})
    monkeypatch.setattr(
        kills,
        "_counted",
        lambda nodes: {f"id {address}": count for address, count in found.items() if f"id {address}" in nodes},
    )
    return found


def test_the_node_that_ray_names_is_asked_and_no_other(counts: dict[str, int]) -> None:
    seen = Kills()
    assert seen.since(SAID.format("10.0.0.2")) == 0
    counts["10.0.0.2"] += 2
    assert seen.since(SAID.format("10.0.0.1")) == seen.since(SAID.format("10.0.0.3")) == seen.since("lost") == 0
    assert seen.since(SAID.format("10.0.0.2")) == 2
    assert seen.since(SAID.format("10.0.0.2")) == 0, "it was told before"
    counts["10.0.0.1"] += 1
    assert seen.since("Ray says nothing of a node") == 1


def test_a_node_that_is_gone_or_new_says_nothing(counts: dict[str, int]) -> None:
    seen = Kills()
    del counts["10.0.0.3"]
    assert seen.since(SAID.format("10.0.0.3")) == 0
    counts["10.0.0.4"] = 9
    assert seen.since(SAID.format("10.0.0.4")) == 0
    counts["10.0.0.4"] += 1
    assert seen.since(SAID.format("10.0.0.4")) == 1


def test_without_ray_this_machine_alone_is_asked() -> None:
    assert Kills().since(SAID.format("10.0.0.2")) == 0
    assert kills._nodes() == {}


@pytest.fixture
def ray() -> Iterator[Any]:
    """Provide Ray with two cores of this machine."""
    local = LocalRay(replace(detect(), cpus=2))
    local.wait()
    import ray

    yield ray
    local.leave()


@pytest.mark.slow
def test_ray_names_the_node_of_an_actor_that_died(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's count is that of its kernel. A group reports it if its process was killed for memory."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    assert kills._nodes() == {node["NodeManagerAddress"]: ""}
    assert kills._counted([node["NodeID"]]) == {node["NodeID"]: killed_for_memory()}
    task = TrialTask(id="t000", strategy=Strategy(), seed=0, deployments=(Q4,), probe=Q4)
    setting: Any = type("Setting", (), {"plan": small_plan(processes=2)})

    class Dying:
        def work(self, assignment: Assignment) -> None:
            import os

            os.kill(os.getpid(), 9)

    asked: list[str] = []

    def since(self: Kills, said: str) -> int:
        asked.append(said)
        return len(asked) - 1

    monkeypatch.setattr(Kills, "since", since)
    made = group.Group(setting, None)
    failures = []
    for _ in range(2):
        made._members = [ray.remote(num_cpus=0)(Dying).remote()]
        failures.append(made.work(Assignment(task=task, rung=0))["failure"])
    assert kills._ADDRESS.search(asked[0])[1] == node["NodeManagerAddress"]  # type: ignore[index]
    assert [cause for cause, _ in failures] == ["worker-died", KILLED]
    assert failures[0][1].startswith("one of its 2 processes ended: The actor died")
    assert "ended by the kernel" in failures[1][1]

"""A node of a cluster of two is killed in each phase of a search, which ends with an exported student all the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autodistill.hardware.budget import Budget
from autodistill.search.campaign.observer import Observer
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text

PHASES = ("solving what fits", "trials", "exporting")
"""How their names begin: of the library, of the race and the trunk, and of the end."""


class NodeKiller(Observer):
    """Kills the node that is not the head's as a phase begins, and starts another."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.killed: list[str] = []

    def phase(self, name: str) -> None:
        """Once for each of the phases."""
        found = [one for one in PHASES if name.startswith(one) and one not in self.killed]
        for one in found:
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)
            self.cluster.add_node(num_cpus=1)
            self.killed.append(one)


@pytest.fixture
def cluster() -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.mark.crash
def test_a_search_ends_though_a_node_is_killed_in_each_of_its_phases(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_teacher(tmp_path / "teacher", layers=3)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    killer = NodeKiller(cluster)
    outcome = search(
        SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            teacher=str(tmp_path / "teacher"),
            data=str(tmp_path / "text"),
            trials=3,
            tokens=2304,
            out=tmp_path / "runs",
            name="run",
            cache=tmp_path / "cache",
            ray_address=cluster.address,
            storage=f"file://{tmp_path}/shared",
        ),
        killer,
    )
    assert killer.killed == list(PHASES)
    assert outcome.finish.paths
    assert all(path.exists() for path in outcome.finish.paths.values())

"""Removes a node from a cluster while a search uses it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from autodistill.search.campaign.observer import Observer

LONGEST = 600.0
"""Seconds that anything is waited for."""


class NodeKiller(Observer):
    """Removes the node on which a file says that a worker is held, or any node once types are scored.

    Args:
        cluster: A cluster of `ray.cluster_utils`.
        held: A JSON file with "node", written by the code that holds a worker.
        scoring: Whether a node is removed while the library is made.
    """

    def __init__(self, cluster: Any, held: Path, *, scoring: bool = False) -> None:
        self._cluster, self._held, self._scoring = cluster, held, scoring
        self.lost: str | None = None

    def line(self, text: str) -> None:
        """Remove a node when the library is made."""
        if self._scoring and self.lost is None and text.startswith("scoring"):
            self._remove(next(iter(self._cluster.worker_nodes)).node_id)

    def phase(self, name: str) -> None:
        """Begin to watch when trials begin."""
        if name == "trials" and not self._scoring:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        ends = time.monotonic() + LONGEST
        while not self._held.exists() and time.monotonic() < ends:
            time.sleep(0.05)
        if self._held.exists():
            self._remove(json.loads(self._held.read_text())["node"])

    def _remove(self, node_id: str) -> None:
        (node,) = (one for one in self._cluster.worker_nodes if one.node_id == node_id)
        self._cluster.remove_node(node, allow_graceful=False)
        self.lost = node_id

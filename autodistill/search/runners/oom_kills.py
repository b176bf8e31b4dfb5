"""Count the processes that the kernel has ended for lack of memory, on the node where a worker ended."""

from __future__ import annotations

import re
from collections.abc import Collection

from autodistill.hardware.process_memory import killed_for_memory

# Ray's message about an actor that died has the address of its node in a line of its own.
_ADDRESS = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)
# Seconds to wait for a node's answer: its first worker process may have to start.
_SECONDS = 20.0
_HERE = ""


class Kills:
    """The kernel's last known counts on the nodes of a Ray cluster; without a cluster, on this machine alone."""

    def __init__(self) -> None:
        self._seen = {_HERE: killed_for_memory()} | _counted(set(_nodes().values()) - {_HERE})

    def since(self, message: str) -> int:
        """Return how many kills there were on a worker's node since the last call.

        It is 0 for a node that is lost, which itself ended the worker, or that has joined since.

        Args:
            message: Ray's message about that worker. If it names no node, the worker is assumed to have been on this
                machine.
        """
        address = _ADDRESS.search(message)
        node = _nodes().get(address[1]) if address else _HERE
        if node is None:
            return 0
        now = killed_for_memory() if node == _HERE else _counted([node]).get(node)
        if now is None:
            return 0
        before = self._seen.get(node, now)
        self._seen[node] = now
        return now - before


def _nodes() -> dict[str, str]:
    """Return the ids of the live nodes by address; this machine's id is empty."""
    import ray

    if not ray.is_initialized():
        return {}
    found = {node["NodeManagerAddress"]: str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    # Several nodes on one machine have one kernel.
    return found | {ray.util.get_node_ip_address(): _HERE}


def _counted(nodes: Collection[str]) -> dict[str, int]:
    """Return the count of each of these nodes that answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # It is nested, so that Ray sends it by value.
    def count() -> int:
        from autodistill.hardware.process_memory import killed_for_memory

        return killed_for_memory()

    if not nodes:
        return {}
    task = ray.remote(num_cpus=0, max_retries=0)(count)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    }
    answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_SECONDS)
    found = {}
    for node, answer in asked.items():
        if answer in answered:
            try:
                found[node] = int(ray.get(answer))
            except ray.exceptions.RayError:  # the node was lost meanwhile
                continue
    return found

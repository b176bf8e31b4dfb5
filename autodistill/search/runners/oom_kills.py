"""How many processes the kernel has ended for want of memory on the node where a worker ended: here, or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Collection

from autodistill.hardware.process_memory import killed_for_memory

# What Ray says of an actor that died has the address of its node in a line of its own.
_ADDRESS = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)
# A node's answer is waited for so long: its first worker process may have to start.
_SECONDS = 20.0
_HERE = ""


class Kills:
    """The kernel's counts on the nodes of a Ray cluster, as they were last seen; on this machine alone without one."""

    def __init__(self) -> None:
        self._seen = {_HERE: killed_for_memory()} | _counted(set(_nodes().values()) - {_HERE})

    def since(self, said: str) -> int:
        """Return how many there are, since it was last asked, where a worker ended.

        0 for a node that is gone, whose loss is what ended the worker, or that has joined since.

        Args:
            said: What Ray says of that worker; where it names no node, it is taken to have been on this machine.
        """
        address = _ADDRESS.search(said)
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
    """Return the ids of the nodes that are alive, by address; of this machine's an empty one."""
    import ray

    if not ray.is_initialized():
        return {}
    found = {node["NodeManagerAddress"]: str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    # Several nodes on one machine have one kernel.
    return found | {ray.util.get_node_ip_address(): _HERE}


def _counted(nodes: Collection[str]) -> dict[str, int]:
    """The count of each of these nodes, of those that answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Nested, so that it travels by value.
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
            except ray.exceptions.RayError:  # the node is gone meanwhile
                continue
    return found

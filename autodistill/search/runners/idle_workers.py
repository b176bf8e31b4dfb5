"""A signal on a Ray cluster that lets idle workers stay and wait until other workers have finished.

Tune keeps one idle process and ends the others. Starting a process again takes longer than many pieces of work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

_MOMENT = 1.0  # second, so that a worker whose bell is lost does not ask all the time


@dataclass(frozen=True)
class IdleWait:
    """What an idle worker receives: it waits until another worker has finished.

    Attributes:
        bell: Ray's handle of the bell.
        rings: How often it had rung before.
    """

    bell: Any
    rings: int

    def wait(self) -> None:
        """Return once the bell has rung, or after a moment if it is lost."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self.bell.wait.remote(self.rings))
        except RayError:
            time.sleep(_MOMENT)


class Bell:
    """Rings when a worker has finished its work, for the workers that wait."""

    def __init__(self) -> None:
        self._rings = 0
        self._bell: Any = None

    def rest(self) -> IdleWait:
        """Return an `IdleWait` for a worker that has nothing to do until the next ring."""
        if self._bell is None:
            self._bell = _start()
        return IdleWait(self._bell, self._rings)

    def ring(self) -> None:
        """Ring, and so end every `IdleWait`."""
        self._rings += 1
        if self._bell is not None:
            self._bell.ring.remote(self._rings)


def _start() -> Any:
    """Start the bell's actor, on the node of the search, which outlives all other nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The class is inside a function, so that Ray sends it by value: the package may be missing where it runs.
    class Actor:
        """The bell: it wakes all workers that wait for a ring."""

        def __init__(self) -> None:
            import asyncio

            self._rings, self._changed = 0, asyncio.Condition()

        async def ring(self, rings: int) -> None:
            async with self._changed:
                self._rings = max(self._rings, rings)
                self._changed.notify_all()

        async def wait(self, rings: int) -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._rings > rings)

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Actor).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()

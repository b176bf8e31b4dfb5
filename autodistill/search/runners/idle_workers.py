"""A signal on a Ray cluster: idle workers stay, and wait for it until others have ended.

Tune keeps one idle process and ends the others, and to start one again takes longer than many a piece of work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

_MOMENT = 1.0  # second, so that a worker whose bell is lost does not ask again and again


@dataclass(frozen=True)
class Rest:
    """What an idle worker is given: to wait until the bell rings again.

    Attributes:
        bell: Ray's handle of it.
        rung: How many times it had rung before.
    """

    bell: Any
    rung: int

    def wait(self) -> None:
        """Returns once it has rung; where it is lost, after a moment."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self.bell.wait.remote(self.rung))
        except RayError:
            time.sleep(_MOMENT)


class Bell:
    """Rings where a worker has ended its work, for those that rest."""

    def __init__(self) -> None:
        self._rung = 0
        self._bell: Any = None

    def rest(self) -> Rest:
        """For a worker that has nothing to do until the next ring."""
        if self._bell is None:
            self._bell = _start()
        return Rest(self._bell, self._rung)

    def ring(self) -> None:
        """Ends every rest there is."""
        self._rung += 1
        if self._bell is not None:
            self._bell.ring.remote(self._rung)


def _start() -> Any:
    """The actor, on the node of the search, which outlives all others."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Within a function, so that Ray sends it by value: where it runs the package may not be found.
    class Actor:
        """The bell: it wakes all who wait for a rung."""

        def __init__(self) -> None:
            import asyncio

            self._rung, self._changed = 0, asyncio.Condition()

        async def ring(self, rung: int) -> None:
            async with self._changed:
                self._rung = max(self._rung, rung)
                self._changed.notify_all()

        async def wait(self, rung: int) -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._rung > rung)

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Actor).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()

"""A local Ray. No other machine can reach it, and it ends with the process that started it."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from autodistill.errors import AutoDistillError
from autodistill.hardware.machine import Machine
from autodistill.search.runners.ray_dashboard import HOST, Dashboard
from autodistill.search.runners.ray_processes import without_python
from autodistill.search.runners.ray_session import WatchedRay, init_ray, runs, set_environment, shut_down_ray

# Processes of Ray without which no trial can run.
_ESSENTIAL = ("gcs_server", "raylet")
# Child processes of the raylet. If one ends, the raylet ends too, after its workers: that is no failure of their work.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# Variables in which the user may name a token. Our own Ray has one token for this process.
_TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
_OWN_TOKEN = secrets.token_hex(32)


class LocalRay(WatchedRay):
    """A Ray on this machine alone. It starts in the background as soon as this object is created.

    Args:
        machine: Its cores and GPUs are those that Ray may use.
        dashboard: Informed once Ray's own dashboard is open; None for no dashboard.
    """

    # If a raylet ends in an orderly way, Ray ends this process a quarter of a second later, without a message.
    look_seconds = 0.05
    instead = "try --runner inline, which needs no Ray"
    """What to do if Ray cannot be started, in words."""

    def __init__(self, machine: Machine, dashboard: Dashboard | None = None) -> None:
        super().__init__()
        self.machines: tuple[Machine, ...] = (machine,)
        self._dashboard = dashboard
        self._error: BaseException | None = None
        self._processes: dict[str, psutil.Process] = {}
        self._ready = threading.Event()
        self._over = threading.Event()
        set_environment()
        threading.Thread(target=self._start, name="ray-start", daemon=True).start()

    def _start(self) -> None:
        machine = self.machines[0]
        try:
            with _for_this_machine() as own, without_python():
                # Without an address, Ray would join any cluster that it finds.
                context = init_ray(
                    address="local",
                    num_cpus=machine.cpus,
                    num_gpus=len(machine.gpus),
                    include_dashboard=self._dashboard is not None,
                    dashboard_host=HOST,
                    **own,
                )
            if self._dashboard is not None:
                self._dashboard.opened(context.dashboard_url, _own_token())
        except BaseException as error:
            # It is raised in the thread that waits for Ray, which can handle it.
            self._error = error
        else:
            children = filter(runs, psutil.Process().children())
            found = {name: child for child in children if (name := child.name()) in _ESSENTIAL}
            agents = filter(runs, found["raylet"].children() if "raylet" in found else ())
            self._processes = found | {name: child for child in agents if (name := child.name()) in _AGENTS}
        self._ready.set()
        # Ray's processes end with the thread that started them, so this one stays until they are not needed.
        self._watch()
        self._over.wait()

    def wait(self) -> None:
        """Wait until Ray is up.

        Raises:
            AutoDistillError: It could not be started.
        """
        self._ready.wait()
        if self._error is not None:
            raise AutoDistillError(
                f"Ray could not be started ({self._error}): try it without --dashboard"
                if self._dashboard
                else f"Ray could not be started ({self._error}): {self.instead}"
            ) from self._error

    def ended(self) -> str | None:
        gone = [name for name, process in self._processes.items() if not runs(process)]
        return f"Ray's {gone[0].removeprefix('ray::')} has ended (killed, or out of memory?)" if gone else None

    def leave(self) -> None:
        """End Ray and its workers, once it has started. A later Ray of this process is not touched."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        self._ready.wait()
        if self._dashboard is not None:
            self._dashboard.close()
        shut_down_ray()
        self._over.set()


@contextmanager
def _for_this_machine() -> Iterator[dict[str, Any]]:
    """Yield options for a Ray that starts in this block, so that it listens on the loopback alone and uses our token.

    Whoever reaches Ray can run code as its owner. Ray replaces the loopback by an address that other machines can
    reach, unless it is told that there are no others. It would also write its token to `~/.ray/auth_token`, which
    everybody can read. So the token of this process's Rays is in its environment, which only its owner can read. It
    stays there, because Ray's threads may ask for it after their end.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined, unused-ignore]

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    if not _TOKENS & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
        # This process may have had another token before, from a cluster.
        AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield {"_node_ip_address": HOST}
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _own_token() -> str | None:
    """Return the token of this process's Rays; None if the user named another."""
    return _OWN_TOKEN if os.environ.get("RAY_AUTH_TOKEN") == _OWN_TOKEN else None

"""What a local Ray and a joined cluster share: how to enter, watch and leave them."""

from __future__ import annotations

import logging
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import psutil

from autodistill.errors import LostClusterError
from autodistill.hardware.machine import Machine
from autodistill.utils.process_exit import end_process, sigterm_kept

# Ray reads these when it is imported or started. The user's own settings have priority.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Paths of a request may be relative to the folder where it was typed.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Seconds between two checks of its processes, and until this process is ended if it hangs in a call to one that is
# gone.
LOOK_SECONDS, _STUCK_SECONDS = 0.5, 10.0


class Cluster(Protocol):
    """Where Ray's workers run.

    Attributes:
        machines: One for each of its nodes.
        to_go_on: Returns what the user should do if Ray has ended and this process is ended for that reason.
    """

    machines: tuple[Machine, ...]
    to_go_on: Callable[[], str]

    def wait(self) -> None:
        """Wait until Ray is up."""
        ...

    def ended(self) -> str | None:
        """Return which part of it has ended, in words; None if all of it runs."""
        ...

    def leave(self) -> None:
        """Give Ray up, unless that was done before. A cluster that was joined runs on."""
        ...


class WatchedRay(ABC):
    """A Ray that a thread watches, because a call to a Ray that has ended never returns."""

    look_seconds = LOOK_SECONDS

    def __init__(self) -> None:
        self.to_go_on: Callable[[], str] = lambda: "start the search again"
        self.ends = "this search ends, and goes on with --resume"  # what happens if Ray has ended, in words
        self._leaving = threading.Event()

    @abstractmethod
    def ended(self) -> str | None:
        """Return which part of it has ended, in words; None if all of it runs."""

    def _watch(self) -> None:
        """End this process if it does not leave a Ray that has ended. After a minute Ray would, without a message."""
        while not self._leaving.wait(self.look_seconds):
            said = self.ended()
            if said is None or self._leaving.is_set():
                continue
            # From here on, Ray may end this process at any moment.
            print(f"{said}: {self.ends}", file=sys.stderr, flush=True)
            if not self._leaving.wait(_STUCK_SECONDS):
                end_process(f"{said}; {self.to_go_on()}", LostClusterError.exit_code)
                return


def runs(process: psutil.Process) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def set_environment() -> None:
    """Set the variables that Ray reads when it is imported or started, unless the user has set them."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def init_ray(**options: Any) -> Any:
    """Call `ray.init` with the options of every search, and return its context. SIGTERM stays this project's."""
    import ray

    job = ray.job_config.JobConfig()
    # Ray would put the folder where the command was typed first in its workers' import path. There, any folder or file
    # with the name of a library would replace that library. In a checkout, this package would have no evaluators.
    job._runtime_env_has_working_dir = lambda: True  # type: ignore[method-assign, unused-ignore]
    with sigterm_kept():
        return ray.init(
            job_config=job, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **options
        )


def shut_down_ray() -> None:
    """Call `ray.shutdown`. SIGTERM stays this project's."""
    import ray

    with sigterm_kept():
        ray.shutdown()

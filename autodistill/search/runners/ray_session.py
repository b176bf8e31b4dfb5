"""What a local Ray and a joined cluster share: how each is entered, watched and left."""

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

# Read by Ray when it is imported or started; a person's own settings go before.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Paths of a request may be relative to where it was typed.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Between two looks at them, and until this process ends where it is stuck in a call to one that is gone.
LOOK_SECONDS, _STUCK_SECONDS = 0.5, 10.0


class Cluster(Protocol):
    """Where Ray's workers run.

    Attributes:
        machines: Of its nodes.
        to_go_on: What a person is told to do where Ray has ended, and this process is ended for that.
    """

    machines: tuple[Machine, ...]
    to_go_on: Callable[[], str]

    def wait(self) -> None:
        """Until Ray is up."""
        ...

    def ended(self) -> str | None:
        """Return what of it has ended, in words; None while all of it runs."""
        ...

    def leave(self) -> None:
        """Gives Ray up, if that has not been done; what was joined runs on."""
        ...


class WatchedRay(ABC):
    """A Ray that is watched from the side, since a call to one that has ended comes to no end."""

    look_seconds = LOOK_SECONDS

    def __init__(self) -> None:
        self.to_go_on: Callable[[], str] = lambda: "start the search again"
        self._leaving = threading.Event()

    @abstractmethod
    def ended(self) -> str | None:
        """Return what of it has ended, in words; None while all of it runs."""

    def _watch(self) -> None:
        """Ends this process where it does not leave a Ray that has ended: after a minute Ray would, without a word."""
        while not self._leaving.wait(self.look_seconds):
            said = self.ended()
            if said is None or self._leaving.is_set():
                continue
            # Ray may end this process at any moment from here on.
            print(f"{said}: this search ends, and goes on with --resume", file=sys.stderr, flush=True)
            if not self._leaving.wait(_STUCK_SECONDS):
                end_process(f"{said}; {self.to_go_on()}", LostClusterError.exit_code)
                return


def runs(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended, and of which nobody has taken notice, does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def set_environment() -> None:
    """Set what Ray reads when it is imported or started, where a person has not."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def init_ray(**options: Any) -> Any:
    """`ray.init` with what every search wants of it; SIGTERM stays this project's. Returns its context."""
    import ray

    job = ray.job_config.JobConfig()
    # Ray would put the folder where the command was typed in front of its workers' import path, where any folder or
    # file named like a library stands in for it: in a checkout, this package without its evaluators.
    job._runtime_env_has_working_dir = lambda: True  # type: ignore[method-assign, unused-ignore]
    with sigterm_kept():
        return ray.init(
            job_config=job, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **options
        )


def shut_down_ray() -> None:
    """`ray.shutdown`; SIGTERM stays this project's."""
    import ray

    with sigterm_kept():
        ray.shutdown()

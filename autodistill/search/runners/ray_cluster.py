"""The Ray that trials run on: one started here, or a running cluster that is joined once its nodes can serve."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import platform
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil

from autodistill.errors import AutoDistillError, InputError, LostClusterError
from autodistill.hardware.machine import Gpu, Machine
from autodistill.search.runners.ray_dashboard import HOST, Dashboard
from autodistill.utils.process_exit import end_process, sigterm_kept
from autodistill.utils.storage import Storage
from autodistill.utils.timeouts import CallTimeoutError, call_with_timeout

_DISTRIBUTION = "autodistill-search"
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
# Ray itself would wait for minutes.
_CONNECT_SECONDS = 3.0
_JOIN_SECONDS = 15.0
# A node's first worker process imports torch to see the GPUs.
_PROBE_SECONDS = 90.0
# Without either of these of its own processes no trial can run.
_ESSENTIAL = ("gcs_server", "raylet")
# Of the raylet's own processes. It ends with either of these, its workers first, which is no fault of their work.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# Between two looks at them, and until this process ends where it is stuck in a call to one that is gone.
_LOOK_SECONDS, _STUCK_SECONDS = 0.5, 10.0
# Of another's cluster only connections are seen, which may fail for a moment.
_SILENT_SECONDS = 3.0
# Where a person names a token; of a Ray of our own there is one for this process.
_TOKENS = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
_OWN_TOKEN = secrets.token_hex(32)
_TOKEN = "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints there"


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

    def ended(self) -> str | None: ...

    def leave(self) -> None:
        """Gives Ray up, if that has not been done; what was joined runs on."""
        ...


class _Watched:
    """A Ray that is watched from the side, since a call to one that has ended comes to no end."""

    look_seconds = _LOOK_SECONDS

    def __init__(self) -> None:
        self.to_go_on: Callable[[], str] = lambda: "start the search again"
        self._leaving = threading.Event()

    def ended(self) -> str | None:
        raise NotImplementedError

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


class LocalRay(_Watched):
    """A Ray of this machine's own, started in the background as soon as this is made.

    Args:
        machine: Its cores and GPUs are what Ray may use.
        dashboard: Is told once Ray's own is there; None for none.
    """

    # Where a raylet ends in good order, Ray ends this process a quarter of a second later, without a word.
    look_seconds = 0.05

    def __init__(self, machine: Machine, dashboard: Dashboard | None = None) -> None:
        super().__init__()
        self.machines: tuple[Machine, ...] = (machine,)
        self._dashboard = dashboard
        self._error: BaseException | None = None
        self._processes: dict[str, psutil.Process] = {}
        self._ready = threading.Event()
        self._over = threading.Event()
        _set_environment()
        threading.Thread(target=self._start, name="ray-start", daemon=True).start()

    def _start(self) -> None:
        machine = self.machines[0]
        try:
            with _for_this_machine() as own:
                # Without an address Ray would join whatever cluster it finds.
                context = _init(
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
            # Raised where somebody waits for Ray, in the thread that can answer it.
            self._error = error
        else:
            children = filter(_running, psutil.Process().children())
            found = {name: child for child in children if (name := child.name()) in _ESSENTIAL}
            agents = filter(_running, found["raylet"].children() if "raylet" in found else ())
            self._processes = found | {name: child for child in agents if (name := child.name()) in _AGENTS}
        self._ready.set()
        # Ray's processes end with the thread that started them, so this one stays until they are not needed.
        self._watch()
        self._over.wait()

    def wait(self) -> None:
        """Until Ray is up.

        Raises:
            AutoDistillError: It could not be started.
        """
        self._ready.wait()
        if self._error is not None:
            raise AutoDistillError(
                f"Ray could not be started ({self._error}): try it without --dashboard"
                if self._dashboard
                else f"Ray could not be started ({self._error}): try --runner inline, which needs no Ray"
            ) from self._error

    def ended(self) -> str | None:
        gone = [name for name, process in self._processes.items() if not _running(process)]
        return f"Ray's {gone[0].removeprefix('ray::')} has ended (killed, or out of memory?)" if gone else None

    def leave(self) -> None:
        """Ends Ray and its workers, once it has started; a later Ray of this process is left alone."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        self._ready.wait()
        if self._dashboard is not None:
            self._dashboard.close()
        _shut_down()
        self._over.set()


class JoinedRay(_Watched):
    """A running cluster, each node of which has answered that it runs the same versions and sees the same folders.

    Args:
        machines: Of its nodes.
        essential: Where those of its processes listen that no trial can run without, by their names for a person: the
            head's GCS, and this node's raylet. Of another's cluster this process sees no more.
    """

    def __init__(self, machines: tuple[Machine, ...], essential: Mapping[str, tuple[str, int]]) -> None:
        super().__init__()
        self.machines = machines
        self._essential = essential
        self._gone: str | None = None
        threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def wait(self) -> None:
        """Nothing is left to wait for."""

    def ended(self) -> str | None:
        """The first of its processes that takes no connection, also some seconds later; whoever asks waits for that.

        So whoever is about to ask anything of Ray does not: it would never return.
        """
        for name, (host, port) in self._essential.items():
            if self._gone is None and not _answers(host, port):
                self._gone = f"{name}, at {host}:{port}, has ended, or is out of reach"
        return self._gone

    def leave(self) -> None:
        """Disconnects; the cluster is somebody else's."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        _shut_down()


def _answers(host: str, port: int) -> bool:
    """Whether somebody takes connections; that nobody does is true of some seconds."""
    ends = time.monotonic() + _SILENT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        except OSError:
            if time.monotonic() > ends:
                return False
            time.sleep(_LOOK_SECONDS)
        else:
            return True


def _running(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended, and of which nobody has taken notice, does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def check_address(address: str) -> None:
    """Refuses an address that no search can join, or that nobody listens at.

    Raises:
        InputError: Says why.
    """
    if address == "auto":
        return
    if "://" in address:
        raise InputError(
            f"--ray-address {address}: a client session would drive the trials far from this run's log; run the search "
            "on a node of the cluster, with --ray-address auto or host:port"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--ray-address takes auto or host:port, like 10.0.0.1:6379, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): check --ray-address, and that Ray's head runs there"
        ) from error


def join(
    address: str, folders: Sequence[Path], files: Sequence[Path] = (), storage: Storage | None = None
) -> JoinedRay:
    """Joins a running cluster, from one of its nodes.

    Args:
        address: "auto", or host:port of its head.
        folders: Those that every node must see, as this one does.
        files: Those that every node must have under the same path, though not the same ones.
        storage: What every node must read, write and remove objects of, as this one does.

    Raises:
        InputError: Nobody answers, another Ray, Python or AutoDistill runs there, or a node lacks a folder, a file or
            the storage; before any work is spent.
    """
    check_address(address)
    _set_environment()
    # Workers are to find GPUs as they are, also where a task asked for none.
    name = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
    _in_time(lambda: _init(address=address, runtime_env={"env_vars": {name: os.environ[name]}}), address)
    try:
        lacking = {str(file): f"has no {file}, which the metric needs: put it there too" for file in files}
        with _markers(folders) as markers, _object(storage) as stored:
            return JoinedRay(_probe(markers | lacking, stored), _essential())
    except BaseException:
        _shut_down()
        raise


def _essential() -> dict[str, tuple[str, int]]:
    """Where the joined cluster's GCS and this node's raylet listen."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    (node,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {
        "the Ray cluster's GCS": (host.strip("[]"), int(port)),
        "this node's raylet": (node["NodeManagerAddress"], node["NodeManagerPort"]),
    }


def _set_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _for_this_machine() -> Iterator[dict[str, Any]]:
    """Options by which a Ray that starts in this block listens on the loopback alone, and knows whom it serves.

    Whoever reaches Ray can run code as its owner. It replaces the loopback by an address that other machines reach,
    but where it is told that there are no others; and it would write its token to `~/.ray/auth_token`, for all to read.
    The token of this process's Rays is in its environment instead, which only its owner reads. It stays there, since
    Ray's threads may ask for it after their end.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined, unused-ignore]

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    if not _TOKENS & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
        # This process may have had another one before, of a cluster.
        AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield {"_node_ip_address": HOST}
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _own_token() -> str | None:
    """The token of this process's Rays; None where a person named another."""
    return _OWN_TOKEN if os.environ.get("RAY_AUTH_TOKEN") == _OWN_TOKEN else None


def _init(**options: Any) -> Any:
    import ray

    job = ray.job_config.JobConfig()
    # Ray would put the folder where the command was typed in front of its workers' import path, where any folder or
    # file named like a library stands in for it: in a checkout, this package without its evaluators.
    job._runtime_env_has_working_dir = lambda: True  # type: ignore[method-assign, unused-ignore]
    with sigterm_kept(), _uncollected():
        return ray.init(
            job_config=job, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **options
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps Python's garbage collector away in this block, and in what is forked in it.

    Ray runs Python between a fork and its program. A process group of gloo that is garbage by then, and is collected
    there, waits for threads that a fork does not have, and ends the child without a word: Ray would wait in vain.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _shut_down() -> None:
    import ray

    with sigterm_kept():
        ray.shutdown()


def _in_time(connect: Callable[[], None], address: str) -> None:
    """Connects in a thread, which is left alone where it does not come to an end."""
    try:
        call_with_timeout(connect, _JOIN_SECONDS, "ray-join")
    except CallTimeoutError:
        raise InputError(
            f"what listens at {address} did not answer as a Ray cluster does within {_JOIN_SECONDS:.0f} s: check "
            f"--ray-address; or {_TOKEN}"
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot join the Ray cluster at {address}: {_why(error)}") from error


def _why(error: BaseException) -> str:
    said = str(error)
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", said)
    if len(versions) == 2:
        theirs, ours = (f"Ray {ray} and Python {python}" for ray, python in versions)
        return f"it runs {theirs}, this process {ours}; the two must be the same"
    if "any running Ray instance" in said:
        return "none runs on this machine: start one with `ray start`, or go to one of its nodes"
    if "uthenticat" in said or "UNAUTHENTICATED" in said:
        return _TOKEN
    return f"{said.splitlines()[0] if said else type(error).__name__}; run the search on a node of the cluster"


@contextmanager
def _markers(folders: Sequence[Path]) -> Iterator[dict[str, str]]:
    """A file in each folder, that a node which shares the folder must see; and what is said of one that does not."""
    files: list[Path] = []
    try:
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = folder.absolute() / f".probe-{uuid.uuid4().hex}"
                file.touch()
            except OSError as error:
                raise InputError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error
            files.append(file)
        remedy = "put --out and --cache on a disk that all nodes share, or give --storage"
        yield {str(file): f"does not see the folder {file.parent}: {remedy}" for file in files}
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@contextmanager
def _object(storage: Storage | None) -> Iterator[tuple[str, str] | None]:
    """An object on a storage that every node must read: the storage's address, and its key."""
    if storage is None:
        yield None
        return
    key = f".probe-{uuid.uuid4().hex}"
    try:
        storage.write(key, b"probe")
        yield storage.uri, key
        storage.remove(key)
    except OSError as error:
        raise InputError(f"cannot write into the storage {storage.uri}: {error}") from error


def _probe(needed: Mapping[str, str], stored: tuple[str, str] | None = None) -> tuple[Machine, ...]:
    """One tiny task on each node: its versions, the files it sees, the storage it reaches, and what it has.

    Args:
        needed: Files that it must see, each with what is said of a node that does not.
        stored: An object of a storage that it must read, as `_object` gives it.

    Raises:
        InputError: A node that cannot serve; the message names it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ours = importlib.metadata.version(_DISTRIBUTION)

    # Nested, so that it travels by value: a node may have no AutoDistill to import it from.
    def look(files: list[str], stored: tuple[str, str] | None) -> dict[str, Any]:
        """What a node is (memory in bytes), and what it does not see or reach; little without the package."""
        import importlib.metadata
        import os
        import platform

        try:
            package = importlib.metadata.version("autodistill-search")
        except importlib.metadata.PackageNotFoundError:
            return {"package": "", "python": platform.python_version()}
        if package != ours:
            return {"package": package, "python": platform.python_version()}
        from autodistill.hardware.machine import computes_bf16, detect
        from autodistill.utils.storage import reached

        machine = detect()
        return {
            "python": platform.python_version(),
            "package": package,
            "storage": reached(*stored) if stored else "",
            "unseen": [file for file in files if not os.path.exists(file)],
            "memory_bytes": machine.memory_bytes,
            "free_bytes": machine.free_bytes,
            "gpus": [(gpu.name, gpu.memory_bytes, gpu.free_bytes) for gpu in machine.gpus],
            "bf16": {kind: computes_bf16(kind) for kind in ("cuda", "cpu")},
        }

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = {
        node["NodeManagerAddress"] + f" ({node['NodeID'][:6]})": (
            node,
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                list(needed), stored
            ),
        )
        for node in nodes
    }
    machines = []
    for name, (node, answer) in asked.items():
        try:
            said = ray.get(answer, timeout=_PROBE_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise InputError(
                f"node {name} of the Ray cluster ran no task within {_PROBE_SECONDS:.0f} s: check it"
            ) from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"node {name} of the Ray cluster cannot run AutoDistill ({reason}): repair it") from error
        machines.append(_machine(name, node["Resources"], said, needed))
    return tuple(machine for machine in machines if machine.cpus or machine.gpus)


def _machine(name: str, resources: dict[str, float], said: dict[str, Any], needed: Mapping[str, str]) -> Machine:
    """What a node offers, of which Ray knows how much it may give away; `needed` is as `_probe` takes it."""
    ours = (platform.python_version(), importlib.metadata.version(_DISTRIBUTION))
    if not said["package"]:
        raise InputError(
            f"node {name} of the Ray cluster has no {_DISTRIBUTION} in its Python {said['python']}: install {ours[1]} "
            "there, as here"
        )
    if (said["python"], said["package"]) != ours:
        raise InputError(
            f"node {name} of the Ray cluster runs {_DISTRIBUTION} {said['package']} on Python {said['python']}, this "
            f"process {ours[1]} on Python {ours[0]}: the two must be the same"
        )
    if said["unseen"]:
        raise InputError(f"node {name} of the Ray cluster {needed[said['unseen'][0]]}")
    if said["storage"]:
        raise InputError(
            f"node {name} of the Ray cluster does not reach the storage ({said['storage']}): give it the credentials "
            "and the network that this one has"
        )
    seen = tuple(Gpu(name=kind, memory_bytes=size, free_bytes=free) for kind, size, free in said["gpus"])
    gpus = seen[: int(resources.get("GPU", 0))]
    memory = min(said["memory_bytes"], int(resources.get("memory", said["memory_bytes"])))
    bf16 = said["bf16"]["cuda" if gpus else "cpu"]
    return Machine(
        cpus=int(resources.get("CPU", 0)), memory_bytes=memory, gpus=gpus, bf16=bf16, free_bytes=said["free_bytes"]
    )

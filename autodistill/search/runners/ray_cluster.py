"""A running Ray cluster. It is joined once each of its nodes has answered that it can serve."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.hardware.machine import Gpu, Machine
from autodistill.search.runners.ray_session import (
    LOOK_SECONDS,
    WatchedRay,
    init_ray,
    set_environment,
    shut_down_ray,
)
from autodistill.utils.storage import Storage
from autodistill.utils.timeouts import CallTimeoutError, call_with_timeout

_DISTRIBUTION = "autodistill-search"
# Ray itself would wait for minutes.
_CONNECT_SECONDS = 3.0
_JOIN_SECONDS = 15.0
# A node's first worker process imports torch to find the GPUs.
_PROBE_SECONDS = 90.0
# Of somebody else's cluster we only see connections, which may fail for a moment.
_SILENT_SECONDS = 3.0
_TOKEN = "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints there"


class JoinedRay(WatchedRay):
    """A running cluster in which each node has confirmed that it runs the same versions and sees the same folders.

    Args:
        machines: One for each of its nodes.
        essential: Addresses of the processes that every trial needs, by names for the user: the head's GCS and this
            node's raylet. This process sees no more of somebody else's cluster.
    """

    def __init__(self, machines: tuple[Machine, ...], essential: Mapping[str, tuple[str, int]]) -> None:
        super().__init__()
        self.machines = machines
        self._essential = essential
        self._gone: str | None = None
        threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def wait(self) -> None:
        """Return at once, because the cluster is already running."""

    def ended(self) -> str | None:
        """Return the first of its processes that takes no connection for some seconds; the caller waits for that time.

        So callers find out before they ask Ray anything. Such a call would never return.
        """
        for name, (host, port) in self._essential.items():
            if self._gone is None and not _answers(host, port):
                self._gone = f"{name}, at {host}:{port}, has ended, or is out of reach"
        return self._gone

    def leave(self) -> None:
        """Disconnect. The cluster belongs to somebody else and runs on."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        shut_down_ray()


def _answers(host: str, port: int) -> bool:
    """Return whether something accepts connections there. It retries for some seconds before it says no."""
    ends = time.monotonic() + _SILENT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        except OSError:
            if time.monotonic() > ends:
                return False
            time.sleep(LOOK_SECONDS)
        else:
            return True


def check_address(address: str) -> None:
    """Refuse an address that no search can join, or where nothing listens.

    Raises:
        InputError: The message gives the reason.
    """
    if address == "auto":
        return
    if "://" in address:
        raise InputError(
            f"--ray-address {address}: a client session would drive the trials far from this run's log; run the search "
            "on a node of the cluster, with --ray-address auto or host:port"
        )
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port):
        raise InputError(f"--ray-address takes auto or host:port, like 10.0.0.1:6379, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last is for a name that no host has
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): check --ray-address, and that Ray's head runs there"
        ) from error


def join(
    address: str, folders: Sequence[Path], files: Sequence[Path] = (), storage: Storage | None = None
) -> JoinedRay:
    """Join a running cluster from one of its nodes.

    Args:
        address: "auto", or host:port of its head.
        folders: Folders that every node must see, as this one does.
        files: Files that every node must have under the same path, though each may have its own.
        storage: Storage in which every node must read, write and remove objects, as this one does.

    Raises:
        InputError: Nothing answers, another Ray, Python or AutoDistill runs there, or a node lacks a folder, a file or
            the storage. This is raised before any work is spent.
    """
    check_address(address)
    set_environment()
    # Workers must see all GPUs, even if a task asked for none.
    name = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
    _in_time(lambda: init_ray(address=address, runtime_env={"env_vars": {name: os.environ[name]}}), address)
    try:
        lacking = {str(file): f"has no {file}, which the metric needs: put it there too" for file in files}
        with _markers(folders) as markers, _object(storage) as stored:
            return JoinedRay(_probe(markers | lacking, stored), _essential())
    except BaseException:
        shut_down_ray()
        raise


def _essential() -> dict[str, tuple[str, int]]:
    """Return where the joined cluster's GCS and this node's raylet listen."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    (node,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {
        "the Ray cluster's GCS": (host.strip("[]"), int(port)),
        "this node's raylet": (node["NodeManagerAddress"], node["NodeManagerPort"]),
    }


def _in_time(connect: Callable[[], None], address: str) -> None:
    """Connect in a thread, which is abandoned if it does not finish."""
    try:
        call_with_timeout(connect, _JOIN_SECONDS, "ray-join")
    except CallTimeoutError:
        raise InputError(
            f"the program at {address} did not answer like a Ray cluster within {_JOIN_SECONDS:.0f} s: check "
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
    """Make a file in each folder, which a node that shares the folder must see.

    Yields:
        The files, each with the message for a node that does not see it.
    """
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
        remedy = "put --runs and --cache on a disk that all nodes share, or give --storage"
        yield {str(file): f"does not see the folder {file.parent}: {remedy}" for file in files}
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@contextmanager
def _object(storage: Storage | None) -> Iterator[tuple[str, str] | None]:
    """Make an object in a storage, which every node must read, and yield the storage's address and the object's key."""
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
    """Run one tiny task on each node. It returns versions, visible files, reached storage, and hardware.

    Args:
        needed: Files that a node must see, each with the message for a node that does not.
        stored: An object in a storage that a node must read, as `_object` yields it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ours = importlib.metadata.version(_DISTRIBUTION)

    # It is nested, so that Ray sends it by value: a node may have no AutoDistill to import it from.
    def look(files: list[str], stored: tuple[str, str] | None) -> dict[str, Any]:
        """Return what a node has (memory in bytes) and what it cannot see or reach; less if packages differ."""
        import importlib.metadata
        import os
        import platform

        try:
            package = importlib.metadata.version("autodistill-search")
        except importlib.metadata.PackageNotFoundError:
            return {"package": "", "python": platform.python_version()}
        if package != ours:
            return {"package": package, "python": platform.python_version()}
        from autodistill.hardware.machine import computes_bf16, computes_tf32, detect
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
            "tf32": bool(machine.gpus) and computes_tf32("cuda"),
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
    """Return what a node offers, within what Ray may give away there; `needed` is as in `_probe`."""
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
        cpus=int(resources.get("CPU", 0)),
        memory_bytes=memory,
        gpus=gpus,
        bf16=bf16,
        tf32=bool(gpus) and said["tf32"],
        free_bytes=said["free_bytes"],
    )

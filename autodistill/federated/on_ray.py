"""Runs the server of federated distillation here, and its clients on the nodes of a Ray that have their text."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodistill.errors import AutoDistillError, InputError
from autodistill.federated.client import Member
from autodistill.federated.flower import flower
from autodistill.federated.server import check_numbers, serve
from autodistill.hardware.machine import detect_for_training
from autodistill.inference.torch_memory import keep_to_share
from autodistill.search.runners.ray_cluster import JoinedRay
from autodistill.search.runners.ray_cluster import join as join_cluster
from autodistill.search.runners.ray_local import LocalRay
from autodistill.units import count_of

_LOOPBACK = "127.0.0.1"
_PROBE_SECONDS = 90.0  # a node's first worker process imports torch
_PARTS = 10_000  # Ray gives away a GPU or a core in parts of this size


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a Ray.

    Attributes:
        id: Ray's id of it.
        address: Its address, for messages.
        cpus, gpus: The cores and GPUs that Ray may give away there.
        unseen: The paths that it does not have, of those that were asked for.
    """

    id: str
    address: str
    cpus: float
    gpus: float
    unseen: frozenset[str]


def placed(texts: Sequence[str], nodes: Sequence[Node]) -> list[Node]:
    """Return the node of each client: one that has its text, with the most cores or GPUs for each of its clients.

    Nodes with GPUs are preferred.

    Args:
        texts: Paths of the clients' texts.
        nodes: The nodes.

    Raises:
        InputError: No node has a text.
    """
    found: list[Node] = []
    for text in texts:
        having = [node for node in nodes if text not in node.unseen]
        if not having:
            raise InputError(f"no node has {text}: name text that is there, with its path on the node that has it")
        found.append(min(having, key=lambda node: (not node.gpus, (found.count(node) + 1) / (node.gpus or node.cpus))))
    return found


def part(given: float, clients: int) -> float:
    """Return the GPUs, or the cores, of each client on a node, so that all of its clients run at the same time.

    Args:
        given: GPUs or cores of the node.
        clients: Number of its clients. A GPU, or a core, is shared by as many as must share it, and by none if all
            have one of their own.
    """
    whole = int(given)
    if not whole:
        return 0.0
    return 1.0 if clients <= whole else math.floor(_PARTS / math.ceil(clients / whole)) / _PARTS


class _OnNode:
    """A client in a process of its own on a node.

    Args:
        gpus: Its share of a GPU, or 0.
        threads: Its threads.
        options: As for `Member`.
    """

    _member: Member

    def __init__(self, gpus: float, threads: int, options: dict[str, Any]) -> None:
        self._gpus, self._threads, self._options = gpus, threads, options

    def prepare(self) -> None:
        """Read its model and its text."""
        import torch

        torch.set_num_threads(self._threads)
        device = "cuda" if self._gpus and torch.cuda.is_available() else "cpu"
        if device == "cuda" and self._gpus < 1:
            keep_to_share(self._gpus)
        flower()
        self._member = Member(**self._options, device=device)

    def take_part(self, address: str, certificate: bytes | None) -> str:
        """Take part, and return the folder of its final model."""
        return str(self._member.take_part(address, certificate, on_round=lambda line: None))


def run(
    clients: Sequence[str | Path],
    *,
    model: str | Path,
    public: str | Path,
    out: str | Path,
    rounds: int,
    ray_address: str | None = None,
    round_seconds: float = 600.0,
    connect_seconds: float = 600.0,
    certificates: tuple[bytes, bytes, bytes] | None = None,
    length: int = 128,
    on_round: Callable[[str], None] = print,
    **training: Any,
) -> list[Path]:
    """Run a server in this process and its clients on Ray, and return the folders of the clients' final models.

    Each client runs on a node that has its text, and reads it there. This process reads none of it. If a node has more
    clients than GPUs, they share the GPUs. A client that vanishes is left out, and the others go on; a line says so.

    Args:
        clients: The text of each client: a folder of .txt or .md files, or a file, under its path on the node that has
            it.
        model: A transformers folder with the initial model of all clients. The nodes of the clients must have it.
        public: The public text. The nodes of the clients must have it.
        out: Folder for the final models, `client-1` and so on. Each is written on its client's node.
        rounds: Number of rounds.
        ray_address: "auto", or host:port of the head of a running cluster. By default Ray starts on this machine alone.
        round_seconds, connect_seconds, certificates: As for `serve`.
        length: Tokens of a sequence.
        on_round: Called with a line for each client and each round.
        training: Arguments of `Client`: rate, steps, batch, weight, seed.

    Raises:
        InputError: The input of a client is invalid, or its folder cannot be written, which is found before anything is
            trained. Or no node has its text, as `serve`, or Ray cannot be joined.
        AutoDistillError: Ray cannot be started, or all clients vanished.
    """
    check_numbers(len(clients), rounds, round_seconds, connect_seconds)
    flower()
    texts, shared = [os.path.abspath(one) for one in clients], [os.path.abspath(one) for one in (model, public)]
    names = [f"client-{place}" for place in range(1, len(texts) + 1)]
    cluster: LocalRay | JoinedRay
    if ray_address is None:
        cluster = LocalRay(detect_for_training())
        cluster.instead = "start the server and each client by themselves, without Ray"
    else:
        cluster = join_cluster(ray_address, [])
    cluster.ends = "federated distillation ends"
    cluster.to_go_on = lambda: "start it again"
    try:
        cluster.wait()
        host = _LOOPBACK if ray_address is None else _own_host()
        nodes = placed(texts, _nodes([*texts, *shared]))
        options = {"model": shared[0], "public": shared[1], "length": length, **training}
        started = []
        for name, text, node in zip(names, texts, nodes, strict=True):
            for path in shared:
                if path in node.unseen:
                    raise InputError(f"the node {node.address}, which has {text}, has no {path}: put it there too")
            given = {**options, "data": text, "out": os.path.join(os.path.abspath(out), name)}
            started.append(_start(node, nodes.count(node), given))
            on_round(f"{name} ({text}) runs on {node.address} with {_said(node, nodes.count(node))}")
        _prepared(started, names, texts)
        address = _free_address(host)
        taking = [one.take_part.remote(address, certificates and certificates[0]) for one in started]
        serve(
            address,
            clients=len(started),
            rounds=rounds,
            round_seconds=round_seconds,
            connect_seconds=connect_seconds,
            certificates=certificates,
            on_round=on_round,
        )
        return _ended(taking, names, texts, round_seconds, on_round)
    finally:
        cluster.leave()


def _own_host() -> str:
    """Return the address of this node, by which the other nodes reach it."""
    import ray

    return str(ray.util.get_node_ip_address())


def _free_address(host: str) -> str:
    with socket.create_server((host, 0)) as found:
        return f"{host}:{found.getsockname()[1]}"


def _nodes(paths: Sequence[str]) -> list[Node]:
    """Ask each node of Ray which of the paths it has."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_unseen)
    asked = [
        (one, look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)).remote(paths))
        for one in ray.nodes()
        if one["Alive"]
    ]
    found = []
    for one, answer in asked:
        address, resources = one["NodeManagerAddress"], one["Resources"]
        try:
            unseen = ray.get(answer, timeout=_PROBE_SECONDS)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise InputError(f"the node {address} of the Ray cluster does not answer: check it") from error
        cpus, gpus = resources.get("CPU", 0.0), float(int(resources.get("GPU", 0.0)))
        if cpus or gpus:
            found.append(Node(id=one["NodeID"], address=address, cpus=cpus, gpus=gpus, unseen=frozenset(unseen)))
    return found


def _unseen(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]


def _threads(node: Node, clients: int) -> int:
    return max(1, int(node.cpus) // clients)


def _start(node: Node, clients: int, options: dict[str, Any]) -> Any:
    """Start a client's process on a node that has so many clients."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus, threads = part(node.gpus, clients), _threads(node, clients)
    # An actor that is restarted would begin with the initial model again.
    kind = ray.remote(max_restarts=0)(_OnNode)
    return kind.options(
        num_cpus=float(threads) if clients <= node.cpus else part(node.cpus, clients),
        num_gpus=gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
    ).remote(gpus, threads, options)


def _said(node: Node, clients: int) -> str:
    """Return in words what a client on a node has."""
    share = part(node.gpus, clients)
    if not share:
        return count_of(_threads(node, clients), "thread")
    return "a GPU of its own" if share == 1 else f"{share:.2g} of a GPU"


def _prepared(started: Sequence[Any], names: Sequence[str], texts: Sequence[str]) -> None:
    """Let all clients read their models and texts.

    Raises:
        InputError: One of them cannot.
    """
    import ray

    reading = [one.prepare.remote() for one in started]
    for name, text, answer in zip(names, texts, reading, strict=True):
        try:
            ray.get(answer)
        except ray.exceptions.RayError as error:
            raise InputError(f"{name} ({text}) cannot begin: {_why(error)}") from error


def _ended(
    taking: Sequence[Any], names: Sequence[str], texts: Sequence[str], seconds: float, on_round: Callable[[str], None]
) -> list[Path]:
    """Return the folders of the clients that wrote their models. Say which ones did not.

    Args:
        taking: Ray's references to what the clients return.
        names, texts: Names and texts of the clients.
        seconds: How long to wait for clients that are late.
        on_round: Called with a line for each client that is left out.

    Raises:
        AutoDistillError: There are none.
    """
    import ray

    done, _ = ray.wait(list(taking), num_returns=len(taking), timeout=seconds)
    found, left_out = [], []
    for name, text, answer in zip(names, texts, taking, strict=True):
        try:
            if answer not in done:
                raise AutoDistillError(f"it did not end within {seconds:g} s of the last round")
            found.append(Path(ray.get(answer)))
        except (ray.exceptions.RayError, AutoDistillError) as error:
            left_out.append(f"{name} ({text}) has no final model: {_why(error)}")
            on_round(left_out[-1])
    if not found:
        raise AutoDistillError(left_out[0])
    return found


def _why(error: Exception) -> str:
    """Return the reason for a failure in one line."""
    import ray

    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ray.exceptions.RayActorError):
        return "its process has ended (killed, or out of memory?)"
    said = " ".join(str(cause).split())
    return said if isinstance(cause, AutoDistillError) else f"{type(cause).__name__}: {said[:200]}"

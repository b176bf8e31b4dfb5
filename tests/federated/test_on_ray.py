"""Clients of federated distillation on Ray: where they run, what they share, and those that vanish or cannot begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from autodistill.data.documents import resolve_data
from autodistill.errors import InputError
from autodistill.federated import on_ray, run, serve
from autodistill.federated.on_ray import Node, part, placed
from autodistill.hardware.machine import Machine
from autodistill.models.loading import load_model
from autodistill.search.runners.ray_local import LocalRay
from autodistill.search.runners.ray_session import set_environment
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.federated.wire import Wire, check_no_text


def node(name: str, cpus: float, gpus: float = 0.0, *, lacks: tuple[str, ...] = ()) -> Node:
    return Node(id=name, address=name, cpus=cpus, gpus=gpus, unseen=frozenset(lacks))


def test_a_client_runs_where_its_text_is_and_clients_spread_over_nodes() -> None:
    first, second = node("first", 4, lacks=("b",)), node("second", 8, lacks=("a",))
    assert placed(["a", "b", "a"], [first, second]) == [first, second, first]
    # Twice as many clients run where there are twice as many cores.
    assert sorted(one.id for one in placed(["c"] * 6, [first, second])) == ["first"] * 2 + ["second"] * 4
    graphic = node("graphic", 1, 1)
    assert placed(["c", "c"], [first, graphic, second]) == [graphic, graphic]
    with pytest.raises(InputError, match="no node has a"):
        placed(["a"], [second])


@pytest.mark.parametrize(
    ("given", "clients", "expected"),
    [(0.0, 3, 0.0), (4.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 2, 0.5), (2.0, 3, 0.5), (1.0, 3, 0.3333), (2.0, 7, 0.25)],
)
def test_more_clients_than_gpus_share_them(given: float, clients: int, expected: float) -> None:
    assert part(given, clients) == expected
    # All of them have their part at the same time.
    assert given == 0 or clients <= int(given) * int(1 / expected)


def test_nothing_starts_without_clients_or_rounds(tmp_path: Path) -> None:
    for clients, rounds in (([], 1), (["a"], 0)):
        with pytest.raises(InputError, match="at least one client and one round"):
            run(clients, model=tmp_path, public=tmp_path, out=tmp_path / "out", rounds=rounds)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with a model, a public text, and the texts of three clients."""
    pytest.importorskip("flwr", reason="the extra federated is not installed")
    save_tiny_teacher(tmp_path / "model", layers=1)
    for seed, name in enumerate(("public", "a", "b", "c")):
        tiny_text(tmp_path / name, documents=2, seed=seed)
    return tmp_path


@pytest.fixture(scope="module")
def local() -> Iterator[LocalRay]:
    """A Ray of this machine, which all tests share."""
    ray = LocalRay(Machine(cpus=2, memory_bytes=10**9, gpus=()))
    yield ray
    ray.leave()


@pytest.fixture
def shared(local: LocalRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `run` use the shared Ray, which stays when it leaves."""
    monkeypatch.setattr(local, "leave", lambda: None)
    monkeypatch.setattr(on_ray, "LocalRay", lambda machine: local)


def asked(inputs: Path, **changes: Any) -> Callable[..., list[Path]]:
    """Return a call of `run` with the inputs, which takes the names of the clients' texts."""
    given: dict[str, Any] = {
        "model": inputs / "model",
        "public": inputs / "public",
        "out": inputs / "out",
        "rounds": 3,
        "length": 32,
        "steps": 2,
    }
    return lambda *names: run([inputs / name for name in names], **(given | changes))


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_what_a_client_cannot_begin_with_is_one_line_before_anything_is_trained(inputs: Path) -> None:
    (inputs / "short").mkdir()
    (inputs / "short" / "a.txt").write_text("Hi.")
    (inputs / "file").touch()
    for names, changes, said in (
        (("a", "elsewhere"), {}, "no node has .*elsewhere"),
        (("a", "short"), {}, r"client-2 \(.*short\) cannot begin: .* do not fill a sequence of 32"),
        (("a",), {"out": inputs / "file" / "out"}, r"client-1 \(.*\) cannot begin: cannot write into"),
        (("a",), {"model": inputs / "none"}, "has no .*none: put it there too"),
    ):
        with pytest.raises(InputError, match=said) as found:
            asked(inputs, on_round=lambda line: None, **changes)(*names)
        assert "\n" not in str(found.value)
    assert not (inputs / "out").exists() or not list((inputs / "out").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_clients_on_ray_send_no_text_and_one_that_vanishes_stops_nobody(
    inputs: Path, wire: tuple[str, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, between = wire
    monkeypatch.setattr(on_ray, "_free_address", lambda host: between.address)
    monkeypatch.setattr(on_ray, "serve", lambda address, **more: serve(listening, **more))
    monkeypatch.setattr("autodistill.federated.client.resolve_data", _refuse)
    secret = "Zanzibar-4711 belongs to nobody else."
    for name in ("a", "b", "c"):
        first = next((inputs / name).iterdir())
        first.write_text(f"{secret} {first.read_text()} {secret}")
    lines: list[str] = []

    def on_round(line: str) -> None:
        lines.append(line)
        if line.startswith("round 1:"):
            taking = [one for one in psutil.Process().children(recursive=True) if "_OnNode.take_part" in one.name()]
            taking[-1].kill()

    found = asked(inputs, on_round=on_round, round_seconds=300.0)("a", "b", "c")
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.partition(",")[0] for line in rounds] == [
        "round 1: 3 clients",
        "round 2: 2 clients",
        "round 3: 2 clients",
    ]
    assert len([line for line in lines if "runs on 127.0.0.1" in line]) == 3
    (gone,) = [line for line in lines if "has no final model" in line]
    assert "its process has ended" in gone
    assert len(found) == 2
    assert all(load_model(folder, torch.float32) for folder in found)
    check_no_text(bytes(between.sent), inputs / "model", inputs / "public", [inputs / name for name in ("a", "b", "c")])


@pytest.mark.slow
def test_clients_run_on_both_nodes_of_a_cluster(inputs: Path) -> None:
    from ray.cluster_utils import Cluster

    set_environment()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    chosen: list[str] = []
    start = on_ray._start

    def noted(node: Node, clients: int, options: dict[str, Any]) -> Any:
        chosen.append(node.id)
        return start(node, clients, options)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(on_ray, "_start", noted)
            found = asked(inputs, ray_address=nodes.address, rounds=1, on_round=lambda line: None)("a", "b")
    finally:
        nodes.shutdown()
    assert len(set(chosen)) == 2
    assert [folder.name for folder in found] == ["client-1", "client-2"]


def _refuse(reference: str) -> Any:
    """Stand for reading text in the process that runs the server."""
    raise AssertionError(f"{reference} was read here; a client does so with {resolve_data.__name__}")

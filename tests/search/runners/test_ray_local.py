"""A Ray that runs only on this machine: which addresses it listens on, how it begins, and how it ends."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from autodistill.hardware.machine import Machine
from autodistill.search.runners.ray_local import LocalRay


def test_a_ray_of_this_machine_has_ended_once_one_of_its_processes_has(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The message comes at once, because Ray may end this process before it can leave."""
    monkeypatch.setattr("autodistill.search.runners.ray_session._STUCK_SECONDS", 0.0)
    ends: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "autodistill.search.runners.ray_session.end_process", lambda said, code: ends.append((said, code))
    )
    monkeypatch.setattr(LocalRay, "_start", lambda self: None)
    local = LocalRay(Machine(cpus=1, memory_bytes=10**9, gpus=()))
    local.to_go_on = lambda: "go on with --resume"
    with subprocess.Popen(["sleep", "60"]) as raylet, subprocess.Popen(["sleep", "60"]) as agent:
        local._processes = {"raylet": psutil.Process(raylet.pid), "ray::DashboardAgent": psutil.Process(agent.pid)}
        assert local.ended() is None
        agent.kill()
        local._watch()
        raylet.kill()
    assert ends == [("Ray's DashboardAgent has ended (killed, or out of memory?); go on with --resume", 1)]
    assert "goes on with --resume" in capfd.readouterr().err


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the empty home of a user who has named no token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_ray_of_its_own_is_told_to_listen_on_the_loopback_and_writes_no_token(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    from ray._private import ray_constants, services

    seen: list[tuple[dict[str, Any], str, str | None]] = []

    def init(**options: Any) -> None:
        address = services.resolve_ip_for_localhost(options["_node_ip_address"])
        seen.append((options, address, os.environ.get("RAY_AUTH_TOKEN")))

    monkeypatch.setattr("autodistill.search.runners.ray_local.init_ray", init)
    monkeypatch.setattr("autodistill.search.runners.ray_local.shut_down_ray", lambda: None)
    before = ray_constants.ENABLE_RAY_CLUSTER
    local = LocalRay(Machine(cpus=1, memory_bytes=10**9, gpus=()))
    local.wait()
    local.leave()
    ((options, address, token),) = seen
    assert options["address"] == "local"
    assert address == "127.0.0.1"
    assert token is not None
    assert len(token) == 64
    assert before == ray_constants.ENABLE_RAY_CLUSTER, "a cluster that is joined later has other machines"
    assert list(home.iterdir()) == []


def test_a_token_that_a_person_named_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    monkeypatch.setattr("autodistill.search.runners.ray_local.init_ray", lambda **options: None)
    monkeypatch.setattr("autodistill.search.runners.ray_local.shut_down_ray", lambda: None)
    local = LocalRay(Machine(cpus=1, memory_bytes=10**9, gpus=()))
    local.wait()
    local.leave()
    assert os.environ["RAY_AUTH_TOKEN"] == "a" * 64


@pytest.mark.slow
def test_nothing_of_a_ray_of_its_own_listens_beyond_the_loopback(home: Path) -> None:
    """The sockets of this process, of Ray and of a worker are checked as the system lists them.

    There is no token file.
    """
    import ray

    own = {one.laddr.port for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN}
    local = LocalRay(Machine(cpus=1, memory_bytes=10**9, gpus=()))
    try:
        local.wait()
        assert ray.get(ray.remote(lambda: 2).remote()) == 2  # starts a worker
        names, listening = set(), []
        for process in (psutil.Process(), *psutil.Process().children()):
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN and one.laddr.port not in own:
                    names.add(process.name())
                    listening.append(ipaddress.ip_address(one.laddr.ip.removeprefix("::ffff:")))
    finally:
        local.leave()
    assert {"gcs_server", "raylet"} <= names
    assert all(address.is_loopback for address in listening), listening
    assert not (home / ".ray" / "auth_token").exists()


def test_a_ray_is_ended_once_and_not_before_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later search of this process may have started another Ray by then, which must not be ended."""
    started, ended = threading.Event(), []
    monkeypatch.setattr("autodistill.search.runners.ray_local.init_ray", lambda **options: started.wait(10))
    monkeypatch.setattr("autodistill.search.runners.ray_local.shut_down_ray", lambda: ended.append(started.is_set()))
    local = LocalRay(Machine(cpus=1, memory_bytes=10**9, gpus=()))
    threading.Timer(0.2, started.set).start()
    local.leave()
    local.leave()
    assert ended == [True]


# Here a fork that runs Python exits at once. A real one may do so if its destructors wait for threads of its parent.
DEADLY_FORK = """
import os, sys, time
import psutil
os.register_at_fork(after_in_child=lambda: os._exit(3))
from autodistill.hardware.machine import Machine
from autodistill.search.runners.ray_local import LocalRay
local = LocalRay(Machine(cpus=1, memory_bytes=10**9, gpus=()))
local.wait()
print(*[process.pid for process in psutil.Process().children()], flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_ray_begins_where_a_fork_that_runs_python_dies_and_ends_with_its_parent() -> None:
    """Its processes ignore Ctrl-C, which is meant for the search. The search ends them itself."""
    with subprocess.Popen([sys.executable, "-c", DEADLY_FORK], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        begun = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        names = {child.name(): child for child in begun}
        assert {"gcs_server", "raylet"} <= names.keys()
        for name in ("gcs_server", "raylet"):
            status = Path(f"/proc/{names[name].pid}/status").read_text()
            blocked = int(status.split("SigBlk:")[1].split()[0], 16)
            assert blocked >> (signal.SIGINT - 1) & 1
        parent.kill()
    assert psutil.wait_procs(begun, timeout=60)[1] == []

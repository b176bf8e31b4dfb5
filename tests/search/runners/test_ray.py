"""The whole path through Ray: warm workers, relative paths, a folder that shadows the package, a worker that dies."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from ray.exceptions import OutOfMemoryError

from autodistill.errors import AutoDistillError
from autodistill.hardware import machine
from autodistill.hardware.budget import Budget
from autodistill.hardware.machine import detect
from autodistill.runs.events import read_events, rows_of
from autodistill.runs.results.row import Status
from autodistill.runs.run_log import RunLog
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.request.request import SearchRequest
from autodistill.search.runners.inline import run_inline
from autodistill.search.runners.ray import _scheduler, _searcher, _worker
from autodistill.search.runners.ray import drive as run_pieces
from autodistill.search.runners.ray_local import LocalRay
from autodistill.search.search import search
from autodistill.search.worker.failures import KILLED
from autodistill.testing import save_tiny_teacher, tiny_text


class Killer(Observer):
    """Kills all workers that it sees training, a given number of times."""

    def __init__(self, times: int) -> None:
        self.killed: list[int] = []
        self._times = times
        self._watch = threading.Thread(target=self._run, daemon=True)

    def phase(self, name: str) -> None:
        """Begin to watch when trials begin."""
        if name == "trials":
            self._watch.start()

    def _run(self) -> None:
        ends = time.monotonic() + 240
        while self._times and time.monotonic() < ends:
            found = False
            for child in psutil.Process().children(recursive=True):
                # A worker's title is the method that it runs. A worker may end while it is inspected.
                with contextlib.suppress(psutil.Error):
                    if child.pid not in self.killed and any("Trainable" in word for word in child.cmdline()):
                        os.kill(child.pid, signal.SIGKILL)
                        self.killed.append(child.pid)
                        found = True
            self._times -= found
            time.sleep(0.01)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "expected"),
    [("cuda", 0.25, 1, [0.25]), ("cuda", 1.0, 1, []), ("cuda", 1.0, 2, []), ("cpu", 0.25, 1, [])],
)
def test_workers_that_share_a_gpu_keep_to_their_shares_and_the_search_itself_does_not(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: float, processes: int, expected: list[float]
) -> None:
    kept: list[float] = []
    monkeypatch.setattr("autodistill.search.runners.ray.keep_to_share", kept.append)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", kept.append)
    for runner in ("ray", "inline"):
        monkeypatch.setattr(f"autodistill.search.runners.{runner}.Workbench", lambda setting: None)
    monkeypatch.setattr("autodistill.search.runners.ray.fetch", lambda setting: setting)
    plan = SimpleNamespace(gpus=gpus, processes=processes)
    setting: Any = SimpleNamespace(device=device, plan=plan)
    run_inline(cast("Campaign", SimpleNamespace(next=lambda: None)), setting, None)
    assert kept == []
    _worker(setting, None)
    assert kept == expected


@pytest.mark.parametrize(("error", "cause"), [(OSError("ACCESS_DENIED"), "worker-died"), (FULL, "disk-full")])
def test_a_worker_that_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch, error: OSError, cause: str) -> None:
    def fail(setting: object) -> None:
        raise error

    monkeypatch.setattr("autodistill.search.runners.ray.fetch", fail)
    setting: Any = SimpleNamespace(device="cpu", plan=SimpleNamespace(gpus=1.0, processes=1))
    said = _worker(setting, None)(cast("Any", None))["failure"]
    assert said == (cause, f"its worker could not begin: {error}")


def test_what_ray_says_of_a_dead_worker_goes_to_whoever_gave_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    work = ["first", "second", "third"]
    source: Any = SimpleNamespace(next=lambda: work.pop(0), take=lambda given, outcome: taken.append((given, outcome)))
    kills = iter([5, 5, 6])
    monkeypatch.setattr("autodistill.search.runners.oom_kills.killed_for_memory", lambda: next(kills))
    errors: dict[str, str] = {}
    scheduler, searcher = _scheduler(errors), _searcher(source, 3, lambda: None, errors)
    (tmp_path / "error.txt").write_text("OutOfMemoryError: Memory on the node exceeds the memory usage threshold")
    for name in "abc":
        searcher.suggest(name)
    scheduler.on_trial_error(None, SimpleNamespace(trial_id="a", error_file=str(tmp_path / "error.txt")))
    scheduler.on_trial_error(None, SimpleNamespace(trial_id="b", error_file=None))
    for name in "ab":
        searcher.on_trial_complete(name, error=True)
    searcher.on_trial_result("c", {"failure": ("error", "so"), "trained": 512})
    searcher.on_trial_complete("c", error=True)
    (_, by_ray), (_, by_kernel), last = taken
    assert by_ray["failure"] == (KILLED, "its worker process was ended by Ray, since the machine's memory was short")
    assert by_kernel["failure"][0] == KILLED
    assert "by the kernel" in by_kernel["failure"][1]
    assert last == ("third", {"failure": ("error", "so"), "trained": 512})


def test_all_work_is_given_out_again_where_ray_s_end_of_a_worker_is_an_error_to_tune(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When Ray ends some workers for lack of memory, Tune gets an error that it does not know."""
    taken: list[Any] = []
    work = ["first", "second"]
    source: Any = SimpleNamespace(next=lambda: work.pop(0), take=lambda given, outcome: taken.append((given, outcome)))
    fits = []

    def fit(trainable: Any, searcher: Any, *_: Any) -> None:
        fits.append([searcher.suggest(name)["assignment"].assignment for name in ("a", "b") if work])
        if len(fits) == 1:
            raise RuntimeError("Caught unexpected exception") from OutOfMemoryError("1 worker(s) were killed")

    monkeypatch.setattr("ray.tune.with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr("ray.tune.with_resources", lambda trainable, _: trainable)
    monkeypatch.setattr("autodistill.search.runners.ray._fit", fit)
    run_pieces(source, 2, [{"CPU": 1.0}], dict, lambda: None)
    failure = (KILLED, "its worker process was ended by Ray, since the machine's memory was short")
    assert taken == [("first", {"failure": failure}), ("second", {"failure": failure})]
    assert fits == [["first", "second"], []]


MEMORY_SHORT = """
import sys, time
from types import SimpleNamespace
import ray
from autodistill.search.runners.ray import drive

config = {"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100}
ray.init(num_cpus=1, include_dashboard=False, _system_config=config)
work = ["first", "second"]

def make():
    def wait(assignment):
        import time
        time.sleep(300)
        return {"done": True}
    return wait

taken = []
source = SimpleNamespace(
    next=lambda: work.pop(0) if work else None, take=lambda given, outcome: taken.append((given, outcome["failure"][0]))
)
drive(source, 1, [{"CPU": 1.0}], make, lambda: None)
print(taken)
"""


@pytest.mark.slow
def test_a_worker_that_ray_s_memory_monitor_ends_ends_no_search(tmp_path: Path) -> None:
    """Ray itself ends the worker: it is configured to treat memory as full as soon as any of it is used."""
    script = [sys.executable, "-c", MEMORY_SHORT]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.splitlines()[-1:] == [str([("first", KILLED), ("second", KILLED)])], done.stderr


SPACE = """
dimensions:
  distillation.learning_rate: {low: 1e-4, high: 1e-2, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [logit_kd]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("times", "trials"), [(1, 2), (3, 4)])
def test_a_search_through_ray_survives_the_death_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, trials: int
) -> None:
    """Another worker does the work of one that died. If that one dies too, the work is recorded as failed."""
    monkeypatch.chdir(tmp_path)
    # This is like a checkout of a package that is installed elsewhere.
    (tmp_path / "autodistill").mkdir()
    (tmp_path / "autodistill" / "__init__.py").write_text(
        "raise ImportError('a worker looked where the command was typed')"
    )
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    (tmp_path / "space.yaml").write_text(SPACE)
    if times == 1:
        # Use one worker, because each takes seconds to begin.
        monkeypatch.setattr(machine, "_cpus", lambda cgroup: 1)
    killer = Killer(times)
    outcome = search(
        SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            teacher="teacher",
            data="text",
            space="space.yaml" if times == 1 else "declared",
            trials=trials,
            tokens=2304,
            runs=Path("runs"),
            name="run",
            cache=Path("cache"),
        ),
        killer,
    )
    events = RunLog(Path("runs/run/trials.jsonl")).read()
    states = {event["trial"]: event for event in events if event["event"] == "status"}
    assert killer.killed, "no worker was seen"
    failed = [event for event in states.values() if event["status"] == Status.FAILED]
    retried = [event for event in events if event["event"] == "retry"]
    assert {event["cause"] for event in retried} == {"worker-died"}
    assert {event["cause"] for event in failed} <= {"worker-died"}
    # The log has each death, either as a first failure or as the end of a trial.
    assert len(retried) + len(failed) == len(killer.killed)
    assert {event["trial"] for event in failed} <= {event["trial"] for event in retried}
    if times == 1:
        assert not failed
    assert sum(event["status"] != Status.REJECTED for event in states.values()) == trials + 1
    assert outcome.finish.best.feasible
    assert Path("runs/run/student/gguf/student.gguf").is_file()
    assert {row.trial for row in rows_of(read_events(events)) if row.full and row.kind == "student"}


class DiskFiller(Observer):
    """Makes the log unwritable once a rung is in it; `/dev/full` answers like a full disk."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.filled = False
        self._watch = threading.Thread(target=self._run, daemon=True)

    def phase(self, name: str) -> None:
        """Begin to watch when trials begin."""
        if name == "trials":
            self._watch.start()

    def _run(self) -> None:
        while not any(event["event"] == "rung" for event in RunLog(self._log).read()):
            time.sleep(0.05)
        (self._log.parent / "full").symlink_to("/dev/full")
        self._log.rename(self._log.parent / "kept")
        (self._log.parent / "full").rename(self._log)
        self.filled = True


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_a_search_through_ray_with_what_to_do(tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    asked = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        space="declared",
        teacher=str(tmp_path / "teacher"),
        data=str(tmp_path / "text"),
        trials=3,
        tokens=2304,
        runs=tmp_path / "runs",
        name="run",
        cache=tmp_path / "cache",
    )
    log = tmp_path / "runs" / "run" / "trials.jsonl"
    filler = DiskFiller(log)
    with pytest.raises(AutoDistillError, match=r"No space left on device; what it held is kept: make room.*--resume"):
        search(asked, filler)
    assert filler.filled
    log.unlink()
    (log.parent / "kept").rename(log)
    before = log.read_bytes()
    outcome = search(replace(asked, resume=True, runner="inline"))
    assert log.read_bytes().startswith(before)
    rungs = [(event["trial"], event["rung"]) for event in RunLog(log).read() if event["event"] == "rung"]
    assert len(set(rungs)) == len(rungs)
    assert outcome.finish.best.feasible


class Tail:
    """Two pieces of work that two processes begin together, then one that runs alone, then short ones."""

    def __init__(self) -> None:
        self._left = [("first", 0.0)] * 2 + [("long", 1.0)] + [("short", 0.4)] * 8
        self._running: list[tuple[str, float]] = []
        self.processes: dict[str, list[int]] = {"first": [], "long": [], "short": []}
        self.settled: list[int] = []

    def next(self) -> Any:
        """Return the next piece. The long piece never runs at the same time as another."""
        kinds = {kind for kind, _ in self._running}
        if not self._left or "long" in kinds or (self._left[0][0] == "long" and kinds):
            return None
        self._running.append(self._left.pop(0))
        return self._running[-1]

    def take(self, assignment: Any, outcome: Any) -> None:
        """Keep the process that did the piece."""
        self._running.remove(assignment)
        assert "process" in outcome, outcome
        self.processes[assignment[0]].append(outcome["process"])
        self.settled.append(outcome["settled"])


def sigterm_handler() -> int | None:
    """Return the handler of SIGTERM below Python."""
    get = ctypes.pythonapi.PyOS_getsig
    get.restype = ctypes.c_void_p
    return get(signal.SIGTERM)


@pytest.mark.slow
def test_a_worker_with_nothing_to_do_keeps_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def make() -> Any:
        def do(piece: tuple[str, float]) -> dict[str, Any]:
            if piece[0] == "first":
                (tmp_path / str(os.getpid())).touch()
                while len(list(tmp_path.glob("[0-9]*"))) < 2:
                    time.sleep(0.05)
            time.sleep(piece[1])
            return {"process": os.getpid(), "settled": gc.get_freeze_count()}

        return do

    met = sigterm_handler()
    cluster, source = LocalRay(replace(detect(), cpus=2)), Tail()
    cluster.wait()
    assert sigterm_handler() == met
    try:
        run_pieces(source, 2, [{"CPU": 1.0}], make, cluster.ended)
    finally:
        cluster.leave()
    assert sigterm_handler() == met
    began, long, short = source.processes.values()
    assert len(set(began)) == 2
    assert set(long) <= set(began)
    assert len(short) == 8
    assert set(short) == set(began)
    # Objects that torch and other imports created are frozen, so that they are not examined between two pieces.
    assert min(source.settled) > 100_000

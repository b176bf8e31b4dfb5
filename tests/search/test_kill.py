"""A search killed with SIGKILL while it trains, and resumed: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from autodistill.hardware.budget import Budget
from autodistill.runs.events import RowAdded, RowTested, read_events, rows_of
from autodistill.runs.results.row import Row
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.event_log import EventLog

Inputs = tuple[Path, Path]
ROOT = Path(__file__).parents[2]
LONGEST = 600.0
"""Seconds that anything is waited for; on a machine with much else to do a search under Ray takes minutes."""

# It has one deployment that is quick to score and to verify.
SMALL = """
dimensions:
  init.depth: {low: 0.6, high: 0.8, step: 0.2}
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
deployments:
  - {runtime: transformers, format: huggingface, bits: 16, group_size: 0}
baselines: [logit_kd]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny_teacher(folder / "teacher", layers=5), tiny_text(folder / "text", documents=30, sentences=24)


def command(inputs: Inputs, runner: str, *more: str) -> list[str]:
    options = ["--budget", "16GB", "--context", "256", "--teacher", str(inputs[0]), "--data", str(inputs[1])]
    fixed = ["--trials", "3", "--tokens", "2304", "--runner", runner, "--name", "run", "--json"]
    return [sys.executable, "-m", "autodistill", "search", *options, *fixed, *more]


def start(words: list[str], folder: Path, cores: int | None = None) -> subprocess.Popen[bytes]:
    # Use one thread: threads that wait for a core that others use are slower than having none.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]),
    )


def events(folder: Path) -> list[dict[str, object]]:
    log = folder / "results" / "runs" / "run" / "trials.jsonl"
    return EventLog(log).read() if log.exists() else []


def wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    ends = time.monotonic() + LONGEST
    while not ready():
        assert process.poll() is None, process.communicate()[1].decode()
        if time.monotonic() >= ends:
            process.kill()
            pytest.fail(f"the search came to nothing: {process.communicate()[1].decode()}")
        time.sleep(0.02)


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """Kill a search, and only that process, once `ready`.

    The processes that it started have to notice by themselves.
    """
    wait_for(process, ready)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def finish(words: list[str], folder: Path, cores: int | None = None) -> dict[str, object]:
    output, errors = start(words, folder, cores).communicate(timeout=LONGEST)
    assert output, errors.decode()
    return dict(json.loads(output))


def reports(folder: Path) -> list[tuple[object, object]]:
    return [(event["trial"], event["rung"]) for event in events(folder) if event["event"] == "rung"]


def rows(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Row]:
    """Return the rows of validation and test that a search has found, once it has ended."""
    errors = process.communicate(timeout=900)[1].decode()
    assert process.returncode == 0, errors
    return {
        f"{kind.__name__} {row.row_id}": row
        for kind in (RowAdded, RowTested)
        for row in rows_of(read_events(events(folder)), [kind])
    }


def results(folder: Path) -> dict[str, tuple[object, ...]]:
    return {
        row.row_id: (row.accuracy, row.perplexity, row.train_tokens) for row in rows_of(read_events(events(folder)))
    }


# This search leaves out the steps that other tests here leave out too, and is killed.
PROGRAM = """
import sys
import torch
from tests.search.conftest import untimed
from tests.search.test_kill import asked
from autodistill.search.search import search

torch.set_num_threads(1)
with untimed():
    search(asked(*sys.argv[1:]))
"""


def asked(teacher: str, text: str, folder: str, resume: bool = False) -> SearchRequest:
    """Return a search in the small space, with its run and cache where a command line in `folder` would put them."""
    out = Path(folder) / "results" / "runs"
    space = Path(folder) / "small.yaml"
    space.write_text(SMALL)
    return SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=teacher,
        data=text,
        space=str(space),
        trials=3,
        tokens=2304,
        runner="inline",
        runs=out,
        name="run",
        cache=Path(folder) / "cache",
        resume=resume,
    )


@pytest.mark.slow
def test_a_killed_search_ends_as_if_it_had_not_been(inputs: Inputs, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    given = [str(path) for path in inputs]
    search(asked(*given, str(whole)))
    words = [sys.executable, "-c", PROGRAM, *given, str(cut)]
    kill_when(start(words, ROOT), lambda: len(reports(cut)) >= 3)
    search(asked(*given, str(cut), resume=True))
    assert reports(cut) == reports(whole)
    assert results(cut) == results(whole)


@pytest.mark.slow
def test_a_run_on_a_storage_is_refused_while_it_is_held_and_goes_on_elsewhere_once_its_search_is_killed(
    inputs: Inputs, tmp_path: Path
) -> None:
    """It goes on from another folder, as on another machine, with nothing of the run but the storage's files."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    storage = ["--storage", f"file://{tmp_path}/shared"]
    process = start(command(inputs, "inline", *storage), here)
    wait_for(process, lambda: len(reports(here)) >= 2)
    os.kill(process.pid, signal.SIGSTOP)
    refused = start(command(inputs, "inline", *storage, "--resume"), there)
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert f"is held by process {process.pid} on " in json.loads(output)["error"]
    assert not (there / "results").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = reports(here)
    output, errors = start(command(inputs, "inline", *storage, "--resume"), there).communicate(timeout=LONGEST)
    assert f"the run is taken over from process {process.pid} on " in errors.decode()
    assert json.loads(output)["best"]
    assert reports(there)[: len(before)] == before
    assert len(set(reports(there))) == len(reports(there)), "a segment was run twice"


@pytest.mark.slow
def test_a_search_killed_under_ray_leaves_no_process_and_resumes(inputs: Inputs, tmp_path: Path) -> None:
    process = start(command(inputs, "ray"), tmp_path)
    children: list[psutil.Process] = []

    def two_reports() -> bool:
        if len(reports(tmp_path)) < 2:
            return False
        children.extend(psutil.Process(process.pid).children(recursive=True))
        return True

    kill_when(process, two_reports)
    assert children
    assert not psutil.wait_procs(children, timeout=180)[1], "processes of the killed search live on"
    before = reports(tmp_path)
    document = finish(command(inputs, "ray", "--resume"), tmp_path)
    after = reports(tmp_path)
    assert after[: len(before)] == before
    assert len(set(after)) == len(after), "a segment was run twice"
    assert document["best"]


@pytest.mark.slow
def test_a_search_whose_ray_is_killed_says_how_to_go_on_and_ends_as_if_it_had_not_been(
    inputs: Inputs, tmp_path: Path
) -> None:
    """The first process loses its raylet, and the next its GCS. With one worker, the order of all work is fixed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    finish(command(inputs, "ray"), whole, cores=1)
    for victim, more, least in (("raylet", [], 1), ("gcs_server", ["--resume"], 3)):
        process = start(command(inputs, "ray", *more), cut, cores=1)
        wait_for(process, lambda least=least: len(reports(cut)) >= least)  # type: ignore[misc]
        before = reports(cut)
        family = psutil.Process(process.pid).children(recursive=True)
        next(child for child in family if child.name() == victim).kill()
        output, errors = process.communicate(timeout=60)  # without the search, Ray would wait that long and say nothing
        assert process.returncode == 1
        said = json.loads(output)["error"]
        assert f"Ray's {victim} has ended" in said
        assert said.endswith("--resume")
        assert said in errors.decode()
        assert "Traceback" not in errors.decode()
        assert not psutil.wait_procs(family, timeout=60)[1], "processes of Ray live on"
        assert reports(cut)[: len(before)] == before
    finish(command(inputs, "ray", "--resume"), cut, cores=1)
    assert not [event for event in events(cut) if event["event"] in ("retry", "unevaluated")]
    assert reports(cut) == reports(whole)
    assert results(cut) == results(whole)


@pytest.mark.slow
def test_a_search_whose_cluster_is_killed_says_how_to_go_on_and_ends_as_if_it_had_not_been(
    inputs: Inputs, tmp_path: Path
) -> None:
    """A first cluster loses its GCS, and a second the node's raylet. Then the search starts a Ray of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    finish(command(inputs, "ray"), whole, cores=1)
    killed = (("gcs_server", "the Ray cluster's GCS", [], 1), ("raylet", "this node's raylet", ["--resume"], 3))
    for victim, named, more, least in killed:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            (doomed,) = (child for child in psutil.Process().children(recursive=True) if child.name() == victim)
            process = start(command(inputs, "ray", "--ray-address", cluster.address, *more), cut)
            wait_for(process, lambda least=least: len(reports(cut)) >= least)  # type: ignore[misc]
            before = reports(cut)
            doomed.kill()
            output, errors = process.communicate(timeout=60)
        finally:
            cluster.shutdown()
        assert process.returncode == 1
        # The process may be stuck in a call to Ray. It is then ended from another thread.
        said = json.loads(output)["error"]
        assert errors.decode().rstrip().splitlines()[-1] == f"error: {said}"
        assert re.match(rf"{named}, at \S+:\d+, has ended, or is out of reach; every finished trial is kept", said)
        assert said.endswith("--resume")
        assert "Traceback" not in errors.decode()
        assert reports(cut)[: len(before)] == before
    finish(command(inputs, "ray", "--resume"), cut, cores=1)
    assert not [event for event in events(cut) if event["event"] in ("retry", "unevaluated")]
    assert reports(cut) == reports(whole)
    assert results(cut) == results(whole)

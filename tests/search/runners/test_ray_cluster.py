"""A cluster of two nodes on this machine: what is refused before any work, and a search that outlives a node."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.estimates.training_fit import Training, TrainingFit, training_fits
from autodistill.hardware.budget import Budget
from autodistill.hardware.machine import detect
from autodistill.runs.events import read_events, rows_of
from autodistill.runs.results.row import Status
from autodistill.runs.run_folder import RunFolder
from autodistill.search.campaign.observer import Observer
from autodistill.search.request.request import SearchRequest
from autodistill.search.runners.ray_cluster import JoinedRay, _machine, _object, check_address, join
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.event_log import EventLog
from autodistill.utils.json_files import read_json
from autodistill.utils.storage import Storage, reached
from tests.search.runners.lost_nodes import NodeKiller


@pytest.fixture
def cluster() -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://10.0.0.1:10001", "run the search on a node of the cluster"),
        ("somewhere", "takes auto or host:port"),
        ("host:port", "takes auto or host:port"),
        ("host:²", "takes auto or host:port"),
        (f"host:{'9' * 5_000}", "takes auto or host:port"),
        (f"{'x' * 70}:1", "no Ray cluster answers at xxx"),
        ("a..b:1", "no Ray cluster answers at a"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
    ],
)
def test_an_address_that_cannot_be_joined_is_refused(address: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_address(address)


def test_a_joined_cluster_has_ended_once_one_of_its_processes_takes_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autodistill.search.runners.ray_cluster._SILENT_SECONDS", 0.0)
    monkeypatch.setattr("autodistill.search.runners.ray_session.end_process", lambda said, code: None)
    with socket.create_server(("127.0.0.1", 0)) as gcs:
        with socket.create_server(("127.0.0.1", 0)) as raylet:
            port = raylet.getsockname()[1]
            joined = JoinedRay((), {"the GCS": gcs.getsockname(), "the raylet": raylet.getsockname()})
            assert joined.ended() is None
        assert joined.ended() == f"the raylet, at 127.0.0.1:{port}, has ended, or is out of reach"
        joined.leave()


@pytest.mark.parametrize(("resources", "bf16"), [({"CPU": 4, "GPU": 2}, True), ({"CPU": 4}, False)])
def test_a_node_computes_in_the_precisions_of_what_ray_gives_of_it(resources: dict[str, float], bf16: bool) -> None:
    said = {
        "python": platform.python_version(),
        "package": importlib.metadata.version("autodistill-search"),
        "unseen": [],
        "storage": "",
        "memory_bytes": 8,
        "free_bytes": 6,
        "gpus": [("a", 24, 20), ("a", 24, None), ("a", 24, 3)],
        "bf16": {"cuda": True, "cpu": False},
        "tf32": True,
    }
    machine = _machine("node", resources, said, {})
    assert (machine.bf16, machine.tf32, len(machine.gpus)) == (bf16, bf16, resources.get("GPU", 0))
    assert machine.usable_bytes == 6
    assert [gpu.usable_bytes for gpu in machine.gpus] == [20, 24][: len(machine.gpus)]


def test_a_node_that_does_not_reach_the_storage_is_refused(tmp_path: Path) -> None:
    """So is a node that sees an unshared folder of the same name, or may only read the folder."""
    ours, theirs = Storage(f"file://{tmp_path}/ours"), Storage(f"file://{tmp_path}/theirs")
    with _object(ours) as stored:
        assert stored is not None
        assert reached(*stored) == ""
        assert "theirs" in reached(theirs.uri, stored[1])
        assert "s3" in reached("s4://bucket/runs", stored[1])
    assert ours.list() == {}
    said = {
        "python": platform.python_version(),
        "package": importlib.metadata.version("autodistill-search"),
        "unseen": [],
        "storage": "ACCESS_DENIED",
    }
    with pytest.raises(InputError, match=r"node b .*does not reach the storage \(ACCESS_DENIED\): give it the cred"):
        _machine("b", {"CPU": 1}, said, {})


@pytest.mark.slow
def test_what_is_no_cluster_is_given_up_after_a_short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.search.runners.ray_cluster._JOIN_SECONDS", 3.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match="did not answer like a Ray cluster within 3 s"):
            join(f"127.0.0.1:{silent.getsockname()[1]}", [])


@pytest.mark.slow
def test_nodes_that_differ_are_refused_and_the_cluster_lives_on(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.59.0")
        with pytest.raises(InputError, match=r"it runs Ray 2\.\S+ and Python 3\.\S+, this process Ray 2\.59\.0"):
            join(cluster.address, [])
    real = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "autodistill-search" else real(name))
        with pytest.raises(InputError, match=rf"runs autodistill-search {real('autodistill-search')} on Python"):
            join(cluster.address, [])
    with pytest.raises(InputError, match=r"node \S+ \(\w+\) of the Ray cluster has no /\S+/score.py, which the metric"):
        join(cluster.address, [], [tmp_path / "score.py"])
    (tmp_path / "score.py").touch()
    joined = join(cluster.address, [tmp_path / "out"], [tmp_path / "score.py"])
    assert [machine.cpus for machine in joined.machines] == [1, 1]
    assert {machine.bf16 for machine in joined.machines} == {detect().bf16}
    assert list((tmp_path / "out").iterdir()) == []
    joined.leave()
    join(cluster.address, []).leave()


class TrialsDone(Exception):
    """The trials of a search have ended. What follows them runs on no cluster and is tested elsewhere."""


def run_trials(patch: pytest.MonkeyPatch, request: SearchRequest, observer: Observer | None = None) -> None:
    """Run a search up to the end of its trials."""

    def done(*given: Any) -> None:
        raise TrialsDone

    patch.setattr("autodistill.search.search.finish", done)
    with pytest.raises(TrialsDone):
        search(request, observer)


def held_on(doomed: str, folder: Path) -> Callable[..., Any]:
    """Return a function that makes a worker's work like the runner's own, on every node of a cluster.

    On the doomed node, a trial that goes on from a rung is held at its first step until the node is removed. On the
    other nodes such a trial waits until one is held there, so that one surely is. The folder gets a file for each piece
    of work that begins, and "held" for the one that is held.
    """

    # The function is nested so that Ray sends it by value: a node cannot import it from the tests.
    def worker(setting: Any, deadline: float | None) -> Callable[[Any], dict[str, Any]]:
        import json
        import uuid

        import ray

        from autodistill.search.runners import ray as ray_runner

        node = ray.get_runtime_context().get_node_id()
        given: dict[str, Any] = {}

        def wait(record: object) -> None:
            if given["rung"] == 0 or given["straight"] or given["deployment"]:
                return
            if node == doomed:
                partial = folder / "held.partial"
                partial.write_text(json.dumps(given))
                partial.rename(folder / "held")
            ends = time.monotonic() + 600
            while node == doomed or not (folder / "held").exists():
                if time.monotonic() > ends:
                    raise RuntimeError("no trial was held on the doomed node, or that was not taken away")
                time.sleep(0.05)

        ray_runner.step_guard = lambda deadline: wait
        work = ray_runner._worker(setting, deadline)

        def begin(assignment: Any) -> dict[str, Any]:
            given.update(
                node=node,
                trial=assignment.task.id,
                rung=assignment.rung,
                straight=assignment.task.straight,
                deployment=assignment.deployment is not None,
            )
            (folder / f"begun-{time.time_ns()}-{uuid.uuid4().hex}").write_text(json.dumps(given))
            return work(assignment)

        return begin

    return worker


@pytest.mark.slow
def test_a_search_outlives_a_node(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that the node trained past a rung goes on elsewhere, from the checkpoint before that rung."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    seen, node = tmp_path / "seen", next(iter(cluster.worker_nodes))
    seen.mkdir()
    monkeypatch.setattr("autodistill.search.runners.ray._worker", held_on(node.node_id, seen))
    killer = NodeKiller(cluster, seen / "held")
    run_trials(
        monkeypatch,
        SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            space="declared",
            teacher=str(tmp_path / "teacher"),
            data=str(tmp_path / "text"),
            # Both trials pass the rung, whichever is better, so no other trial overtakes the lost one.
            trials=2,
            tokens=3072,
            runs=tmp_path / "runs",
            name="run",
            cache=tmp_path / "cache",
            ray_address=cluster.address,
            storage=f"file://{tmp_path}/shared",
        ),
        killer,
    )
    assert killer.lost == node.node_id
    run = RunFolder.open(tmp_path / "runs", "run")
    events, plan = run.events.read(), Plan.from_json(read_json(run.search_file)["plan"])
    assert plan.keep == (2,)
    states = {event["trial"]: event["status"] for event in events if event["event"] == "status"}
    assert sum(status != Status.REJECTED for status in states.values()) == 3
    assert Status.FAILED not in states.values(), "the lost trial was not tried again"
    held = json.loads((seen / "held").read_text())
    lost = [event for event in events if event["event"] == "retry" and event["trial"] == held["trial"]]
    assert [(event["rung"], event["deployment"]) for event in lost] == [(1, None)]
    begun = [json.loads(path.read_text()) for path in sorted(seen.glob("begun-*"))]
    where = [item["node"] for item in begun if (item["trial"], item["rung"]) == (held["trial"], 1)]
    assert where[0] == node.node_id
    assert node.node_id not in where[1:]
    assert len(where) > 1
    (again,) = (
        event for event in events if event["event"] == "rung" and (event["trial"], event["rung"]) == (held["trial"], 1)
    )
    checkpoint = branch_point(plan.rungs[0], plan.decay, plan.batch_tokens)
    assert 0 < again["trained"] == again["tokens"] - checkpoint < again["tokens"]
    ended = {row.trial for row in rows_of(read_events(events)) if row.full and row.kind == "student"}
    assert held["trial"] in ended
    assert len(ended) == 2


@pytest.mark.slow
def test_two_processes_on_two_nodes_find_what_one_finds(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)

    def losses(name: str, **more: Any) -> dict[tuple[str, int], list[float]]:
        run_trials(
            monkeypatch,
            SearchRequest(
                budget=Budget(memory_bytes=16 * 10**9, context=256),
                strategy="logit_kd",
                teacher=str(tmp_path / "teacher"),
                data=str(tmp_path / "text"),
                tokens=4608,
                step_tokens=512,
                runs=tmp_path / "runs",
                name=name,
                cache=tmp_path / "cache",
                **more,
            ),
        )
        events = EventLog(tmp_path / "runs" / name / "trials.jsonl").read()
        rungs = [event for event in events if event["event"] == "rung"]
        return {(event["trial"], event["rung"]): [step["loss"] for step in event["steps"]] for event in rungs}

    together = losses("together", ray_address=cluster.address, cpus_per_trial=2)
    alone = losses("alone", runner="inline")
    assert together.keys() == alone.keys()
    for segment, expected in alone.items():
        # They compute in bfloat16, and the processes sum in another order.
        assert together[segment] == pytest.approx(expected, rel=2e-2)


@pytest.mark.slow
def test_a_search_over_two_nodes_with_low_rank_changes_and_eight_bit_states_finds_what_one_process_finds(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train as if memory were shortest: one sequence at a time, checkpointing, and 8-bit states.

    With changes of rank 37, the blocks of 256 values end elsewhere in shards than in the whole.
    """

    def smallest(training: Training, limit_bytes: int) -> TrainingFit:
        return list(training_fits(training))[-1]

    monkeypatch.setattr("autodistill.search.setup.training_setup.fit_training", smallest)
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    grid = {"format": "gguf-q4_0", "bits": 4, "group_size": 32}
    learned, changes = grid | {"scales": "learned"}, {"rank": 37, "alpha": 74.0, "layers": "ffn"}
    dimensions = {
        "init.depth": {"choices": [0.6, 0.8]},
        "distillation.lora": {"choices": {"none": None, "changes": changes}},
        "finishing": {"choices": {"learned": learned, "derived": grid, "none": None}},
    }
    packings = [("llama.cpp", grid), ("transformers", {"format": "huggingface", "bits": 16, "group_size": 0})]
    deployments = [packing | {"runtime": runtime} for runtime, packing in packings]
    space = {"name": "short", "dimensions": dimensions, "deployments": deployments}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    for name, lora in (("changes", changes), ("weights", None)):
        strategy = {"init": {"depth": 0.6}, "distillation": {"lora": lora}, "finishing": learned}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(strategy))

    def request(name: str, **more: Any) -> SearchRequest:
        return SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            teacher=str(tmp_path / "teacher"),
            data=str(tmp_path / "text"),
            space=str(tmp_path / "space.yaml"),
            baseline=(str(tmp_path / "changes.yaml"), str(tmp_path / "weights.yaml")),
            trials=3,
            tokens=4608,
            step_tokens=512,
            runs=tmp_path / "runs",
            name=name,
            cache=tmp_path / "cache",
            **more,
        )

    outcome = search(request("together", ray_address=cluster.address, cpus_per_trial=2))
    plan = outcome.document["plan"]
    assert (plan["processes"], plan["micro_batch"], plan["optimizer_state"]) == (2, 1, "int8")
    assert outcome.finish.best.feasible
    trained = [row for row in outcome.rows if row.full and row.kind in ("student", "baseline")]
    assert {row.kind for row in trained} == {"student", "baseline"}

    run_trials(monkeypatch, request("alone", runner="inline"))
    together, alone = (EventLog(tmp_path / "runs" / name / "trials.jsonl").read() for name in ("together", "alone"))
    assert not [event for event in together if event["event"] == "retry" or event.get("status") == Status.FAILED]
    # Some trials resumed from a checkpoint of both processes.
    assert [event for event in together if event["event"] == "rung" and event["trained"] < event["tokens"]]
    strategies, expected = (
        {event["trial"]: event["strategy_id"] for event in events if event["event"] == "trial"}
        for events in (together, alone)
    )
    losses, aims = (
        {
            (event["trial"], event["rung"]): [step["loss"] for step in event["steps"]]
            for event in events
            if event["event"] == "rung"
        }
        for events in (together, alone)
    )
    common = [one for one in aims if one in losses and strategies[one[0]] == expected[one[0]]]
    assert {trial for trial, _ in common} > {"b000", "b001"}
    for segment in common:
        # Processes sum in another order, partly in bfloat16, and round states in other blocks.
        assert losses[segment] == pytest.approx(aims[segment], rel=5e-3)

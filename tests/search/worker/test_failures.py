"""Causes of failures, recognised by the errors that libraries raise; and a search whose disk is full for a while."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from autodistill.distillation.training import checkpoint
from autodistill.errors import AutoDistillError, InputError, TrialFailedError
from autodistill.hardware.budget import Budget
from autodistill.hardware.process_memory import killed_for_memory
from autodistill.inference.outputs import TeacherReference
from autodistill.runs.results.row import Status
from autodistill.runs.run_log import RunLog
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.search.worker.failures import KILLED, RETRIED, death, explained
from autodistill.search.worker.trial import Trial
from autodistill.search.workplace import disk_faults
from autodistill.testing import save_tiny_teacher, tiny_text


@contextmanager
def files_of(most: int) -> Iterator[None]:
    """Limit all files to so many bytes, as on a full disk or with a full quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def raised(work: Any) -> TrialFailedError:
    try:
        work()
    except Exception as error:
        return explained(error)
    pytest.fail("nothing was raised")


def test_a_full_disk_is_known_whoever_writes(tmp_path: Path) -> None:
    with files_of(1000):
        by_safetensors = raised(lambda: save_file({"a": torch.zeros(10**4)}, tmp_path / "a"))
        by_python = raised(lambda: (tmp_path / "b").write_bytes(bytes(10**4)))
    assert by_safetensors.cause == by_python.cause == "disk-full"
    assert raised(lambda: Path("/dev/full").write_bytes(b"text")).cause == "disk-full"
    assert raised(lambda: Path("/nowhere/at/all").read_text()).cause == "error"


def test_out_of_memory_is_known() -> None:
    assert raised(lambda: torch.empty(2**60)).cause == "out-of-memory"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TrialFailedError("nan", "loss was not finite"), "nan"),
        (InputError("the cache lacks temperature 3"), "refused"),
        (ValueError("so"), "error"),
        (OSError(errno.EIO, "disk broken"), "error"),
        (MemoryError(), "out-of-memory"),
    ],
)
def test_each_error_has_a_cause(error: Exception, cause: str) -> None:
    found = explained(error)
    assert found.cause == cause
    assert str(found)
    assert (cause in RETRIED) == (cause == "error")


SPACE = """
dimensions:
  distillation.learning_rate: {low: 1e-4, high: 1e-2, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [logit_kd]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    teacher = save_tiny_teacher(folder / "teacher", layers=5)
    (folder / "space.yaml").write_text(SPACE)
    return teacher, tiny_text(folder / "text", documents=30, sentences=24), folder / "cache"


@pytest.mark.slow
def test_a_disk_that_is_full_while_students_are_saved_costs_one_trial_at_most(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first student cannot be written at first, and the second not at all."""
    teacher, text, cache = inputs
    asked = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=str(teacher),
        data=str(text),
        space=str(teacher.with_name("space.yaml")),
        trials=2,
        tokens=1024,
        runner="inline",
        runs=tmp_path,
        name="run",
        cache=cache,
    )
    tried: list[str] = []
    real = Trial._save_student

    def saving(self: Any, *given: Any) -> None:
        tried.append(self._task.id)
        found = list(dict.fromkeys(tried))
        room = {0: len(tried) > 1, 1: False}.get(found.index(self._task.id), True)
        with files_of(10**9 if room else 10**4):
            real(self, *given)

    monkeypatch.setattr(Trial, "_save_student", saving)
    outcome = search(asked)
    events = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    first, second = list(dict.fromkeys(tried))[:2]
    retried = [(event["trial"], event["cause"]) for event in events if event["event"] == "retry"]
    assert retried == [(first, "disk-full"), (second, "disk-full")]
    ends = {event["trial"]: event["status"] for event in events if event["event"] == "status"}
    assert (ends[first], ends[second]) == (Status.COMPLETED, Status.FAILED)
    assert [failure["trial"] for failure in outcome.document["failed"]] == [second]
    assert outcome.finish.best.trial != second
    left = (tmp_path / "run").rglob("*partial*")
    assert not [path for path in left if path.is_file() or any(path.iterdir())]


def test_a_disk_that_is_full_before_the_first_trial_or_read_only_after_it_ends_the_search_with_how_to_go_on(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, text, cache = inputs
    asked = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        teacher=str(teacher),
        data=str(text),
        space=str(teacher.with_name("space.yaml")),
        strategy="logit_kd",
        tokens=1024,
        runner="inline",
        runs=tmp_path,
        name="run",
        cache=cache,
    )

    def saving(self: TeacherReference, path: Path) -> None:
        with files_of(10**4):
            save(self, path)

    save = TeacherReference.save
    with monkeypatch.context() as patch:
        patch.setattr(TeacherReference, "save", saving)
        with pytest.raises(AutoDistillError, match=r"File too large\): make room in .*; every finished .* --resume$"):
            search(asked)

    def read_only(self: RunLog, event: dict[str, Any]) -> None:
        if event["event"] == "rung":
            raise OSError(errno.EROFS, "Read-only file system")
        append(self, event)

    append = RunLog.append
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "append", read_only)
        with pytest.raises(AutoDistillError, match=r"^a disk failed \(Read-only file system\): check .* To go on: "):
            search(replace(asked, resume=True))
    assert search(replace(asked, resume=True)).finish.best.trial == "b000"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
    ],
)
def test_a_disk_that_fails_is_said_in_one_line_with_how_to_go_on(error: Exception) -> None:
    said = (
        r"^a disk failed \(.*(Input/output error|Read-only file system).*\): check the disk of runs; to go on: again$"
    )
    with pytest.raises(AutoDistillError, match=said), disk_faults("runs", lambda: "; to go on: again"):
        raise error


def test_what_is_no_fault_of_a_disk_is_not_called_so() -> None:
    with pytest.raises(FileNotFoundError), disk_faults("runs", lambda: ""):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "stable.safetensors"
    checkpoint.write_checkpoint(path, {"a": torch.ones(10)}, {"tokens": "1"})
    before = path.read_bytes()
    with files_of(1000), pytest.raises(Exception, match="os error"):
        checkpoint.write_checkpoint(path, {"a": torch.ones(10**4)}, {"tokens": "2"})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("said", "kills", "cause"),
    [
        ("The actor died unexpectedly before finishing this task.", 0, "worker-died"),
        ("The actor died unexpectedly before finishing this task.", 1, KILLED),
        (
            "ray.exceptions.OutOfMemoryError: Memory on the node (IP: 10.0.0.1) was 30.5GB / 32.0GB (0.953), which "
            "exceeds the memory usage threshold of 0.95. Ray killed this worker",
            0,
            KILLED,
        ),
        # Ray gives this list of potential causes whenever a connection ends, so it proves nothing.
        ("(1) The process is killed by SIGKILL by OOM killer due to high memory usage.", 0, "worker-died"),
    ],
)
def test_a_worker_that_was_ended_for_want_of_memory_is_known_by_who_ended_it(said: str, kills: int, cause: str) -> None:
    assert death(said, kills)[0] == cause
    assert cause in RETRIED
    assert killed_for_memory() >= 0

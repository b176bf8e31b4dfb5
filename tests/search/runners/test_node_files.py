"""The files that trials read are sent once, and found on another machine under other paths."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import AutoDistillError
from autodistill.runs.students import has_student, send_student, trained_student
from autodistill.search.runners import node_files as supplies
from autodistill.search.runners.node_files import absolute, fetch, hold_copy, send
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.strategy import Init
from autodistill.utils.storage import Storage


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialSetting:
    """Return a setting with relative paths, as a user types them."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "data", "cache", "small"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "file").write_text(name)
    (tmp_path / "reference.npz").write_bytes(b"kept")
    others: dict[str, Any] = dict.fromkeys(
        ("teacher_spec", "teacher_accuracy", "budget", "plan", "metric", "direction")
    )
    return TrialSetting(
        teacher=Path("teacher"),
        data=Path("data"),
        cache=Path("cache"),
        teacher_reference=Path("reference.npz"),
        checkpoints=Path("checkpoints"),
        pretrained={"some/model": Path("small")},
        renderings={"some/model": "own"},
        evaluators=(),
        device="cpu",
        **others,
    )


def test_another_machine_reads_copies(setting: TrialSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"file://{tmp_path}/shared")
    sent = send(setting, storage, 10**9)
    before = storage.list()
    send(setting, storage, 10**9)
    assert storage.list() == before
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir("/")
    found = fetch(sent)
    paths = {
        "teacher": found.teacher,
        "data": found.data,
        "cache": found.cache,
        "small": found.pretrained["some/model"],
    }
    for name, path in paths.items():
        assert path is not None
        assert path.is_relative_to(tmp_path / "home")
        assert (path / "below" / "file").read_text() == name
    assert found.teacher_reference.read_bytes() == b"kept"
    own = Init(source="pretrained", model="some/model", depth=1.0)
    assert found.text(own).is_relative_to(found.data)
    assert found.text(Init()) == found.teacher
    assert found.calibration is None
    assert found.checkpoints.is_relative_to(tmp_path / "home")


def test_what_changed_is_sent_anew(setting: TrialSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"file://{tmp_path}/shared")
    send(setting, storage, 10**9)
    (tmp_path / "data" / "below" / "file").write_text("longer data")
    sent = send(setting, storage, 10**9)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (fetch(sent).data / "below" / "file").read_text() == "longer data"


def hold(storage: Storage, name: str, told: Connection) -> None:
    """Fetch a folder as another process, report its path, and hold the copy until the process is killed."""
    told.send(storage.fetch_folder(name, hold_copy(storage, name)))
    signal.pause()


def test_a_nodes_copies_are_collected_under_the_limit_but_for_those_in_use(
    setting: TrialSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies belong to other processes. The one unused for longest goes first; a copy in use is never removed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    storage = Storage(f"file://{tmp_path}/shared")
    (tmp_path / "big").write_bytes(bytes(1000))
    copies: dict[str, Path] = {}
    others: dict[str, ForkProcess] = {}
    forks = get_context("fork")  # a forked process need not import anything
    for name in ("held", "old", "new"):
        storage.send_folder(tmp_path / "big", name)
        here, there = forks.Pipe()
        others[name] = forks.Process(target=hold, args=(storage, name, there), daemon=True)
        others[name].start()
        copies[name] = here.recv()

    def left() -> set[str]:
        return {name for name, copy in copies.items() if copy.exists()}

    def end(name: str) -> None:
        others[name].kill()
        others[name].join()

    for name in ("old", "new"):
        end(name)
    partial = copies["old"].with_name(".fetch-killed")
    partial.mkdir()
    os.utime(partial, (0, 0))
    found = fetch(send(setting, storage, 2200))  # room for two of the copies and the few bytes that are fetched
    assert left() == {"held", "new"}
    assert not partial.exists()
    fetch(send(setting, storage, 1))
    assert left() == {"held"}
    assert (found.teacher / "below" / "file").read_text() == "teacher"
    end("held")
    fetch(send(setting, storage, 1))
    assert left() == set()
    assert (storage.fetch_folder("held", copies["held"]) / "big").read_bytes() == bytes(1000)


def test_without_a_storage_paths_are_those_of_this_machine(setting: TrialSetting, tmp_path: Path) -> None:
    found = absolute(setting)
    os.chdir("/")
    assert fetch(found).teacher == tmp_path / "teacher"
    assert found.pretrained == {"some/model": tmp_path / "small"}


def test_a_student_is_found_where_another_node_trained_it(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/shared")
    trial = tmp_path / "here" / "t001"
    assert not has_student(trial, storage)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    storage.send_folder(tmp_path / "there", "students/t001")
    assert has_student(trial, storage)
    assert not has_student(trial, None)
    assert (trained_student(trial, storage) / "config.json").read_text() == "{}"


def test_of_a_trial_that_was_tried_again_the_second_student_is_found_on_every_node(tmp_path: Path) -> None:
    """A node sent its first student and died evaluating it. Another node had already fetched that student."""
    storage = Storage(f"file://{tmp_path}/shared")
    first, other, driver = (tmp_path / name / "t001x" for name in ("first", "other", "driver"))

    def train(trial: Path, weights: str) -> None:
        (trial / "student").mkdir(parents=True)
        (trial / "student" / "weights").write_text(weights)
        send_student(trial, storage)

    def read(trial: Path) -> str:
        return (trained_student(trial, storage) / "weights").read_text()

    train(first, "of 400 tokens")
    assert read(driver) == "of 400 tokens"
    train(other, "of 380 tokens")
    for trial in (first, other, driver, tmp_path / "late" / "t001x"):
        assert read(trial) == "of 380 tokens"


def test_a_storage_that_fails_for_a_moment_is_asked_again(
    setting: TrialSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = send(setting, Storage(f"file://{tmp_path}/shared"), 10**9)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read, waits, failing = Storage.read, [], [True, True]

    def flaky(self: Storage, key: str) -> bytes:
        if failing and failing.pop():
            raise OSError("AWS Error NETWORK_CONNECTION")
        return read(self, key)

    monkeypatch.setattr(Storage, "read", flaky)
    monkeypatch.setattr(supplies.time, "sleep", waits.append)
    assert fetch(sent).teacher.is_dir()
    assert waits == [1.0, 4.0]
    failing += [True] * 5
    with pytest.raises(OSError, match=r"could not be fetched from file://\S*shared: AWS Error NETWORK_CONNECTION"):
        fetch(sent)
    assert sum(waits[2:]) == 60.0


def test_what_cannot_be_sent_is_told_in_one_line(
    setting: TrialSetting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Storage, folder: Path, key: str) -> None:
        raise OSError("ACCESS_DENIED")

    monkeypatch.setattr(Storage, "send_folder", refuse)
    with pytest.raises(AutoDistillError, match=r"could not be sent to file://\S*shared \(ACCESS_DENIED\).*--resume"):
        send(setting, Storage(f"file://{tmp_path}/shared"), 10**9)

"""Everything that a search relies on is synced to disk, names and data, before it continues."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.errors import InputError
from autodistill.export.huggingface import HuggingFaceExporter
from autodistill.inference.outputs import TeacherReference
from autodistill.runs.checkpoints import open_stages
from autodistill.runs.run_folder import RunFolder
from autodistill.strategy.deployment import IN_16_BITS
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.durable import make_folder, put
from autodistill.utils.event_log import EventLog
from autodistill.utils.json_files import write_json
from autodistill.utils.storage import Storage
from tests.crash.disk import Disk
from tests.crash.kernel import Call, watched, why_not

Work = Callable[[Path], object]


def lost(work: Work, folder: Path) -> list[str]:
    """Return the files of a folder that are gone or have other bytes if power fails right after some work below it."""
    folder.mkdir(exist_ok=True)
    disk = Disk()

    def see(call: Call) -> int:
        disk.apply(call)
        return 0

    ended = watched(lambda: work(folder) and None, folder.resolve(), see, seconds=60)
    assert ended.code == 0
    written, left = disk.after("killed"), disk.after("synced")
    real = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    assert written.keys() == real.keys()
    assert all(kept is None or kept.data == real[path].read_bytes() for path, kept in written.items())
    gone = [path for path, kept in written.items() if path not in left or (kept and kept.data != left[path].data)]
    return sorted(path for path in gone if not path.endswith("lock"))


def stage(folder: Path) -> None:
    open_stages(folder / "checkpoints").save("a" * 16, 512, lambda path: path.write_bytes(b"weights") and None)


def calibration(folder: Path) -> None:
    ones = torch.ones(2, 2)
    PartImportance(similarity=ones, neurons=ones.clone(), groups=ones.clone(), channels=ones[0].clone()).save(
        folder / "c"
    )


def reference(folder: Path) -> None:
    ids = np.arange(4, dtype=np.int32)
    TeacherReference(top1=ids, tokens=ids, log_probs=np.zeros((4, 2), dtype=np.float16)).save(folder / "r.npz")


def run_folder(folder: Path) -> None:
    with RunFolder.create(folder / "runs" / "of" / "mine", "run") as run:
        write_json(run.search_file, {"name": "run"})
        run.events.append({"event": "session"})
        EventLog(folder / "runs" / "ledger.jsonl").append({"run": "run"})


def stored(folder: Path) -> None:
    storage = Storage(f"file://{folder}/store")
    storage.write("events/1.json", b"{}")
    (folder / "local").write_bytes(b"local")
    storage.put(folder / "local", "a/file")
    (folder / "local").unlink()
    storage.get("a/file", folder / "copies" / "file")


@pytest.mark.parametrize("work", [stage, calibration, reference, run_folder, stored])
def test_what_was_written_outlives_a_power_failure(work: Work, tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    assert lost(work, tmp_path / "disk") == []


def test_prepared_data_and_an_exported_student_outlive_a_power_failure(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    teacher, text = save_tiny_teacher(tmp_path / "teacher", layers=2), tiny_text(tmp_path / "text")

    def prepared(folder: Path) -> None:
        prepare(resolve_data(str(text)), teacher, "tokenizer", 32, folder / "data")

    def exported(folder: Path) -> None:
        HuggingFaceExporter().export(teacher, IN_16_BITS, folder / "student" / "huggingface")

    assert lost(prepared, tmp_path / "one") == []
    assert lost(exported, tmp_path / "two") == []


def test_a_name_comes_after_the_data(tmp_path: Path) -> None:
    """After a crash at any call, under every model, the file is the whole old one or the whole new one."""
    if why := why_not():
        pytest.skip(why)
    folder, calls = tmp_path / "disk", []
    folder.mkdir()

    def work() -> None:
        for text in (b"old", b"newer"):
            (folder / "partial").write_bytes(text)
            put(folder / "partial", folder / "file")

    watched(work, folder.resolve(), lambda call: calls.append(call) or 0, seconds=60)
    for model in ("killed", "synced", "names", "zeros"):
        disk, seen = Disk(), []
        for call in calls:
            disk.apply(call)
            seen.append(kept.data if (kept := disk.after(model).get("file")) else b"")
        assert [*dict.fromkeys(seen)] == [b"", b"old", b"newer"]


def test_a_folder_that_cannot_be_synced_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(InputError, match=r"cannot write into .*: Input/output error"):
        RunFolder.create(tmp_path / "runs", "run")


def test_folders_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "file").touch()
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "file").exists()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a" / "b" / "file")

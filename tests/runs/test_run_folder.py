"""The run folder and its lock: names, who holds it, and what remains of a run that ended early."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.runs.run_folder import RunFolder, known_runs
from autodistill.utils.json_files import write_json


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "..", "a b", "-x", "a\n", "é", "x" * 101, "a\x00"])
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    for make in (RunFolder.create, RunFolder.open):
        with pytest.raises(InputError, match="plain run name"):
            make(tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_run_is_created_once_and_opened_again(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "out", "run-1.a") as run:
        write_json(run.search_file, {})
        assert run.path == tmp_path / "out" / "run-1.a"
        assert run.student("gguf") == run.path / "student" / "gguf"
    with pytest.raises(InputError, match="--resume"):
        RunFolder.create(tmp_path / "out", "run-1.a")
    with RunFolder.open(tmp_path / "out", "run-1.a", lock=True) as again:
        assert again.events.read() == []
    assert known_runs(tmp_path / "out") == ["run-1.a"]


def test_an_unknown_run_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs"):
        RunFolder.open(tmp_path / "nowhere", "x")
    for name in ("b", "a"):
        with RunFolder.create(tmp_path, name) as run:
            write_json(run.search_file, {})
    with pytest.raises(InputError, match=r"no run 'x' in .* a, b\Z"):
        RunFolder.open(tmp_path, "x")


def test_a_folder_that_is_no_run_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("mine", "file"):
        with pytest.raises(InputError, match="not a run"):
            RunFolder.create(tmp_path, name)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_that_was_killed_before_its_search_file_can_be_made_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "run").close()
    RunFolder.create(tmp_path, "run").close()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write into .*file.*--runs"):
        RunFolder.create(tmp_path / "file" / "out", "run")
    with pytest.raises(InputError, match="cannot write into"):
        write_json(tmp_path / "file" / "search.json", {})


def test_two_processes_cannot_hold_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from autodistill.utils.json_files import write_json\n"
        "from autodistill.runs.run_folder import RunFolder\n"
        "run = RunFolder.create(Path(sys.argv[1]), 'run'); write_json(run.search_file, {})\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"process {holder.pid}\b"):
            RunFolder.open(tmp_path, "run", lock=True)
        assert RunFolder.open(tmp_path, "run").events.read() == [], "reading needs no lock"
        holder.send_signal(signal.SIGKILL)
    RunFolder.open(tmp_path, "run", lock=True).close()


def test_a_holder_on_another_host_is_named_with_it(tmp_path):
    """On a shared disk, another host may hold a run. The lock names that host."""
    with RunFolder.create(tmp_path, "run") as holder:
        write_json(holder.search_file, {})
        (tmp_path / "run" / "lock").write_text("4321 node-7\n")
        with pytest.raises(
            InputError, match=r"process 4321 on node-7: wait for it, or stop it on node-7 \(kill 4321\)"
        ):
            RunFolder.open(tmp_path, "run", lock=True)
        (tmp_path / "run" / "lock").write_text(f"{os.getpid()} {socket.gethostname()}\n")
        with pytest.raises(InputError) as caught:
            RunFolder.open(tmp_path, "run", lock=True)
    assert f"process {os.getpid()}: wait" in str(caught.value)
    assert "--resume" in str(caught.value)


def test_default_names_that_collide_differ(tmp_path):
    runs: list[RunFolder] = []
    with contextlib.ExitStack() as stack:
        threads = [
            threading.Thread(target=lambda: runs.append(stack.enter_context(RunFolder.create_free(tmp_path, "s"))))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {run.name for run in runs} == {"s", *(f"s-{number}" for number in range(2, 11))}
        write_json(runs[0].search_file, {})
    with RunFolder.create_free(tmp_path, runs[0].name) as other:  # also if that run has ended
        assert other.name not in (runs[0].name, "")


def test_a_run_that_ended_before_anything_was_planned_leaves_nothing(tmp_path):
    with RunFolder.create(tmp_path, "early") as run:
        (run.path / ".search.77.json").write_text("{")  # left by a kill while it was written
        run.discard()
    assert not run.path.exists()
    with RunFolder.create(tmp_path, "planned") as run:
        write_json(run.search_file, {})
        run.discard()
    assert run.search_file.exists()
    with RunFolder.create(tmp_path, "mine") as run:
        (run.path / "notes.txt").write_text("mine")
        run.discard()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_disk_that_became_read_only_before_anything_was_planned_leaves_the_name_free(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with RunFolder.create(tmp_path, "early") as run, monkeypatch.context() as disk:
        disk.setattr(os, "unlink", read_only)
        disk.setattr(os, "rmdir", read_only)
        run.discard()
        assert [*run.path.iterdir()]
    with RunFolder.create(tmp_path, "early") as run:
        run.discard()
    assert not run.path.exists()


def test_a_name_whose_run_was_killed_before_anything_was_planned_is_free(tmp_path):
    RunFolder.create(tmp_path, "run").close()
    (tmp_path / "run" / ".search.4711.json").write_text("{")
    RunFolder.create(tmp_path, "run").close()

"""A board over ssh, which is this machine's own loopback, and the message if it cannot be reached."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError, RemoteError
from autodistill.runtimes.llama_bench import Bench
from autodistill.runtimes.ssh import Board, parse_board, run_on


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "student.gguf"
    path.write_bytes(bytes(range(256)) * 5000)
    return path


def test_a_script_runs_there_with_the_file_and_nothing_stays(board: Board, student: Path) -> None:
    script = 'echo "$0 $2"; wc -c < "$1"; cksum < "$1"; dirname "$1"; exit 3'
    printed, left = run_on(board, script, student, "a path/with blanks", 60)
    assert left is None
    said = printed.splitlines()
    assert said[0] == "sh a path/with blanks"
    assert int(said[1]) == 256 * 5000
    local = subprocess.run(["cksum"], input=student.read_bytes(), capture_output=True, check=True)
    assert said[2] == local.stdout.decode().strip()
    assert "autodistill." in said[3]
    assert not Path(said[3]).exists()


def test_a_board_that_takes_too_long_is_given_up(board: Board, student: Path) -> None:
    with pytest.raises(RemoteError, match="took longer than 3 s: raise --timeout"):
        run_on(board, "sleep 30", student, None, 3)


def test_a_measurement_outlives_a_folder_that_cannot_be_removed(
    near: Board, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_on(near, "echo found", student, None, 60) == ("found\n", None)
    assert list((tmp_path / "there").iterdir()) == []
    monkeypatch.setenv("LOST", "rm -rf")
    said, left = run_on(near, "echo found", student, None, 60)
    (folder,) = (tmp_path / "there").iterdir()
    assert said == "found\n"
    assert left is not None
    assert left.startswith(f"{folder} may still be on the board")
    assert "ssh://near cannot be reached" in left
    # If there are two failures, the first is reported.
    with pytest.raises(RemoteError, match="took longer than 1 s: raise --timeout"):
        run_on(near, "sleep 3", student, None, 1)


def test_a_bench_that_is_given_up_is_ended_there(near: Board, student: Path, tmp_path: Path) -> None:
    note, bench = tmp_path / "note", tmp_path / "llama-bench"
    bench.write_text(f"#!/bin/sh\necho $PPID $$ > {note}\nexec sleep 600\n", encoding="utf-8")
    bench.chmod(0o755)
    script = Bench(student="abc", student_bytes=student.stat().st_size, threads=1).script()
    with pytest.raises(RemoteError, match="took longer than 2 s"):
        run_on(near, script, student, str(bench), 2)
    still = [process for process in map(int, note.read_text().split()) if _runs(process)]
    for process in still:
        os.kill(process, 9)
    assert not still
    assert list((tmp_path / "there").iterdir()) == []


def _runs(process: int) -> bool:
    """Return whether a process still runs after ten seconds. One that has ended but was not waited for does not run."""
    for _ in range(200):
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.05)
    return True


def test_a_wrong_key_a_strange_host_and_a_closed_port_are_told_apart(
    board: Board, student: Path, tmp_path: Path
) -> None:
    assert board.config is not None
    strange = tmp_path / "strange"
    strange.write_text(board.config.read_text().replace(str(board.config.parent / "known"), "/dev/null"))
    for wrong, said in (
        (replace(board, config=board.config.with_name("wrong")), "Permission denied.*ssh-copy-id"),
        (replace(board, config=strange), "Host key verification failed.*connect to it once by hand"),
        (replace(board, port=1), "Connection refused.*check the port"),
    ):
        with pytest.raises(RemoteError, match=f"ssh://127.0.0.1:\\d+ cannot be reached .*{said}"):
            run_on(wrong, "true", student, None, 60)


def test_a_name_that_nothing_has_is_said_so(student: Path) -> None:
    if not shutil.which("ssh"):
        pytest.skip("OpenSSH's client is not installed")
    with pytest.raises(RemoteError, match=r"ssh://nobody\.invalid cannot be reached"):
        run_on(Board(host="nobody.invalid"), "true", student, None, 60)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ssh://pi", ("pi", None, None)),
        ("ssh://me@raspberrypi.local:2222", ("raspberrypi.local", "me", 2222)),
        ("ssh://root@[fe80::1]:22", ("fe80::1", "root", 22)),
        ("ssh://10.0.0.7/", ("10.0.0.7", None, None)),
    ],
)
def test_a_board_is_read_and_written(text: str, parts: tuple[object, ...]) -> None:
    found = parse_board(text)
    assert (found.host, found.user, found.port) == parts
    assert found.name == text.rstrip("/")
    words = found.command("true")
    assert words[words.index("--") + 1 :] == [f"{found.user}@{found.host}" if found.user else found.host, "true"]


@pytest.mark.parametrize(
    "text",
    ["", "pi", "http://pi", "ssh://", "ssh://-oProxyCommand=x", "ssh://a@-x@b", "ssh://pi:0", "ssh://pi:99999",
     "ssh://u:secret@pi", "ssh://pi/home", "ssh://pi?x", "ssh://a b", "ssh://-x@pi", "ssh://pi:22a", "ssh://[::1"],
)  # fmt: skip
def test_what_is_no_board_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"like ssh://pi@raspberrypi\.local"):
        parse_board(text)


@given(st.text(max_size=30).map(lambda text: f"ssh://{text}") | st.text(max_size=30))
def test_any_text_is_a_board_or_is_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        found = parse_board(text)
        target = found.command("true")[-2]
        assert not target.startswith("-")
        assert not set(target) & set(" \t\n'\"`$;&|")


def test_settings_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*none of ssh's settings"):
        parse_board("ssh://pi", tmp_path / "none")

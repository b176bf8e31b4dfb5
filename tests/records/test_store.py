"""The event log after a kill at any byte, the run folder and its lock."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.errors import AutoDistillError, InputError
from autodistill.records import store
from autodistill.records.store import EventLog, RunFolder, known_runs, read_json, write_json

EVENTS = [
    {"event": "plan", "tokens": 4096},
    {"event": "row", "row": {"accuracy": 0.25, "name": "ü |\n"}},
    {"event": "status", "trial": "t001", "nested": {"a": [1, {"b": None}]}},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_every_truncation_is_read_and_appended_to(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "trials.jsonl")
    for event in EVENTS:
        log.append(event)
    whole = log.path.read_bytes()
    # A line counts as soon as its closing brace is there, with or without the newline after it.
    braces = [index for index, byte in enumerate(whole) if whole[index + 1 : index + 2] == b"\n" and byte == ord("}")]
    assert len(braces) == len(EVENTS)
    for cut in range(len(whole) + 1):
        torn = EventLog(tmp_path / "torn.jsonl")
        torn.path.write_bytes(whole[:cut])
        kept = EVENTS[: sum(cut > brace for brace in braces)]
        assert torn.read() == kept
        assert torn.path.read_bytes() == whole[:cut], "reading must not write"
        torn.append({"event": "next", "cut": cut})
        assert torn.read() == [*kept, {"event": "next", "cut": cut}]
        lines = torn.path.read_text(encoding="utf-8").split("\n")
        assert [json.loads(line) for line in lines[:-1]] == [*kept, {"event": "next", "cut": cut}]
        assert lines[-1] == ""


def test_a_writer_killed_in_mid_work_leaves_only_whole_events(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "trials.jsonl")
    code = (
        "import sys; from pathlib import Path; from autodistill.records.store import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for n in range(10**9):\n"
        "    log.append({'n': n, 'filler': 'x' * 5000})\n"
        "    n == 20 and print('ready', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, log.path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        writer.send_signal(signal.SIGKILL)
    numbers = [event["n"] for event in log.read()]
    assert len(numbers) > 20
    assert numbers == list(range(len(numbers)))
    log.append({"n": -1})
    assert log.read()[-1] == {"n": -1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=3))
def test_events_read_back_as_written(events: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "log.jsonl")
        for event in events:
            log.append(event)
        assert log.read() == events
        assert not events or log.path.read_bytes().count(b"\n") == len(events)


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    log.append({"row": {"loss": math.nan, "steps": [1.0, math.inf, -math.inf]}, "fine": 1.5})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(log.path.read_text(), parse_constant=refuse) == {
        "row": {"loss": None, "steps": [1.0, None, None]},
        "fine": 1.5,
        "non_finite": {"row.loss": "nan", "row.steps.1": "inf", "row.steps.2": "-inf"},
    }


def test_keys_that_would_not_read_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="7"):
        EventLog(tmp_path / "log.jsonl").append({"layers": {7: 1}})


@pytest.mark.parametrize("line", [b"{torn", b"[1]", b"", b'"text"', b"\xff\xfe"])
def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(InputError, match=r"line 2 of .*trials\.jsonl is corrupt"):
        EventLog(path).read()


def test_a_short_write_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "trials.jsonl")
    log.append({"a": 1})
    write = os.write
    monkeypatch.setattr(store.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(AutoDistillError, match="No space left"):
        log.append({"b": 2})
    monkeypatch.undo()
    assert log.path.read_bytes() == b'{"a":1}\n'


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with contextlib.suppress(RuntimeError), store.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_json_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(InputError, match=r"search\.json"):
        read_json(tmp_path / "search.json")


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
    with pytest.raises(InputError, match=r"cannot write into .*file.*--out"):
        RunFolder.create(tmp_path / "file" / "out", "run")
    with pytest.raises(InputError, match="cannot write into"):
        write_json(tmp_path / "file" / "search.json", {})


def test_two_processes_cannot_hold_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from autodistill.records.store import RunFolder, write_json\n"
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
    """Over a shared disk a run may be held from elsewhere; its lock says from where."""
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
    with RunFolder.create_free(tmp_path, runs[0].name) as other:  # also beside one that has ended
        assert other.name not in (runs[0].name, "")


def test_a_run_that_ended_before_anything_was_planned_leaves_nothing(tmp_path):
    with RunFolder.create(tmp_path, "early") as run:
        (run.path / ".search.77.json").write_text("{")  # of a kill while it was written
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


def test_a_name_whose_run_was_killed_before_anything_was_planned_is_free(tmp_path):
    RunFolder.create(tmp_path, "run").close()
    (tmp_path / "run" / ".search.4711.json").write_text("{")
    RunFolder.create(tmp_path, "run").close()


def test_one_at_a_time_makes_what_others_find(tmp_path):
    made, inside = [], []

    def make():
        with store.alone(tmp_path / "folder" / "thing"):
            inside.append(1)
            assert len(inside) == 1
            if not (tmp_path / "folder" / "thing").exists():
                made.append(1)
                (tmp_path / "folder" / "thing").write_text("whole")
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert inside == []
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thing"]
    with pytest.raises(KeyError), store.alone(tmp_path / "folder" / "thing"):
        raise KeyError
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thing"]

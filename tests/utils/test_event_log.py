"""The event log after a kill at any byte."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.errors import AutoDistillError, InputError
from autodistill.utils import event_log
from autodistill.utils.event_log import EventLog

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
    # A line counts as soon as its closing brace exists, with or without the newline after it.
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
        "import sys; from pathlib import Path; from autodistill.utils.event_log import EventLog\n"
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


@pytest.mark.parametrize("line", [b"{torn", b"[1]", b"", b'"text"', b"\xff\xfe", b"[" * 99_999], ids=range(6))
def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    with pytest.raises(InputError, match=r"line 2 of .*trials\.jsonl is corrupt"):
        EventLog(path).read()


def test_a_short_write_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "trials.jsonl")
    log.append({"a": 1})
    write = os.write
    monkeypatch.setattr(event_log.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(AutoDistillError, match=r"No space left .* make room for it, and go on"):
        log.append({"b": 2})
    monkeypatch.undo()
    assert log.path.read_bytes() == b'{"a":1}\n'


def test_a_log_whose_disk_turned_read_only_does_not_ask_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(event_log.os, "open", read_only)
    with pytest.raises(AutoDistillError, match=r"Read-only file system; .*: look after its disk, and go on"):
        EventLog(tmp_path / "trials.jsonl").append({"a": 1})

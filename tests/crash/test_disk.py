"""The model of a disk against known small cases, and whether calls are seen as they are made."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.crash.disk import MODELS, Disk, states
from tests.crash.kernel import Call, watched, why_not
from tests.crash.whole import faults_of

NEW = os.O_CREAT | os.O_WRONLY


def call(name: str, path: str, **more: object) -> Call:
    return Call(name=name, path=path, **more)  # type: ignore[arg-type]


def after(*calls: Call) -> dict[str, dict[str, bytes | None]]:
    disk = Disk()
    for one in calls:
        disk.apply(one)
    return {model: {path: kept and kept.data for path, kept in disk.after(model).items()} for model in MODELS}


def test_data_and_names_are_synced_apart() -> None:
    begun = (call("create", "a", flags=NEW), call("write", "a", data=b"12"))
    assert after(*begun) == {"killed": {"a": b"12"}, "synced": {}, "names": {"a": b""}, "zeros": {"a": b"\0\0"}}
    assert after(*begun, call("sync", "a"))["synced"] == {}
    assert after(*begun, call("sync", ""))["synced"] == {"a": b""}
    both = (*begun, call("sync", "a"), call("sync", ""))
    more = after(*both, call("write", "a", data=b"345", offset=2))
    assert more == {
        "killed": {"a": b"12345"},
        "synced": {"a": b"12"},
        "names": {"a": b"12"},
        "zeros": {"a": b"12\0\0\0"},
    }


def test_a_rename_that_is_not_synced_may_not_have_been() -> None:
    both = [call("create", "a", flags=NEW), call("write", "a", data=b"1"), call("sync", "a"), call("sync", "")]
    moved = after(*both, call("rename", "a", other="b"))
    assert (moved["names"], moved["synced"]) == ({"b": b"1"}, {"a": b"1"})


def test_what_the_kernel_refuses_changes_nothing() -> None:
    made = [call("mkdir", "d"), call("create", "d/a", flags=NEW), call("mkdir", "e"), call("create", "e/b", flags=NEW)]
    refused = [call("rmdir", "d"), call("rename", "d", other="e"), call("unlink", "x"), call("mkdir", "x/y")]
    assert after(*made, *refused)["killed"] == {"d": None, "d/a": b"", "e": None, "e/b": b""}


def test_equal_states_count_once() -> None:
    calls = [call("create", "a", flags=NEW), call("unlink", "a"), call("create", "a", flags=NEW)]
    found = states(calls)
    # No file, and an empty file. The strict model allows only the first state.
    assert [(state.calls, state.prefixes) for state in found] == [(0, 10), (1, 6)]


def test_a_name_before_its_data_is_found_torn_and_a_name_after_them_is_not() -> None:
    written = [call("create", ".a", flags=NEW), call("write", ".a", data=b"1")]
    renamed = [call("rename", ".a", other="a"), call("sync", "")]
    said = [line.rpartition(": a is")[0] for line in faults_of([*written, *renamed])]
    assert said == ["names, after call 3 (rename .a)", "zeros, after call 3 (rename .a)"]
    assert [*faults_of([*written, call("sync", ".a"), *renamed])] == []


def test_calls_are_seen_failed_and_counted_in_whatever_library_makes_them(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    import pyarrow as pa
    import pyarrow.parquet as pq

    seen: list[Call] = []

    def decide(made: Call) -> int:
        seen.append(made)
        return errno.ENOSPC if made.path == "second.parquet" and made.name == "write" else 0

    def work() -> int:
        table = pa.table({"a": [1, 2, 3]})
        pq.write_table(table, tmp_path / "first.parquet")
        try:
            pq.write_table(table, tmp_path / "second.parquet")
        except OSError as error:
            return 7 if error.errno == errno.ENOSPC else 1
        return 0

    ended = watched(work, tmp_path.resolve(), decide, seconds=60)
    assert ended.code == 7
    disk = Disk()
    for made in seen:
        if made.path == "first.parquet":
            disk.apply(made)
    kept = disk.after("killed")["first.parquet"]
    assert kept is not None
    assert kept.data == (tmp_path / "first.parquet").read_bytes()
    assert not (tmp_path / "second.parquet").exists()  # pyarrow removes a file that it could not write

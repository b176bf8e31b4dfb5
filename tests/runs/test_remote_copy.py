"""A lease on a folder and on an S3 server: who is refused, what is taken over, and how its holder finds out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.errors import AutoDistillError, InputError
from autodistill.runs import remote_copy as module
from autodistill.runs.remote_copy import Lease, StoredLog, check_unheld
from autodistill.utils.storage import Storage


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.0)


def write(storage: Storage, **changes: object) -> None:
    """Write a lease as another machine would."""
    other = {"host": "elsewhere", "process": 7, "place": "another kernel", "born": 1.0, "token": "theirs", "beat": 1.0}
    storage.write("lease.json", json.dumps(other | changes).encode())


def test_a_run_is_held_by_one_and_free_again_afterwards(storage: Storage) -> None:
    with (
        Lease(storage),
        pytest.raises(InputError, match=rf"is held by process {os.getpid()} on \S+, last heard of .* ago"),
        Lease(storage),
    ):
        pass
    assert storage.list() == {}
    assert check_unheld(storage) is None
    with Lease(storage) as lease:
        lease.check()


def test_a_run_held_elsewhere_is_refused_with_its_holder_and_the_time_left(storage: Storage) -> None:
    write(storage)
    with pytest.raises(InputError, match=r"process 7 on elsewhere.*--resume.*may be taken over in (2m 00s|1m \d\ds)"):
        check_unheld(storage)


def test_one_that_is_not_heard_of_is_taken_over_whatever_its_clock_said(tmp_path: Path) -> None:
    """The age of a lease is that of its file, not the time that the other machine wrote."""
    storage = Storage(f"file://{tmp_path}/there")
    write(storage, beat=9e12)
    file = tmp_path / "there" / "lease.json"
    written = file.stat().st_mtime
    os.utime(file, (written - 110, written - 110))
    with pytest.raises(InputError, match="is held by process 7 on elsewhere"):
        check_unheld(storage)
    os.utime(file, (written - 130, written - 130))
    said: list[str] = []
    with Lease(storage, said.append):
        assert said == ["the run is taken over from process 7 on elsewhere, not heard of for 2m 00s or more"]


KILLED = """
import os, signal, sys
from autodistill.runs import remote_copy as lease
from autodistill.utils.storage import Storage
lease._SETTLE_SECONDS = 0.0
with lease.Lease(Storage(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_holder_of_this_machine_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/there")
    done = subprocess.run([sys.executable, "-c", KILLED, storage.uri], check=False)
    assert done.returncode == -9
    assert storage.has("lease.json")
    said: list[str] = []
    with Lease(storage, said.append):
        assert len(said) == 1
        assert said[0].endswith("which has ended")


def test_a_number_that_another_process_has_by_now_is_not_the_holder(storage: Storage) -> None:
    own = json.loads(json.dumps({name: getattr(module.Holder.here(), name) for name in ("host", "place", "born")}))
    write(storage, **own, process=os.getpid())
    with pytest.raises(InputError, match="is held by"):
        check_unheld(storage)
    write(storage, **(own | {"born": own["born"] - 100}), process=os.getpid())
    assert check_unheld(storage) is not None


def test_of_two_that_take_it_at_once_the_last_to_write_has_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: write(storage))
    with pytest.raises(InputError, match=r"process 7 on elsewhere took the run .* at the same moment"), Lease(storage):
        pass
    with pytest.raises(InputError, match="is held by process 7"):
        check_unheld(storage)


def test_one_that_was_overtaken_writes_nothing_more_and_leaves_the_lease_alone(
    storage: Storage, tmp_path: Path
) -> None:
    with Lease(storage) as lease:
        log = StoredLog(tmp_path / "log.jsonl", storage, lease.check)
        log.append({"event": "counted", "number": 1})
        lease.beat()
        log.append({"event": "counted", "number": 2})
        write(storage)
        lease.beat()
        with pytest.raises(AutoDistillError, match="was taken over by process 7 on elsewhere"):
            log.append({"event": "counted", "number": 3})
    assert json.loads(storage.read("lease.json"))["token"] == "theirs"
    log.sync()
    assert [event["number"] for event in log.read()] == [1, 2]


def test_a_beat_renews_the_lease_also_where_somebody_removed_it(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/there")
    file = tmp_path / "there" / "lease.json"
    with Lease(storage) as lease:
        os.utime(file, (0, 0))
        lease.beat()
        with pytest.raises(InputError, match="is held by"):
            check_unheld(storage)
        file.unlink()
        lease.beat()
        assert file.exists()


def test_a_damaged_lease_is_said(storage: Storage) -> None:
    storage.write("lease.json", b"{")
    with pytest.raises(InputError, match=r"lease\.json of .* cannot be read .*: remove it if no search runs"):
        check_unheld(storage)

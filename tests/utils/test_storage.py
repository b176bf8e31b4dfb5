"""Objects, folders, logs and copies behave the same on a local folder, an S3 server and one of Google's."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from pyarrow import fs

from autodistill.errors import InputError
from autodistill.runs.checkpoints import StoredFiles
from autodistill.runs.remote_copy import StoredLog, check_free, keep, pull
from autodistill.utils.event_log import EventLog
from autodistill.utils.storage import Storage, check_folder
from autodistill.utils.timeouts import calls_left


def test_objects_are_written_read_listed_and_removed(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    assert storage.list() == {}
    storage.write("a/one", b"12")
    storage.write("a/one", b"123")
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 40_000)  # more than one chunk
    storage.put(file, "b")
    assert storage.list() == {"a/one": 3, "b": 10_240_000}
    assert storage.list("a") == {"a/one": 3}
    assert storage.read_all(["a/one", "a/one"]) == [b"123", b"123"]
    storage.get("b", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == file.read_bytes()
    age = storage.age("b")
    assert age is not None
    assert 0 <= age < 600
    assert storage.age("none") is None
    assert storage.list() == {"a/one": 3, "b": 10_240_000}
    storage.remove("b")
    storage.remove("b")
    assert not storage.has("b")
    with pytest.raises(FileNotFoundError):
        storage.get("b", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert pickle.loads(pickle.dumps(storage.at("a"))).list() == {"one": 3}


def test_more_objects_than_google_lists_at_once_are_listed(gcs: str) -> None:
    storage = Storage(gcs).at("many")
    names = {f"{number:04d}" for number in range(1010)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write(name, b"x"), names))
    assert storage.list() == dict.fromkeys(names, 1)


class Unreadable:
    """A file on a disk that fails after two chunks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads = file, 0

    def __enter__(self) -> Unreadable:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        self._reads += 1
        if self._reads > 2:
            raise OSError("Input/output error")
        return self._file.read(size)


def test_a_file_that_cannot_be_read_to_its_end_becomes_no_object(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a stream is closed in the middle, the clients of object stores make an object of what they have."""
    file, opened = tmp_path / "file", Path.open
    file.write_bytes(bytes(20_000_000))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *given: Unreadable(opened(self, *given)))
        with pytest.raises(OSError, match="Input/output error"):
            storage.put(file, "key")
    assert storage.list() == {}
    with pytest.raises(FileNotFoundError):
        storage.put(tmp_path / "none", "key")
    assert storage.list() == {}


@pytest.mark.parametrize("whole", [True, False])
def test_what_an_interrupt_meets_while_it_is_sent_is_sent_whole_or_not_at_all(
    bucket: str, tmp_path: Path, whole: bool
) -> None:
    """Dropping a client's stream publishes what it has so far. Here a process ends and drops it, as a command does."""
    storage, pipe = Storage(bucket).at(f"interrupted-{whole}"), tmp_path / "pipe"
    os.mkfifo(pipe)
    program = """
import os, signal, sys, time
from pathlib import Path
from autodistill.utils.timeouts import calls_left
from autodistill.utils.storage import Storage
signal.alarm(60)  # a read of a pipe that has no more may be deaf to an interrupt
storage, pipe = Storage(sys.argv[1]), Path(sys.argv[2])
try:
    storage.put(pipe, "key")
except KeyboardInterrupt:
    assert calls_left()
    print("interrupted", flush=True)
    sys.stdin.read() if sys.argv[3] == "True" else os._exit(0)
    while calls_left():
        time.sleep(0.01)
"""
    command = subprocess.Popen(
        [sys.executable, "-c", program, storage.uri, str(pipe), str(whole)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with pipe.open("wb") as sender:
            sender.write(bytes(10_000_000))
            command.send_signal(signal.SIGINT)
            assert command.stdout is not None
            assert command.stdout.readline() == "interrupted\n"
            if whole:
                sender.write(bytes(5_000_000))
            else:
                command.wait(timeout=60)
        command.communicate(timeout=60)
    finally:
        command.kill()
    assert command.returncode == 0
    assert storage.list() == ({"key": 15_000_000} if whole else {})


def test_google_is_told_to_serve_no_object_from_a_cache(gcs: str) -> None:
    """Google caches public objects for an hour, and would serve them even if they have been replaced since."""
    storage = Storage(gcs).at("fresh")
    storage.write("written", b"1")
    google, root = fs.FileSystem.from_uri(storage.uri)
    with google.open_input_stream(f"{root}/written") as stream:
        assert stream.metadata()["Cache-Control"] == b"no-store"


def test_a_folder_is_there_once_it_was_sent_whole(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / "x.json").write_text("x")
    (folder / "inside" / "y").write_text("y")
    # The state that a killed sender leaves.
    storage.put(folder / "x.json", "key/x.json")
    with pytest.raises(FileNotFoundError):
        storage.fetch_folder("key", tmp_path / "copy")
    storage.send_folder(folder, "key")
    copy = storage.fetch_folder("key", tmp_path / "copy")
    assert {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()} == {
        "x.json": "x",
        "inside/y": "y",
    }
    # Once it has fetched the files, a node asks no more.
    storage.remove("key/x.json")
    assert storage.fetch_folder("key", tmp_path / "copy") == copy
    storage.send_folder(folder / "x.json", "alone")
    assert (storage.fetch_folder("alone", tmp_path / "alone") / "x.json").read_text() == "x"


def test_a_folder_in_the_place_of_another_is_fetched_also_where_that_one_was(storage: Storage, tmp_path: Path) -> None:
    def made(text: str, *names: str) -> Path:
        folder = tmp_path / text
        folder.mkdir()
        for name in names:
            (folder / name).write_text(text)
        return folder

    def fetched(copy: str) -> dict[str, str]:
        folder = storage.fetch_folder("key", tmp_path / copy)
        return {path.name: path.read_text() for path in folder.iterdir() if path.name != ".whole"}

    # Students of runs that are already stored may have been sent in this way.
    storage.send_folder(made("first", "a", "b"), "key")
    assert fetched("early") == {"a": "first", "b": "first"}
    for text in ("second", "third"):
        storage.replace_folder(made(text, "a", "c"), "key")
        expected = {"a": text, "c": text}
        assert fetched("early") == fetched("late" + text) == fetched(text) == expected
    assert (tmp_path / "third").stat().st_ino == storage.fetch_folder("key", tmp_path / "third").stat().st_ino
    assert fetched("second") == expected, "what its own writer has is another's now"


def test_a_folder_that_is_not_sent_whole_takes_the_place_of_none(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    storage.replace_folder(tmp_path / "one", "key")

    def killed(self: Storage, file: Path, key: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            storage.replace_folder(tmp_path / "two", "key")
    assert not storage.has_folder("key")
    with pytest.raises(FileNotFoundError):
        storage.fetch_folder("key", tmp_path / "copy")
    storage.replace_folder(tmp_path / "two", "key")
    assert (storage.fetch_folder("key", tmp_path / "copy") / "file").read_text() == "two"


def test_events_are_read_in_their_order_on_another_machine(storage: Storage, tmp_path: Path) -> None:
    here, there = StoredLog(tmp_path / "here.jsonl", storage), StoredLog(tmp_path / "there.jsonl", storage)
    # A kind of event that no version knows, which is left unchanged.
    expected = [{"event": "counted", "number": number} for number in range(21)]
    for event in expected[:20]:
        here.append(event)
    there.sync()
    there.append(expected[20])
    here.sync()
    assert here.read() == there.read() == EventLog(tmp_path / "here.jsonl").read() == expected


def test_what_this_machine_lost_comes_back(storage: Storage, tmp_path: Path) -> None:
    search = tmp_path / "run" / "search.json"
    search.parent.mkdir()
    search.write_text("{}")
    check_free(storage)
    assert pull(search.parent, storage)
    search.unlink()
    assert not pull(search.parent, storage)
    search.write_text("{}")
    keep(search, storage)
    search.unlink()
    assert pull(search.parent, storage)
    assert search.read_text() == "{}"
    # A file that it did not lose is replaced if another machine has continued.
    search.write_text('{"older": true}')
    assert pull(search.parent, storage)
    assert search.read_text() == "{}"
    with pytest.raises(InputError, match="go on with it by --resume"):
        check_free(storage)


def test_a_checkpoint_written_on_one_node_is_read_on_another(storage: Storage, tmp_path: Path) -> None:
    one, other = StoredFiles(storage, tmp_path / "one"), StoredFiles(storage, tmp_path / "other")
    assert other.get("key") is None
    (tmp_path / "file").write_text("content")
    one.put(tmp_path / "file", "key")
    for node in (one, other):
        found = node.get("key")
        assert found is not None
        assert found.read_text() == "content"
        assert node.list() == {"key": 7}
    one.remove("key")
    assert other.get("key") is None
    assert other.list() == {}


def copies(node: Path) -> list[str]:
    return sorted(path.name for path in node.iterdir() if not path.name.startswith("."))


def test_a_node_keeps_no_copy_of_what_another_machine_removed(storage: Storage, tmp_path: Path) -> None:
    """A machine that sees no other machine's copies enforces the disk limit on the storage."""
    driver, node = StoredFiles(storage, tmp_path / "driver"), StoredFiles(storage, tmp_path / "node")

    def put(files: StoredFiles, key: str) -> None:
        (tmp_path / "file").write_text(key)
        files.put(tmp_path / "file", key)

    for number in range(5):
        put(node, f"own{number}")
    for number in range(4):
        driver.remove(f"own{number}")
    put(node, "next")
    assert copies(tmp_path / "node") == ["next", "own4"]
    driver.remove("own4")
    put(driver, "others")
    found = node.get("others")
    assert found is not None
    assert found.read_text() == "others"
    assert copies(tmp_path / "node") == ["next", "others"]


def test_a_node_whose_disk_is_short_drops_the_copies_longest_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can be fetched again. As long as there is room, none is removed."""
    scratch = tmp_path / "node"
    files = StoredFiles(Storage(f"file://{tmp_path}/shared"), scratch)
    free = [1000]

    def usage(path: Path) -> Any:
        return SimpleNamespace(free=free[0] - sum(file.stat().st_size for file in scratch.iterdir()))

    monkeypatch.setattr("autodistill.runs.checkpoints.shutil.disk_usage", usage)
    for number, name in enumerate("abcd"):
        (tmp_path / "file").write_bytes(b"x" * 300)
        files.put(tmp_path / "file", name)
        os.utime(scratch / name, (number, number))
    assert {path.name for path in scratch.iterdir() if len(path.name) == 1} == {"b", "c", "d"}
    free[0] = 10**6
    found = files.get("a")
    assert found is not None
    assert found.read_bytes() == b"x" * 300


def test_processes_of_a_node_that_ask_at_once_fetch_once(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    StoredFiles(storage, tmp_path / "other").put(tmp_path / "file", "key")
    fetched, get = [], Storage.get

    def slow(self: Storage, key: str, file: Path) -> None:
        fetched.append(key)
        time.sleep(0.2)
        get(self, key, file)

    monkeypatch.setattr(Storage, "get", slow)
    with ThreadPoolExecutor(8) as ranks:
        found = list(ranks.map(lambda _: StoredFiles(storage, tmp_path / "node").get("key"), range(8)))
    assert found == [tmp_path / "node" / "key"] * 8
    assert (tmp_path / "node" / "key").read_bytes() == bytes(1000)
    assert fetched == ["key"]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("here/there", "takes a URI"),
        ("nonsense://x", "Unrecognized filesystem"),
        ("s3://key:secret@bucket/prefix", "give credentials by the environment"),
        ("s3://anonymous@bucket/prefix", "give credentials by the environment"),
        ("gs://somebody@bucket/prefix", "give credentials by the environment"),
        ("file:///", "names no bucket"),
        ("s3://", "names no bucket"),
    ],
)
def test_what_is_no_storage_is_refused(uri: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Storage(uri)


def test_google_tries_again_for_seconds_and_not_for_its_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def from_uri(uri: str) -> tuple[fs.LocalFileSystem, str]:
        opened.append(uri)
        return fs.LocalFileSystem(), "b/p"

    monkeypatch.setattr("autodistill.utils.storage.fs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=from_uri)))
    given = ("gs://b/p", "gs://anonymous@b/p?scheme=http", "gs://b/p?retry_limit_seconds=60", "s3://b/p")
    assert [Storage(uri).uri for uri in given] == list(given)
    assert opened == [
        "gs://b/p?retry_limit_seconds=15",
        "gs://anonymous@b/p?scheme=http&retry_limit_seconds=15",
        "gs://b/p?retry_limit_seconds=60",
        "s3://b/p",
    ]


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that accepts connections and sends nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def mute(server: socket.socket, bucket: str) -> str:
    return f"{bucket}/prefix?scheme=http&endpoint_override=127.0.0.1:{server.getsockname()[1]}"


def test_a_storage_that_does_not_answer_is_refused(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.utils.storage._ANSWER_SECONDS", 1.0)
    uri = mute(silent, "gs://anonymous@bucket") + "&retry_limit_seconds=4"
    with pytest.raises(InputError, match=r"the storage gs://\S+ did not answer within 1 s: check its address"):
        Storage(uri).check()
    assert calls_left()


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "code"), [(1, 2), (3600, 143)])
def test_a_command_ends_though_a_storage_does_not_answer(
    silent: socket.socket, tmp_path: Path, patience: int, code: int
) -> None:
    """It ends by itself or by SIGTERM while a thread is stuck in a client that waits without end, also at exit."""
    program = (
        f"import sys, autodistill.utils.storage as storage, autodistill.cli.app as cli; "
        f"storage._ANSWER_SECONDS = {patience}.0; "
        "sys.exit(cli.main())"
    )
    words = ["search", "--budget", "1GB", "--name", "run", "--runs", str(tmp_path), "--storage", mute(silent, "s3://b")]
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = subprocess.Popen(
        [sys.executable, "-c", program, *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        connection, _ = silent.accept()
        if patience > 60:
            command.send_signal(signal.SIGTERM)
        _, said = command.communicate(timeout=120)
        connection.close()
    finally:
        command.kill()
    assert command.returncode == code
    assert ("did not answer within 1 s" if code == 2 else "stopped") in said


def test_storage_that_cannot_be_written_is_refused(tmp_path: Path, s3: str, gcs: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    none = [uri.replace("bucket/prefix", "no-bucket/prefix") for uri in (s3, gcs)]
    for uri in (f"file://{tmp_path}/file/below", none[0].replace("&allow_bucket_creation=true", ""), none[1]):
        with pytest.raises(InputError, match="cannot write into the storage"):
            Storage(uri).check()


def test_an_address_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    """pathlib drops one of its slashes, and would make a folder named s3: here."""
    check_folder(Path("results/runs"), "--runs")
    check_folder(tmp_path / "a:b", "--runs")
    with pytest.raises(InputError, match=r"--cache takes a folder of this machine, not s3://b/x: --storage s3://b/x"):
        check_folder(Path("s3://b/x"), "--cache")

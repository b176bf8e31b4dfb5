"""Files on any storage that `pyarrow.fs` reaches: a local folder, S3, Google Cloud Storage, by URI."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

from pyarrow import fs

from autodistill.errors import InputError
from autodistill.utils.durable import make_folder, put
from autodistill.utils.timeouts import NotInTimeError, in_time

# Objects that are read at once: each costs a round trip.
_READERS = 16
_CHUNK = 2**22
_GOOGLE = ("gs", "gcs")
# Until Google's client gives up, and until a storage is said to be silent, which others' clients never say.
_RETRY_SECONDS, _ANSWER_SECONDS = 15, 30.0
# Beside the files of a folder that has been sent whole: nothing, or which of those that replace each other it is.
_WHOLE = ".whole"
FETCHING = ".fetch-"
"""What names of folders begin with that are being filled."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Storage:
    """A prefix of a file system. What crosses to another process is the URI alone.

    Keys are paths below it, with slashes. An object is whole or not there: on object stores a write ends with its
    publication, which no interrupt brings forward, and a local one is on the disk before it is renamed.

    Attributes:
        uri: As a person gave it, like "s3://bucket/prefix" or "file:///shared/folder".
    """

    uri: str
    _system: Any = field(init=False, repr=False, compare=False)
    _root: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        system, root = _open(self.uri)
        object.__setattr__(self, "_system", system)
        object.__setattr__(self, "_root", root)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.uri,)

    def at(self, *parts: str) -> Storage:
        """The prefix below this one."""
        base, mark, query = self.uri.partition("?")
        return Storage("/".join([base.rstrip("/"), *parts]) + mark + query)

    @property
    def local(self) -> bool:
        """Whether it is a folder that this machine sees as such."""
        return isinstance(self._system, fs.LocalFileSystem)

    @property
    def folder(self) -> Path | None:
        """The folder that it is on this machine; None of an object store."""
        return Path(self._root) if self.local else None

    def check(self) -> None:
        """Writes an object, reads it back and removes it.

        Raises:
            InputError: One of these is impossible, or does not come to an end; says why.
        """
        try:
            _answered(self._probe, self.uri)
        except (OSError, NotImplementedError) as error:
            raise InputError(
                f"cannot write into the storage {self.uri}: {_brief(error)}; check its address and your "
                "credentials, or choose another --storage"
            ) from error

    def _probe(self) -> None:
        key = f".probe-{uuid.uuid4().hex}"
        self.write(key, b"probe")
        if self.read(key) != b"probe":
            raise OSError("what was written is not what is read")
        self.remove(key)

    def write(self, key: str, data: bytes) -> None:
        """Writes an object.

        Raises:
            OSError: It cannot be written.
        """

        def send() -> None:
            with self._writing(key) as stream:
                stream.write(data)

        self._uninterrupted(send)

    def read(self, key: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError, OSError: There is none, or it cannot be read.
        """
        with self._system.open_input_stream(self._path(key)) as stream:
            return bytes(stream.read())

    def read_all(self, keys: list[str]) -> list[bytes]:
        """Many objects' bytes, some at a time."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read, keys))

    def put(self, file: Path, key: str) -> None:
        """Sends a local file.

        Raises:
            OSError: It cannot be read or written.
        """

        def send() -> None:
            with file.open("rb") as source, self._writing(key) as stream:
                while chunk := source.read(_CHUNK):
                    stream.write(chunk)

        self._uninterrupted(send)

    def get(self, key: str, file: Path) -> None:
        """Fetches an object to a local path, where it is whole or not there.

        Raises:
            FileNotFoundError, OSError: There is none, or it cannot be read or written.
        """
        make_folder(file.parent)
        with tempfile.TemporaryDirectory(prefix=FETCHING, dir=file.parent) as folder:
            partial = Path(folder) / file.name
            with self._system.open_input_stream(self._path(key)) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
            put(partial, file)

    def list(self, below: str = "") -> dict[str, int]:
        """Bytes of each object below a key, by key."""
        selector = fs.FileSelector(self._path(below), allow_not_found=True, recursive=True)
        start = len(self._root) + 1  # object stores list what they were asked for without a first slash
        return {
            info.path[start:]: info.size
            for info in self._system.get_file_info(selector)
            if info.type == fs.FileType.File and not info.base_name.startswith(".write-")
        }

    def has(self, key: str) -> bool:
        """Whether there is an object of this key."""
        return bool(self._system.get_file_info(self._path(key)).type == fs.FileType.File)

    def age(self, key: str) -> float | None:
        """Seconds since an object was written, by the storage's own clock; None where there is none.

        Raises:
            OSError: Nothing can be written, which is how the storage is asked for its time.
        """
        found = self._system.get_file_info(self._path(key))
        if found.type != fs.FileType.File:
            return None
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"now")
        now = self._system.get_file_info(self._path(probe))
        self.remove(probe)
        return float((now.mtime - found.mtime).total_seconds())

    def remove(self, key: str) -> None:
        """Removes an object; nothing where there is none."""
        try:
            self._system.delete_file(self._path(key))
        except FileNotFoundError:
            return

    def send_folder(self, folder: Path, key: str) -> None:
        """Sends the files of a folder, or one file, whose content never changes, unless they were sent before."""
        if not self.has_folder(key):
            self._send(folder, key, b"")

    def replace_folder(self, folder: Path, key: str) -> None:
        """Sends the files of a folder in the place of any that the key had, copies of which are not used any more."""
        mark = uuid.uuid4().hex.encode()
        self.remove_folder(key)
        (folder / _WHOLE).write_bytes(mark)
        self._send(folder, key, mark)

    def remove_folder(self, key: str) -> None:
        """Removes the files of a folder that was sent, which is not whole from the first of them on."""
        self.remove(f"{key}/{_WHOLE}")
        for name in self.list(key):
            self.remove(name)

    def _send(self, folder: Path, key: str, mark: bytes) -> None:
        root = folder if folder.is_dir() else folder.parent
        found = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        files = [path for path in found if path.is_file() and path.name != _WHOLE]
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda path: self.put(path, f"{key}/{path.relative_to(root).as_posix()}"), files))
        self.write(f"{key}/{_WHOLE}", mark)

    def has_folder(self, key: str) -> bool:
        """Whether a folder was sent whole."""
        return self.has(f"{key}/{_WHOLE}")

    def fetch_folder(self, key: str, folder: Path) -> Path:
        """A local copy of a folder that was sent whole, fetched once however many processes ask for it.

        One of what has been replaced since is fetched anew.

        Raises:
            FileNotFoundError: It was never sent whole.
        """
        make_folder(folder.parent)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            try:
                mark = self.read(f"{key}/{_WHOLE}")
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.uri} has no {key}") from None
            if folder.exists():
                if _mark(folder) == mark:
                    return folder
                shutil.rmtree(folder)
            with tempfile.TemporaryDirectory(prefix=FETCHING, dir=folder.parent) as temporary:
                partial = Path(temporary) / folder.name
                partial.mkdir()
                for name in self.list(key):
                    inside = name.removeprefix(f"{key}/")
                    if mark or inside != _WHOLE:
                        self.get(name, partial / inside)
                put(partial, folder)
        return folder

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    def _uninterrupted(self, send: Callable[[], None]) -> None:
        """Sends an object. An interrupt ends the wait for it, and not the sending, which ends with it or the process.

        A client's stream that an interrupt meets is closed by whoever drops it, and would publish what it has so far.
        """
        if self.local:
            send()
        else:
            in_time(send, None, "storage")

    @contextmanager
    def _writing(self, key: str) -> Iterator[Any]:
        """A stream that is the object once it has come to its end; local ones get their name then."""
        path = self._path(key)
        if not self.local:
            stream = self._system.open_output_stream(path, metadata=self._metadata)
            try:
                yield stream
            except BaseException:
                # To be closed is all that a stream can be told, which publishes what it has so far unless it fails too.
                with suppress(OSError):
                    stream.close()
                    self.remove(key)
                raise
            stream.close()
            return
        folder = Path(path).parent
        make_folder(folder)
        partial = str(folder / f".write-{uuid.uuid4().hex}")
        try:
            with self._system.open_output_stream(partial) as stream:
                yield stream
            put(Path(partial), Path(path))
        finally:
            Path(partial).unlink(missing_ok=True)

    @property
    def _metadata(self) -> dict[str, str] | None:
        """Of an object that is written: Google serves those that anybody may read from a cache of an hour, else."""
        return {"Cache-Control": "no-store"} if self.uri.partition("://")[0] in _GOOGLE else None


def _mark(folder: Path) -> bytes:
    """Which of those that replace each other a local folder is; nothing where it is none of them."""
    try:
        return (folder / _WHOLE).read_bytes()
    except FileNotFoundError:
        return b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time; the kernel frees it however the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class StoredFiles:
    """Files by key, which have one content for ever, on a storage, with a copy of those used on this machine.

    Args:
        storage: What holds them.
        scratch: Folder of the copies.
    """

    def __init__(self, storage: Storage, scratch: Path) -> None:
        self._storage = storage
        self._scratch = scratch

    def put(self, file: Path, key: str) -> None:
        """Sends a file, and keeps it as this machine's copy.

        Raises:
            OSError: It cannot be written.
        """
        self._drop_removed()
        self._storage.put(file, key)
        os.replace(file, self._scratch / key)

    def get(self, key: str) -> Path | None:
        """This machine's copy, fetched once however many processes ask for it; None where there is no such file."""
        path = self._scratch / key
        if not self._storage.has(key):
            path.unlink(missing_ok=True)
            return None
        make_folder(self._scratch)
        with _locked(path.with_name(f".{key}.lock")):
            if not path.is_file():
                self._drop_removed()
                try:
                    self._storage.get(key, path)
                except FileNotFoundError:
                    return None
        return path

    def _drop_removed(self) -> None:
        """Makes room for another copy: what other machines have removed is of no use here either.

        Where the disk does not hold another one of the largest, those longest unused go too: they can be fetched again.
        """
        make_folder(self._scratch)
        # Looked at first, since a copy is here only after its file is on the storage.
        copies = [path for path in self._scratch.iterdir() if path.is_file() and not path.name.startswith(".")]
        kept = self._storage.list()
        for path in copies:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        held = sorted((path for path in copies if path.name in kept), key=_used)
        largest = max((kept[path.name] for path in held), default=0)
        for path in held:
            if shutil.disk_usage(self._scratch).free >= largest:
                break
            path.unlink(missing_ok=True)

    def drop_copy(self, key: str) -> bool:
        """Drops this machine's copy, which is fetched again."""
        (self._scratch / key).unlink(missing_ok=True)
        return True

    def list(self) -> dict[str, int]:
        """Bytes of each file, by key."""
        return self._storage.list()

    def remove(self, key: str) -> None:
        """Removes a file, and this machine's copy."""
        self._storage.remove(key)
        (self._scratch / key).unlink(missing_ok=True)


def reached(uri: str, key: str) -> str:
    """Why this machine does not reach what another one wrote to a storage, or cannot write there; "" where it can."""
    try:
        storage = Storage(uri)
        storage.read(key)
        storage.check()
    except (InputError, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def _used(path: Path) -> float:
    """When a file was last read or written; one that is gone meanwhile never."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0.0
    return max(stat.st_atime, stat.st_mtime)


def check_folder(folder: Path, option: str) -> None:
    """Refuses a URI where a folder is asked for, which would be made as one of that name.

    Args:
        folder: As it was typed; a path has one slash where the URI had two.
        option: That it was given by.

    Raises:
        InputError: It is a URI.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        uri = str(folder).replace(":/", "://", 1)
        raise InputError(
            f"{option} takes a folder of this machine, not {uri}: --storage {uri} keeps a run, and what its trials "
            "read, on a storage"
        )


def _open(uri: str) -> tuple[Any, str]:
    if "://" not in uri:
        raise InputError(f"--storage takes a URI, like s3://bucket/prefix or file:///shared/folder, not {uri!r}")
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    # A bucket that anybody may use is asked for by this word, which is no secret.
    if at and (scheme not in _GOOGLE or user != "anonymous"):
        # It is written into the run's own files, and handed to every node.
        raise InputError("--storage holds a key or a password: give credentials by the environment, not in the URI")
    try:
        system, root = _answered(lambda: fs.FileSystem.from_uri(_impatient(uri)), uri)
    except (OSError, ValueError) as error:
        raise InputError(f"--storage {uri}: {_brief(error)}; give a URI like s3://bucket/prefix") from error
    if not root.strip("/"):
        raise InputError(f"--storage {uri} names no bucket or folder: give a URI like s3://bucket/prefix")
    if "//" in root.strip("/"):
        raise InputError(f"--storage {uri} has an empty part between two slashes: give a URI like s3://bucket/prefix")
    return system, root.rstrip("/")


def _impatient(uri: str) -> str:
    """The URI with a limit of how long Google's client tries again, which is 15 minutes else, if it has none."""
    base, _, query = uri.partition("?")
    if base.partition("://")[0] not in _GOOGLE or "retry_limit_seconds" in parse_qs(query, keep_blank_values=True):
        return uri
    return f"{base}?{'&'.join(filter(None, [query, f'retry_limit_seconds={_RETRY_SECONDS}']))}"


def _answered(call: Callable[[], _Result], uri: str) -> _Result:
    """What a call of a storage returns or raises; a folder of this machine needs no deadline.

    Raises:
        InputError: The storage did not answer in time.
    """
    if uri.startswith("file:"):
        return call()
    try:
        return in_time(call, _ANSWER_SECONDS, "storage")
    except NotInTimeError:
        raise InputError(
            f"the storage {uri} did not answer within {_ANSWER_SECONDS:.0f} s: check its address, and that this "
            "machine reaches it, or choose another --storage"
        ) from None


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""Files on any storage that `pyarrow.fs` supports, by URI: a local folder, S3, Google Cloud Storage."""

from __future__ import annotations

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
from autodistill.utils.file_locks import exclusive
from autodistill.utils.timeouts import CallTimeoutError, call_with_timeout

# Objects that are read at the same time, since each costs a round trip.
_READERS = 16
_CHUNK = 2**22
_GOOGLE = ("gs", "gcs")
# Seconds until Google's client gives up, and until a storage counts as silent. Other clients never give up.
_RETRY_SECONDS, _ANSWER_SECONDS = 15, 30.0
# Lies next to the files of a completely sent folder. It is empty, or its content tells versions of the folder apart.
_WHOLE = ".whole"
FETCHING = ".fetch-"
"""Start of the names of folders that are still being filled."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Storage:
    """A prefix of a file system. Only its URI is sent to other processes.

    Keys are paths below it, with slashes. An object either is complete or does not exist. On an object store, it is
    published at the end of a write, and an interrupt does not publish it earlier. A local file is on the disk before it
    is renamed.

    Attributes:
        uri: The URI as the user gave it, like "s3://bucket/prefix" or "file:///shared/folder".
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
        """Return the prefix below this one."""
        base, mark, query = self.uri.partition("?")
        return Storage("/".join([base.rstrip("/"), *parts]) + mark + query)

    @property
    def local(self) -> bool:
        """Whether it is a folder that this machine can see."""
        return isinstance(self._system, fs.LocalFileSystem)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, or None for an object store."""
        return Path(self._root) if self.local else None

    def check(self) -> None:
        """Write an object, read it back and remove it.

        Raises:
            InputError: One of these fails, or does not end in time. The message says why.
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
        """Write an object.

        Raises:
            OSError: It cannot be written.
        """

        def send() -> None:
            with self._writing(key) as stream:
                stream.write(data)

        self._uninterrupted(send)

    def read(self, key: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            FileNotFoundError, OSError: The object does not exist, or cannot be read.
        """
        with self._system.open_input_stream(self._path(key)) as stream:
            return bytes(stream.read())

    def read_all(self, keys: list[str]) -> list[bytes]:
        """Return the bytes of many objects, read several at a time."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read, keys))

    def put(self, file: Path, key: str) -> None:
        """Send a local file.

        Raises:
            OSError: The file cannot be read, or the object cannot be written.
        """

        def send() -> None:
            with file.open("rb") as source, self._writing(key) as stream:
                while chunk := source.read(_CHUNK):
                    stream.write(chunk)

        self._uninterrupted(send)

    def get(self, key: str, file: Path) -> None:
        """Fetch an object to a local path, completely or not at all.

        Raises:
            FileNotFoundError, OSError: The object does not exist, or it cannot be read or written.
        """
        make_folder(file.parent)
        with tempfile.TemporaryDirectory(prefix=FETCHING, dir=file.parent) as folder:
            partial = Path(folder) / file.name
            with self._system.open_input_stream(self._path(key)) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
            put(partial, file)

    def list(self, below: str = "") -> dict[str, int]:
        """Return the size of each object below a key, by key."""
        selector = fs.FileSelector(self._path(below), allow_not_found=True, recursive=True)
        start = len(self._root) + 1  # object stores return paths without a first slash
        return {
            info.path[start:]: info.size
            for info in self._system.get_file_info(selector)
            if info.type == fs.FileType.File and not info.base_name.startswith(".write-")
        }

    def has(self, key: str) -> bool:
        """Return whether an object with this key exists."""
        return bool(self._system.get_file_info(self._path(key)).type == fs.FileType.File)

    def age(self, key: str) -> float | None:
        """Return the seconds since an object was written, by the storage's clock, or None if it does not exist.

        Raises:
            OSError: Nothing can be written. An object is written to learn the storage's time.
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
        """Remove an object. Do nothing if it does not exist."""
        try:
            self._system.delete_file(self._path(key))
        except FileNotFoundError:
            return

    def send_folder(self, folder: Path, key: str) -> None:
        """Send a file, or the files of a folder, whose content never changes, unless it was sent before."""
        if not self.has_folder(key):
            self._send(folder, key, b"")

    def replace_folder(self, folder: Path, key: str) -> None:
        """Send the files of a folder in place of those under the key. Older copies are no longer used."""
        mark = uuid.uuid4().hex.encode()
        self.remove_folder(key)
        (folder / _WHOLE).write_bytes(mark)
        self._send(folder, key, mark)

    def remove_folder(self, key: str) -> None:
        """Remove the files of a sent folder. After the first removal it counts as incomplete."""
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
        """Return whether a folder was sent completely."""
        return self.has(f"{key}/{_WHOLE}")

    def fetch_folder(self, key: str, folder: Path) -> Path:
        """Return a local copy of a completely sent folder, fetched once for all processes of this machine.

        If the folder has been replaced since, it is fetched again.

        Raises:
            FileNotFoundError: The folder was never sent completely.
        """
        with exclusive(folder):
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
        """Send an object. An interrupt ends only the waiting: the sending goes on until it or the process ends.

        An interrupted stream is closed when it is freed, and would then publish the part that was written so far.
        """
        if self.local:
            send()
        else:
            call_with_timeout(send, None, "storage")

    @contextmanager
    def _writing(self, key: str) -> Iterator[Any]:
        """Open a stream that becomes the object when it is closed. A local file gets its name only then."""
        path = self._path(key)
        if not self.local:
            stream = self._system.open_output_stream(path, metadata=self._metadata)
            try:
                yield stream
            except BaseException:
                # A stream can only be closed. That publishes what was written so far, unless closing fails too.
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
        """The metadata of a written object. Without them, Google caches publicly readable objects for an hour."""
        return {"Cache-Control": "no-store"} if self.uri.partition("://")[0] in _GOOGLE else None


def _mark(folder: Path) -> bytes:
    """Return the mark that tells versions of a replaced folder apart, or b"" if there is none."""
    try:
        return (folder / _WHOLE).read_bytes()
    except FileNotFoundError:
        return b""


def reached(uri: str, key: str) -> str:
    """Return why this machine cannot read what another one wrote to a storage, or cannot write there; "" if it can."""
    try:
        storage = Storage(uri)
        storage.read(key)
        storage.check()
    except (InputError, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def check_folder(folder: Path, option: str) -> None:
    """Refuse a URI where a local folder is expected. Otherwise a folder of that name would be created.

    Args:
        folder: The path as it was typed. It has one slash where a URI has two.
        option: The option that gave it.

    Raises:
        InputError: The folder is a URI.
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
    # This word asks for a bucket that anybody may use. It is not a secret.
    if at and (scheme not in _GOOGLE or user != "anonymous"):
        # The URI is written into the run's files, and sent to every node.
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
    """Return the URI with a limit on the retries of Google's client, which are 15 minutes by default."""
    base, _, query = uri.partition("?")
    if base.partition("://")[0] not in _GOOGLE or "retry_limit_seconds" in parse_qs(query, keep_blank_values=True):
        return uri
    return f"{base}?{'&'.join(filter(None, [query, f'retry_limit_seconds={_RETRY_SECONDS}']))}"


def _answered(call: Callable[[], _Result], uri: str) -> _Result:
    """Return or raise the result of a storage call, within a deadline. Local folders need none."""
    if uri.startswith("file:"):
        return call()
    try:
        return call_with_timeout(call, _ANSWER_SECONDS, "storage")
    except CallTimeoutError:
        raise InputError(
            f"the storage {uri} did not answer within {_ANSWER_SECONDS:.0f} s: check its address, and that this "
            "machine reaches it, or choose another --storage"
        ) from None


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""Sees, counts and fails the calls by which a process changes files; the kernel announces each before it is done.

A forked process gives the kernel a filter (seccomp). The filter holds every such call until another process, the
watcher, has looked at it and says that it may proceed, or with which error it ends. This works below Python and the
library that writes, in all threads and children of the process, and needs no special privileges. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import posix
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_NUMBERS = {
    "write": 1,
    "open": 2,
    "mmap": 9,
    "pwrite64": 18,
    "writev": 20,
    "sendfile": 40,
    "fsync": 74,
    "fdatasync": 75,
    "truncate": 76,
    "ftruncate": 77,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "creat": 85,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "openat": 257,
    "mkdirat": 258,
    "unlinkat": 263,
    "renameat": 264,
    "linkat": 265,
    "symlinkat": 266,
    "utimensat": 280,
    "fallocate": 285,
    "pwritev": 296,
    "renameat2": 316,
    "copy_file_range": 326,
    "pwritev2": 328,
    "io_uring_setup": 425,
    "openat2": 437,
}
_NAMES = {number: name for name, number in _NUMBERS.items()}
# These are judged by their arguments. Writes to standard output and errors, files opened for reading, and private
# memory are frequent and change none of the watched files.
_JUDGED = ("write", "writev", "open", "openat", "mmap")
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_X86_64 = 0xC000003E
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _GREATER, _ANY, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_AT_FDCWD, _AT_REMOVEDIR = -100, 0x200
# A call writes at most this many bytes at a time. More would mean that its arguments were misread.
_MOST = 2**30


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that changes a file or a folder.

    Attributes:
        name: What is done: "create", "write", "truncate", "sync", "rename", "link", "unlink", "mkdir", "rmdir", or the
            kernel's name of a call that is not understood.
        path: The file or folder, relative to the watched folder.
        other: The second path of a rename or a link; "" otherwise.
        data: The bytes that are written.
        offset: Where the bytes go, or the new length of a truncated file.
        flags: Flags of a file that is opened.
        time: The time of the call, from `time.time()`.
    """

    name: str
    path: str
    other: str = ""
    data: bytes = b""
    offset: int = 0
    flags: int = 0
    time: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a watched process ended: its exit code, negative for a signal, or None if its time ran out."""

    code: int | None
    seconds: float
    cpu_seconds: float


def why_not() -> str:
    """Return why calls cannot be watched here, or "" if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "calls are watched on Linux on x86-64 only"
    seen: list[Call] = []
    probe = Path("/tmp") / f"autodistill-watch-{os.getpid()}"

    def see(call: Call) -> int:
        seen.append(call)
        return 0

    try:
        ended = watched(lambda: probe.write_bytes(b"") and None, Path("/tmp"), see, seconds=20)
    except OSError as error:
        return f"the kernel does not let calls be watched: {error.strerror}"
    probe.unlink(missing_ok=True)
    return "" if ended.code == 0 and seen else "the kernel does not announce calls here"


def watched(work: Callable[[], int | None], root: Path, decide: Callable[[Call], int], seconds: float) -> Ended:
    """Fork a process that does some work, and look at each call that changes something below a folder.

    Args:
        work: Returns an exit code; None means 0.
        root: The folder; a path without links.
        decide: Called with each call before it is done. Returns the number of the error that the call ends with, or 0
            if it may proceed.
        seconds: Seconds after which the process is killed.

    Raises:
        OSError: The kernel does not allow calls to be watched.
    """
    mine, its = socket.socketpair()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        mine.close()
        code = 1
        os.fsync = posix.fsync  # the tests' own processes replace it
        try:
            # The child does not close inherited files; they belong to its parent.
            socket.send_fds(its, [b"l"], [_filter()])
            its.recv(1)
            its.close()
            code = work() or 0
        except BaseException:  # a fork must never continue as its parent
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    its.close()
    # The child sends it with a call that is not watched.
    _, descriptors, _, _ = socket.recv_fds(mine, 1, 1)
    if not descriptors:
        os.waitpid(child, 0)
        raise OSError(errno.ENOSYS, "no filter with a listener")
    (listener,) = descriptors
    mine.send(b"g")
    mine.close()
    try:
        state, usage, timely = _attend(child, listener, root, decide, began + seconds)
    finally:
        os.close(listener)
    code = os.waitstatus_to_exitcode(state) if timely else None
    return Ended(code=code, seconds=time.monotonic() - began, cpu_seconds=usage.ru_utime + usage.ru_stime)


def _attend(child: int, listener: int, root: Path, decide: Callable[[Call], int], until: float) -> tuple:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    timely = True
    while True:
        events = poll.poll(100)
        if events and events[0][1] & select.POLLIN:
            _answer(listener, root, decide)
            continue
        found, state, usage = os.wait4(child, os.WNOHANG)
        if found:
            return state, usage, timely
        if events:  # its end: no process with the filter is left
            _, state, usage = os.wait4(child, 0)
            return state, usage, timely
        if timely and time.monotonic() > until:
            timely = False
            os.kill(child, signal.SIGKILL)


def _answer(listener: int, root: Path, decide: Callable[[Call], int]) -> None:
    notice = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, notice, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return  # its process was killed meanwhile
        raise
    key, process, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", notice)
    failure = 0
    try:
        call = _understood(process, _NAMES[number], arguments, f"{root}/")
    except (FileNotFoundError, ProcessLookupError):
        call = None  # as above, or its file has no name
    if call is not None:
        failure = decide(call)
    try:
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", key, 0, -failure, 0 if failure else 1))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _understood(process: int, name: str, given: list[int], root: str) -> Call | None:
    """Return the call that a process is about to make, if it concerns the watched folder."""
    signed = [ctypes.c_int(value).value for value in given]
    place = f"/proc/{process}"

    def text(address: int) -> bytes:
        found = b""
        with open(f"{place}/mem", "rb", buffering=0) as memory:
            while b"\0" not in found:
                # Do not read past the end of a page: the next page may not exist.
                memory.seek(address + len(found))
                found += memory.read(4096 - (address + len(found)) % 4096)
        return found[: found.index(b"\0")]

    def named(folder: int, address: int) -> str:
        typed = os.fsdecode(text(address))
        base = os.readlink(f"{place}/cwd" if folder == _AT_FDCWD else f"{place}/fd/{folder}")
        return os.path.normpath(os.path.join(base, typed))

    def of(descriptor: int) -> str:
        return os.readlink(f"{place}/fd/{descriptor}")

    def memory(address: int, size: int) -> bytes:
        if size > _MOST:
            raise AssertionError(f"{name} of {size} bytes")
        with open(f"{place}/mem", "rb", buffering=0) as file:
            file.seek(address)
            found = file.read(size)
            while len(found) < size:
                found += file.read(size - len(found))
        return found

    def position(descriptor: int) -> int:
        """Return where the next byte goes. For an open file that appends, this is its end."""
        lines = Path(f"{place}/fdinfo/{descriptor}").read_text().splitlines()
        facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if int(facts["flags"], 8) & os.O_APPEND:
            return os.stat(f"{place}/fd/{descriptor}").st_size
        return int(facts["pos"])

    def made(kind: str, path: str, **more: object) -> Call | None:
        if not path.startswith(root) or path.endswith(" (deleted)"):
            return None
        other = str(more.pop("other", ""))
        if other and not other.startswith(root):
            raise AssertionError(f"{name} from {path} to {other}, out of the watched folder")
        below = other.removeprefix(root)
        return Call(name=kind, path=path.removeprefix(root), other=below, time=time.time(), **more)  # type: ignore[arg-type]

    first, second, third = signed[:3]
    if name in ("open", "creat", "openat"):
        path = named(first, given[1]) if name == "openat" else named(_AT_FDCWD, given[0])
        flags = {"openat": third, "open": second, "creat": os.O_CREAT | os.O_TRUNC | os.O_WRONLY}[name]
        return made("create", path, flags=flags)
    if name in ("write", "pwrite64"):
        path = of(first)
        if not path.startswith(root):
            return None
        offset = given[3] if name == "pwrite64" else position(first)
        return made("write", path, data=memory(given[1], given[2]), offset=offset)
    if name == "writev":
        path = of(first)
        if not path.startswith(root):
            return None
        parts = struct.iter_unpack("=QQ", memory(given[1], 16 * given[2]))
        return made("write", path, data=b"".join(memory(*part) for part in parts), offset=position(first))
    if name == "sendfile":
        path = of(first)
        if not path.startswith(root):
            return None
        with open(f"{place}/fd/{second}", "rb") as source:
            source.seek(struct.unpack("=q", memory(given[2], 8))[0] if given[2] else position(second))
            return made("write", path, data=source.read(given[3]), offset=position(first))
    if name in ("fsync", "fdatasync"):
        path = of(first)
        # The folder itself may be synced too.
        return Call(name="sync", path="", time=time.time()) if f"{path}/" == root else made("sync", path)
    if name == "ftruncate":
        return made("truncate", of(first), offset=given[1])
    if name == "truncate":
        return made("truncate", named(_AT_FDCWD, given[0]), offset=given[1])
    if name in ("rename", "link"):
        return made(name, named(_AT_FDCWD, given[0]), other=named(_AT_FDCWD, given[1]))
    if name in ("renameat", "renameat2", "linkat"):
        kind = "link" if name == "linkat" else "rename"
        return made(kind, named(first, given[1]), other=named(third, given[3]))
    if name in ("mkdir", "rmdir", "unlink"):
        return made(name, named(_AT_FDCWD, given[0]))
    if name == "mkdirat":
        return made("mkdir", named(first, given[1]))
    if name == "unlinkat":
        return made("rmdir" if third & _AT_REMOVEDIR else "unlink", named(first, given[1]))
    if name == "utimensat":
        return None  # times are not content
    descriptor = {"mmap": signed[4], "copy_file_range": third, "symlinkat": second}.get(name, first)
    if name == "symlink":
        return made(name, named(_AT_FDCWD, given[1]))
    return made(name, of(descriptor)) if descriptor >= 0 else None


def _filter() -> int:
    """Give this process its filter, and return the descriptor that announces its calls.

    Raises:
        OSError: The kernel refuses.
    """
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    for name, number in _NUMBERS.items():
        if name not in _JUDGED:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOTIFY)]

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, 16 + 8 * index)

    for name in ("write", "writev"):
        program += [(_EQUAL, 0, 4, _NUMBERS[name]), argument(0), (_GREATER, 0, 1, 2), (_RETURN, 0, 0, _NOTIFY)]
        program += [(_RETURN, 0, 0, _ALLOW)]
    for name, flags in (("open", 1), ("openat", 2)):
        program += [(_EQUAL, 0, 4, _NUMBERS[name]), argument(flags), (_ANY, 0, 1, _CHANGING), (_RETURN, 0, 0, _NOTIFY)]
        program += [(_RETURN, 0, 0, _ALLOW)]
    # Memory that belongs to a file, is shared and is writable.
    program += [(_EQUAL, 0, 6, _NUMBERS["mmap"]), argument(2), (_ANY, 0, 3, 2), argument(3), (_ANY, 0, 1, 1)]
    program += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(held)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, otherwise a filter needs rights
    listener = libc.syscall(317, 1, 8, ctypes.byref(head))
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(listener)

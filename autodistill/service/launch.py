"""Serve a student with the server of llama.cpp or vLLM: check it first, watch it, and restart it if it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from autodistill.advisor.describe import Described, deployment_named, describe
from autodistill.errors import InputError, MissingDependencyError, ServiceError
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.speculative import PROPOSED
from autodistill.hardware.machine import cores, free_memory_bytes
from autodistill.options import parsed
from autodistill.runtimes.launch_files import vllm_options
from autodistill.service.client import Client, is_loopback
from autodistill.service.keys import kept_key, make_key
from autodistill.service.process import ServerProcess
from autodistill.service.request import ServeRequest
from autodistill.service.served import Served, as_asked, find_served
from autodistill.units import count_of, format_bytes, format_duration

_CHILD = Path(__file__).parents[1] / "runtimes" / "llama_cpp_http_child.py"
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
_POLL_SECONDS = 0.1
# A server that dies more often than this within a minute is not started again.
_MOST_DEATHS, _MINUTE = 5, 60.0
# With such a GPU the machine's memory does not matter: the driver says whether the GPU's memory is enough.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
# vLLM may compile for minutes before it answers.
_LOAD_SECONDS = {"llama.cpp": 600.0, "vllm": 1800.0}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that is needed to start a server.

    Attributes:
        served: The student, with context, streams and cache.
        host: Name or address on which it listens, or the path of a Unix socket.
        port: Port; 0 for a Unix socket.
        key: Key that each request must have.
        threads: Number of CPU threads.
        draft: File of a smaller model that proposes tokens, or None.
    """

    served: Served
    host: str
    port: int
    key: str
    threads: int
    draft: Path | None = None

    @property
    def is_socket(self) -> bool:
        """Whether the server listens on a Unix socket."""
        return self.host.endswith(".sock")

    @property
    def url(self) -> str:
        """The address at which clients on this machine reach the server."""
        if self.is_socket:
            return f"unix:{self.host}"
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{anywhere}]:{self.port}" if ":" in anywhere else f"http://{anywhere}:{self.port}"


def settle(request: ServeRequest, notify: Callable[[str], None] = lambda line: None) -> Setting:
    """Find what is asked for, and refuse what cannot be served before anything is started.

    Args:
        request: What the user asks for.
        notify: Called with a line about a socket that was left behind.

    Raises:
        InputError: The student is not found or does not fit into the free memory, the port is in use, or the server
            would be public without `--public`.
        MissingDependencyError: The runtime is not installed.
    """
    found = find_served(request.export, Path(request.runs), request.row)
    _check_installed(found)
    model = describe(str(found.path))
    served = as_asked(found, parsed(request.context), request.streams, model.spec.max_context)
    draft = None
    if request.draft is not None:
        draft = _draft(str(request.draft), served, model, Path(request.runs))
    host, port = _address(request, notify)
    _check_memory(served, model, draft)
    return Setting(
        served=served,
        host=host,
        port=port,
        key=make_key() if request.key_file is None else kept_key(Path(request.key_file)),
        threads=request.threads or cores(),
        draft=draft,
    )


def _check_installed(served: Served) -> None:
    if served.runtime == "llama.cpp" and find_spec("xllamacpp") is None:
        raise MissingDependencyError("serving a GGUF file needs xllamacpp: pip install xllamacpp")
    if served.runtime == "vllm" and _vllm() is None:
        raise MissingDependencyError(
            f"{served.path} is a folder for vLLM, which is not installed: pip install vllm (in an environment of its "
            "own), or export the student with --to gguf"
        )


def _vllm() -> str | None:
    """Return the path of vLLM's program: from the search path, or from this Python environment."""
    beside = Path(sys.executable).with_name("vllm")
    return shutil.which("vllm") or (str(beside) if beside.is_file() else None)


def _draft(reference: str, served: Served, model: Described, out: Path) -> Path:
    """Return the file of a draft model whose vocabulary is that of this student."""
    if served.runtime != "llama.cpp":
        raise InputError(f"--draft is for llama.cpp, and {served.path} is served by {served.runtime}: leave it out")
    found = find_served(reference, out)
    if found.runtime != "llama.cpp":
        raise InputError(f"--draft {reference} is a folder, and llama.cpp reads .gguf files: export it with --to gguf")
    words = describe(str(found.path)).spec.vocabulary
    if words != model.spec.vocabulary:
        raise InputError(
            f"--draft {reference} has a vocabulary of {words:,} tokens, and {served.path.name} one of "
            f"{model.spec.vocabulary:,}: give a draft with the same tokenizer"
        )
    return found.path


def _address(request: ServeRequest, notify: Callable[[str], None]) -> tuple[str, int]:
    """Return a free host and port. Port 0 is replaced by a free one."""
    host = request.host
    if host.endswith(".sock"):
        path = Path(host).expanduser().absolute()
        free_socket(path, notify)
        return str(path), 0
    if "/" in host:
        raise InputError(f"--host {host} is no address, and the path of a Unix socket ends in .sock: name one of these")
    if not is_loopback(host) and not request.public:
        raise InputError(f"--host {host} lets other machines in: say so with --public, or leave --host out")
    if not is_loopback(host) and request.key_file is None:
        raise InputError("--public needs --key-file, so that the key is kept and not only printed once")
    try:
        family, _, _, _, place = socket.getaddrinfo(host, request.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return host, int(probe.getsockname()[1])
    except (socket.gaierror, UnicodeError):
        raise InputError(f"--host {host} is no address: leave it out, or give one of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = (
                f"port {request.port} of {host} is in use: stop what uses it, or give another --port (0: any free one)"
            )
        elif error.errno == errno.EACCES:
            why = f"port {request.port} is for the system's administrator: give a --port of 1024 or more"
        else:
            why = f"cannot listen on {host}: {error.strerror}"
        raise InputError(why) from None


def free_socket(path: Path, notify: Callable[[str], None]) -> None:
    """Remove a socket that a server left behind. The next server would not start with it.

    Raises:
        InputError: A server answers on it, it is not a socket, or no socket can be made there.
    """
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise InputError(
            f"a socket's path has at most {_LONGEST_SOCKET} bytes, and {path} has more: give another --host"
        )
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for the socket: make it, or give another --host")
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise InputError(f"{path} is there and is no socket: give another --host")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            notify(f"removed {path}, left behind by a server that has ended")
            return
    raise InputError(f"a server answers on {path}: stop it, or give another --host")


def _check_memory(served: Served, model: Described, draft: Path | None) -> None:
    """Refuse a student that is predicted not to fit into the free memory. For GPUs this is left to the driver."""
    if served.runtime != "llama.cpp" or any(map(os.path.exists, _GPU_DEVICES)):
        return
    needed = _predicted(served, model)
    if draft is not None:
        needed += _predicted(replace(served, cache_types=("f16", "f16")), describe(str(draft)))
    free = free_memory_bytes()
    if needed > free:
        raise InputError(
            f"{served.path.name} with {count_of(served.streams, 'stream')} of {served.context} tokens needs about "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free: stop other work, or give fewer --streams or "
            "less --context"
        )


def _predicted(served: Served, model: Described) -> int:
    keys, values = served.cache_types
    plain = deployment_named(model.format_name or "gguf-q8_0")
    deployment = replace(plain, cache_type_k=keys, cache_type_v=values)
    assert served.context is not None
    asked: dict[str, Any] = {"context": served.context, "batch": served.streams, "weights": model.weights_bytes}
    return memory(model.spec, deployment, **asked).total_bytes


class Service:
    """A server that runs within a `with` block and is restarted if it dies.

    llama.cpp's server ends with the caller, however the caller ends. vLLM's server does not read stdin, so it ends only
    if the caller exits normally.

    Args:
        setting: What `settle` returned.
        notify: Called with one line for each warning of the server and each restart.

    Attributes:
        restarts: Number of restarts.

    Raises:
        ServiceError: On entry, the server did not start. The message has its own words.
    """

    def __init__(self, setting: Setting, notify: Callable[[str], None] = lambda line: None) -> None:
        self.setting, self._notify = setting, notify
        self.restarts = 0
        self._deaths: deque[float] = deque()
        self._process: ServerProcess | None = None
        self._ready = self._stopped = False
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Id of the server's process."""
        assert self._process is not None
        return self._process.pid

    def client(self, timeout: float = 120.0) -> Client:
        """Return a client of the server, with its key."""
        return Client(self.setting.url, self.setting.key, timeout=timeout)

    def watch(self) -> None:
        """Wait, and restart the server whenever it dies, until it is stopped or interrupted.

        Raises:
            ServiceError: The server dies again and again.
        """
        while True:
            assert self._process is not None
            status = self._process.wait()
            if self._stopped:
                return
            words = self._process.last_words()
            self._process.stop()
            now = time.monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > _MINUTE:
                self._deaths.popleft()
            why = f"the server died (exit status {status}: {words})"
            if len(self._deaths) > _MOST_DEATHS:
                raise ServiceError(f"{why} {len(self._deaths)} times in a minute, and is not started again")
            self._start()
            self.restarts += 1
            self._notify(f"{why}; it serves again after {format_duration(time.monotonic() - now)}")

    def summary(self) -> dict[str, Any]:
        """Return what the server did since its last start, as far as it still answers."""
        done: dict[str, Any] = {
            "url": self.setting.url,
            "seconds": time.monotonic() - self._began,
            "restarts": self.restarts,
        }
        try:
            with self.client(timeout=2.0) as client:
                counted = client.counters()
        except ServiceError:
            return done
        done |= {"prompt_tokens": int(counted.prompt_tokens), "answer_tokens": int(counted.answer_tokens)}
        if self.setting.draft is not None:
            done |= {"drafted": int(counted.drafted), "accepted": int(counted.accepted)}
            done |= {"acceptance": counted.acceptance}
        return done

    def _start(self) -> None:
        """Start the server, and wait until it has loaded its model."""
        setting = self.setting
        if setting.is_socket:
            free_socket(Path(setting.host), self._notify)
        self._ready = False
        told = None if setting.served.runtime == "vllm" else json.dumps(child_settings(setting))
        most = _LOAD_SECONDS[setting.served.runtime]
        ends = time.monotonic() + most
        with _held_port(setting), self.client(timeout=5.0) as client:
            self._process = ServerProcess(command(setting), environment(setting), told, self._relay)
            while not client.healthy():
                if not self._process.alive:
                    name = setting.served.path.name
                    raise ServiceError(
                        f"{setting.served.runtime} could not serve {name}: {self._process.last_words()} (exit status "
                        f"{self._process.wait()})"
                    )
                if time.monotonic() > ends:
                    raise ServiceError(f"{setting.served.runtime} was not ready in {format_duration(most)}")
                time.sleep(_POLL_SECONDS)
        self._ready = True

    def _relay(self, line: str) -> None:
        # Lines from before it is ready are shown only if it does not start.
        if self._ready:
            self._notify(f"{self.setting.served.runtime}: {line}")

    def _stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.stop()
            if self.setting.is_socket:
                Path(self.setting.host).unlink(missing_ok=True)


@contextlib.contextmanager
def _held_port(setting: Setting) -> Iterator[None]:
    """Hold the server's port while it loads, so that the system gives it to no other program.

    llama.cpp's server shares its port with any other server of the same user (SO_REUSEPORT). Without an error, each
    would then get some of the other's requests.
    """
    if setting.is_socket:
        yield
        return
    family, _, _, _, place = socket.getaddrinfo(setting.host, setting.port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(place)
        except OSError as error:
            raise ServiceError(f"cannot serve at {setting.url}: {error.strerror}; give another --port") from None
        # Only after binding, which a port that others share would not refuse. It does not listen, so gets no requests.
        if hasattr(socket, "SO_REUSEPORT"):
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield


def command(setting: Setting) -> list[str]:
    """Return the command of the server. The key is not part of it."""
    served = setting.served
    if served.runtime != "vllm":
        # Run by path, so that the child imports nothing of this package.
        return [sys.executable, "-P", str(_CHILD)]
    words = [_vllm() or "vllm", "serve", str(served.path.resolve()), "--served-model-name", served.name]
    words += ["--uds", setting.host] if setting.is_socket else ["--host", setting.host, "--port", str(setting.port)]
    assert served.context is not None
    for name, value in vllm_options(served.context, served.streams, served.gpu_share).items():
        words += [f"--{name}", str(value)]
    return words


def environment(setting: Setting) -> dict[str, str]:
    """Return the variables of the server's process: with vLLM's key, and without the caller's OpenMP settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return inherited | ({"VLLM_API_KEY": setting.key} if setting.served.runtime == "vllm" else {})


def child_settings(setting: Setting) -> Mapping[str, Any]:
    """Return the settings that are sent to llama.cpp's child process."""
    served = setting.served
    keys, values = served.cache_types
    return {
        "path": str(served.path.resolve()),
        "name": served.name,
        "host": setting.host,
        "port": setting.port,
        "key": setting.key,
        "context": served.context,
        "streams": served.streams,
        "cache_type_k": keys,
        "cache_type_v": values,
        "flash_attention": served.flash_attention,
        "threads": setting.threads,
        "draft": None if setting.draft is None else str(setting.draft.resolve()),
        "proposed": PROPOSED,
    }

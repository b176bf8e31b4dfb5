"""A client of llama.cpp's and vLLM's servers: health, metrics, and answers that stream in, timed token by token."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeGuard
from urllib.parse import urlsplit

import httpx2
import psutil

from autodistill.distillation.teacher.endpoint import KEY_VARIABLE
from autodistill.errors import InputError, ServiceError
from autodistill.service.metrics import Counters, read_counters

_UNIX = "unix:"
_INTERPRETER = "interpreter-bytes="  # of the tag by which `runtimes/llama_cpp_http_child.py` says it
_MOST_BYTES = 2**24  # of a page that is no answer
_TOKEN_BYTES, _CHAT_BYTES = 2**14, 2**28  # of a token as a server may write it, and of a chat's answer
_LONGEST_SECONDS = 600.0
_SHOWN = 200  # characters of what a server says
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A streamed answer and its times, as the client saw them.

    Attributes:
        tokens: Of the answer.
        first_seconds: From the request to the first token.
        token_seconds: From each token to the next. Tokens that came together share the time since those before.
        drafted, accepted: Tokens that a draft model proposed for it, and that were taken.
        text: What it says.
    """

    tokens: int
    first_seconds: float
    token_seconds: tuple[float, ...]
    drafted: int = 0
    accepted: int = 0
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a chat's answer.

    Attributes:
        text: Of the answer.
        tokens, seconds: Of the whole answer, with the last piece; else None.
    """

    text: str
    tokens: int | None = None
    seconds: float | None = None


class Client:
    """Asks one server; may be used from several threads.

    Args:
        url: Like "http://127.0.0.1:8080", or "unix:/run/student.sock"; a "/v1" at its end is ignored.
        key: Sent with each request; None sends none.
        timeout: Seconds without a byte after which a request is given up.
        longest: Seconds after which one is given up that still trickles in; of a chat's answer a person decides.

    Attributes:
        url: Without what was ignored.

    Raises:
        InputError: No such URL.
    """

    _processes: tuple[psutil.Process, ...] = ()
    _interpreter = 0

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = 120.0, longest: float = _LONGEST_SECONDS
    ) -> None:
        self._longest = longest
        self.url = url.rstrip("/").removesuffix("/v1")
        transport, base = None, self.url
        if self.url.startswith(_UNIX):
            transport, base = httpx2.HTTPTransport(uds=self.url.removeprefix(_UNIX)), "http://localhost"
        elif not _is_address(self.url):
            raise InputError(f"{url!r} is no address of a server: write one like http://127.0.0.1:8080")
        self._model = ""
        self._http = httpx2.Client(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=_CONNECT_SECONDS),
            transport=transport,
            # What is on this machine is not asked for through a proxy.
            trust_env=not self.local,
            limits=httpx2.Limits(max_connections=None),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @property
    def local(self) -> bool:
        """Whether the server is on this machine, by its address."""
        return self.url.startswith(_UNIX) or is_loopback(urlsplit(self.url).hostname or "")

    def healthy(self) -> bool:
        """Return whether it is there and has loaded its model."""
        if self.url.startswith(_UNIX) and not Path(self.url.removeprefix(_UNIX)).exists():
            return False
        try:
            return self._http.get("/health").status_code == 200
        except httpx2.HTTPError:
            return False

    def counters(self) -> Counters:
        """Return what it counts.

        Raises:
            ServiceError: It is not reached, refuses, or has no metrics.
        """
        return read_counters(self._get("/metrics").text)

    def room(self) -> tuple[int, int] | None:
        """Return the tokens of each sequence and the sequences at once that it makes room for; None of vLLM's."""
        props = self._props()
        settings = props.get("default_generation_settings")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        slots = props.get("total_slots")
        return (context, slots) if _counts(context) and _counts(slots) else None

    def model_path(self) -> Path | None:
        """Return the file that it says it serves; None where it says none that could be here."""
        path = self._props().get("model_path")
        return Path(path) if isinstance(path, str) and path and _nameable(path) else None

    def _props(self) -> Mapping[str, Any]:
        response = self._page("/props")
        if response.status_code in (404, 501):
            return {}
        with self._told():
            found = self._checked(response).json()
        return found if isinstance(found, dict) else {}

    def model(self) -> str:
        """Return the name of the model that it serves."""
        if not self._model:
            with self._told():
                found = self._get("/v1/models").json()
            with contextlib.suppress(KeyError, IndexError, TypeError):
                self._model = str(found["data"][0]["id"])
            if not self._model:
                raise ServiceError(f"{self.url} names no model: name the address of a server that has one")
        return self._model

    def tokenize(self, text: str) -> list[int]:
        """Return llama.cpp's ids of a text, with those that begin it."""
        with self._told(), self._http.stream("POST", "/tokenize", json={"content": text, "add_special": True}) as said:
            return [int(token) for token in self._checked(self._whole(said)).json()["tokens"]]

    def memory_bytes(self) -> int | None:
        """Return the memory of its processes, which are others once it was started again; None where none are seen.

        What is promised is llama.cpp's own: the interpreter that runs it in `autodistill serve` is left out.
        """
        if not self.local:
            return None
        found = memory_of(self._processes)
        if found is None:
            self._processes = server_processes(self.url)
            self._interpreter = self._interpreter_bytes() if self._processes else 0
            found = memory_of(self._processes)
        return None if found is None else max(0, found - self._interpreter)

    def _interpreter_bytes(self) -> int:
        """Return the memory of its process that is a Python interpreter's and not the server's, as it says itself."""
        with self._told():
            models = self._get("/v1/models").json()["data"]
            tags = [str(tag) for one in models for tag in one.get("tags") or ()]
            found = [int(tag.removeprefix(_INTERPRETER)) for tag in tags if tag.startswith(_INTERPRETER)]
        return max(0, sum(found))

    def complete(self, prompt: Sequence[int], tokens: int, *, reuse: bool = False) -> Answer:
        """Let it continue a prompt with the likeliest tokens, and time them.

        Args:
            prompt: Ids.
            tokens: To write; an end token ends nothing.
            reuse: Whether what it holds of the prompt already may be kept.

        Raises:
            ServiceError: It is not reached, refuses, writes nothing, or more than was asked for, or for too long.
        """
        body = {
            "model": self.model(),
            "prompt": [int(token) for token in prompt],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": reuse,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        came: list[float] = []
        text = ""
        counted, ended = 0, 0.0
        timings: Mapping[str, Any] = {}
        began = time.perf_counter()
        with self._told():
            for event in self._events("/v1/completions", body, _TOKEN_BYTES * (tokens + 64), self._longest):
                now = time.perf_counter() - began
                for choice in event.get("choices") or ():
                    text += str(choice.get("text") or "")
                    came += [now] if choice.get("finish_reason") is None else []
                    ended = now
                counted = int((event.get("usage") or {}).get("completion_tokens", counted))
                timings = event.get("timings") or timings
            counted = counted or len(came)
            if counted > 2 * tokens + 16:
                raise ServiceError(f"{self.url} says that it wrote {counted} tokens where {tokens} were asked for")
            if counted < 1:
                raise ServiceError(f"{self.url} wrote nothing where {tokens} tokens were asked for")
            drafted, accepted = (int(timings.get(name, 0)) for name in ("draft_n", "draft_n_accepted"))
            # llama.cpp holds back bytes that are no whole character yet, sometimes to the end: it says itself how long
            # a token took.
            step = float(timings.get("predicted_per_token_ms", 0.0)) / 1e3
            # One that says what cannot be is timed by this clock alone, and so is one that counts and shows no token.
            ended = ended or now
            step = step if 0 < step * counted <= ended else ended / counted
            came = came or [ended - step * (counted - 1)]
        return Answer(
            tokens=counted,
            first_seconds=came[0],
            token_seconds=_steps(came, counted, ended),
            drafted=drafted,
            accepted=accepted,
            text=text,
        )

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[Piece]:
        """Yield the answer to messages as it comes.

        Args:
            messages: Each with "role" and "content".
            options: Further fields of the request, such as max_tokens and temperature.

        Raises:
            ServiceError: It is not reached, or refuses.
        """
        body = {"model": self.model(), "messages": list(messages), "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        began = time.perf_counter()
        pieces, counted = 0, 0
        with self._told():
            for event in self._events("/v1/chat/completions", body, _CHAT_BYTES, math.inf):
                counted = int((event.get("usage") or {}).get("completion_tokens", counted))
                for choice in event.get("choices") or ():
                    said = choice.get("delta") or {}
                    text = str(said.get("content") or said.get("reasoning_content") or "")
                    pieces += bool(text)
                    if text:
                        yield Piece(text=text)
        yield Piece(text="", tokens=counted or pieces, seconds=time.perf_counter() - began)

    def _events(
        self, path: str, body: Mapping[str, Any], most_bytes: int, longest: float
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the JSON of a stream of events, each of which is one line here."""
        with self._told(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                self._checked(self._whole(response))
            left = b""
            for part in self._parts(response, most_bytes, longest):
                *lines, left = (left + part).split(b"\n")
                for line in lines:
                    name, _, data = line.partition(b":")
                    if name.strip() != b"data":
                        continue
                    if data.strip() == b"[DONE]":
                        return
                    found = json.loads(data)
                    if "error" in found:
                        raise ServiceError(f"{self.url} gave up an answer: {_short(_said(found))}")
                    yield found

    def _get(self, path: str) -> httpx2.Response:
        return self._checked(self._page(path))

    def _page(self, path: str) -> httpx2.Response:
        with self._told(), self._http.stream("GET", path) as response:
            return self._whole(response)

    def _whole(self, response: httpx2.Response) -> httpx2.Response:
        """Return a response that has been read."""
        read = b"".join(self._parts(response, _MOST_BYTES, self._longest))
        return httpx2.Response(response.status_code, content=read, request=response.request)

    def _parts(self, response: httpx2.Response, most_bytes: int, longest: float) -> Iterator[bytes]:
        """Yield what comes, but neither without end nor for ever."""
        read, began = 0, time.monotonic()
        for part in response.iter_bytes():
            read += len(part)
            if read > most_bytes:
                raise ServiceError(f"{self.url} sent more than {most_bytes:,} bytes, which no such answer has")
            if time.monotonic() - began > longest:
                raise ServiceError(f"{self.url} was not done after {longest:g} seconds: it may be busy, or stuck")
            yield part

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line why it is not reached, or what is wrong with what it says."""
        try:
            yield
        except httpx2.ConnectError as error:
            raise ServiceError(
                f"{self.url} cannot be reached ({_short(str(error))}): start it with autodistill serve"
            ) from None
        except httpx2.TimeoutException:
            raise ServiceError(f"{self.url} gave no answer in time: it may be busy, or stuck") from None
        except httpx2.HTTPError as error:
            raise ServiceError(f"{self.url} broke off ({_short(str(error)) or type(error).__name__})") from None
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ServiceError(f"{self.url} answered nonsense ({_short(str(error))})") from None

    def _checked(self, response: httpx2.Response) -> httpx2.Response:
        if response.status_code in (401, 403):
            raise ServiceError(
                f"{self.url} refused the key ({response.status_code}): give --key-file, or set {KEY_VARIABLE}"
            )
        if response.status_code != 200:
            try:
                said = _said(response.json())
            except (ValueError, RecursionError):
                said = response.text
            # llama.cpp has no metrics unless it is started with them.
            hint = ": start it with --metrics" if response.request.url.path == "/metrics" else ""
            path = response.request.url.path
            raise ServiceError(f"{self.url} refused {path} ({response.status_code}): {_short(said)}{hint}")
        return response


def _counts(value: Any) -> TypeGuard[int]:
    """Return whether a value is a number of something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40


def _nameable(path: str) -> bool:
    """Return whether a system takes a text as a path at all."""
    try:
        Path(path).exists()
    except (OSError, ValueError):
        return False
    return "\0" not in path


def _is_address(url: str) -> bool:
    """Return whether a text is the address of a server, without a name, a key or a query in it."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in parts.hostname
        httpx2.URL(url)
        if url.isascii():
            (parts.hostname or "").encode("idna")  # which a name that no host has cannot be
    except (ValueError, httpx2.InvalidURL):
        return False
    return bool(whole) and not (parts.query or parts.fragment or parts.username or parts.password)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone: "localhost", or an address of its loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def server_processes(url: str) -> tuple[psutil.Process, ...]:
    """Return the process on this machine that listens at a local URL, and its children; none where it is not seen."""
    address = url.removeprefix(_UNIX) if url.startswith(_UNIX) else None
    port = urlsplit(url).port or (443 if url.startswith("https") else 80) if address is None else None
    try:
        for one in psutil.net_connections("unix" if address else "inet"):
            mine = one.laddr == address if address else one.status == "LISTEN" and one.laddr.port == port
            if mine and one.pid:
                process = psutil.Process(one.pid)
                return (process, *process.children(recursive=True))
    except (psutil.Error, OSError):
        pass
    return ()


def memory_of(processes: Sequence[psutil.Process]) -> int | None:
    """Return the resident memory of processes in bytes; None where they are not seen any more."""
    try:
        return sum(process.memory_info().rss for process in processes if process.is_running()) or None
    except psutil.Error:
        return None


def _steps(came: Sequence[float], tokens: int, ended: float) -> tuple[float, ...]:
    """Return the times of the tokens after the first; where several came at once, each has its share of all time."""
    if tokens <= 1:
        return ()
    if len(came) == tokens:
        return tuple(later - before for before, later in pairwise(came))
    return ((ended - came[0]) / (tokens - 1),) * (tokens - 1)


def _said(document: Any) -> str:
    error = document.get("error", document) if isinstance(document, dict) else document
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."

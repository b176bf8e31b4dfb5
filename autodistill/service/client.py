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
_INTERPRETER = "interpreter-bytes="  # start of the tag with which `runtimes/llama_cpp_http_child.py` reports them
_MOST_BYTES = 2**24  # most bytes of a page that is not a model's answer
_TOKEN_BYTES, _CHAT_BYTES = 2**14, 2**28  # most bytes that a server may send for a token, and for a chat's answer
_LONGEST_SECONDS = 600.0
_SHOWN = 200  # characters shown of a server's message
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A streamed answer and its times, measured by the client.

    Attributes:
        tokens: Number of tokens of the answer.
        first_seconds: Time from the request to the first token.
        token_seconds: Time from each token to the next. Tokens that arrived together share the time since the previous
            ones.
        drafted, accepted: Tokens that a draft model proposed for the answer, and how many of them were accepted.
        text: Text of the answer.
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
        text: Text of the answer.
        tokens, seconds: Number of tokens and time of the whole answer, with the last piece; otherwise None.
    """

    text: str
    tokens: int | None = None
    seconds: float | None = None


class Client:
    """A client of one server. Several threads may share it.

    Args:
        url: Like "http://127.0.0.1:8080", or "unix:/run/student.sock". A "/v1" at its end is ignored.
        key: Key that is sent with each request; None sends none.
        timeout: Seconds without a byte after which a request is given up.
        longest: Seconds after which a request is given up even if bytes still arrive. It does not apply to chats, which
            the user ends.

    Attributes:
        url: The URL without the part that is ignored.

    Raises:
        InputError: The URL is not the address of a server.
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
            # Requests to this machine do not go through a proxy.
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
        """Return whether the server is running and has loaded its model."""
        if self.url.startswith(_UNIX) and not Path(self.url.removeprefix(_UNIX)).exists():
            return False
        try:
            return self._http.get("/health").status_code == 200
        except httpx2.HTTPError:
            return False

    def counters(self) -> Counters:
        """Return the server's counters.

        Raises:
            ServiceError: The server cannot be reached, refuses, or has no metrics.
        """
        return read_counters(self._get("/metrics").text)

    def room(self) -> tuple[int, int] | None:
        """Return the tokens per sequence and the number of sequences that it has room for; None for vLLM."""
        props = self._props()
        settings = props.get("default_generation_settings")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        slots = props.get("total_slots")
        return (context, slots) if _counts(context) and _counts(slots) else None

    def model_path(self) -> Path | None:
        """Return the file that the server says it serves, or None if it names none that could be on this machine."""
        path = self._props().get("model_path")
        return Path(path) if isinstance(path, str) and path and _nameable(path) else None

    def _props(self) -> Mapping[str, Any]:
        response = self._page("/props")
        if response.status_code in (404, 501):
            return {}
        with self._errors_as_service_error():
            found = self._checked(response).json()
        return found if isinstance(found, dict) else {}

    def model(self) -> str:
        """Return the name of the model that the server serves."""
        if not self._model:
            with self._errors_as_service_error():
                found = self._get("/v1/models").json()
            with contextlib.suppress(KeyError, IndexError, TypeError):
                self._model = str(found["data"][0]["id"])
            if not self._model:
                raise ServiceError(f"{self.url} names no model: name the address of a server that has one")
        return self._model

    def tokenize(self, text: str) -> list[int]:
        """Return llama.cpp's token ids of a text, including the tokens that begin every text."""
        with (
            self._errors_as_service_error(),
            self._http.stream("POST", "/tokenize", json={"content": text, "add_special": True}) as said,
        ):
            return [int(token) for token in self._checked(self._whole(said)).json()["tokens"]]

    def memory_bytes(self) -> int | None:
        """Return the memory of the server's processes, or None if they cannot be seen.

        The processes are looked up again after a restart. A promise is about llama.cpp's own memory, so the interpreter
        that runs it in `autodistill serve` is not counted.
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
        """Return the memory of the Python interpreter in the server's process, which the server reports."""
        with self._errors_as_service_error():
            models = self._get("/v1/models").json()["data"]
            tags = [str(tag) for one in models for tag in one.get("tags") or ()]
            found = [int(tag.removeprefix(_INTERPRETER)) for tag in tags if tag.startswith(_INTERPRETER)]
        return max(0, sum(found))

    def complete(self, prompt: Sequence[int], tokens: int, *, reuse: bool = False) -> Answer:
        """Let the server continue a prompt with the likeliest tokens, and time them.

        Args:
            prompt: Token ids.
            tokens: Number of tokens to write. End tokens do not stop the answer.
            reuse: Whether the part of the prompt that the server's cache already has may be reused.

        Raises:
            ServiceError: The server cannot be reached, refuses, writes nothing, writes more than was asked for, or
                takes too long.
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
        with self._errors_as_service_error():
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
            # llama.cpp holds back bytes that are not a whole character yet, sometimes until the end. So its own time
            # per token tells when the first token was there, if not every token was shown.
            step = float(timings.get("predicted_per_token_ms", 0.0)) / 1e3
            # If that time is impossible or unknown, only this client's clock is used.
            ended = ended or now
            if len(came) < counted and 0 < step * counted <= ended:
                came = [min([ended - step * (counted - 1), *came[:1]])]
            came = came or [ended / counted]
        return Answer(
            tokens=counted,
            first_seconds=came[0],
            token_seconds=_steps(came, counted, ended),
            drafted=drafted,
            accepted=accepted,
            text=text,
        )

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[Piece]:
        """Yield the answer to some messages as it arrives.

        Args:
            messages: Each with "role" and "content".
            options: Further fields of the request, such as max_tokens and temperature.

        Raises:
            ServiceError: The server cannot be reached, or refuses.
        """
        body = {"model": self.model(), "messages": list(messages), "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        began = time.perf_counter()
        pieces, counted = 0, 0
        with self._errors_as_service_error():
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
        """Yield the JSON of each event of a stream. An event is one line here."""
        with self._errors_as_service_error(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                self._checked(self._whole(response))
            left = b""
            for part in self._limited_chunks(response, most_bytes, longest):
                *lines, left = (left + part).split(b"\n")
                for line in lines:
                    name, _, data = line.partition(b":")
                    if name.strip() != b"data":
                        continue
                    if data.strip() == b"[DONE]":
                        return
                    found = json.loads(data)
                    if "error" in found:
                        raise ServiceError(f"{self.url} gave up an answer: {_short(_error_message(found))}")
                    yield found

    def _get(self, path: str) -> httpx2.Response:
        return self._checked(self._page(path))

    def _page(self, path: str) -> httpx2.Response:
        with self._errors_as_service_error(), self._http.stream("GET", path) as response:
            return self._whole(response)

    def _whole(self, response: httpx2.Response) -> httpx2.Response:
        """Read a streamed response completely and return it."""
        read = b"".join(self._limited_chunks(response, _MOST_BYTES, self._longest))
        return httpx2.Response(response.status_code, content=read, request=response.request)

    def _limited_chunks(self, response: httpx2.Response, most_bytes: int, longest: float) -> Iterator[bytes]:
        """Yield the parts of a response as they arrive, up to a number of bytes and seconds."""
        read, began = 0, time.monotonic()
        for part in response.iter_bytes():
            read += len(part)
            if read > most_bytes:
                raise ServiceError(f"{self.url} sent more than {most_bytes:,} bytes, which no such answer has")
            if time.monotonic() - began > longest:
                raise ServiceError(f"{self.url} was not done after {longest:g} seconds: it may be busy, or stuck")
            yield part

    @contextmanager
    def _errors_as_service_error(self) -> Iterator[None]:
        """Turn errors of the connection and malformed answers into a `ServiceError` of one line."""
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
                said = _error_message(response.json())
            except (ValueError, RecursionError):
                said = response.text
            # llama.cpp has metrics only if it is started with them.
            hint = ": start it with --metrics" if response.request.url.path == "/metrics" else ""
            path = response.request.url.path
            raise ServiceError(f"{self.url} refused {path} ({response.status_code}): {_short(said)}{hint}")
        return response


def _counts(value: Any) -> TypeGuard[int]:
    """Return whether a value is a positive integer of plausible size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40


def _nameable(path: str) -> bool:
    """Return whether the system accepts a text as a path."""
    try:
        Path(path).exists()
    except (OSError, ValueError):
        return False
    return "\0" not in path


def _is_address(url: str) -> bool:
    """Return whether a text is the address of a server, without a user name, a key or a query in it."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in parts.hostname
        httpx2.URL(url)
        if url.isascii():
            (parts.hostname or "").encode("idna")  # fails for a name that no host can have
    except (ValueError, httpx2.InvalidURL):
        return False
    return bool(whole) and not (parts.query or parts.fragment or parts.username or parts.password)


def is_loopback(host: str) -> bool:
    """Return whether a host can only be this machine: "localhost", or an address of its loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def server_processes(url: str) -> tuple[psutil.Process, ...]:
    """Return the process on this machine that listens at a local URL, and its children; none if it cannot be seen."""
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
    """Return the resident memory of processes in bytes, or None if they cannot be seen any more."""
    try:
        return sum(process.memory_info().rss for process in processes if process.is_running()) or None
    except psutil.Error:
        return None


def _steps(came: Sequence[float], tokens: int, ended: float) -> tuple[float, ...]:
    """Return the times of the tokens after the first. If several arrived at once, all tokens share the time equally."""
    if tokens <= 1:
        return ()
    if len(came) == tokens:
        return tuple(later - before for before, later in pairwise(came))
    return ((ended - came[0]) / (tokens - 1),) * (tokens - 1)


def _error_message(document: Any) -> str:
    error = document.get("error", document) if isinstance(document, dict) else document
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."

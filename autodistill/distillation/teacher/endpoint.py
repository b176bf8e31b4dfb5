"""Client for a model behind an OpenAI-compatible HTTP endpoint, with retries when they can help."""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from autodistill.errors import EndpointError, InputError, RefusedPromptError

KEY_VARIABLE = "AUTODISTILL_API_KEY"


# Statuses of a server, or its gateway, that is busy or restarting.
_PASSING = (408, 425, 429, 500, 502, 503, 504)

# Statuses that concern the prompt, for example because it is too long or filtered.
_OF_THE_PROMPT = (400, 413, 422)

_LONGEST_PAUSE = 60.0

_SHOWN = 200  # characters of a server's message that are shown

_MOST_SAID = 2**16  # bytes of an error message that are read

# Most bytes of an answer: a base for its text and what servers add, and a part for each token or candidate token.
_MOST_BYTES, _TOKEN_BYTES = 2**24, 2**10


@dataclass(frozen=True)
class Choice:
    """A token's text, its id on the server if the server reports it, and its log-probability."""

    text: str
    id: int | None
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply of an endpoint.

    Attributes:
        text: The answer. It is empty if the model wrote none, for example if it reached the limit while reasoning.
        finished: Whether the answer ended by itself, not at the token limit.
        prompt_tokens, answer_tokens: Tokens as the server counts and bills them.
        tokens: The answer's tokens, each with the most likely tokens in its place. Empty if the server reports none.
    """

    text: str
    finished: bool
    prompt_tokens: int
    answer_tokens: int
    tokens: tuple[tuple[Choice, tuple[Choice, ...]], ...]


class Endpoint:
    """Asks one model for chat completions. Several threads may use it.

    A request is repeated if its failure may be temporary (a busy server, a time-out, a torn answer). The pause between
    requests doubles each time, unless the server asks for a longer one. The key, if any, is read from
    AUTODISTILL_API_KEY. It is sent only to this endpoint and never shown. Redirections are not followed. An answer that
    is longer than any real one is not read to its end.

    Args:
        url: Base of the API, like "http://localhost:8000/v1".
        model: The model's name at the endpoint.
        timeout: Seconds after which an answer is given up, even if a part of it has arrived.
        attempts: Most requests per answer.
        pause: Seconds before the second request.

    Raises:
        InputError: The URL is not http(s), or no header can hold the key.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 300.0, attempts: int = 6, pause: float = 1.0) -> None:
        if not _is_base(url):
            raise InputError("--endpoint is the base of an API, like http://localhost:8000/v1, without key or query")
        self.url = url.rstrip("/")
        self.model = model
        self._timeout, self._attempts, self._pause = timeout, attempts, pause
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"{KEY_VARIABLE} is not one line of printable ASCII: set it to the key alone")
        # A server that never answered is not retried: waiting for it would hide a wrong address.
        self._reached = threading.Event()

    def ask(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, top_logprobs: int = 0, **options: Any
    ) -> Reply:
        """Return the answer to messages.

        Args:
            messages: Messages, each with "role" and "content".
            max_tokens: Number of tokens after which the answer ends unfinished.
            top_logprobs: Number of most likely tokens to ask for in each place. 0 asks for none.
            options: Further fields of the request, such as temperature, top_p and seed.

        Raises:
            RefusedPromptError: The endpoint refused these messages. It may answer others.
            EndpointError: The endpoint cannot be reached, refused the request, or gave no proper answer in all
                attempts.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, **options}
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        most = _MOST_BYTES + _TOKEN_BYTES * max_tokens * (1 + top_logprobs)
        trouble = ""
        for attempt in range(self._attempts):
            wait = self._pause * 2**attempt
            try:
                return _reply(json.loads(self._exchange("/chat/completions", body, most)))
            except urllib.error.HTTPError as error:
                self._reached.set()
                said = self._said(error)
                if error.code not in _PASSING:
                    kind = RefusedPromptError if error.code in _OF_THE_PROMPT else EndpointError
                    raise kind(f"{self.url} refused ({error.code}): {said}{self._advice(error.code)}") from None
                trouble = f"answered {error.code}: {said}"
                wait = max(wait, _retry_after(error))
            except TimeoutError:
                trouble = f"gave no answer in {self._timeout:g} seconds"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    trouble = f"gave no answer in {self._timeout:g} seconds"
                elif not self._reached.is_set():
                    raise self._unreachable(reason) from None
                else:
                    trouble = f"broke off ({self._shown(reason) or type(error).__name__})"
            except (ValueError, RecursionError) as error:
                trouble = f"answered nonsense ({self._shown(error)})"
            if attempt + 1 < self._attempts:
                time.sleep(min(wait, _LONGEST_PAUSE))
        raise EndpointError(f"{self.url} {trouble}, {self._attempts} times: try again later")

    def reach(self) -> None:
        """Contact the endpoint before other work depends on it. Any reply shows that it can be reached.

        Raises:
            EndpointError: The endpoint cannot be reached, or it refuses the key.
        """
        try:
            self._exchange("/models")
        except urllib.error.HTTPError as error:
            self._reached.set()
            if advice := self._advice(error.code) if error.code != 404 else "":
                raise EndpointError(f"{self.url} refused ({error.code}): {self._said(error)}{advice}") from None
        except (OSError, http.client.HTTPException) as error:
            if not self._reached.is_set():
                raise self._unreachable(getattr(error, "reason", error)) from None

    def _unreachable(self, reason: object) -> EndpointError:
        said = self._shown(reason)
        return EndpointError(f"{self.url} cannot be reached ({said}): start the server, or correct --endpoint")

    def _exchange(self, path: str, body: Mapping[str, Any] | None = None, most: int = _MOST_BYTES) -> bytes:
        """Return the server's reply to a request, which may have at most `most` bytes.

        Raises:
            EndpointError: The reply is longer.
        """
        request = urllib.request.Request(
            f"{self.url}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "User-Agent": "autodistill"},
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with exchange(request, self._timeout) as response:
            self._reached.set()
            answer = response.read(most + 1)
        if len(answer) > most:
            raise EndpointError(f"{self.url} sent more than {most:,} bytes, which no answer has: correct --endpoint")
        return answer

    def _said(self, error: urllib.error.HTTPError) -> str:
        """Return the error that the server reports, or the address to which it redirects."""
        if 300 <= error.code < 400:
            return self._shown(f"it redirects to {error.headers.get('Location')}")
        try:
            text = error.read(_MOST_SAID).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            message = json.loads(text)["error"]
            text = message["message"] if isinstance(message, dict) else str(message)
        except (ValueError, KeyError, TypeError, RecursionError):
            text = text or error.reason
        return self._shown(text)

    def _shown(self, trouble: object) -> str:
        """Return an error in one line, without the key, which some servers repeat."""
        text = str(trouble)
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_SHOWN]

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"; set {KEY_VARIABLE} to a key of this endpoint"
        if 300 <= status < 400:
            return ", which is not followed: give --endpoint as the address that answers"
        return "; correct --endpoint or --model" if status == 404 else ""


def _is_base(url: str) -> bool:
    """Return whether a URL can be extended by paths and contains nothing secret."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:  # brackets without an end, an invalid port, or an invalid host name
        return False
    plain = parts.path.isascii() and "@" not in parts.netloc and not parts.query and port != 0
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return max(0.0, float(error.headers.get("Retry-After") or 0))
    except ValueError:  # a date; the doubling pause is used instead
        return 0.0


def _reply(answer: Any) -> Reply:
    """Read a chat completion.

    Raises:
        ValueError: The answer is not a chat completion.
    """
    try:
        (choice, *_) = answer["choices"]
        text, usage = choice["message"].get("content"), answer.get("usage") or {}
        if text is None and choice.get("finish_reason"):
            text = ""  # null or missing, because all tokens went into reasoning or a filter removed them
        if not isinstance(text, str):
            raise ValueError("no text in its message")
        # Servers without log-probabilities leave them out, or send null.
        content = (choice.get("logprobs") or {}).get("content") or ()
        return Reply(
            text=_whole(text),
            finished=choice.get("finish_reason") != "length",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            answer_tokens=int(usage.get("completion_tokens") or 0),
            tokens=tuple((_choice(one), tuple(map(_choice, one.get("top_logprobs") or ()))) for one in content),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"no chat completion: {type(error).__name__} {error}") from error


def _whole(text: str) -> str:
    """Return text without lone halves of UTF-16 pairs, which JSON allows but tokenizers and files do not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _choice(entry: Mapping[str, Any]) -> Choice:
    given = entry.get("id")
    return Choice(_whole(str(entry["token"])), int(given) if given is not None else None, float(entry["logprob"]))


def exchange(request: urllib.request.Request, seconds: float) -> http.client.HTTPResponse:
    """Send a request, and return a response whose status, headers and body share one deadline.

    A redirection raises an error with its status, like any other status without success. Otherwise urllib would turn a
    POST into a GET of the new address, and return its answer.

    Args:
        request: An http or https request.
        seconds: Time after which any read, even of the body, raises TimeoutError, even if a part has arrived.

    Raises:
        TimeoutError, OSError, http.client.HTTPException: As for `urllib.request.urlopen`.
    """
    until = time.monotonic() + seconds
    opener = urllib.request.build_opener(_Http(until), _Https(until), _NoRedirection())
    return cast(http.client.HTTPResponse, opener.open(request, timeout=seconds))


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """Refuse the redirection by returning no new request (see `urllib.request`)."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, http.client.HTTPConnection, self._until), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, until: float) -> None:
        super().__init__()
        self._until = until

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, http.client.HTTPSConnection, self._until), request)


def _connection(kind: type[http.client.HTTPConnection], until: float, host: str, **options: Any) -> Any:
    connection = kind(host, **options)
    connection.response_class = partial(_Response, until=until)  # type: ignore[assignment]
    return connection


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, until: float, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Until(self.fp.detach(), sock, until))


class _Until(io.RawIOBase):
    """Reads a socket, and waits only until a deadline."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float) -> None:
        self._raw, self._sock, self._until = raw, sock, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer (see `io`), or raise TimeoutError after the deadline."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()

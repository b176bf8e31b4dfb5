"""A small server that answers, stalls, refuses and talks nonsense, and how the client reacts."""

from __future__ import annotations

import contextlib
import email.message
import io
import json
import math
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from autodistill.distillation.teacher.endpoint import Choice, Endpoint
from autodistill.errors import EndpointError, InputError, RefusedPromptError

ASK = [{"role": "user", "content": "hi"}]
GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "ho"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2},
}


class Server:
    """Answers each request by its next script, and repeats the last one. Keeps all requests."""

    def __init__(self, *scripts: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    script = scripts[min(len(server.requests), len(scripts) - 1)]
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                script(self)

            def do_GET(self) -> None:
                server.headers.append(dict(self.headers))
                send(200, {"moved": True})(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def send(status: int, body: Any, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def script(handler: BaseHTTPRequestHandler) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return script


def _telling(**fields: Any) -> dict[str, Any]:
    """Return an answer with one token that has these fields in its log-probabilities."""
    entry = {"token": "ho", "logprob": -0.5, "top_logprobs": [], **fields}
    return GOOD | {"choices": [GOOD["choices"][0] | {"logprobs": {"content": [entry]}}]}


def stall(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def torn(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("AUTODISTILL_API_KEY", raising=False)
    started: list[Server] = []

    def start(*scripts: Callable[[BaseHTTPRequestHandler], None]) -> Server:
        started.append(Server(*scripts))
        return started[-1]

    yield start
    for server in started:
        server.close()


def client(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(server.url, "big", **({"timeout": 10.0, "attempts": 3, "pause": 0.01} | changes))


def test_a_chat_completion_is_asked_for_and_read(serve: Callable[..., Server]) -> None:
    entry = {"token": "ho", "logprob": -0.5, "top_logprobs": [{"token": "hi", "logprob": -1.0, "id": 4}]}
    content = {"choices": [GOOD["choices"][0] | {"logprobs": {"content": [entry]}, "finish_reason": "length"}]}
    server = serve(send(200, GOOD | content))
    reply = client(server).ask(ASK, max_tokens=9, top_logprobs=5, temperature=0.5)
    assert server.requests == [
        {"model": "big", "messages": ASK, "max_tokens": 9, "logprobs": True, "top_logprobs": 5, "temperature": 0.5}
    ]
    assert (reply.text, reply.finished, reply.prompt_tokens, reply.answer_tokens) == ("ho", False, 7, 2)
    assert reply.tokens == ((Choice("ho", None, -0.5), (Choice("hi", 4, -1.0),)),)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "message", [{"content": None}, {"content": None, "reasoning_content": "so"}, {}, {"content": ""}]
)
@pytest.mark.parametrize(("reason", "finished"), [("length", False), ("stop", True)])
def test_an_answer_without_a_word_is_one_that_was_paid_for(
    serve: Callable[..., Server], message: dict[str, Any], reason: str, finished: bool
) -> None:
    choice = {"message": {"role": "assistant", **message}, "finish_reason": reason}
    server = serve(send(200, GOOD | {"choices": [choice]}))
    reply = client(server).ask(ASK, max_tokens=9)
    assert (reply.text, reply.finished, reply.answer_tokens) == ("", finished, 2)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "trouble",
    [send(429, {}), send(500, b"oops"), send(503, {}), hang_up, torn, send(200, b"<html>"), send(200, {"no": 1})],
)
def test_what_may_pass_is_asked_again(serve: Callable[..., Server], trouble: Any) -> None:
    server = serve(send(503, {}), trouble, send(200, GOOD))
    assert client(server).ask(ASK, max_tokens=9).text == "ho"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (send(429, {"error": {"message": "slow down"}}), r"answered 429: slow down, 3 times: try again later"),
        (send(500, b"oops\nand more"), r"answered 500: oops and more, 3 times"),
        (send(200, b"<html>"), r"answered nonsense \(.*\), 3 times"),
        (send(200, {"choices": []}), r"answered nonsense"),
        (send(200, {"choices": [{"message": {"content": None}}]}), r"nonsense \(no text in its message\)"),
        (send(200, [1]), r"answered nonsense \(no chat completion"),
        (send(200, GOOD | {"usage": {"prompt_tokens": math.inf}}), r"answered nonsense \(no chat completion: Overflow"),
        (send(200, _telling(id=math.inf)), r"answered nonsense \(no chat completion: Overflow"),
        (send(200, _telling(logprob=10**400)), r"answered nonsense \(no chat completion: Overflow"),
        (send(200, b"[" * 100_000), r"answered nonsense \(maximum recursion depth"),
        (send(503, b"[" * 100_000), r"answered 503"),
    ],
)
def test_what_does_not_pass_is_said(serve: Callable[..., Server], script: Any, said: str) -> None:
    server = serve(script)
    with pytest.raises(EndpointError, match=said) as caught:
        client(server).ask(ASK, max_tokens=9)
    assert len(server.requests) == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "AUTODISTILL_API_KEY"), (402, "no more"), (403, "AUTODISTILL_API_KEY"), (404, "--model")],
)
def test_what_cannot_pass_is_said_at_once(serve: Callable[..., Server], status: int, advice: str) -> None:
    server = serve(send(status, {"error": {"message": "no more"}}))
    with pytest.raises(EndpointError, match=rf"refused \({status}\): no more.*") as caught:
        client(server).ask(ASK, max_tokens=9)
    assert not isinstance(caught.value, RefusedPromptError)
    assert advice in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_wrong_with_one_prompt_is_told_apart(serve: Callable[..., Server], status: int) -> None:
    server = serve(send(status, {"error": {"message": "too long"}}), send(200, GOOD))
    asker = client(server)
    with pytest.raises(RefusedPromptError, match=rf"refused \({status}\): too long$"):
        asker.ask(ASK, max_tokens=9)
    assert asker.ask(ASK, max_tokens=9).text == "ho"
    assert len(server.requests) == 2


def test_a_slow_server_is_given_up(serve: Callable[..., Server]) -> None:
    server = serve(stall)
    with pytest.raises(EndpointError, match=r"gave no answer in 0.1 seconds, 3 times"):
        client(server, timeout=0.1).ask(ASK, max_tokens=9)


@pytest.mark.parametrize("beginning", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX-Slow: "])
def test_a_server_that_keeps_the_line_open_is_given_up(serve: Callable[..., Server], beginning: bytes) -> None:
    """It sends blanks, as a gateway does while it queues, and then the answer.

    Each part comes in time, but not the whole.
    """

    def drip(handler: BaseHTTPRequestHandler) -> None:
        with suppress(OSError):
            handler.wfile.write(beginning)
            for _ in range(10):
                handler.wfile.write(b" ")
                time.sleep(0.05)
            handler.wfile.write((b"" if beginning.endswith(b"\n") else b"\r\n\r\n") + json.dumps(GOOD).encode())

    with pytest.raises(EndpointError, match=r"gave no answer in 0.2 seconds, 1 times"):
        client(serve(drip), timeout=0.2, attempts=1).ask(ASK, max_tokens=9)
    assert client(serve(drip), timeout=10.0).ask(ASK, max_tokens=9).text == "ho"


def test_a_first_answer_that_is_torn_is_asked_for_again(serve: Callable[..., Server]) -> None:
    server = serve(torn, send(200, GOOD))
    assert client(server).ask(ASK, max_tokens=9).text == "ho"
    assert len(server.requests) == 2


def test_halves_of_characters_are_replaced(serve: Callable[..., Server]) -> None:
    content = _telling(token="\ud83d")["choices"][0] | {"message": {"content": "a\ud800b \ud83d\ude00 \udc00"}}
    reply = client(serve(send(200, GOOD | {"choices": [content]}))).ask(ASK, max_tokens=9)
    assert reply.text == "a\ufffdb \U0001f600 \ufffd"
    assert reply.tokens[0][0].text == "\ufffd"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed(
    status: int, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not even followed to a proper answer. A GET would go to a server that nobody named."""
    monkeypatch.setenv("AUTODISTILL_API_KEY", "secret")
    other = serve(send(200, GOOD))
    server = serve(send(status, b"", Location=f"{other.url}/chat/completions"))
    with pytest.raises(EndpointError, match=rf"refused \({status}\): it redirects to {other.url}/.*, which is not fol"):
        client(server).ask(ASK, max_tokens=9)
    assert len(server.requests) == 1
    assert (other.requests, other.headers) == ([], [])


def test_a_redirection_is_said_before_anything_is_asked(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = email.message.Message()
    headers["Location"] = "http://elsewhere/v1/models"
    error = urllib.error.HTTPError("", 301, "moved", headers, io.BytesIO(b""))
    monkeypatch.setattr("autodistill.distillation.teacher.endpoint.exchange", lambda request, seconds: _raise(error))
    with pytest.raises(EndpointError, match=r"refused \(301\): it redirects to http://elsewhere/v1/models"):
        client(serve(send(200, GOOD))).reach()


def endless(status: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a script that answers up to 200 MB, without a length, as far as the client reads it."""

    def script(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        sent.clear()
        with contextlib.suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b" " * 10**6)
                sent.append(10**6)

    return script


sent: list[int] = []


@pytest.mark.parametrize(
    ("status", "said"), [(200, r"sent more than \d\d,\d{3},\d{3} bytes"), (400, r"refused \(400\)")]
)
def test_an_answer_that_does_not_end_is_not_read_to_its_end(
    status: int, said: str, serve: Callable[..., Server]
) -> None:
    server = serve(endless(status))
    with pytest.raises((EndpointError, RefusedPromptError), match=said):
        client(server).ask(ASK, max_tokens=9, top_logprobs=20)
    assert len(server.requests) == 1
    assert sum(sent) < 60 * 10**6


def test_an_answer_with_many_told_tokens_is_read(serve: Callable[..., Server]) -> None:
    """There are 20 tokens at each of 200 positions, each with the bytes that servers spell out."""
    one = {"token": "word", "logprob": -12.345678, "bytes": [119, 111, 114, 100] * 40}
    content = [one | {"top_logprobs": [one] * 20}] * 200
    answer = GOOD | {"choices": [GOOD["choices"][0] | {"logprobs": {"content": content}}]}
    reply = client(serve(send(200, answer))).ask(ASK, max_tokens=200, top_logprobs=20)
    assert len(reply.tokens) == 200


def test_whatever_a_server_answers_it_is_there(serve: Callable[..., Server]) -> None:
    server = serve(send(200, GOOD))
    client(server).reach()
    assert not server.requests
    assert server.headers


def test_a_key_that_is_refused_is_said_before_anything_is_asked(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = urllib.error.HTTPError("", 401, "no", None, io.BytesIO(b"{}"))  # type: ignore[arg-type]
    monkeypatch.setattr("autodistill.distillation.teacher.endpoint.exchange", lambda request, seconds: _raise(error))
    with pytest.raises(EndpointError, match=r"refused \(401\): .*AUTODISTILL_API_KEY"):
        client(serve(send(200, GOOD))).reach()


def _raise(error: Exception) -> None:
    raise error


def test_nobody_there_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match=r"cannot be reached .*refused.*: start the server"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "big", pause=60).ask(ASK, max_tokens=9)
    with pytest.raises(EndpointError, match=r"cannot be reached .*refused.*: start the server"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "big").reach()


def test_the_pause_doubles_and_is_at_least_what_the_server_asks(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("autodistill.distillation.teacher.endpoint.time.sleep", pauses.append)
    busy = send(429, {}, Retry_After="7")
    server = serve(send(503, {}), send(503, {}), busy, send(429, {}, Retry_After="9999"), send(200, GOOD))
    client(server, attempts=5, pause=1.0).ask(ASK, max_tokens=9)
    assert pauses == [1.0, 2.0, 7.0, 60.0]


def test_the_key_goes_to_the_endpoint_alone_and_is_never_shown(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTODISTILL_API_KEY", "sk-very-secret")
    server = serve(send(401, {"error": {"message": "wrong key sk-very-secret"}}))
    with pytest.raises(EndpointError) as caught:
        client(server).ask(ASK, max_tokens=9)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(caught.value)
    assert "wrong key ***" in str(caught.value)


@pytest.mark.parametrize("repeat", ["nonsense", "status"])
def test_a_key_that_a_broken_answer_repeats_is_not_shown(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, repeat: str
) -> None:
    monkeypatch.setenv("AUTODISTILL_API_KEY", "sk-very-secret\n")

    def script(handler: BaseHTTPRequestHandler) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        if repeat == "status":
            handler.wfile.write(f"{key}\r\n\r\n".encode())
            handler.close_connection = True
            return
        entry = {"token": "ho", "logprob": key}
        send(200, GOOD | {"choices": [GOOD["choices"][0] | {"logprobs": {"content": [entry]}}]})(handler)

    with pytest.raises(EndpointError, match=r"\*\*\*") as caught:
        client(serve(send(503, {}), script)).ask(ASK, max_tokens=9)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-secret-1\nsk-secret-2", "sk-secret-\u20ac", "sk-secret-\xe9", "sk-secret\x7f"])
def test_a_key_that_no_header_holds_is_refused_before_anything_is_asked(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("AUTODISTILL_API_KEY", key)
    server = serve(send(200, GOOD))
    with pytest.raises(InputError, match="AUTODISTILL_API_KEY is not one line of printable ASCII") as caught:
        client(server)
    assert "secret" not in str(caught.value)
    assert not server.requests


URLS = ["localhost:8000", "file:///etc/passwd", "http://", "https://me:secret@host/v1", "https://:secret@host/v1", ""]
URLS += ["http://[::1/v1", "http://localhost:eight/v1", "http://localhost:99999/v1", "http://localhost/v1/\xe9"]


@pytest.mark.parametrize("url", URLS)
def test_only_a_plain_base_is_taken(url: str) -> None:
    with pytest.raises(InputError, match="http://localhost:8000/v1") as caught:
        Endpoint(url, "big")
    assert "secret" not in str(caught.value)

"""A client of a server that never ends: answers that come byte by byte, or without bound, are given up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import ServiceError
from autodistill.service import client as module
from autodistill.service.client import Client

_EVENT = {"choices": [{"text": "a", "finish_reason": None}]}
_MODELS = {"data": [{"id": "student"}]}


class _Endless(BaseHTTPRequestHandler):
    """Pages that begin well. Those of `/slow` never end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/models":
            self.wfile.write(json.dumps(_MODELS).encode())
        else:
            self._without_end(b"# more\n" * 10_000)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        event = f"data: {json.dumps(_EVENT)}\n\n".encode()
        if asked["max_tokens"] == 3:
            # Split inside lines, as a network may do.
            text = b": a comment\nevent: x\n" + 3 * event + b"data: [DONE]\n\ndata: {\n\n"
            for place in range(0, len(text), 7):
                self.wfile.write(text[place : place + 7])
                self.wfile.flush()
        else:
            self._without_end(event)

    def _without_end(self, part: bytes) -> None:
        try:
            while True:
                self.wfile.write(part)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_events_are_read_as_they_are_cut_and_up_to_the_last(url: str) -> None:
    with Client(url) as client:
        answer = client.complete([1], 3)
    assert (answer.tokens, answer.text, len(answer.token_seconds)) == (3, "aaa", 2)


@pytest.mark.parametrize("told", [{}, {"predicted_per_token_ms": float("nan")}, {"predicted_per_token_ms": 1e308}])
def test_an_answer_that_is_counted_and_not_shown_takes_the_time_until_it_was_counted(
    told: dict[str, float], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"usage": {"completion_tokens": 5}, "timings": told}
    monkeypatch.setattr(Client, "_events", lambda *given: iter([event]))
    with Client(url) as client:
        answer = client.complete([1], 5)
    assert answer.tokens == 5
    assert 0 < answer.first_seconds < 5
    assert len(answer.token_seconds) == 4
    assert min(answer.token_seconds) > 0


def test_a_first_token_that_is_held_back_is_timed_by_the_servers_own_clock(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    # An answer of five tokens, 0.1 seconds each, of which the first three make one character.
    said: tuple[tuple[float, dict[str, Any]], ...] = (
        (0.4, _EVENT),
        (0.5, _EVENT),
        (0.6, {"choices": [{"text": "a", "finish_reason": "length"}]}),
        (0.6, {"usage": {"completion_tokens": 5}, "timings": {"predicted_per_token_ms": 100.0}}),
    )

    def events(*given: Any) -> Iterator[dict[str, Any]]:
        for clock[0], event in said:
            yield event

    monkeypatch.setattr(Client, "_events", events)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    with Client(url) as client:
        answer = client.complete([1], 5)
    # By the client's clock alone, the first took 0.4 seconds, and each later one half of its time.
    assert answer.first_seconds == pytest.approx(0.2)
    assert answer.token_seconds == pytest.approx([0.1] * 4)


def test_what_has_no_end_is_given_up_by_its_size_and_by_its_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(url) as client:
        with pytest.raises(ServiceError, match="sent more than"):
            client.complete([1], 1)
        with pytest.raises(ServiceError, match="sent more than"):
            client.counters()
    monkeypatch.setattr(module, "_MOST_BYTES", 10**15)
    with Client(url, longest=0.0) as client, pytest.raises(ServiceError, match="was not done after 0 seconds"):
        client.counters()


def test_memory_is_of_its_processes_without_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = iter([None, 900, 950, 50])
    monkeypatch.setattr(module, "memory_of", lambda processes: next(seen))
    monkeypatch.setattr(module, "server_processes", lambda url: ("one",))
    with Client("http://127.0.0.1:9") as client:
        monkeypatch.setattr(client, "_interpreter_bytes", lambda: 100)
        assert [client.memory_bytes() for _ in range(3)] == [800, 850, 0]
    with Client("http://192.0.2.1:9") as elsewhere:
        assert elsewhere.memory_bytes() is None

"""The smoke test for vLLM: it sends and receives tokens, and accepts nine right answers out of ten.

vLLM itself needs a GPU. A stand-in answers like its server, with as many wrong answers as a test asks for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from autodistill.bundle.write import write_bundle
from tests.bundle.test_bundle import smoke

KEY = "a-key-of-some-length"


class Answers(ThreadingHTTPServer):
    """Server that returns the recorded answers, except for some.

    Args:
        recorded: Content of answers.json.
    """

    def __init__(self, recorded: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        written = recorded["written"]
        places = {tuple(one["prompt"]): one["answer"] for one in recorded["questions"]}
        places |= {
            tuple(written["prompt"] + written["answer"][:number]): token
            for number, token in enumerate(written["answer"])
        }
        self.places, self.wrong, self.student = places, 0, recorded["student"]


class _Handler(BaseHTTPRequestHandler):
    server: Answers

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self._answer(200, "vllm:num_requests_running 0\n" if self.path == "/metrics" else "")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self._answer(401, "{}")
        if self.path != "/v1/completions" or asked["model"] != self.server.student or asked["max_tokens"] != 1:
            return self._answer(400, "{}")
        if isinstance(asked["prompt"], str):
            return self._answer(200, json.dumps({"choices": [{"text": " there"}]}))
        if asked["return_token_ids"] is not True or asked["temperature"] != 0:
            return self._answer(400, "{}")
        token = self.server.places[tuple(asked["prompt"])] + (self.server.wrong > 0)
        self.server.wrong -= 1
        return self._answer(200, json.dumps({"choices": [{"text": "x", "token_ids": [token]}]}))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def bundle(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "bundle"
    write_bundle(packed, out)
    return out


@pytest.fixture
def answers(bundle: Path) -> Iterator[Answers]:
    with Answers(json.loads((bundle / "answers.json").read_text())) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("wrong", "code"), [(0, 0), (2, 0), (20, 1)])
def test_nine_answers_of_ten_are_enough(wrong: int, code: int, bundle: Path, answers: Answers, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    answers.wrong = wrong
    done = smoke(bundle, f"http://127.0.0.1:{answers.server_port}", key)
    assert (done.returncode, done.stderr) == (code, "")
    count = len(answers.places)
    assert f"{count - wrong} of {count} answers" in done.stdout

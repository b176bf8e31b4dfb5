"""Run docs/examples/route.py between two servers of this process that speak OpenAI's protocol."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "docs" / "examples" / "route.py"
# The small model's probability of each of two tokens, by question.
SURE = {"easy": (0.99, 0.96), "hard": (0.9, 0.1)}


class Server(ThreadingHTTPServer):
    """Answers with its name, and records what it was asked."""

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.asked = name, list[dict[str, Any]]()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        question = body["messages"][-1]["content"]
        choice: dict[str, Any] = {"message": {"content": f"{self.server.name} on {question}"}}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"logprob": math.log(p)} for p in SURE[question]]}
        told = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    pair = Server("small"), Server("large")
    for one in pair:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield pair
    for one in pair:
        one.shutdown()
        one.server_close()


def test_what_is_not_sure_enough_is_asked_of_the_large_model(servers: tuple[Server, Server]) -> None:
    small, large = servers
    urls = [f"http://127.0.0.1:{one.server_address[1]}" for one in servers]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *urls, "0.9"],
        input="easy\n\nhard\n",
        capture_output=True,
        text=True,
        check=True,
        env={"API_KEY": "secret"},
    )
    easy, hard = (math.sqrt(one * two) for one, two in SURE.values())
    assert done.stdout.splitlines() == [f"small ({easy:.3f}): 'small on easy'", f"large ({hard:.3f}): 'large on hard'"]
    assert [one["messages"][0]["content"] for one in small.asked] == ["easy", "hard"]
    assert [one["messages"][0]["content"] for one in large.asked] == ["hard"]
    assert {one["temperature"] for one in (*small.asked, *large.asked)} == {0}
    assert {one["key"] for one in small.asked} == {"Bearer secret"}


def test_it_is_forty_lines_and_needs_python_alone() -> None:
    text = PROGRAM.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    imported = {line.split()[1].partition(".")[0] for line in imports}
    assert imported <= sys.stdlib_module_names

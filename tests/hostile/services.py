"""Servers with absurd answers, and records of drafts, as input of `monitor`, `load`, `chat` and `drafts`."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit, nothing
from tests.hostile.serving import PROMISES

_METRICS = "llamacpp:prompt_tokens_total 9\nllamacpp:tokens_predicted_total 9\nllamacpp:requests_processing 0\n"
_PROPS: dict[str, Any] = {"default_generation_settings": {"n_ctx": 512}, "total_slots": 2}
_MODELS: dict[str, Any] = {"data": [{"id": "student", "tags": []}]}
_DEEP = "[" * 100_000
_METRICS_CASES = {
    "nothing": "",
    "a-page": "<html>hello</html>",
    "bytes": "\xff\xfe\x00" * 100,
    "no-number": "llamacpp:tokens_predicted_total many\n",
    "not-finite": "llamacpp:tokens_predicted_total NaN\nllamacpp:requests_processing 1e999\n",
    "huge": "llamacpp:tokens_predicted_total 1e308\nllamacpp:requests_processing 1e308\n",
    "below": "llamacpp:tokens_predicted_total -5\nllamacpp:requests_processing -7\n",
    "open-label": 'llamacpp:tokens_predicted_total{a="' + "b" * 100_000,
    "more-than-a-page": "x" * (2**24 + 1),
}
_PROPS_CASES: dict[str, Any] = {
    "a-list": [],
    "a-word": "x",
    "none": None,
    "settings-a-list": _PROPS | {"default_generation_settings": [1]},
    "context-text": _PROPS | {"default_generation_settings": {"n_ctx": "512"}},
    "context-below": _PROPS | {"default_generation_settings": {"n_ctx": -5}},
    "context-huge": _PROPS | {"default_generation_settings": {"n_ctx": 10**30}},
    "context-true": _PROPS | {"default_generation_settings": {"n_ctx": True}},
    "no-slots": _PROPS | {"total_slots": 0},
    "path-number": _PROPS | {"model_path": 7},
    "path-of-another-file": _PROPS | {"model_path": "/etc/hostname"},
    "path-of-a-folder": _PROPS | {"model_path": "/"},
    "path-of-zero": _PROPS | {"model_path": "a\0b"},
    "path-long": _PROPS | {"model_path": "x" * 100_000},
}
_MODELS_CASES: dict[str, Any] = {
    "a-list": [],
    "empty": {"data": []},
    "none": {"data": None},
    "id-none": {"data": [{"id": None}]},
    "id-long": {"data": [{"id": "m" * 10**6}]},
    "id-steers-the-terminal": {"data": [{"id": "\x1b[2J\x1b]0;title\x07"}]},
    "tags-number": {"data": [{"id": "m", "tags": 5}]},
    "tag-no-number": {"data": [{"id": "m", "tags": ["interpreter-bytes=x"]}]},
    "tag-huge": {"data": [{"id": "m", "tags": ["interpreter-bytes=" + "9" * 5000]}]},
}
_EVENT = {"choices": [{"text": "a", "finish_reason": None}]}


def _events(*said: object) -> str:
    return "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in said)


_ANSWER = _events(_EVENT, _EVENT, {"choices": [], "usage": {"completion_tokens": 2}}, "[DONE]")
_ANSWERS: dict[str, str] = {
    "nothing": "",
    "no-events": "hello\n",
    "no-json": _events("{"),
    "a-number": _events("3"),
    "a-list": _events("[1]"),
    "none": _events("null"),
    "deep": _events(_DEEP),
    "choices-none": _events({"choices": None}),
    "choices-of-text": _events({"choices": ["a"]}),
    "choice-none": _events({"choices": [None]}),
    "text-number": _events({"choices": [{"text": 3, "finish_reason": None}]}),
    "usage-a-list": _events(_EVENT, {"usage": [1]}),
    "count-text": _events(_EVENT, _EVENT, {"usage": {"completion_tokens": "x"}}),
    "count-below": _events(_EVENT, {"usage": {"completion_tokens": -5}}),
    "count-huge": _events(_EVENT, {"usage": {"completion_tokens": 10**30}}),
    "timings-a-list": _events(_EVENT, _EVENT | {"timings": [1]}),
    "timings-text": _events(_EVENT, _EVENT | {"timings": {"draft_n": "x", "predicted_per_token_ms": "y"}}),
    "timings-huge": _events({"usage": {"completion_tokens": 5}, "timings": {"predicted_per_token_ms": 1e308}}),
    "timings-not-finite": _events('{"usage": {"completion_tokens": 5}, "timings": {"predicted_per_token_ms": NaN}}'),
    "an-error": _events({"error": {"message": "x" * 10**6}}),
    "an-error-none": _events({"error": None}),
    "a-long-line": "data: " + "x" * 2**23,
}
_RECORDS: dict[str, str] = {
    "nothing": "{}",
    "a-number": "3",
    "target-number": json.dumps({"event": "drafted", "target": 3}),
    "torn": '{"event": "drafted", "target": ',
    "deep": _DEEP,
    "no-text": "\0\xff",
}


class _Handler(BaseHTTPRequestHandler):
    """Answers below "/KIND/NAME/" as a server does, except for one page that the case defines."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        if self.path.count("/") < 3:  # a client has followed the header below
            self.send_error(404)
            return
        _, kind, name, path = self.path.split("/", 3)
        pages: dict[str, Any] = {
            "metrics": _METRICS,
            "props": _PROPS | ({"model_path": _student[0]} if _student else {}),
            "v1/models": _MODELS,
            "v1/completions": _ANSWER,
            "health": {"status": "ok"},
        }
        place, cases = _KINDS[kind]
        if place == path:
            pages[path] = cases[name]
        said = pages.get(path)
        status = int(name) if kind == "status" and path != "health" else 404 if path not in pages else 200
        body = said if isinstance(said, str) else json.dumps(said)
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        try:
            self.wfile.write(body.encode("latin-1", "replace"))
            while kind == "endless" and path.startswith(name):
                self.wfile.write(_events(_EVENT).encode() if path.startswith("v1/c") else b"# more\n" * 1000)
        except OSError:
            pass  # the client has closed the connection

    def log_message(self, *_: object) -> None:
        """Say nothing."""


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "metrics": ("metrics", _METRICS_CASES),
    "props": ("props", _PROPS_CASES),
    "models": ("v1/models", _MODELS_CASES),
    "answer": ("v1/completions", _ANSWERS),
    "status": ("", {str(code): None for code in (302, 401, 403, 404, 500, 503)}),
    "endless": ("", {"metrics": None, "v1": None}),
    "whole": ("", {"x": None}),
}
_student: list[str] = []
"""The file that servers claim to serve. They answer in this process, which knows the file once the kit has it."""


@cache
def _server() -> ThreadingHTTPServer:
    """Return the one server for all cases. It ends with this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    """Each case ends in a report, a warning or one line, whatever the other side says."""
    _student[:] = [str(kit.gguf)]
    base = f"http://127.0.0.1:{_server().server_port}"
    short = ("--prompt", "4", "--decoded", "2", "--streams", "1", "--time", "2s")

    def case(name: str, *argv: str, make: Callable[[Path], object] = nothing, codes: tuple[int, ...]) -> Case:
        return Case(area="services", name=name, argv=argv, make=make, codes=codes)

    for kind, (_, found) in _KINDS.items():
        for name in found:
            url, told = f"{base}/{kind}/{name}", f"{kind}-{name}"
            yield case(f"monitor-{told}", "monitor", url, "--time", "1ms", codes=(0,))
            yield case(f"load-{told}", "load", url, *short, codes=(0, 1, 2))
            if kind in ("models", "status", "endless"):
                yield case(f"chat-{told}", "chat", url, codes=(0, 1))
    yield case("monitor-json", "monitor", f"{base}/answer/count-huge", "--time", "1ms", "--json", codes=(0,))
    for name, document in PROMISES.items():

        def export(folder: Path, document: Any = document) -> None:
            """Make a student with such a promise."""
            shutil.copyfile(kit.gguf, folder / "student.gguf")
            (folder / "export.json").write_text(json.dumps({"row": "t001", "promise": document}), encoding="utf-8")

        words = ("load", f"{base}/whole/x", *short, "--promise", "student.gguf")
        yield case(f"load-promise-{name}", *words, make=export, codes=(2,))
    yield case("load-margin", "load", f"{base}/whole/x", *short, "--promise", "gone", "--margin", "-1", codes=(2,))
    gguf = str(kit.gguf)
    for name, record in _RECORDS.items():

        def recorded(folder: Path, record: str = record) -> None:
            """Make a record of drafts."""
            (folder / "drafts.jsonl").write_text(f"{record}\n", encoding="utf-8")

        yield case(f"record-{name}", "drafts", gguf, "--runs", ".", make=recorded, codes=(0, 2))
    whole = {"event": "drafted", "target": gguf, "draft": "a\x1b[2Jb", "drafted": 9, "accepted": 3, "time": "now"}
    figures = {"size_bytes": 1, "speed": 1.0, "speed_stderr": None, "expected": 1.0, "same": 1, "answers": 1}
    tried = whole | figures | {"how": "drafts", "tokens_per_pass": 1.0, "tokens_per_second": 1.0}
    wrong: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        "of-a-server": (whole | {"how": "serve"}, (0,)),
        "whole": (tried, (0,)),
        "of-nobody": (whole | {"how": "guess"}, (2,)),
        "no-speed": ({name: value for name, value in tried.items() if name != "speed"}, (2,)),
        "speed-text": (tried | {"speed": "fast"}, (2,)),
        "draft-number": (tried | {"draft": 3}, (2,)),
        "counts-below": (tried | {"drafted": -1, "accepted": -5}, (0,)),
        "counts-huge": (tried | {"drafted": 10**400, "accepted": 10**400}, (0, 2)),
        "size-huge": (tried | {"size_bytes": 10**400}, (0, 2)),
    }
    for name, (event, codes) in wrong.items():
        line = json.dumps(event)

        def kept(folder: Path, line: str = line) -> None:
            """Make a record of a draft of the student."""
            (folder / "drafts.jsonl").write_text(f"{line}\n", encoding="utf-8")

        yield case(f"recorded-{name}", "drafts", gguf, "--runs", ".", make=kept, codes=codes)
    yield case("drafts-gone", "drafts", "gone.gguf", codes=(2,))
    yield case("drafts-gone-draft", "drafts", gguf, "gone.gguf", codes=(2,))
    yield case("drafts-folder", "drafts", str(kit.teacher), gguf, codes=(2,))
    yield case("drafts-folder-as-draft", "drafts", gguf, str(kit.teacher), codes=(2,))
    for option, value in (
        *(("time", one) for one in ("0s", "1d", "soon")),
        *(("prompts", one) for one in ("0", "x", "9" * 30)),
        *(("prompt", one) for one in ("0", "-3", "9" * 30)),
        *(("decoded", one) for one in ("2", "x", "9" * 30)),
        *(("threads", one) for one in ("-1", "x")),
    ):
        yield case(f"drafts-{option}-{value[:6]}", "drafts", gguf, gguf, f"--{option}", value, codes=(2,))
    yield case("drafts-text", "drafts", gguf, gguf, "--text", "no-such-folder/of-text", codes=(2,))

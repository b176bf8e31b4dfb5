"""Exports that are served or promise something: `serve.json`, `export.json`, keys, sockets, addresses."""

from __future__ import annotations

import json
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit, nothing

_WHOLE: dict[str, Any] = {
    "runtime": "llama.cpp",
    "model": "student.gguf",
    "context": 128,
    "slots": 1,
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "flash_attention": "auto",
    "command": ["touch", "ran"],
}
_LAUNCH: dict[str, Any] = {
    "no-object": [],
    "a-number": 7,
    "empty": {},
    "no-model": {key: value for key, value in _WHOLE.items() if key != "model"},
    "model-number": _WHOLE | {"model": 3},
    "context-text": _WHOLE | {"context": "128"},
    "context-none": _WHOLE | {"context": None},
    "context-one": _WHOLE | {"context": 1},
    "context-below": _WHOLE | {"context": -5},
    "context-huge": _WHOLE | {"context": 10**12},
    "context-true": _WHOLE | {"context": True},
    "slots-none": _WHOLE | {"slots": 0},
    "slots-huge": _WHOLE | {"slots": 10**9},
    "cache-unknown": _WHOLE | {"cache_type_k": "q1_0"},
    "cache-list": _WHOLE | {"cache_type_v": ["f16"]},
    "cache-that-does-not-divide": _WHOLE | {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    "flash-unknown": _WHOLE | {"flash_attention": "always"},
    "more-than-memory": _WHOLE | {"slots": 900_000, "context": 512},
}
_PROMISE: dict[str, Any] = {
    "context": 128,
    "streams": 1,
    "memory_bytes": 10**9,
    "device": None,
    "latency": [],
    "measured": {},
}
_LATE = {"quantity": "ttft", "percentile": 95, "seconds": 1.0, "streams": 1, "prompt": 512}
PROMISES: dict[str, Any] = {
    "none": None,
    "a-list": [],
    "empty": {},
    "context-text": _PROMISE | {"context": "all"},
    "latency-number": _PROMISE | {"latency": 5},
    "latency-of-text": _PROMISE | {"latency": ["fast"]},
    "latency-unknown": _PROMISE | {"latency": [_LATE | {"quantity": "speed"}]},
    "latency-percentile": _PROMISE | {"latency": [_LATE | {"percentile": 100}]},
    "latency-below": _PROMISE | {"latency": [_LATE | {"seconds": -1.0}]},
    "nothing": _PROMISE | {"memory_bytes": None},
    "measured-text": _PROMISE | {"memory_bytes": None, "measured": {"memory_bytes": "much", "tpot_p95_ms": [1]}},
    "measured-list": _PROMISE | {"measured": [1]},
}
_URLS = (
    *("", " ", "nowhere", "ftp://127.0.0.1", "http://", "http://[::1", "http://user:key@127.0.0.1", "127.0.0.1:80"),
    *("http://127.0.0.1:99999", "http://127.0.0.1:x", "http://127.0.0.1?a=b", "http://\x00", "http://a b"),
    *("http://a..b", "http://\udcff", f"http://{'x' * 70}:9", f"http://{'é' * 200}"),
)


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    """Each case is refused before a server is started or asked."""
    gguf, gone = str(kit.gguf), "http://127.0.0.1:9"

    def export(name: str, text: str) -> Callable[[Path], object]:
        """Make a folder with a student, and with such a file next to it."""

        def make(folder: Path) -> None:
            shutil.copyfile(kit.gguf, folder / "student.gguf")
            (folder / name).write_text(text, encoding="utf-8")

        return make

    def case(name: str, *argv: str, make: Callable[[Path], object] = nothing, codes: tuple[int, ...] = (2,)) -> Case:
        return Case(area="serving", name=name, argv=argv, make=make, codes=codes)

    for name, document in _LAUNCH.items():
        make = export("serve.json", json.dumps(document))
        yield case(f"launch-{name}", "serve", "student.gguf", "--port", "0", make=make)
    for name, text in (("torn", '{"model": '), ("nan", '{"context": NaN}'), ("deep", "[" * 100_000), ("no-text", "\0")):
        yield case(f"launch-{name}", "serve", "student.gguf", "--port", "0", make=export("serve.json", text))
    for name, document in PROMISES.items():
        make = export("export.json", json.dumps({"row": "t001", "promise": document}))
        yield case(f"promise-{name}", "monitor", gone, "--promise", "student.gguf", "--time", "1ms", make=make)
    for number, url in enumerate(_URLS):
        for verb in ("monitor", "load"):
            yield case(f"url-{number}-{verb}", verb, url, make=nothing)
    yield case("load-elsewhere", "load", "http://192.0.2.1")
    for name, value in (("text", "x"), ("none", "0"), ("many", "257"), ("huge", "9" * 30)):
        yield case(f"load-streams-{name}", "load", gone, "--streams", value)
    for name, value in (("never", "0s"), ("day", "1d"), ("text", "soon")):
        yield case(f"load-time-{name}", "load", gone, "--time", value)
    yield case("serve-port", "serve", gguf, "--port", "70000")
    yield case("serve-public", "serve", gguf, "--host", "0.0.0.0")
    yield case("serve-public-keyless", "serve", gguf, "--host", "0.0.0.0", "--public")
    yield case("serve-nowhere", "serve", gguf, "--host", "no host", "--public", "--key-file", "key")
    for number, host in enumerate(("a..b", "\udcff", "x" * 70, "é" * 200, "/tmp", "a/b")):
        yield case(f"serve-no-host-{number}", "serve", gguf, "--host", host, "--public", "--key-file", "key")
    for name, value in (("beyond", "99999"), ("huge", "9" * 30)):
        yield case(f"prometheus-{name}", "monitor", gone, "--prometheus", value, "--time", "1ms")
    for verb in ("monitor", "load"):
        yield case(f"{verb}-margin-alone", verb, gone, "--margin", "0.5")
    yield case("serve-long-socket", "serve", gguf, "--host", f"/{'x' * 200}.sock")
    yield case("serve-socket-nowhere", "serve", gguf, "--host", "/no/such/folder/a.sock")
    yield case(
        "serve-socket-a-file", "serve", gguf, "--host", "a.sock", make=lambda folder: (folder / "a.sock").touch()
    )
    yield case("serve-context", "serve", gguf, "--context", "10000000000")
    yield case("serve-streams", "serve", gguf, "--streams", "9000000")
    yield case("serve-draft", "serve", gguf, "--draft", "gone.gguf")
    yield case("serve-teacher-folder-as-draft", "serve", gguf, "--draft", str(kit.teacher))
    for name, content in (("empty", b""), ("short", b"abc"), ("words", b"two words and more"), ("bytes", b"\xff" * 40)):
        yield case(
            f"key-{name}",
            *("serve", gguf, "--port", "0", "--key-file", "key"),
            make=lambda folder, content=content: (folder / "key").write_bytes(content),
        )
    yield case("key-a-socket", "serve", gguf, "--port", "0", "--key-file", "key", make=_bound)
    yield case("chat-gone", "chat", "gone.gguf")
    yield case("monitor-window", "monitor", gone, "--window", "1s")
    yield case("monitor-margin", "monitor", gone, "--promise", gguf, "--margin", "-1")


def _bound(folder: Path) -> None:
    """Bind a socket where a key should be. Its path must be short."""
    import os

    here = os.getcwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind("key")
    finally:
        os.chdir(here)

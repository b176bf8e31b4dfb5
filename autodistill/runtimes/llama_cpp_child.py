"""The child process that runs llama.cpp: it loads one GGUF file, then answers requests on stdin, one per line.

It is run by path and not as a module, so that neither this package nor torch is imported. It therefore starts at once
and stays small.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
from typing import Any

_SOCKET = "llama.sock"


def _load(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"] * settings["parallel"]
    for name in ("cache_type_k", "cache_type_v"):
        setattr(params, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{settings[name].upper()}"))
    way = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[settings["flash_attention"]]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{way}")
    params.swa_full = settings["whole_cache"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    # A relative Unix socket in the private working folder, so that nothing listens on the network.
    params.hostnames = [_SOCKET]
    params.offline = True
    params.ui = False
    params.cache_ram_mib = 0  # no store of old prompts in addition to the context
    params.fit_params = False  # either the context is as requested, or loading fails
    # If weights are mapped, those that the CPU repacks are in memory twice and are counted twice.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.verbosity = 10  # the lowest level at which answers have token ids
    return xllamacpp.Server(params)


class _Local(http.client.HTTPConnection):
    """HTTP over the server's socket, for functions that xllamacpp does not offer."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(_SOCKET)


def _post(path: str, request: dict[str, Any]) -> Any:
    connection = _Local("localhost")
    connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def _answer(server: Any, request: dict[str, Any]) -> list[Any]:
    if "text" in request:
        return [_post("/tokenize", {"content": request["text"], "add_special": True, "parse_special": True})]
    if "together" in request:
        return [_post("/completion", request["together"])]
    chunks: list[Any] = []
    result = server.handle_completions(request, chunks.append)
    return chunks if result is None else [result]


def _resident_bytes() -> int:
    """Return the resident memory of this process; 0 if the system does not report it as Linux does."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0


def main() -> None:
    """Load the file, report that in one line, and answer requests until stdin ends.

    The line says how much memory the interpreter used before, which llama.cpp alone would not use. A request is a JSON
    object for llama.cpp's completions, or one with a `text` to tokenise, or one with prompts to continue `together`.
    The answer is a JSON list of the objects that llama.cpp returned.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runtime prints goes to the log
    before = {"interpreter_bytes": _resident_bytes()}
    server = _load(json.loads(sys.argv[1]))
    print(json.dumps(before), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(server, json.loads(line))), file=answers, flush=True)
    # Exit without the server's destructor, which sometimes waits for ever for a loop that has just begun.
    os._exit(0)


if __name__ == "__main__":
    main()

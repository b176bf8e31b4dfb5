"""The child process of llama.cpp's HTTP server: it reads its settings as JSON from stdin, and serves until stdin ends.

It is run by path and not as a module, so that neither this package nor torch is imported: its memory is llama.cpp's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

_TAG = "interpreter-bytes="


def _parameters(settings: dict[str, Any], interpreter_bytes: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.model_alias = {settings["name"]}
    # llama.cpp alone would not use this memory, so the tag lets a reader of this process's memory subtract it.
    params.model_tags = {f"{_TAG}{interpreter_bytes}"}
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    params.api_keys = [settings["key"]]
    params.endpoint_metrics = True
    params.ui = True
    params.offline = True
    params.n_parallel = settings["streams"]
    params.n_ctx = settings["context"] * settings["streams"]
    for name in ("cache_type_k", "cache_type_v"):
        setattr(params, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{settings[name].upper()}"))
    way = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[settings["flash_attention"]]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{way}")
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    # The promised memory is that of weights, cache and buffers. So there is no store of old prompts, which would grow
    # to 8 GiB, and there are no copies of slots. Either the context is as requested, or the server does not start.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.n_ctx_checkpoints = 0
    params.fit_params = False
    # If weights are mapped, those that the CPU repacks are in memory twice.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.verbosity = 2  # warnings and errors
    if settings["draft"]:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = settings["draft"]
        # Always propose the same number, however sure the draft is.
        params.speculative.draft.n_max = settings["proposed"]
        params.speculative.draft.n_min, params.speculative.draft.p_min = 0, 0.0
        params.speculative.draft.cpuparams.n_threads = settings["threads"]
        params.speculative.draft.cpuparams_batch.n_threads = settings["threads"]
    return params


def _resident_bytes() -> int:
    """Return the resident memory of this process; 0 if the system does not report it as Linux does."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0


def main() -> None:
    """Serve until stdin ends. It also ends when the parent dies, however that happens."""
    # These signals reach a whole group of processes. The parent decides what they mean, and then closes stdin.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    before = _resident_bytes()
    import xllamacpp

    try:
        # The server runs in its own threads.
        server = xllamacpp.Server(_parameters(json.loads(sys.stdin.readline()), before))
    except RuntimeError:
        os._exit(1)  # the log has said why
    sys.stdin.read()
    # Exit without the server's destructor, which sometimes waits for ever for a loop that has just begun.
    os._exit(0 if server else 1)


if __name__ == "__main__":
    main()

"""The child process that is llama.cpp's HTTP server: a line of JSON on stdin says all, and it serves until stdin ends.

Run by path and not as a module, so that neither this package nor torch is imported: its memory is llama.cpp's.
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
    # What llama.cpp on its own would not have: whoever looks at this process's memory can leave it out.
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
    # The memory that was promised is that of weights, cache and buffers: no store of old prompts beside these, which
    # would grow to 8 GiB, no copies of slots, and the context as asked or no start.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.n_ctx_checkpoints = 0
    params.fit_params = False
    # Mapped weights that the CPU repacks would be there twice.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.verbosity = 2  # warnings and errors
    if settings["draft"]:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = settings["draft"]
        # Always as many, however sure the draft is.
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
    """Serve until stdin ends, which it does with the parent too, whatever the parent's end."""
    # They reach a whole group of processes: the parent decides what they mean, and then closes stdin.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    before = _resident_bytes()
    import xllamacpp

    try:
        # It serves from threads of its own.
        server = xllamacpp.Server(_parameters(json.loads(sys.stdin.readline()), before))
    except RuntimeError:
        os._exit(1)  # its log has said why
    sys.stdin.read()
    # Not by way of the server's destructor, which now and then waits for ever for a loop that has just begun.
    os._exit(0 if server else 1)


if __name__ == "__main__":
    main()

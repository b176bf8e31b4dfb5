"""Run llama.cpp's HTTP server through xllamacpp, with the arguments of llama-server that a bundle gives it.

It is run by path and needs nothing from this project. It is also the server in the image that a test builds.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def parameters(words: list[str]) -> Any:
    """Return the arguments as xllamacpp takes them. An unknown argument ends the process."""
    import xllamacpp

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("host", "model", "api-key-file", "alias", "cache-type-k", "cache-type-v", "flash-attn", "load-mode"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "ctx-size", "parallel", "cache-ram", "ctx-checkpoints"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--n-gpu-layers", type=int)
    parser.add_argument("--fit", choices=("on", "off"), required=True)
    for name in ("metrics", "offline", "no-ui"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(words)
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames, params.port = [given.host], given.port
    params.api_keys = [Path(given.api_key_file).read_text().strip()]
    params.n_ctx, params.n_parallel = given.ctx_size, given.parallel
    for name in ("cache_type_k", "cache_type_v"):
        setattr(params, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{getattr(given, name).upper()}"))
    way = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[given.flash_attn]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{way}")
    params.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{given.load_mode.upper()}")
    params.cache_ram_mib, params.n_ctx_checkpoints = given.cache_ram, given.ctx_checkpoints
    params.fit_params = given.fit == "on"
    params.endpoint_metrics, params.offline, params.ui = given.metrics, given.offline, not given.no_ui
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return params


def main() -> None:
    """Serve until a signal, or the end of the process that holds stdin open."""
    import xllamacpp

    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    server = xllamacpp.Server(parameters(sys.argv[1:]))
    over.wait()
    del server


if __name__ == "__main__":
    main()

"""What a server must be told that a GGUF file does not carry: Ollama's `Modelfile`, and `serve.json` for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

from autodistill.strategy.deployment import Deployment

SERVE_FILE = "serve.json"
"""Lies beside a GGUF file."""


def write_launch_files(model: Path, deployment: Deployment, context: int, slots: int) -> None:
    """Write both beside a model.

    Args:
        model: The GGUF file.
        deployment: How it was evaluated: types of its cache.
        context: Tokens of each sequence.
        slots: Sequences at once.
    """
    keys, values = deployment.cache_types
    narrow = (keys, values) != ("f16", "f16")
    command = ["llama-server", "--model", model.name, "--ctx-size", str(context * slots), "--parallel", str(slots)]
    document = {
        "runtime": "llama.cpp",
        "model": model.name,
        "context": context,
        "slots": slots,
        "cache_type_k": keys,
        "cache_type_v": values,
        "flash_attention": "on" if narrow else "auto",
        "command": [*command, *deployment.server_arguments],
    }
    (model.parent / SERVE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    # Ollama has one type for keys and values, set for the whole server.
    server = [f"OLLAMA_NUM_PARALLEL={slots}"]
    server += [f"OLLAMA_KV_CACHE_TYPE={keys}", "OLLAMA_FLASH_ATTENTION=1"] if narrow and keys == values else []
    lines = [f"# Start the server with: {' '.join(server)} ollama serve"]
    if keys != values:
        lines.append(f"# It was evaluated with keys in {keys} and values in {values}, which Ollama cannot hold.")
    lines += [f"FROM ./{model.name}", f"PARAMETER num_ctx {context}"]
    (model.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")

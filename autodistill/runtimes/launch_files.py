"""Settings of a server that a model does not contain: `serve.json` for llama.cpp, a `Modelfile`, vLLM's options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from autodistill.errors import InputError
from autodistill.hardware.budget import check_streams
from autodistill.quantization.formats import CACHE_BYTES
from autodistill.strategy.deployment import Deployment
from autodistill.units import MOST_CONTEXT
from autodistill.utils.json_files import read_json, replacing, write_json
from autodistill.utils.typed_data import check_typed

SERVE_FILE = "serve.json"
"""Name of the file, which lies next to a GGUF file."""

FlashAttention = Literal["on", "off", "auto"]


class _Stored(TypedDict):
    """The fields that are read of `serve.json`. Its command is only for people."""

    model: str
    context: int
    slots: int
    cache_type_k: str
    cache_type_v: str
    flash_attention: FlashAttention


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start llama.cpp with a GGUF file.

    Attributes:
        context: Tokens of each sequence.
        slots: Sequences at once.
        cache_types: Types of keys and values in the cache.
        flash_attention: "on", "off" or "auto".
    """

    context: int
    slots: int
    cache_types: tuple[str, str]
    flash_attention: FlashAttention


def read_launch(model: Path) -> Launch | None:
    """Return what the `serve.json` next to a GGUF file says, or None if there is none or it is about another file.

    Raises:
        InputError: A field has an impossible value.
    """
    beside = model.parent / SERVE_FILE
    if not beside.is_file():
        return None
    said = read_json(beside)
    check_typed(said, _Stored, str(beside))
    if said["model"] != model.name:
        return None
    for name in ("cache_type_k", "cache_type_v"):
        if said[name] not in CACHE_BYTES:
            raise InputError(f"{beside} has {name} {said[name]!r}, which is none of {', '.join(CACHE_BYTES)}")
    return Launch(
        context=check_context(said["context"], f"the context in {beside}"),
        slots=check_streams(said["slots"], f"the slots in {beside}"),
        cache_types=(said["cache_type_k"], said["cache_type_v"]),
        flash_attention=said["flash_attention"],
    )


def vllm_options(context: int, streams: int, gpu_share: float | None) -> dict[str, Any]:
    """Return vLLM's options for a student, the same for a bundle as for `serve`, without the dashes before their names.

    Args:
        context: Tokens of each sequence.
        streams: Sequences at once.
        gpu_share: Share of the GPU's memory that it may take; None for vLLM's default.
    """
    # Answers are sampled as clients ask, and not as a file of the model says.
    found: dict[str, Any] = {"max-model-len": context, "max-num-seqs": streams, "generation-config": "vllm"}
    return found if gpu_share is None else found | {"gpu-memory-utilization": gpu_share}


def check_context(tokens: int, where: str) -> int:
    """Check a context length, and return it.

    Raises:
        InputError: It is below 2, or longer than any model can read.
    """
    if not 2 <= tokens <= MOST_CONTEXT:
        raise InputError(f"{where} must be 2 to {MOST_CONTEXT:,} tokens, not {tokens}")
    return tokens


def write_launch_files(model: Path, deployment: Deployment, context: int, slots: int) -> None:
    """Write `serve.json` and `Modelfile` next to a model.

    Args:
        model: The GGUF file.
        deployment: The deployment under which it was evaluated, which has the types of its cache.
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
    write_json(model.parent / SERVE_FILE, document)
    # Ollama has one type for keys and values, set for the whole server.
    server = [f"OLLAMA_NUM_PARALLEL={slots}"]
    server += [f"OLLAMA_KV_CACHE_TYPE={keys}", "OLLAMA_FLASH_ATTENTION=1"] if narrow and keys == values else []
    lines = [f"# Start the server with: {' '.join(server)} ollama serve"]
    if keys != values:
        lines.append(f"# It was evaluated with keys in {keys} and values in {values}, which Ollama cannot hold.")
    lines += [f"FROM ./{model.name}", f"PARAMETER num_ctx {context}"]
    with replacing(model.parent / "Modelfile") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

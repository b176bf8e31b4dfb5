"""What a server is told: the arguments of llama.cpp's and of vLLM's, with the memory that was promised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autodistill.bundle.exported import Exported

MODEL = "model"
"""Folder of the export in a bundle, and, below the root, in an image."""
KEY_FILE = "/run/secrets/api_key"
"""In a container: the key that clients send."""
VLLM_FILE = "vllm.yaml"
_GPU_LAYERS = 999  # all of them


@dataclass(frozen=True, kw_only=True)
class Server:
    """A program that answers HTTP.

    Attributes:
        image: That it comes in, and that an image of the student is built on.
        port: That it listens on, in a container.
        health: Path that answers 200 once it can serve, without a key.
        arguments: In a container, where the export lies in /model.
        key_variable: Environment variable that has its key; "" where it reads `KEY_FILE`.
        program: On a machine without containers.
        board_arguments: There, below the folder `{folder}`, with the key in a file `{key}`.
    """

    image: str
    port: int
    health: str
    arguments: tuple[str, ...]
    program: str
    board_arguments: tuple[str, ...]
    key_variable: str = ""


def server_of(exported: Exported) -> Server:
    """Return the server of an export: llama.cpp's, or vLLM's."""
    return _llama_cpp(exported) if exported.runtime == "llama.cpp" else _vllm(exported)


def _llama_cpp(exported: Exported) -> Server:
    launch, promise = exported.launch, exported.promise
    assert launch is not None
    keys, values = launch.cache_types
    limits = [
        *("--ctx-size", str(launch.context * launch.slots), "--parallel", str(launch.slots)),
        *("--cache-type-k", keys, "--cache-type-v", values, "--flash-attn", launch.flash_attention),
    ]
    if promise.gpu_maker:
        limits += ["--n-gpu-layers", str(_GPU_LAYERS)]
    # The memory that was measured is that of weights, cache and buffers: weights are not mapped beside the copy that a
    # CPU repacks, no store of old prompts grows to 8 GiB, and the context is as asked or the server does not start.
    limits += ["--load-mode", "none", "--cache-ram", "0", "--ctx-checkpoints", "0", "--fit", "off"]
    common = ("--alias", exported.name, *limits, "--metrics", "--offline", "--no-ui")

    def arguments(host: str, model: str, key: str) -> tuple[str, ...]:
        return ("--host", host, "--port", "8080", "--model", model, "--api-key-file", key, *common)

    return Server(
        image=f"ghcr.io/ggml-org/llama.cpp:server{_flavour(exported)}",
        port=8080,
        health="/health",
        arguments=arguments("0.0.0.0", f"/{MODEL}/{exported.model}", KEY_FILE),
        program="/usr/local/bin/llama-server",
        board_arguments=arguments("127.0.0.1", f"{{folder}}/{MODEL}/{exported.model}", "{key}"),
    )


def _flavour(exported: Exported) -> str:
    return {"amd": "-rocm", "nvidia": "-cuda"}.get(exported.promise.gpu_maker, "")


def _vllm(exported: Exported) -> Server:
    return Server(
        image="vllm/vllm-openai:latest",
        port=8000,
        health="/health",
        arguments=("--config", f"/{VLLM_FILE}"),
        program="/opt/vllm/bin/vllm",
        board_arguments=(
            *("serve", f"{{folder}}/{MODEL}", "--config", f"{{folder}}/{VLLM_FILE}"),
            *("--host", "127.0.0.1"),
        ),
        key_variable="VLLM_API_KEY",
    )


def vllm_config(exported: Exported) -> dict[str, Any]:
    """Return vLLM's arguments as its `--config` reads them: context, sequences at once, and its share of the GPU."""
    promise = exported.promise
    found: dict[str, Any] = {
        "model": f"/{MODEL}",
        "served-model-name": exported.name,
        "port": 8000,
        "max-model-len": promise.context,
        "max-num-seqs": promise.streams,
        "generation-config": "vllm",
    }
    device = promise.known_device
    if promise.memory_bytes is not None and device is not None and device.discrete:
        # vLLM takes all that it is given: no more than was promised.
        share = math.floor(100 * promise.memory_bytes / device.memory_bytes) / 100
        found["gpu-memory-utilization"] = min(0.95, max(0.01, share))
    return found


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a container is given.

    Attributes:
        requested_bytes: Main memory that was measured; None where it was not, or of a GPU.
        limit_bytes: Most of it; None where the promise is of a GPU's memory.
        gpu: Resource of Kubernetes that one GPU is; "" for none.
    """

    requested_bytes: int | None = None
    limit_bytes: int | None = None
    gpu: str = ""


def resources_of(exported: Exported) -> Resources:
    """Return what a container of the student is given.

    The request is the memory that was measured of the row at its context and streams, and the limit is the promised
    budget. Where both are of a GPU's memory, nothing was measured of the main memory beside it: it has neither.
    """
    promise = exported.promise
    gpu = f"{promise.gpu_maker}.com/gpu" if promise.gpu_maker else ""
    if promise.on_gpu:
        return Resources(gpu=gpu)
    need, limit = promise.figure("memory_bytes"), promise.memory_bytes
    if promise.measured.get("memory_on") or need is None:
        return Resources(limit_bytes=limit, gpu=gpu)
    return Resources(requested_bytes=int(min(need, limit or need)), limit_bytes=limit, gpu=gpu)

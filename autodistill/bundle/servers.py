"""The settings of a server: the arguments of llama.cpp and of vLLM, with the memory that was promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autodistill.bundle.exported import Exported
from autodistill.runtimes.launch_files import vllm_options

MODEL = "model"
"""Folder of the export in a bundle; in an image it lies below the root."""
KEY_FILE = "/run/secrets/api_key"
"""The file with the clients' key, in a container."""
VLLM_FILE = "vllm.yaml"
_GPU_LAYERS = 999  # all of them


@dataclass(frozen=True, kw_only=True)
class Server:
    """A program that answers HTTP requests.

    Attributes:
        image: Image that has the program, and from which an image of the student is built.
        port: Port that it listens on in a container.
        health: Path that answers 200, without a key, once it can serve.
        arguments: Arguments in a container, where the export lies in /model.
        key_variable: Environment variable of its key; "" if it reads `KEY_FILE`.
        program: Path of the program on a machine without containers.
        board_arguments: Arguments there, where `{folder}` is the folder of the bundle and `{key}` the file with the
            key.
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
    # The measured memory is that of weights, cache and buffers. So weights are not mapped, which would keep them next
    # to the copy that a CPU repacks. There is no store of old prompts, which would grow to 8 GiB. Either the context is
    # as requested, or the server does not start.
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
    """Return vLLM's arguments for its `--config`: context, sequences at once, and its share of the GPU's memory."""
    promise = exported.promise
    return {
        "model": f"/{MODEL}",
        "served-model-name": exported.name,
        "port": 8000,
        **vllm_options(promise.context, promise.streams, promise.gpu_share),
    }


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources of a container.

    Attributes:
        requested_bytes: Main memory that was measured; None if it was not measured, or on a GPU.
        limit_bytes: Most main memory; None if the promise is about a GPU's memory.
        gpu: Kubernetes resource of one GPU; "" for none.
    """

    requested_bytes: int | None = None
    limit_bytes: int | None = None
    gpu: str = ""


def resources_of(exported: Exported) -> Resources:
    """Return the resources of a container of the student.

    The request is the memory that was measured for the row at its context and streams. The limit is the promised
    budget. If both are about a GPU's memory, the main memory was not measured, so there is neither.
    """
    promise = exported.promise
    gpu = f"{promise.gpu_maker}.com/gpu" if promise.gpu_maker else ""
    if promise.on_gpu:
        return Resources(gpu=gpu)
    need, limit = promise.figure("memory_bytes"), promise.memory_bytes
    if promise.measured.get("memory_on") or need is None:
        return Resources(limit_bytes=limit, gpu=gpu)
    return Resources(requested_bytes=int(min(need, limit or need)), limit_bytes=limit, gpu=gpu)

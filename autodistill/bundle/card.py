"""The card of a bundle: what the student promises, and how to start, watch and check it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from autodistill.bundle.board import folder_of, key_of
from autodistill.bundle.exported import Exported
from autodistill.bundle.kubernetes import REPLICAS, secret_of
from autodistill.bundle.servers import Server
from autodistill.runs.markdown import fenced, plain
from autodistill.units import count_of, format_bytes

_PROGRAMS = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "onnxruntime": "ONNX Runtime"}


def card(exported: Exported, server: Server | None, image: str, monitor: str) -> str:
    """Return the README.md of a bundle.

    Args:
        exported: The student.
        server: The server of the student, or None if a library runs it.
        image: Name of the image.
        monitor: The command that monitors the server.
    """
    of = f"The row `{exported.row}` of a search" if exported.row else "A model"
    parts = [
        f"# {plain(exported.name)}",
        f"{of}, stored as {exported.deployment.name}, for {_PROGRAMS[exported.runtime]}. The folder `model` is the "
        "export itself, with its own card, record and proof. AutoDistill wrote this bundle.",
        "## What it promises",
        "\n".join(_promise(exported)),
        *(_library() if server is None else _service(exported, server, image, monitor)),
        "## Check it",
        _shell("sha256sum --check SHA256SUMS", "autodistill bundle --check .", "autodistill verify model"),
        "## Licences",
        "\n".join(_licenses(exported)),
    ]
    return "\n\n".join(parts) + "\n"


def _promise(exported: Exported) -> Iterator[str]:
    promise = exported.promise
    yield f"- {count_of(promise.streams, 'stream')} of {promise.context:,} tokens."
    where = "of the GPU" if promise.on_gpu else "of the process"
    limit = "no limit" if promise.memory_bytes is None else f"at most {format_bytes(promise.memory_bytes)}"
    need = promise.figure("memory_bytes")
    yield f"- Memory {where}: {limit}; {'not measured' if need is None else f'measured: {format_bytes(need)}'}."
    for one in promise.latency:
        yield f"- Latency: {one.describe()}."
    first, later = promise.figure("ttft_p50_ms"), promise.figure("tpot_p95_ms")
    if later is not None:
        prompt = promise.measured.get("prompt")
        began = "" if first is None else f", {first:.1f} ms to the first token after {prompt} (median)"
        machine = plain(promise.measured.get("machine") or "its machine")
        asked = "" if promise.latency else " No limit of latency was asked for: a quarter more is an alert."
        yield f"- Measured on {machine}: {later:.1f} ms for 95 of 100 later tokens{began}.{asked}"
    if promise.device is not None:
        yield f"- Made for {plain(promise.device)}."


def _service(exported: Exported, server: Server, image: str, monitor: str) -> Iterator[str]:
    url = f"http://127.0.0.1:{server.port}"
    yield "## Start it"
    yield "First make a key for clients; this folder has none yet."
    yield _shell("(umask 077; openssl rand -hex 32 > api_key)", "export API_KEY=$(cat api_key)")
    yield (
        f"In a container, on {url} alone. The base image is the argument `BASE` of the Dockerfile: name one by its "
        "digest if each build must be the same. The flags are those of llama.cpp builds of late 2026 and newer."
        if exported.runtime == "llama.cpp"
        else f"In a container, on {url} alone. The base image is the argument `BASE` of the Dockerfile."
    )
    yield _shell("docker compose up --build --detach student", f"python3 smoke_test.py --url {url} --key-file api_key")
    gpu = ", each with a GPU of its own" if exported.promise.on_gpu else ""
    yield (
        f"In Kubernetes: {REPLICAS} replicas{gpu}, once the image is in the registry that the cluster pulls from. It "
        f"is called {plain(image)} in `kubernetes.yaml` and `compose.yaml`; `autodistill bundle --image` gives it "
        "another name."
    )
    name = exported.name
    yield _shell(
        f"docker build --tag {shlex.quote(image)} . && docker push {shlex.quote(image)}",
        f"kubectl create secret generic {secret_of(exported)} --from-file=api_key",
        "kubectl apply --filename kubernetes.yaml",
        f"kubectl port-forward service/{name} {server.port}:80 &",
        f"python3 smoke_test.py --url {url} --key-file api_key",
    )
    yield f"On a machine without containers, where `{server.program}` is installed, as root:"
    key = key_of(exported)
    if server.key_variable:
        made = f"(umask 077; echo {server.key_variable}=$(cat api_key) > {key}.env)"
    else:
        made = f"install --mode 600 api_key {key}"
    yield _shell(
        f"mkdir --parents {folder_of(exported)} {key.rpartition('/')[0]} && cp --recursive . {folder_of(exported)}",
        made,
        f"cp {name}.service /etc/systemd/system/ && systemctl enable --now {name}",
    )
    if exported.runtime == "llama.cpp":
        yield "In Ollama, which holds keys and values in one type, set for its whole server (see `model/Modelfile`):"
        yield _shell(f"ollama create {name} --file model/Modelfile")
    yield "## Watch it"
    yield (
        "The server says how many tokens and requests there are. The monitor measures latency and memory, and says "
        "whether the promise is kept."
    )
    yield _shell(f"AUTODISTILL_API_KEY=$(cat api_key) {monitor}", "docker compose --profile monitoring up --detach")
    yield (
        "`prometheus.yml` scrapes both on this machine, `alerts.yml` warns when a promise is broken, and "
        "`dashboard.json` can be imported into Grafana."
    )


def _library() -> Iterator[str]:
    yield "## Use it"
    yield _shell(
        "pip install --requirement requirements.txt",
        'python3 example.py "The capital of France is"',
        "python3 smoke_test.py",
    )


def _licenses(exported: Exported) -> Iterator[str]:
    known = plain(exported.license) if exported.license else "not stated: ask the author of the teacher"
    yield f"- The student, as its teacher: {known}. Its card, `model/README.md`, has the licence of its text too."
    yield "- `smoke_test.py` and the other files next to `model`: Apache-2.0, like AutoDistill."
    yield "- The base image, Prometheus and Grafana are not included, and have their own licences."


def _shell(*lines: str) -> str:
    return fenced("\n".join(lines), "sh")

"""The image of a student as a Dockerfile, and its service as a Compose file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autodistill.bundle.exported import Exported
from autodistill.bundle.servers import MODEL, VLLM_FILE, Server, resources_of

USER = 10001
"""User id of the process in a container, and its group id."""
_PROMETHEUS = "prom/prometheus:v3.5.0"


def dockerfile(exported: Exported, server: Server) -> str:
    """Return the Dockerfile: a base image as an argument, the model, a user without rights, and a health check."""
    copied = [MODEL] if exported.runtime == "llama.cpp" else [MODEL, VLLM_FILE]
    health = ["curl", "--fail", "--silent", "--show-error", f"http://127.0.0.1:{server.port}{server.health}"]
    instructions: list[tuple[str, str]] = [
        ("ARG", f"BASE={server.image}"),
        ("FROM", "${BASE}"),
        ("LABEL", f"org.opencontainers.image.title={json.dumps(exported.name)}"),
        *([("LABEL", f"org.opencontainers.image.licenses={json.dumps(exported.license)}")] if exported.license else []),
        *(("COPY", f"{name} /{name}") for name in copied),
        ("USER", f"{USER}:{USER}"),
        ("EXPOSE", str(server.port)),
        ("HEALTHCHECK", f"--interval=10s --timeout=5s --start-period=5m CMD {_listed(health)}"),
        ("CMD", _listed(server.arguments)),
    ]
    return "".join(f"{name} {rest}\n" for name, rest in instructions)


def _listed(words: Sequence[str]) -> str:
    return json.dumps(list(words))


def compose(exported: Exported, server: Server, image: str) -> dict[str, Any]:
    """Return the Compose file: the student on loopback with a key, and Prometheus in its own profile.

    The memory limit is the promised budget, swap included. The root file system is read-only.
    """
    resources = resources_of(exported)
    student: dict[str, Any] = {
        "image": image,
        "build": {"context": ".", "args": {"BASE": f"${{BASE:-{server.image}}}"}},
        "ports": [f"127.0.0.1:{server.port}:{server.port}"],
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
    }
    asked = "${API_KEY:?set API_KEY to the key that clients send}"
    if server.key_variable:
        student["environment"] = {server.key_variable: asked}
        # vLLM's compiled files and shared memory lie outside the read-only root.
        student["environment"] |= {"HOME": "/tmp"}
        student["shm_size"] = "2gb"
    else:
        student["secrets"] = ["api_key"]  # in KEY_FILE
    if resources.limit_bytes is not None:
        student["mem_limit"] = student["memswap_limit"] = resources.limit_bytes
    if resources.gpu == "nvidia.com/gpu":
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        student["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    elif resources.gpu:
        student["devices"] = ["/dev/kfd", "/dev/dri"]
    prometheus = {
        "image": _PROMETHEUS,
        "profiles": ["monitoring"],
        # It reaches the student and the monitor at the same addresses as everything else on this machine.
        "network_mode": "host",
        "command": ["--config.file=/etc/prometheus/prometheus.yml", "--web.listen-address=127.0.0.1:9090"],
        "volumes": [f"./{name}:/etc/prometheus/{name}:ro" for name in ("prometheus.yml", "alerts.yml")],
        "secrets": [{"source": "api_key", "target": "/etc/prometheus/api_key"}],
    }
    return {
        "name": exported.name,
        "services": {"student": student, "prometheus": prometheus},
        "secrets": {"api_key": {"environment": "API_KEY"}},
    }

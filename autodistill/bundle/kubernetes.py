"""A student in Kubernetes: a Deployment of three replicas, its Service, and how many replicas may be down at once."""

from __future__ import annotations

from typing import Any

from autodistill.bundle.container import USER
from autodistill.bundle.exported import Exported
from autodistill.bundle.servers import KEY_FILE, Server, resources_of

REPLICAS = 3
_MIB = 2**20
_STARTS = 60  # times 10 s, since reading a large model takes minutes


def secret_of(exported: Exported) -> str:
    """Return the name of the Secret that has the clients' key under `api_key`."""
    return f"{exported.name}-key"


def manifests(exported: Exported, server: Server, image: str) -> list[dict[str, Any]]:
    """Return the manifests, in the order in which they are applied.

    Args:
        exported: The student.
        server: The server of the student.
        image: Image that the cluster's nodes pull.
    """
    labels = {"app.kubernetes.io/name": exported.name}
    named = {"name": exported.name, "labels": labels}
    spec = {
        "replicas": REPLICAS,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {
                "labels": labels,
                "annotations": {
                    "prometheus.io/scrape": "true",
                    "prometheus.io/path": "/metrics",
                    "prometheus.io/port": str(server.port),
                },
            },
            "spec": _pod(exported, server, image),
        },
    }
    ports = [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": named, "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": named,
            "spec": {"type": "ClusterIP", "selector": labels, "ports": ports},
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": named,
            "spec": {"minAvailable": REPLICAS - 1, "selector": {"matchLabels": labels}},
        },
    ]


def _pod(exported: Exported, server: Server, image: str) -> dict[str, Any]:
    asked = {"path": server.health, "port": "http"}
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    container: dict[str, Any] = {
        "name": "student",
        "image": image,
        "args": list(server.arguments),
        "ports": [{"name": "http", "containerPort": server.port, "protocol": "TCP"}],
        "startupProbe": {"httpGet": asked, "periodSeconds": 10, "failureThreshold": _STARTS},
        "readinessProbe": {"httpGet": asked, "periodSeconds": 5},
        "livenessProbe": {"httpGet": asked, "periodSeconds": 20, "timeoutSeconds": 10},
        "resources": _resources(exported),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    if server.key_variable:
        reference = {"secretKeyRef": {"name": secret_of(exported), "key": "api_key"}}
        container["env"] = [{"name": server.key_variable, "valueFrom": reference}, {"name": "HOME", "value": "/tmp"}]
        # Worker processes exchange tensors through it.
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}})
    else:
        folder, _, _ = KEY_FILE.rpartition("/")
        mounts.append({"name": "key", "mountPath": folder, "readOnly": True})
        volumes.append({"name": "key", "secret": {"secretName": secret_of(exported)}})
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }


def _resources(exported: Exported) -> dict[str, dict[str, Any]]:
    given = resources_of(exported)
    requests: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    if given.requested_bytes is not None:
        # Rounding up must not exceed the limit.
        whole = -(-given.requested_bytes // _MIB) * _MIB
        fits = given.limit_bytes is None or whole <= given.limit_bytes
        requests["memory"] = f"{whole // _MIB}Mi" if fits else str(given.requested_bytes)
    if given.limit_bytes is not None:
        limits["memory"] = str(given.limit_bytes)
    if given.gpu:
        limits[given.gpu] = requests[given.gpu] = 1
    return {name: found for name, found in (("requests", requests), ("limits", limits)) if found}

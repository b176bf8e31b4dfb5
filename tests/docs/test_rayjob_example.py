"""The RayJob of docs/examples: Kubernetes accepts its pods, and KubeRay's own schema accepts all of it."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from autodistill.cli.app import app

JOB = Path(__file__).parents[2] / "docs" / "examples" / "rayjob.yaml"
SCHEMA = "KUBERAY_CRD"
"""Names RayJob's CRD: ray.io_rayjobs.yaml of KubeRay's Helm chart (Apache-2.0), not part of this project."""


def job() -> dict[str, Any]:
    """Return the example as it is applied."""
    return yaml.safe_load(JOB.read_text(encoding="utf-8"))


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pods of a cluster as separate objects."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{index}"}, "spec": group["template"]["spec"]}
        for index, group in enumerate(groups)
    ]


def strict(schema: Any) -> Any:
    """Return a schema that refuses unnamed fields, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(one) for name, one in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def test_it_runs_commands_that_exist_on_the_ray_that_is_installed() -> None:
    """Each option of both commands is an option of `search`, and the image and the cluster have this version of Ray."""
    found = job()
    words = shlex.split(shlex.split(found["spec"]["entrypoint"])[2])
    options = {word.rstrip(";") for word in words if word.startswith("--")}
    shown = CliRunner().invoke(app, ["search", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert words.count("search") == 2
    assert {"--resume", "--storage", "--ray-address"} <= options
    assert all(option in shown for option in options)
    version = importlib.metadata.version("ray")
    assert found["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert f"rayproject/ray:{version}-" in JOB.read_text(encoding="utf-8")


def test_it_asks_for_a_token_and_gives_no_rights() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in pods(cluster):
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not any("SECRET" in one["name"] for one in container["env"])


@pytest.mark.system
def test_its_pods_are_those_that_kubernetes_takes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for pod in pods(job()["spec"]["rayClusterSpec"]):
        validate.validate(pod, "1.30", strict=True)


@pytest.mark.system
def test_all_of_it_is_what_kuberay_takes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    if not os.environ.get(SCHEMA):
        pytest.skip(f"{SCHEMA} names no file with KubeRay's schema of RayJob")
    definition = yaml.safe_load(Path(os.environ[SCHEMA]).read_text(encoding="utf-8"))
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    # The API server knows the fields that every object has.
    schema["properties"]["metadata"] = {"type": "object"}
    check = jsonschema.Draft7Validator(schema)
    assert [error.message for error in check.iter_errors(job())] == []
    wrong = job()
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 3
    assert [error.message for error in check.iter_errors(wrong)] != []

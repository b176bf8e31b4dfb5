"""What figures depend on in addition to the request: the code, the packages, the machine and its threads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from autodistill.hardware.machine import Machine, machine_name

# numba is optional, but without it sums are added in another order.
_PACKAGES = ("autodistill-search", "torch", "transformers", "optuna", "ray", "xllamacpp", "gguf")
_PERHAPS = ("numba",)
_SOURCES = Path(__file__).parents[1]
_SECONDS = 10  # most time that git may take


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a figure may depend on."""
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    for package in _PERHAPS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {"python": platform.python_version()} | found


@cache
def code() -> dict[str, Any]:
    """Return which code runs: a hash of its files, and in a checkout its commit and whether the code has changed."""
    found: dict[str, Any] = {"hash": _hash()}
    commit = _git("rev-parse", "HEAD")
    # An installed copy may lie within another repository of the user, which does not track these files.
    if commit and _git("ls-files", "--error-unmatch", str(Path(__file__))):
        changed = _git("status", "--porcelain", "--", str(_SOURCES))
        found |= {"commit": commit, "dirty": bool(changed)}
    return found


def machine_here(machine: Machine) -> dict[str, Any]:
    """Return the properties of a machine that a figure may depend on."""
    return {
        "name": machine_name(machine),
        "cpus": machine.cpus,
        "system": platform.system(),
        "arch": platform.machine(),
    }


def _hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*.py")):
        digest.update(f"{path.relative_to(_SOURCES).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _git(*words: str) -> str | None:
    """Return git's output, or None if git is not installed or this is not a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_SOURCES), *words], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

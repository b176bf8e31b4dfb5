"""Paths as the public functions take them, and runs by name or folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autodistill.errors import InputError
from autodistill.objects.run import Run
from autodistill.runs.run_folder import RunFolder, default_cache


def run_folder(run: str | Path | Run, out: Path) -> RunFolder:
    """Return the folder of a run, given as an object, a folder, or a name below `out`."""
    if isinstance(run, Run):
        return RunFolder.open(run.path.parent, run.name)
    path = Path(run).expanduser()
    if isinstance(run, Path) or len(path.parts) > 1:
        return RunFolder.open(path.absolute().parent, path.absolute().name)
    return RunFolder.open(out, str(run))


def device_files(files: Sequence[str | Path] | None, named: bool) -> list[Path]:
    """Return the files of a person's own devices, which are read where a device is asked for."""
    if files and not named:
        raise InputError("--devices only describes devices: choose one with --device")
    return [Path(file) for file in files or ()]


def cache_folder(folder: str | Path | None) -> Path:
    """Return the folder of what later calls can use again."""
    return default_cache() if folder is None else Path(folder)


def as_path(file: str | Path | None) -> Path | None:
    """Return a path that may be left out."""
    return None if file is None else Path(file)

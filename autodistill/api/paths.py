"""Resolve the paths and run names that the public functions take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from autodistill.errors import InputError
from autodistill.objects.run import Run
from autodistill.runs.run_folder import RunFolder, newest_run
from autodistill.search.budgets.record import runs_of


def run_folder(run: str | Path | Run | None, out: Path) -> RunFolder:
    """Return the folder of a run, given as an object, a folder or a name below `out`. The default is the newest run."""
    if run is None:
        return newest_run(out)
    if isinstance(run, Run):
        return RunFolder.open(run.path.parent, run.name)
    path = Path(run).expanduser()
    if isinstance(run, Path) or _is_path(run):
        return RunFolder.open(path.absolute().parent, path.absolute().name)
    if each := runs_of(out, str(run)):
        raise InputError(f"{run!r} is a search for several budgets: name one of its runs, {', '.join(each)}")
    return RunFolder.open(out, str(run))


def each_run(names: Iterable[str], out: Path) -> list[str]:
    """Return the names of runs. The name of a search for several budgets is replaced by the names of its runs."""
    return list(dict.fromkeys(one for name in names for one in _runs_of(name, out) or [name]))


def _runs_of(name: str, out: Path) -> list[str]:
    return [] if _is_path(name) else runs_of(out, name)


def _is_path(name: str) -> bool:
    """Return whether a run is given by its folder, as in ./run."""
    return os.sep in name or len(Path(name).expanduser().parts) > 1


def device_files(files: Sequence[str | Path] | None, named: bool) -> list[Path]:
    """Return the files with the user's own devices. They are only read if a device is asked for.

    Raises:
        InputError: There are files, but no device is asked for.
    """
    if files and not named:
        raise InputError("--devices only describes devices: choose one with --device")
    return [Path(file) for file in files or ()]

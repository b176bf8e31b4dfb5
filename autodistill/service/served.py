"""What is served: a file or folder of an export, a run or a row, and how it should be served."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodistill.advisor.origin import Origin, origin
from autodistill.errors import InputError
from autodistill.export.promise import RECORD, Promised
from autodistill.hardware.budget import CONTEXT, check_streams
from autodistill.runs.run_folder import RunFolder, known_runs
from autodistill.runtimes.launch_files import FlashAttention, check_context, read_launch
from autodistill.utils.input_files import check_file
from autodistill.utils.json_files import read_json

_CONTAINERS = ("gguf", "compressed-tensors", "huggingface")
"""The formats that a server here can read, the most usual first."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A student and how it should be served.

    Attributes:
        path: A .gguf file, or a folder that vLLM reads.
        runtime: "llama.cpp" or "vllm".
        context: Tokens of each sequence, or None if nothing states them.
        streams: Sequences at once.
        cache_types: Types of keys and values in the cache.
        flash_attention: "on", "off" or "auto".
        gpu_share: Share of the GPU's memory that vLLM may take, or None if nothing states it.
    """

    path: Path
    runtime: str
    context: int | None = None
    streams: int = 1
    cache_types: tuple[str, str] = ("f16", "f16")
    flash_attention: FlashAttention = "auto"
    gpu_share: float | None = None

    @property
    def name(self) -> str:
        """The name under which clients ask for the student."""
        return self.path.stem if self.runtime == "llama.cpp" else self.path.resolve().name

    @property
    def export(self) -> Path:
        """The folder that has the record of the export, if there is one."""
        return self.path if self.path.is_dir() else self.path.parent


def find_served(reference: str | Path, out: Path, row: str | None = None) -> Served:
    """Find what the user names, with the settings in its `serve.json`, or for vLLM those of its promise.

    Args:
        reference: A .gguf file, a folder of an export, a run by folder or name, or a row's id.
        out: Folder that holds the runs.
        row: Row of the run; by default what the run exported.

    Raises:
        InputError: Nothing is found, it is damaged, no server here reads its format, or it is a row that was not
            exported. In the last case the message has the command that exports it.
    """
    path = Path(reference).expanduser()
    run = find_run(path, str(reference), out)
    if run is not None:
        return _of_run(run, row)
    if row is not None:
        raise InputError(f"--row names a row of a run, and {reference} is not a run: leave it out")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf" or path.exists():
        check_file(path)
        if not path.exists():
            raise InputError(f"there is no {path}: give a .gguf file, an exported folder, a run or a row")
        if path.suffix != ".gguf":
            raise InputError(f"{path} is no .gguf file and no folder: export a student with --to gguf")
        return _with_launch(path)
    found = find_row(str(reference), out)
    return _of_run(found.run, found.row.row_id)


def find_row(reference: str, out: Path) -> Origin:
    """Return the row with an id, after no file, folder or run was found.

    Args:
        reference: The name that the user gave.
        out: Folder that holds the runs.

    Raises:
        InputError: No row has this id either.
    """
    # A row is named ROW or RUN/ROW.
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise InputError(f"there is no {reference}: give a .gguf file, an exported folder, a run or a row")
    try:
        return origin(reference, out)
    except InputError as error:
        raise InputError(f"there is no file, folder or run {reference!r}, and {error}") from None


def find_run(path: Path, name: str, out: Path) -> RunFolder | None:
    """Return the run with this folder, or with this name if no such file or folder exists here.

    Args:
        path: The user's reference as a path.
        name: The same reference as a name.
        out: Folder that holds the runs.
    """
    if (path / "search.json").is_file():
        return RunFolder.open(path.absolute().parent, path.absolute().name)
    return RunFolder.open(out, name) if not path.exists() and name in known_runs(out) else None


def _of_run(run: RunFolder, row: str | None) -> Served:
    """Return what a run exported: for a row if one is named, otherwise for its best."""
    folders = [run.student(container) for container in _CONTAINERS]
    if row is None:
        there = next((folder for folder in folders if folder.is_dir()), None)
        if there is None:
            raise InputError(f"the run {run.name!r} has exported no student yet: {_export(run, 'ROW')}")
        return _of_folder(there)
    for folder in folders:
        if (folder / RECORD).is_file() and _same(row, read_json(folder / RECORD).get("row")):
            return _of_folder(folder)
    raise InputError(f"the row {row!r} of the run {run.name!r} was not exported: {_export(run, row)}")


def _same(asked: str, row: Any) -> bool:
    return isinstance(row, str) and asked in (row, row.replace("-compressed-tensors-", "-ct-"))


def _export(run: RunFolder, row: str) -> str:
    words = ["autodistill", "export", str(run.path), "--row", row, "--to", "gguf", "--out", f"students/{row}"]
    return f"`{shlex.join(words)}` does, and `autodistill serve students/{row}/gguf` then serves it"


def _of_folder(folder: Path) -> Served:
    """Return what an exported folder holds, which may also be the folder of formats that `export --out` wrote."""
    inner = next((folder / name for name in _CONTAINERS if (folder / name).is_dir()), None)
    if inner is not None:
        return _of_folder(inner)
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"{folder} has {len(files)} .gguf files: name one of them")
    if files:
        return _with_launch(files[0])
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        return _with_promise(folder)
    raise InputError(
        f"{folder} has no .gguf file and no safetensors, so no server here reads it: export with --to gguf"
    )


def _with_launch(path: Path) -> Served:
    """Return a GGUF file with the settings of the `serve.json` next to it, if that describes this file."""
    served, launch = Served(path=path, runtime="llama.cpp"), read_launch(path)
    if launch is None:
        return served
    return replace(
        served,
        context=launch.context,
        streams=launch.slots,
        cache_types=launch.cache_types,
        flash_attention=launch.flash_attention,
    )


def _with_promise(folder: Path) -> Served:
    """Return a folder for vLLM with the settings of the promise in its `export.json`, if it has one."""
    served, record = Served(path=folder, runtime="vllm"), folder / RECORD
    stored = read_json(record).get("promise") if record.is_file() else None
    if stored is None:
        return served
    promise = Promised.read(stored, str(record))
    return replace(
        served,
        context=check_context(promise.context, f"the context in {record}"),
        streams=check_streams(promise.streams, f"the streams in {record}"),
        gpu_share=promise.gpu_share,
    )


def as_asked(served: Served, context: int | None, streams: int | None, most: int) -> Served:
    """Return the same with another context or number of streams, up to what the student can read.

    Args:
        served: What `find_served` found.
        context, streams: The values asked for; None keeps the current ones.
        most: Most tokens that the student can read.

    Raises:
        InputError: The context asked for is longer than that.
    """
    if context is not None and check_context(context, "--context") > most:
        raise InputError(f"{served.path} reads {most} tokens: give --context {most} or less")
    found = replace(
        served,
        context=context or min(served.context or CONTEXT, most),
        streams=served.streams if streams is None else check_streams(streams, "--streams"),
    )
    assert found.context is not None
    if found.context * found.streams > (served.context or CONTEXT) * served.streams:
        return replace(found, gpu_share=None)  # the promised memory was not for so many tokens
    return found

"""The record next to an export: its row, the hashes of its files, and the proof that it acts as evaluated."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autodistill.errors import AutoDistillError, DamagedError, InputError, VerificationError
from autodistill.export import proof
from autodistill.export.base import Expected, Exporter, TakesAny, load_exporter
from autodistill.export.promise import RECORD as FILE
from autodistill.export.promise import ExportRecord, check_exported
from autodistill.export.verify import RuntimeCheck, Verification, prove
from autodistill.strategy.deployment import Deployment
from autodistill.utils.checksums import check_entries, entries
from autodistill.utils.json_files import read_json, write_json
from autodistill.utils.typed_data import check_typed

CARD = "README.md"
"""The model card next to an export."""

_VERSION = 2
_PACKAGES = ("autodistill-search", "torch", "transformers")
_RUNTIMES = {"llama.cpp": ("gguf", "xllamacpp"), "vllm": ("compressed-tensors",)}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The content of an export's record.

    Attributes:
        row: Id of the exported row; "" if there is none.
        deployment: The deployment whose weights the export holds.
        artifact: Name of the file that a runtime loads; "" for the folder itself.
        weights: Result of comparing the weights in its files; None if they were not compared.
        expected: Outputs of the evaluated student; None if it was not run.
        check: Result of running the export in its runtime; None if it was not run.
        text: Kind of text that was read: the run's validation text, general text, or random tokens.
        promise: What a served student must meet, from `promise_of`; None if there is no row.
    """

    row: str
    deployment: Deployment
    artifact: str = ""
    weights: Verification | None = None
    expected: Expected | None = None
    check: RuntimeCheck | None = None
    text: str = ""
    promise: Mapping[str, Any] | None = None


def write(folder: Path, exporter: Exporter, exported: Exported) -> None:
    """Write `export.json`, with the expected outputs next to it; nothing is added to the folder afterwards.

    Args:
        folder: The export's folder, with all its other files.
        exporter: The exporter that wrote it.
        exported: What is known of it.
    """
    if exported.expected is not None:
        proof.save(exported.expected, folder)
    notes = exporter.notes if isinstance(exporter, TakesAny) else {}
    files = entries(folder, without=(FILE,))
    check = exported.check
    document = {
        "version": _VERSION,
        "format": exporter.name,
        "row": exported.row or None,
        "deployment": exported.deployment.to_json(),
        "artifact": exported.artifact,
        "runtime": _runtime(exporter, exported.deployment),
        **notes,
        "size_bytes": sum(int(entry["bytes"]) for entry in files.values()),
        "files": files,
        "versions": _versions(exporter, exported.deployment),
        "weights": None if exported.weights is None else asdict(exported.weights),
        "proof": None if check is None else {**asdict(check), "text_read": exported.text},
        "promise": None if exported.promise is None else dict(exported.promise),
    }
    write_json(folder / FILE, document)


def read_back(folder: Path, exporter: Exporter, deployment: Deployment) -> Exported | None:
    """Return the record of an export if it need not be written again, else None.

    It must be written again in three cases: there is no record of this exporter and deployment, another version of a
    package made it, or a file has changed since. The result of comparing weights is left out.
    """
    try:
        record = read_json(folder / FILE)
        check_typed(record, ExportRecord, str(folder / FILE))
        made = record["version"], record["format"], Deployment.from_json(record["deployment"]), record["versions"]
        if made != (_VERSION, exporter.name, deployment, _versions(exporter, deployment)):
            return None
        if record["artifact"] and record["artifact"] not in record["files"]:
            return None
        check_entries(folder, record["files"], without=(FILE,))
        check = None if record["proof"] is None else dict(record["proof"])
        text = "" if check is None else check.pop("text_read", "")
        if check is not None:
            check_typed(check, RuntimeCheck, f"the proof in {folder / FILE}")
        return Exported(
            row=record["row"] or "",
            deployment=deployment,
            artifact=record["artifact"],
            expected=proof.load(folder) if proof.FILE in record["files"] else None,
            check=None if check is None else RuntimeCheck(**check),
            text=text,
            promise=record.get("promise"),
        )
    except AutoDistillError:
        return None


def forget(folder: Path) -> None:
    """Remove the records of an export from its folder, before another export is written there.

    Until the new export has its own record, its files must not be described by results of others.
    """
    for name in (FILE, proof.FILE, CARD):
        (folder / name).unlink(missing_ok=True)


def _runtime(exporter: Exporter, deployment: Deployment) -> str:
    return exporter.runs_in if isinstance(exporter, TakesAny) else deployment.runtime


def _versions(exporter: Exporter, deployment: Deployment) -> dict[str, str]:
    needed = exporter.packages if isinstance(exporter, TakesAny) else _RUNTIMES.get(deployment.runtime, ())
    found = {name: importlib.metadata.version(name) for name in (*_PACKAGES, *needed)}
    return {"python": platform.python_version()} | found


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The result of `repeat`: the record, and the result of running the files here.

    Attributes:
        record: Content of `export.json`.
        check: Result of running the files in their runtime here; None if they were not run.
        why_not: Why they were not run.
    """

    record: Mapping[str, Any]
    check: RuntimeCheck | None
    why_not: str = ""


def repeat(folder: Path, threads: int, *, run_code: bool = False) -> Repeated:
    """Check the files of an export against their hashes, and run it again as its proof did.

    Args:
        folder: A folder with an `export.json`; it may come from anywhere.
        threads: CPU threads of the runtime.
        run_code: Whether a file that is code, like TorchScript, may be run.

    Raises:
        InputError: There is no such folder, or its record is invalid.
        DamagedError: A file is missing, was added or was altered; the message names the first one.
        VerificationError: The export does not act here as the evaluated student does.
    """
    check_exported(folder)
    record = read_json(folder / FILE)
    check_typed(record, ExportRecord, str(folder / FILE))
    if record["version"] != _VERSION:
        raise InputError(
            f"{folder / FILE} is of version {record['version']}, and this AutoDistill reads {_VERSION}: export the "
            "student again, or use the version that wrote it"
        )
    deployment, exporter = Deployment.from_json(record["deployment"]), load_exporter(record["format"])
    files, name = record["files"], record["artifact"]
    check_entries(folder, files, without=(FILE,))
    if record["proof"] is None:
        return Repeated(record=record, check=None, why_not="it was exported without a proof")
    if isinstance(exporter, TakesAny) and exporter.is_code and not run_code:
        why = f"{exporter.name} files are code: if you trust where it comes from, give --run-code"
        return Repeated(record=record, check=None, why_not=why)
    built = record.get("compiled_for")
    if built and isinstance(exporter, TakesAny) and built != (here := exporter.notes.get("compiled_for")):
        return Repeated(record=record, check=None, why_not=f"it is for {built}; here is {here}")
    if name and name not in files:
        raise DamagedError(f"{folder / FILE} names {name!r}, which is not one of its files")
    if proof.FILE not in files:
        raise VerificationError(f"{folder} has no {proof.FILE}: export the student again")
    path = folder / name if name else folder
    check = prove(exporter, path, deployment, proof.load(folder), threads, folder)
    return Repeated(record=record, check=check)

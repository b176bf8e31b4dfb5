"""An export that is to be bundled: its files are checked against their hashes, and its records are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autodistill.errors import DamagedError, InputError
from autodistill.export.base import Expected
from autodistill.export.promise import RECORD, ExportRecord, Promised, check_exported
from autodistill.models.model_folder import stated_license
from autodistill.runtimes.launch_files import SERVE_FILE, Launch, read_launch
from autodistill.strategy.deployment import Deployment
from autodistill.utils.checksums import check_entries
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json
from autodistill.utils.typed_data import check_typed
from autodistill.utils.yaml_files import parse_yaml

RUNTIMES = ("llama.cpp", "vllm", "onnxruntime")
"""Runtimes that a bundle can be for, by their names for `--runtime`."""
_READ = {
    "llama.cpp": ("gguf",),
    "vllm": ("compressed-tensors", "huggingface"),
    "onnxruntime": ("onnx", "onnx-f16"),
}
_NOT_NAMES = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export, and what is known about it.

    Attributes:
        folder: Folder of its files, which have the hashes of its record.
        files: Their names, including `export.json`.
        runtime: One of `RUNTIMES`.
        name: Name of the student as a DNS label: small letters, digits and "-".
        tag: A hash of all files.
        row: Id of the row; "" if it is not from a row.
        model: Name of the file that the runtime loads; "" for the folder.
        deployment: Its deployment: how it is packed.
        promise: Its promise: what it was chosen for.
        expected: What the evaluated student answers.
        written: Tokens that it writes after the beginning of the first sequence, up to where its runtime differed.
        launch: How to start llama.cpp with it; None for other runtimes.
        versions: Versions of the software that wrote and ran it.
        license: Licence of the student according to its card; "" if the card has none.
    """

    folder: Path
    files: tuple[str, ...]
    runtime: str
    name: str
    tag: str
    row: str
    model: str
    deployment: Deployment
    promise: Promised
    expected: Expected
    written: tuple[int, ...]
    launch: Launch | None
    versions: Mapping[str, str]
    license: str


def read_export(folder: Path, runtime: str | None = None) -> Exported:
    """Read an export and check each file against its hash.

    Args:
        folder: Folder that `autodistill export` or a search wrote.
        runtime: Runtime to bundle it for. "llamacpp" means llama.cpp. By default, one that reads its format.

    Raises:
        InputError: It is not an export, it has no proof or no promise, or the runtime does not read it.
        DamagedError: A file has changed since it was written.
        VerificationError: Its expected answers cannot be read.
    """
    runtime = "llama.cpp" if runtime == "llamacpp" else runtime  # its packages and images have the shorter name
    if runtime is not None and runtime not in RUNTIMES:
        raise InputError(f"there is no runtime {runtime!r}: --runtime is {', '.join(RUNTIMES)}")
    check_exported(folder)
    record = read_json(folder / RECORD)
    where = str(folder / RECORD)
    check_typed(record, ExportRecord, where)
    fitting = [name for name, formats in _READ.items() if record["format"] in formats]
    runtime = runtime or next(iter(fitting), None)
    if runtime not in fitting:
        read = "; ".join(f"{name} reads {' and '.join(formats)}" for name, formats in _READ.items())
        raise InputError(f"{folder} is an export to {record['format']}, and a bundle has no server for it: {read}")
    if record.get("promise") is None and runtime != "onnxruntime":
        raise InputError(
            f"{where} has no promise: the row was not measured as it is stored there, or an earlier version wrote it; "
            "export it again, in the row's own format"
        )
    if record["proof"] is None:
        raise InputError(f"{folder} was exported without a proof, so its expected answers are unknown: export it again")
    if record["artifact"] and record["artifact"] not in record["files"]:
        raise DamagedError(f"{where} names {record['artifact']!r}, which is not one of its files")
    launch = _launch(folder / record["artifact"]) if runtime == "llama.cpp" else None
    check_entries(folder, record["files"], without=(RECORD,))
    # This import loads torch, so it comes only after the checks.
    from autodistill.export import proof

    expected = proof.load(folder)
    same = record["proof"].get("same_written")
    promise = record.get("promise")
    if promise is None:
        # A library promises nothing. It is asked no more tokens than were read at the export.
        promised = Promised(context=expected.sequences.shape[1], streams=1, measured={})
    else:
        promised = Promised.read(promise, where)
    return Exported(
        folder=folder,
        files=(*record["files"], RECORD),
        runtime=runtime,
        name=_name(record["row"] or folder.resolve().name),
        tag=content_hash(record["files"]),
        row=record["row"] or "",
        model=record["artifact"],
        deployment=Deployment.from_json(record["deployment"]),
        promise=promised,
        expected=expected,
        written=expected.written[: same if isinstance(same, int) else 0],
        launch=launch,
        versions=record["versions"],
        license=_license(folder),
    )


def _launch(model: Path) -> Launch:
    launch = read_launch(model)
    if launch is None:
        raise InputError(f"there is no {SERVE_FILE} for {model}, as in earlier versions: export the student again")
    return launch


def _license(folder: Path) -> str:
    """Return the licence in the header of a model card that a search or an export wrote."""
    path = folder / "README.md"
    _, _, rest = (path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "").partition("---\n")
    head, end, _ = rest.partition("\n---\n")
    found = parse_yaml(head, str(path)) if end else None
    return stated_license(found.get("license")) or "" if isinstance(found, Mapping) else ""


def _name(text: str) -> str:
    """Return a name for images, services and units: a DNS label that begins with a letter, at most 40 characters."""
    plain = _NOT_NAMES.sub("-", text.lower()).strip("-") or "student"
    return (plain if plain[0].isalpha() else f"student-{plain}")[:40].strip("-")

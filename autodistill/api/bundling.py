"""`bundle` and `dashboards`: files that serve a student elsewhere, and a Grafana dashboard of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from autodistill.dashboards.search import PORT
from autodistill.errors import InputError
from autodistill.options import Option


def bundle(
    export: Annotated[
        str | Path | None,
        Option(
            help="Folder that a search or autodistill export wrote, with its export.json.",
            metavar="EXPORT",
            typed=Path,
            argument=True,
        ),
    ] = None,
    *,
    runtime: Annotated[
        str | None,
        Option(help="What serves it: llama.cpp, vllm or onnxruntime (default: what reads its format).", metavar="NAME"),
    ] = None,
    out: Annotated[
        str | Path | None, Option(help="Folder to write the bundle into.", metavar="DIR", typed=Path)
    ] = None,
    image: Annotated[
        str | None,
        Option(
            help="Name of the image, like registry.example.com/team/student:1 (default: of the row and its files).",
            metavar="NAME",
        ),
    ] = None,
    check: Annotated[
        str | Path | None,
        Option(help="Instead: compare the files of this bundle with their checksums.", metavar="DIR", typed=Path),
    ] = None,
) -> dict[str, Any]:
    """Write what others need to serve an exported student: image, manifests, monitoring, smoke test and a card.

    Returns:
        Plain data: the bundle and its files. With `check`: how many files are intact, and which files do not belong to
        the bundle.

    Raises:
        InputError: There is no export or bundle, the export cannot be bundled, or arguments contradict each other.
        DamagedError: A file is missing or was altered after the bundle was written.
    """
    if check is not None:
        if (export, runtime, out, image) != (None, None, None, None):
            raise InputError("--check DIR checks an existing bundle: give it alone")
        from autodistill.bundle.sums import check_sums

        found = check_sums(Path(check))
        return {"bundle": str(check), "whole": found.files, "others": list(found.other_files)}
    if export is None:
        raise InputError("bundle takes the folder of an export, or --check DIR")
    if out is None:
        raise InputError("bundle writes a folder: name it with --out")
    from autodistill.bundle.write import write_bundle

    return write_bundle(Path(export), Path(out), runtime, image)


def dashboards(
    out: Annotated[str | Path, Option(help="Folder to write into.", metavar="DIR", typed=Path, required=True)],
    *,
    port: Annotated[
        int, Option(help=f"Port of the search, as in its --metrics-port (default: {PORT}).", metavar="PORT")
    ] = PORT,
) -> dict[str, str]:
    """Write a Grafana dashboard of a search, and the scrape configuration for Prometheus.

    Returns:
        The path of each file, by the file's purpose.

    Raises:
        InputError: A file exists already, or the folder cannot be written.
    """
    from autodistill.dashboards.search import write_dashboards

    if not 1 <= port <= 65535:
        raise InputError(f"--port must be 1 to 65535, not {port}")
    return {name: str(path) for name, path in write_dashboards(Path(out), port).items()}

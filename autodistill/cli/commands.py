"""The commands that show what the Python API has as objects: leaderboards, explanations, exports, what is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from autodistill.cli.streams import quiet_libraries
from autodistill.cli.tables import open_view
from autodistill.errors import InputError
from autodistill.options import RUNS, Cache, Option, Out, RayAddress, Storage
from autodistill.runs.run_folder import RunFolder, default_cache, known_runs
from autodistill.runs.standing import leaderboard_of

RunName = Annotated[str, Option(help="Name of the run.", metavar="RUN", argument=True, complete="runs")]
Boards = list[tuple[RunFolder, tuple[Any, str]]]


def further(given: Mapping[str, Any]) -> Iterator[str]:
    """What a request names beside teacher and data that may lie on a hub: tasks of lm-eval, and models that students
    may begin from.
    """
    from autodistill.evaluators.tasks.lm_eval import PREFIX
    from autodistill.strategy.named import load_strategy
    from autodistill.strategy.space import load_space

    for text in (given.get("metric"), given.get("objectives")):
        yield from (name for name in map(str.strip, (text or "").split(",")) if name.startswith(PREFIX))
    if given.get("space") is not None:
        yield from load_space(given["space"]).models
    strategies = (given.get("strategy"), *(given.get("baseline") or ()))
    models = (load_strategy(reference).init.model for reference in strategies if reference is not None)
    yield from filter(None, models)


def leaderboard(
    runs: Annotated[
        list[str] | None,
        Option(help="Names of runs (default: all).", metavar="RUN", typed=list[str], argument=True, complete="runs"),
    ] = None,
    out: Out = RUNS,
) -> Boards:
    """Show the ranked students of runs, including runs that are still going on."""
    names = list(dict.fromkeys(runs or known_runs(Path(out))))
    if not names:
        raise InputError(f"there are no runs in {out}: make one with autodistill search, or name another --out")
    found = [RunFolder.open(Path(out), name) for name in names]
    return [(run, leaderboard_of(run)) for run in found]


def explain(run: RunName, out: Out = RUNS) -> dict[str, Any]:
    """Show what mattered in a run, what was stopped early, which limit binds and what to try next."""
    from autodistill.search.explain import explain as explained

    found = explained(RunFolder.open(Path(out), run))
    return {**found.to_json(), "text": found.describe()}


def export(
    run: RunName,
    to: Annotated[
        str,
        Option(
            help="Formats to write, separated by commas: huggingface, gguf, compressed-tensors, onnx, onnx-f16, pt2, "
            "torchscript.",
            metavar="NAMES",
        ),
    ],
    out: Annotated[
        Path, Option(help="Folder to write into; each format gets a folder in it.", metavar="DIR", typed=Path)
    ],
    row: Annotated[
        str | None, Option(help="Row of the leaderboard to export (default: the best row).", metavar="ID")
    ] = None,
    runs: Annotated[Path, Option(help="Folder that holds the runs.", metavar="DIR", typed=Path)] = RUNS,
    unverified: Annotated[
        bool,
        Option(help="Do not run what was written; its card says so. Weights are compared all the same.", typed=bool),
    ] = False,
) -> dict[str, str]:
    """Export a row of a run, a student or the teacher, to other formats, and prove that each does the same."""
    containers = [name.strip() for name in to.split(",") if name.strip()]
    quiet_libraries()
    folder = RunFolder.open(runs, run)
    from autodistill.search.finish.export_run import export_run

    threads = _threads()
    with open_view() as view:
        paths = export_run(folder, row, containers, out, view.log, verified=not unverified, threads=threads)
        return {name: str(path) for name, path in paths.items()}


def _threads() -> int:
    from autodistill.hardware.background_load import free_cores
    from autodistill.hardware.machine import detect

    return free_cores(detect().cpus)


def verify(
    folder: Annotated[
        Path, Option(help="Folder that autodistill export wrote.", metavar="DIR", typed=Path, argument=True)
    ],
    run_code: Annotated[
        bool, Option(help="Run files that are code too (pt2, torchscript): only of whom you trust.", typed=bool)
    ] = False,
) -> dict[str, Any]:
    """Hold an export to the hashes of its record, and repeat its proof on this machine."""
    quiet_libraries()
    from autodistill.export.record import repeat

    found = repeat(folder, _threads(), run_code=run_code)
    files = len(found.record["files"])
    document = {"folder": str(folder), "format": found.record["format"], "row": found.record["row"], "files": files}
    document |= {"not_run": found.why_not} if found.check is None else {"proof": asdict(found.check)}
    return document


def verified_text(document: Mapping[str, Any]) -> str:
    """What `verify` found, for a person."""
    whole = f"{document['folder']}: its {document['files']} files are those that were exported as {document['format']}"
    if "not_run" in document:
        return f"{whole}. They were not run: {document['not_run']}"
    proof = document["proof"]
    low, high = proof["interval"]
    said = [
        f"{whole}.",
        f"Run here they choose the evaluated student's token in {proof['agreement']:.2%} ({low:.1%} to {high:.1%}) of "
        f"{proof['positions']} clear positions, and in {proof['raw_agreement']:.2%} of all.",
    ]
    if proof["divergence"] is not None:
        said.append(f"They are {proof['divergence']:.2g} nats away from that student.")
    if proof["same_written"] is not None:
        said.append(f"The first {proof['same_written']} tokens that they write are the same.")
    return " ".join(said)


def doctor(
    out: Out = RUNS, cache: Cache = None, storage: Storage = None, ray_address: RayAddress = None
) -> Sequence[Any]:
    """Check what is installed and what is missing. Exits with 2 if the default search cannot run."""
    quiet_libraries()
    from autodistill.cli.doctor import examine

    return examine(Path(out), default_cache() if cache is None else Path(cache), storage, ray_address)


def strategies(
    name: Annotated[
        str | None,
        Option(help="Print this strategy's YAML.", metavar="NAME", argument=True, complete="strategies"),
    ] = None,
) -> dict[str, Any]:
    """List the strategies that distill and --baseline know by name, or print one."""
    return _packaged("strategies", name)


def spaces(
    name: Annotated[
        str | None, Option(help="Print this space's YAML.", metavar="NAME", argument=True, complete="spaces")
    ] = None,
) -> dict[str, Any]:
    """List the search spaces that --space knows by name, or print one, to begin your own with."""
    return _packaged("spaces", name)


def _packaged(what: str, name: str | None) -> dict[str, Any]:
    """The packaged spaces or strategies with what each is, or the text of one."""
    from autodistill.strategy.named import packaged_file, packaged_files

    if name is not None:
        path = packaged_file(what, name)
        return {"name": name, "path": str(path), "yaml": path.read_text(encoding="utf-8")}
    return {"known": {name: _about(path.read_text(encoding="utf-8")) for name, path in packaged_files(what).items()}}


def _about(text: str) -> str:
    """What a YAML file says it is: its description, or the comment that it begins with."""
    described = next((line for line in text.splitlines() if line.startswith("description: ")), None)
    if described is not None:
        return described.removeprefix("description: ").strip("\"'")
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)

"""Commands for what the Python API has as objects: leaderboards, explanations, exports, packaged files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from autodistill.advisor.merged import Board
from autodistill.api.paths import each_run, run_folder
from autodistill.cli.streams import quiet_libraries
from autodistill.cli.summary import headline
from autodistill.cli.tables import open_view
from autodistill.errors import InputError
from autodistill.export.base import check_containers
from autodistill.export.promise import RECORD, check_exported
from autodistill.options import EACH_RUN, ONE_RUN, RUNS, Cache, Moved, Option, Runs, cache_folder
from autodistill.runs.events import RowAdded, RowTested
from autodistill.runs.results.leaderboard import Ranked
from autodistill.runs.results.selection import contenders
from autodistill.runs.run_folder import RunFolder, no_runs, read_each
from autodistill.runs.standing import find_row, leaderboard_of
from autodistill.units import format_rate
from autodistill.utils.json_files import read_json

OneRun = Annotated[str | None, ONE_RUN]
Boards = list[tuple[RunFolder, tuple[Any, str]]]


class Merged:
    """Tables with the rows of several runs.

    Attributes:
        boards: The tables. The rows of one table are comparable.
    """

    def __init__(self, boards: Sequence[Board]) -> None:
        self.boards = boards


def hub_references(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a request may read from a hub in addition to teacher and data.

    These are tasks of lm-eval, and models from which students may be initialised.
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
    run: Annotated[
        list[str] | None,
        EACH_RUN,
    ] = None,
    merge: Annotated[
        bool,
        Option(
            help=(
                "Rank the rows of all runs together, if they can be compared. RUN may then be a folder or a .parquet "
                "file."
            ),
        ),
    ] = False,
    by: Annotated[
        str | None,
        Option(help="With --merge: the figure to rank by (default: what ranked each run).", metavar="FIGURE"),
    ] = None,
    parquet: Annotated[
        Path | None,
        Option(help="With --merge: also write all rows into this .parquet file.", metavar="FILE", typed=Path),
    ] = None,
    most: Annotated[
        int | None, Option(help="With --merge: rows to show of each table (default: 20).", metavar="N", minimum=1)
    ] = None,
    runs: Runs = RUNS,
) -> Boards | Merged:
    """Show the ranked students of runs, including runs that are still going on."""
    if merge and parquet is not None and (parquet.is_dir() or parquet.suffix != ".parquet"):
        raise InputError(f"--parquet {parquet}: name a file that ends in .parquet")
    if merge:
        names = each_run(run or [str(runs)], Path(runs))
        return _merged(names, Path(runs), by, parquet, 20 if most is None else most)
    for name, value in (("by", by), ("parquet", parquet), ("most", most)):
        if value is not None:
            raise InputError(f"--{name} belongs to tables of several runs: give it with --merge")
    if run:
        return [_board(run_folder(name, Path(runs))) for name in each_run(run, Path(runs))]
    found = read_each(Path(runs), _board)
    if not found:
        raise no_runs(Path(runs))
    return list(found.values())


def _board(run: RunFolder) -> tuple[RunFolder, tuple[list[Ranked], str]]:
    headline(run)  # raises if the run's records cannot be read, before other runs are shown
    return run, leaderboard_of(run)


def _merged(names: Sequence[str], folder: Path, by: str | None, parquet: Path | None, most: int) -> Merged:
    from autodistill.advisor.merged import merge, read_runs, write

    runs = read_runs(names, folder)
    boards = merge(runs, by, most)
    if parquet is not None:
        write(runs, parquet)
    return Merged(boards)


def _file(path: Path) -> Path:
    """Return the path of a file to write.

    Raises:
        InputError: The path is a folder, such as the folder of the runs.
    """
    if path.is_dir():
        raise InputError(
            f"{path} is a folder: --out names the file to write, and --runs the folder that holds the runs"
        )
    return path


def explain(run: OneRun = None, runs: Runs = RUNS) -> dict[str, Any]:
    """Show what mattered in a run, what was stopped early, which limit binds and what to try next."""
    folder = run_folder(run, Path(runs))
    from autodistill.search.explain import explain as explained

    found = explained(folder)
    return {**found.to_json(), "text": found.describe()}


RowId = Annotated[str, Option(help="Id of the row, as leaderboard shows it.", metavar="ROW", argument=True)]
On = Annotated[
    str | None, Option(help="Run that has the row (default: the one that does).", metavar="RUN", complete="runs")
]


def show(row: RowId, on: On = None, runs: Runs = RUNS) -> dict[str, Any]:
    """Show how a row was made: teacher, data, code, packages, machine, seeds, and tokens read."""
    from autodistill.advisor.origin import origin

    return origin(row, Path(runs), on).to_json()


def reproduce(
    row: RowId,
    on: On = None,
    teacher: Moved = None,
    data: Annotated[str | None, Option(help="Where the run's data are now, if they were moved.", metavar="REF")] = None,
    general_text: Annotated[
        str | None, Option(help="Where the run's --general-text is now, if it was moved.", metavar="REF")
    ] = None,
    runs: Runs = RUNS,
    cache: Cache = None,
) -> dict[str, Any]:
    """Make a row again, and say whether it is identical, within its error, or different. Its run is left as it is."""
    from autodistill.advisor.origin import origin

    found = origin(row, Path(runs), on)
    quiet_libraries()
    from autodistill.search.remake import remake

    with open_view() as view:
        moved = {"teacher": teacher, "data": data, "general_text": general_text}
        made = remake(found.run, found.row, cache_folder(cache), view.log, **moved)
    return {**made.to_json(), "text": made.describe()}


def report(
    run: OneRun = None,
    out: Annotated[
        Path | None,
        Option(
            help="File to write the page to (default: report.html in the run's folder).", metavar="FILE", typed=Path
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        Option(help="Also write each chart as PNG, SVG and Vega-Lite into this folder.", metavar="DIR", typed=Path),
    ] = None,
    runs: Runs = RUNS,
) -> dict[str, str]:
    """Write the page about a run again: one file with charts and tables, which opens from disk."""
    folder = run_folder(run, Path(runs))
    if plots is not None and plots.exists() and not plots.is_dir():
        raise InputError(f"{plots} is a file: --plots names a folder for the charts")
    from autodistill.report.writing import write_charts, write_page

    paths = {"page": str(write_page(folder, None if out is None else _file(out)))}
    return paths | ({path.name: str(path) for path in write_charts(folder, plots)} if plots else {})


def compare(
    run: Annotated[
        list[str],
        Option(
            help="Names of two runs or more, or their folders.",
            metavar="RUN",
            typed=list[str],
            argument=True,
            complete="runs",
        ),
    ],
    out: Annotated[Path, Option(help="File to write (default: compare.html).", metavar="FILE", typed=Path)] = Path(
        "compare.html"
    ),
    runs: Runs = RUNS,
) -> dict[str, str]:
    """Write one page about several runs: what each was asked and found, with their budget curves."""
    folders = [run_folder(name, Path(runs)) for name in each_run(run, Path(runs))]
    from autodistill.report.writing import write_comparison

    return {"page": str(write_comparison(folders, _file(out)))}


def study(
    run: OneRun = None,
    out: Annotated[
        Path | None, Option(help="File to write (default: RUN.journal).", metavar="FILE", typed=Path)
    ] = None,
    runs: Runs = RUNS,
) -> dict[str, str]:
    """Write a run's trials as a study of Optuna, which optuna-dashboard shows."""
    from autodistill.search.study import write_study

    folder = run_folder(run, Path(runs))
    return {"open": write_study(folder, Path(f"{folder.name}.journal") if out is None else _file(out))}


def log(
    run: OneRun = None,
    *,
    to: Annotated[
        str, Option(help="Tracker to send to: tensorboard[=DIR], mlflow[=URI] or wandb[=PROJECT].", metavar="TRACKER")
    ],
    runs: Runs = RUNS,
) -> dict[str, Any]:
    """Send a run's trials to TensorBoard, MLflow or Weights & Biases, each as a run of its own."""
    quiet_libraries()
    from autodistill.trackers.writing import send_run

    count, opened_by = send_run(run_folder(run, Path(runs)), to)
    return {"trials": count, "open": opened_by}


def export(
    run: OneRun = None,
    *,
    to: Annotated[
        str,
        Option(
            help="Formats to write, separated by commas: huggingface, gguf, compressed-tensors, onnx, onnx-f16, "
            "pt2, torchscript, aoti, litert, litert-codes, litertlm, executorch.",
            metavar="NAMES",
        ),
    ],
    out: Annotated[
        Path, Option(help="Folder to write into; each format gets a folder in it.", metavar="DIR", typed=Path)
    ],
    row: Annotated[
        str | None, Option(help="Row of the leaderboard to export (default: the best row).", metavar="ID")
    ] = None,
    teacher: Moved = None,
    runs: Runs = RUNS,
    unverified: Annotated[
        bool, Option(help="Do not run what was written; its card says so. Weights are compared all the same.")
    ] = False,
) -> dict[str, str]:
    """Export a row of a run, a student or the teacher, to other formats, and prove that each does the same."""
    containers = [name.strip() for name in to.split(",") if name.strip()]
    folder = run_folder(run, Path(runs))
    check_containers(containers, out)
    if row is not None:
        find_row(folder, contenders(folder.events.rows(RowAdded, RowTested)), row)
    # Everything named exists. Only now import the engines, which takes seconds.
    quiet_libraries()
    from autodistill.search.finish.export_run import export_run

    threads = _threads()
    with open_view() as view:
        options: dict[str, Any] = {"verified": not unverified, "threads": threads, "teacher": teacher}
        paths = export_run(folder, row, containers, out, view.log, **options)
        return {name: str(path) for name, path in paths.items()}


def exported_text(paths: Mapping[str, str]) -> str:
    """Return text about what `export` wrote and what its verification found."""
    told = []
    for name, path in paths.items():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        proof = read_json(folder / RECORD)["proof"]
        found = "not run, as asked" if proof is None else f"{_agreement(proof)}."
        told.append(f"{name}: {path}\n  {found}")
    served = [f"To serve it: autodistill serve {shlex.quote(paths['gguf'])}"] if "gguf" in paths else []
    return "\n".join(told + served)


def _agreement(proof: Mapping[str, Any]) -> str:
    from autodistill.export.verify import RuntimeCheck

    check = RuntimeCheck(**{name: value for name, value in proof.items() if name != "text_read"})
    return f"Run here they have {check.describe()}"


def _threads() -> int:
    from autodistill.hardware.background_load import free_cores
    from autodistill.hardware.machine import detect

    return free_cores(detect().cpus)


def verify(
    folder: Annotated[
        Path, Option(help="Folder that autodistill export wrote.", metavar="DIR", typed=Path, argument=True)
    ],
    run_code: Annotated[
        bool, Option(help="Also run files that are code (pt2, torchscript, aoti). Only if you trust their maker.")
    ] = False,
) -> dict[str, Any]:
    """Compare an export with the hashes in its record, and repeat its proof on this machine."""
    check_exported(folder)
    quiet_libraries()
    from autodistill.export.record import repeat

    found = repeat(folder, _threads(), run_code=run_code)
    files = len(found.record["files"])
    document = {"folder": str(folder), "format": found.record["format"], "row": found.record["row"], "files": files}
    document |= {"not_run": found.why_not} if found.check is None else {"proof": asdict(found.check)}
    return document


def verified_text(document: Mapping[str, Any]) -> str:
    """Return text about what `verify` found."""
    whole = f"{document['folder']}: its {document['files']} files are those that were exported as {document['format']}"
    if "not_run" in document:
        return f"{whole}. They were not run: {document['not_run']}"
    proof = document["proof"]
    said = [f"{whole}.", f"{_agreement(proof)}."]
    if proof["same_written"] is not None:
        said.append(f"The first {proof['same_written']} tokens that they write are the same.")
    if proof["tokens_per_second"] is not None:
        said.append(f"They write {format_rate(proof['tokens_per_second'], 3)} tokens a second here.")
    return " ".join(said)


def doctor(
    runs: Runs = RUNS,
    cache: Cache = None,
    storage: Annotated[
        str | None,
        Option(help="Also check that this can be written and read: an s3://, gs:// or file:// address.", metavar="URI"),
    ] = None,
    ray_address: Annotated[
        str | None,
        Option(help="Also check each node of this running Ray cluster: auto, or host:port.", metavar="ADDR"),
    ] = None,
) -> Sequence[Any]:
    """Check what is installed and what is missing. Exits with 2 if a search cannot run."""
    quiet_libraries()
    from autodistill.cli.doctor import examine

    return examine(Path(runs), cache_folder(cache), storage, ray_address)


def strategies(
    name: Annotated[
        str | None, Option(help="Print this strategy's YAML.", metavar="NAME", argument=True, complete="strategies")
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
    """Return the packaged spaces or strategies with their descriptions, or the YAML text of one."""
    from autodistill.strategy.named import packaged_file, packaged_files

    if name is not None:
        path = packaged_file(what, name)
        return {"name": name, "path": str(path), "yaml": path.read_text(encoding="utf-8")}
    return {"known": {name: _about(path.read_text(encoding="utf-8")) for name, path in packaged_files(what).items()}}


def _about(text: str) -> str:
    """Return the `description:` of a YAML file, or else the comment at its start."""
    described = next((line for line in text.splitlines() if line.startswith("description: ")), None)
    if described is not None:
        return described.removeprefix("description: ").strip("\"'")
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)

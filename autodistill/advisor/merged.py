"""Leaderboards of many runs as tables. Only rows that are comparable are ranked together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.runs.results.leaderboard import SPEEDS, Ranked, rank
from autodistill.runs.results.row import Row, finite, is_field, trained_fully
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.results.table import read_rows, read_table, table_of, write_table
from autodistill.runs.run_folder import RunFolder, read_each
from autodistill.runs.schema import about
from autodistill.strategy.domains import near
from autodistill.utils.typed_data import check_typed

if TYPE_CHECKING:
    import pyarrow as pa

PAIRED = 100
"""Number of best rows of a table that are checked for ties. Later rows are ordered by the metric alone."""
_AGAINST_TEACHER = ("agreement", "kl")  # metrics that compare a student with its teacher
_LESS_IS_BETTER = ("perplexity", "kl", "ece", "latency_ms", "ttft_ms", "answer_ms", "memory_bytes", "size_bytes")
_NO_FIGURES = ("context", "batch", "fidelity", "interpolation", "seed", "schema_version")
_TASK = "task:"


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """The rows of one run as a table, and what they were measured on.

    Attributes:
        run: The run's name.
        path: The folder or file that it was read from.
        about: The part of its `search.json` that `about` returns. Empty for a file that does not have it.
        table: The rows, as `table_of` makes them.
    """

    run: str
    path: Path
    about: Mapping[str, Any]
    table: pa.Table


@dataclass(frozen=True, kw_only=True)
class Board:
    """Rows of one or several runs that are ranked together.

    Attributes:
        metric, direction: The metric that ranks them, and its direction.
        on: What all of them were measured on, in words.
        runs: Names of the runs.
        ranked: The best rows in their order. The budget of their own run does not count; `feasible` says whether they
            keep to it. The id of each begins with its run.
        count: Number of rows in all.
    """

    metric: str
    direction: Direction
    on: str
    runs: tuple[str, ...]
    ranked: tuple[Ranked, ...]
    count: int


class _Key(NamedTuple):
    """What rows must have in common to be ranked together."""

    metric: str
    direction: Direction
    split: str
    examples: str
    teacher: str
    served: str


def read_runs(names: Sequence[str], out: Path) -> list[StoredRun]:
    """Read the rows of runs, by name, by folder, or from Parquet files.

    Args:
        names: Each is a run in `out`, the folder of a run, a folder of runs or of Parquet files, or a Parquet file.
        out: Folder that holds the runs that are given by name.

    Raises:
        InputError: A name is none of these, or cannot be read; or two different runs have the same name.
    """
    found: dict[str, StoredRun] = {}
    for name in names:
        for one in _read(name, out):
            before = found.setdefault(one.run, one)
            if before.path.resolve() != one.path.resolve():
                raise InputError(
                    f"two runs are named {one.run!r}, in {before.path} and in {one.path}: rename one of their folders, "
                    "or leave it out"
                )
    return list(found.values())


def merge(runs: Sequence[StoredRun], by: str | None = None, limit: int = PAIRED) -> list[Board]:
    """Rank the rows of many runs. Comparable rows share a table; there are as many tables as needed.

    Rows are comparable by a metric if they were measured on the same examples (the same documents with the same number
    of tokens each). For agreement and KL they also need the same teacher, and for a latency the same machine and
    runtime. Rows of full fidelity come first, then the metric decides. Ties among the first `PAIRED` rows are found as
    in `rank`.

    Args:
        runs: The result of `read_runs`.
        by: A figure to rank by. By default, the metric that ranked each run.
        limit: Number of rows of each table that are returned.

    Raises:
        InputError: No row has the figure, or a table has unexpected content.
    """
    groups: dict[_Key, list[tuple[StoredRun, Any, Any, np.ndarray[Any, Any]]]] = {}
    for run in runs:
        metric = by or str(run.about.get("metric") or "accuracy")
        direction: Direction = _direction(metric, run.about)
        values = _figures(run, metric)
        for key, indices in _grouped(run, metric, direction, values).items():
            groups.setdefault(key, []).append((run, values, _fidelities(run), np.array(indices)))
    if not groups:
        what = by or "what its run was ranked by"
        raise InputError(f"no row has {what}: rank by another figure with --by; {near(what, _known_figures(runs))}")
    return [_board(key, parts, limit) for key, parts in sorted(groups.items(), key=lambda item: item[0])]


def explain_split(boards: Sequence[Board]) -> str:
    """Say why rows are in several tables, or return "" if there is at most one table."""
    if len(boards) < 2:
        return ""
    reasons = []
    if len({one.metric for one in boards}) > 1:
        reasons.append("their runs were ranked by different metrics")
    speeds = [one for one in boards if one.metric in SPEEDS]
    if len({one.on for one in speeds}) > 1:
        reasons.append("a latency holds on one machine and in one runtime alone")
    others = [one for one in boards if one.metric not in SPEEDS]
    if any(sum(one.metric == other.metric for other in others) > 1 for one in others):
        reasons.append("they were measured on different examples, on which even the same model has other figures")
    return f"The rows stand in {len(boards)} tables, which cannot be compared: {', and '.join(reasons)}."


def write(runs: Sequence[StoredRun], path: Path) -> None:
    """Write the rows of runs into one Parquet file, which `read_runs` reads again.

    Args:
        runs: The result of `read_runs`.
        path: The file to write.
    """
    import pyarrow as pa

    write_table(pa.concat_tables([run.table for run in runs]), path, {run.run: run.about for run in runs})


def _read(name: str, out: Path) -> list[StoredRun]:
    path = Path(name).expanduser()
    if len(path.parts) == 1 and (out / name / "search.json").is_file():
        return [_of_run(RunFolder.open(out, name))]
    if path.is_file():
        return _of_file(path)
    if (path / "search.json").is_file():
        return [_of_run(RunFolder.open(path.absolute().parent, path.absolute().name))]
    if path.is_dir():
        inside = list(read_each(path, _of_run).values())
        inside += [one for file in sorted(path.glob("*.parquet")) for one in _of_file(file)]
        if not inside:
            raise InputError(f"{path} has no run and no .parquet file: name a run, a folder of runs, or a file")
        return inside
    if len(path.parts) > 1 or path.suffix == ".parquet":
        raise InputError(f"there is no file or folder {path}: name a run, a folder of runs, or a .parquet file")
    return [_of_run(RunFolder.open(out, name))]


def _of_run(run: RunFolder) -> StoredRun:
    asked = run.read_settings("metric", "direction")
    table = read_table(run.leaderboard_file)[0] if run.tabled else table_of(run.events.rows(), run.name)
    return StoredRun(run=run.name, path=run.path, about=about(asked), table=_named(table, run.name))


def _of_file(path: Path) -> list[StoredRun]:
    import pyarrow.compute as pc

    table, told = read_table(path)
    names = table.column("run").unique().to_pylist()
    if names in ([], [""]):
        # The file has no run names: an earlier version wrote it, it lies next to a `search.json`, or a person made it.
        name = path.parent.name if path.name == "leaderboard.parquet" else path.stem
        return [StoredRun(run=name, path=path, about={}, table=_named(table, name))]
    found = []
    for name in names:
        known = told.get(name, {})
        check_typed(known, dict[str, Any], f"what {path} says of the run {name!r}")
        part = table.filter(pc.equal(table.column("run"), name)) if len(names) > 1 else table
        found.append(StoredRun(run=name, path=path, about=known, table=part))
    return found


def _named(table: pa.Table, run: str) -> pa.Table:
    """Return the table with the name of its run, since the run may have been copied and renamed."""
    import pyarrow as pa

    place = table.schema.get_field_index("run")
    return table.set_column(place, "run", pa.array([run] * len(table), pa.string()))


def _direction(metric: str, known: Mapping[str, Any]) -> Direction:
    if metric == known.get("metric"):
        direction: Direction = known.get("direction", "max")
        return direction
    return "min" if metric.removesuffix("_predicted") in _LESS_IS_BETTER else "max"


def _figures(run: StoredRun, metric: str) -> Any:
    """Return [rows], the figure of each row, or NaN if it is missing or not finite."""
    if is_field(metric):
        values = run.table.column(metric).cast("float64").to_numpy(zero_copy_only=False)
    else:
        texts = run.table.column("other").to_pylist()
        found = [json.loads(text).get(metric) if text else None for text in texts]
        values = np.array([math.nan if isinstance(one, bool | str | None) else float(one) for one in found], float)
    return np.where(np.isfinite(values), values, math.nan)


def _known_figures(runs: Sequence[StoredRun]) -> list[str]:
    """Return the names of the figures that a row has, without errors and what only identifies it."""
    found: dict[str, None] = {}
    for table in (run.table for run in runs):
        columns = [name for name in table.column_names if is_field(name) and name not in _NO_FIGURES]
        found |= dict.fromkeys(name for name in columns if table.column(name).null_count < table.num_rows)
        others = (json.loads(text) for text in table.column("other").to_pylist() if text)
        found |= dict.fromkeys(name for other in others for name, value in other.items() if finite(value) is not None)
    return [name for name in found if not name.endswith("_stderr")]


def _fidelities(run: StoredRun) -> Any:
    """Return [rows], each row's share of the plan's tokens. It is 1 for rows trained to the end or without training."""
    kinds = run.table.column("kind").to_pylist()
    shares = run.table.column("fidelity").to_pylist()
    return np.array(
        [1.0 if trained_fully(kind, share) else share or 0.0 for kind, share in zip(kinds, shares, strict=True)], float
    )


def _grouped(run: StoredRun, metric: str, direction: Direction, values: Any) -> dict[_Key, list[int]]:
    """Return the indices of rows that have the metric, grouped by what comparable rows have in common."""
    columns = [run.table.column(name).to_pylist() for name in ("kind", "split", "examples", "machine", "deployment")]
    teacher = str((run.about.get("teacher") or {}).get("fingerprint", run.run)) if metric in _AGAINST_TEACHER else ""
    task = str(run.about.get("data", {}).get("name", "")) if metric.startswith(_TASK) else ""
    runtimes: dict[str, str] = {}
    found: dict[_Key, list[int]] = {}
    for place, (kind, split, examples, machine, deployment) in enumerate(zip(*columns, strict=True)):
        if kind == CONFIRMATION or split == "test" or math.isnan(values[place]):
            continue
        served = ""
        if metric in SPEEDS:
            if deployment not in runtimes:
                runtimes[deployment] = str(json.loads(deployment).get("runtime"))
            served, examples = f"{runtimes[deployment]} on {machine or f'an unknown machine of {run.run}'}", ""
        elif not examples:
            # The examples are unknown, so the row is only comparable within its run.
            examples = f"of {run.run} {task}".strip()
        key = _Key(metric, direction, split or "", examples, teacher, served)
        found.setdefault(key, []).append(place)
    return found


def _board(key: _Key, parts: Sequence[tuple[StoredRun, Any, Any, Any]], limit: int) -> Board:
    sign = -1.0 if key.direction == "max" else 1.0
    values = np.concatenate([values[places] for _, values, _, places in parts])
    shares = np.concatenate([shares[places] for _, _, shares, places in parts])
    sizes = np.concatenate([_sizes(run)[places] for run, _, _, places in parts])
    ids = np.concatenate([_ids(run)[places] for run, _, _, places in parts])
    # The last key decides first.
    order = np.lexsort((ids, sizes, sign * values, -np.minimum(shares, 1.0)))
    owners = np.concatenate([np.full(len(places), number) for number, (*_, places) in enumerate(parts)])
    within = np.concatenate([places for *_, places in parts])
    first = order[: max(limit, PAIRED)]
    rows: dict[int, Row] = {}
    for number, (run, *_) in enumerate(parts):
        mine = [int(place) for place in first if owners[place] == number]
        read = read_rows(run.table.take(within[mine]), str(run.path)) if mine else []
        rows |= {place: replace(row, row_id=f"{run.run}/{row.row_id}") for place, row in zip(mine, read, strict=True)}
    beyond = {row.row_id for row in rows.values() if not row.feasible}
    ordered = [replace(rows[int(place)], feasible=True) for place in first]
    ranked = rank(ordered[:PAIRED], key.metric, key.direction)
    ranked += [Ranked(place=place, row=row) for place, row in enumerate(ordered[PAIRED:], start=PAIRED + 1)]
    shown = [replace(one, row=replace(one.row, feasible=one.row.row_id not in beyond)) for one in ranked[:limit]]
    runs = tuple(dict.fromkeys(run.run for run, *_ in parts))
    return Board(
        metric=key.metric,
        direction=key.direction,
        on=key.served or _data(key, [run for run, *_ in parts]),
        runs=runs,
        ranked=tuple(shown),
        count=len(order),
    )


def _data(key: _Key, runs: Iterable[StoredRun]) -> str:
    """Return what rows were measured on, in words. The examples distinguish different readings of one text."""
    names = dict.fromkeys(str(name) for run in runs if (name := (run.about.get("data") or {}).get("name")))
    said = ", ".join(names) or "data that the table does not name"
    return said if key.examples.startswith("of ") else f"{said}, examples {key.examples}"


def _sizes(run: StoredRun) -> Any:
    values = run.table.column("memory_bytes").cast("float64").to_numpy(zero_copy_only=False)
    return np.where(np.isnan(values), math.inf, values)


def _ids(run: StoredRun) -> Any:
    return np.array(run.table.column("row_id").to_pylist(), dtype=object).astype(str)

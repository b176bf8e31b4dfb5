"""The students of a results folder that may be picked: rows of runs, trained to the end, and their shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from autodistill.contracts import ModelSpec
from autodistill.errors import InputError
from autodistill.estimate import spec_from_config
from autodistill.records.json_files import read_json
from autodistill.records.leaderboard import DISTILLED
from autodistill.records.recalibration import Overhead, Place, overheads
from autodistill.records.row import Row, rows_of
from autodistill.records.store import RunFolder, known_runs
from autodistill.strategy import Deployment

_COLUMNS = (
    *("row_id", "trial", "kind", "name", "deployment", "status", "feasible", "split", "params", "shape"),
    *("accuracy", "accuracy_stderr", "perplexity", "agreement", "memory_bytes", "memory_source", "size_bytes"),
    *("latency_ms", "latency_source", "machine", "context", "batch", "fidelity", "other"),
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stored row.

    Attributes:
        run: Name of its run.
        row: The row, without its documents, strategy and shape.
        metric, direction: What ranked in its run.
        shape: JSON text of the config that describes the student; None where the row has none.
    """

    run: str
    row: Row
    metric: str
    direction: str
    shape: str | None = None

    @property
    def worth(self) -> float:
        """The metric, more being better."""
        value = self.row.figure(self.metric)
        return -math.inf if value is None else value if self.direction == "max" else -value

    @cached_property
    def deployment(self) -> Deployment:
        """How it is packed and served."""
        fields = self.row.deployment
        return _deployment(tuple((name, tuple(v) if type(v) is list else v) for name, v in fields.items()))

    @property
    def config(self) -> Mapping[str, Any] | None:
        """What describes the student."""
        return None if self.shape is None else _config(self.shape)

    @property
    def spec(self) -> ModelSpec | None:
        """The student's shape; one object for all rows of one shape."""
        return None if self.shape is None else _spec(self.shape)


@lru_cache(1024)
def _deployment(fields: tuple[tuple[str, Any], ...]) -> Deployment:
    return Deployment.from_json({name: list(v) if type(v) is tuple else v for name, v in fields})


@lru_cache(65536)
def _config(text: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(text)
    return found


@lru_cache(256)
def _spec(text: str) -> ModelSpec:
    return spec_from_config(_config(text))


def stored(out: Path, runs: Sequence[str] = ()) -> list[Candidate]:
    """The students of runs that were trained to the end, of their validation split.

    Args:
        out: Folder of the runs.
        runs: Names; all by default.

    Raises:
        InputError: No such run, none at all, or runs that ranked by different metrics.
    """
    names = list(dict.fromkeys(runs or known_runs(out)))
    if not names:
        raise InputError(f"there are no runs in {out}: make one with autodistill search, or name another --out")
    found, metrics = [], {}
    for name in names:
        run = RunFolder.open(out, name)
        asked = read_json(run.search_file)
        metrics[name] = (asked["metric"], asked["direction"])
        found += [
            Candidate(run=name, row=row, metric=asked["metric"], direction=asked["direction"], shape=shape)
            for row, shape in _rows(run)
            if row.kind in DISTILLED and row.split != "test" and row.full and row.figure(asked["metric"]) is not None
        ]
    if len(set(metrics.values())) > 1:
        told = ", ".join(f"{name} by {metric}" for name, (metric, _) in metrics.items())
        raise InputError(f"runs that rank by different metrics cannot be compared ({told}): name those of one")
    return found


def recalibrated(out: Path) -> dict[Place, Overhead]:
    """What predicted memory is changed by, as the measured students of a folder's runs speak for it; often nothing."""
    return overheads(
        row
        for name in known_runs(out)
        for row, _ in _rows(RunFolder.open(out, name))
        if row.memory_source == "measured"
    )


def _rows(run: RunFolder) -> Iterator[tuple[Row, str | None]]:
    """The rows without what makes up most of the file, documents and strategies; and the text of their shapes."""
    if not run.leaderboard_file.is_file():
        for row in rows_of(run.events.read()):
            yield row, None if row.shape is None else json.dumps(row.shape)
        return
    import pyarrow.parquet as pq

    # Not `read_table`, which imports pandas where that is installed, and takes longer than all else here.
    with pq.ParquetFile(run.leaderboard_file) as file:
        # Runs of earlier versions lack some.
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        table = file.read(columns=names, use_threads=False)
    columns = {name: table.column(name).to_pylist() for name in names}
    shapes = columns.pop("shape", [None] * len(table))
    for name in ("deployment", "other"):
        columns[name] = [None if text is None else _config(text) for text in columns[name]]
    for shape, *cells in zip(shapes, *columns.values(), strict=True):
        fields = {key: value for key, value in zip(columns, cells, strict=True) if value is not None}
        yield Row(**({"other": {}} | fields)), shape

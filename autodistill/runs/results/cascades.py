"""Cascades on disk: the results of two rows for each item, as Parquet, and the curve over thresholds, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.utils.json_files import read_json, replacing, write_json
from autodistill.utils.typed_data import check_typed

VERSION = 1
_FOLDER = "cascades"


class CascadePoint(TypedDict):
    """The fields of a point of the curve that pages read; a point has more."""

    threshold: float
    deferred: float
    accuracy: float
    accuracy_stderr: float | None
    over_chance: float
    latency_ms: float | None
    memory_bytes: int | None


class CascadeUnit(TypedDict):
    """A curve over items of one kind."""

    items: int
    documents: int
    small_accuracy: float
    large_accuracy: float
    curve: Sequence[CascadePoint]
    suggestion: Mapping[str, Any]


class Cascade(TypedDict):
    """The JSON document of a cascade."""

    version: int
    run: str
    split: str
    small: Mapping[str, Any]
    large: Mapping[str, Any]
    units: Mapping[str, CascadeUnit]
    parquet: str
    notes: Sequence[str]


def write_items(
    run: Path,
    small: str,
    large: str,
    units: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    about: Mapping[str, Any],
) -> Path:
    """Write the results of two rows for each item of the same data; docs/cascades.md describes the columns.

    Args:
        run: Folder of the run.
        small, large: Ids of the rows.
        units: The columns, each [n], for each kind of item, "position" or "answer".
        about: Metadata of the file: split, data, code.

    Raises:
        InputError: The run's folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("unit", pa.string()),
            ("item", pa.int64()),
            ("document", pa.int32()),
            ("small_confidence", pa.float64()),
            ("small_correct", pa.bool_()),
            ("small_tokens", pa.int32()),
            ("large_confidence", pa.float64()),
            ("large_correct", pa.bool_()),
            ("large_tokens", pa.int32()),
        ],
        metadata={b"autodistill": json.dumps({"cascade": VERSION, **about}, allow_nan=False).encode()},
    )
    tables = []
    for unit, columns in units.items():
        count = len(next(iter(columns.values())))
        whole = {"unit": [unit] * count, "item": np.arange(count), **columns}
        tables.append(pa.table({name: whole[name] for name in schema.names}, schema=schema))
    path = _path(run, small, large, ".parquet")
    with replacing(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
    return path


def write_cascade(run: Path, small: str, large: str, document: Mapping[str, Any]) -> Path:
    """Write the curve of two rows next to their items; it replaces an earlier one.

    Raises:
        InputError: The run's folder cannot be written.
    """
    path = _path(run, small, large, ".json")
    write_json(path, document)
    return path


def read_cascades(run: Path) -> list[dict[str, Any]]:
    """Read all cascades in the folder of a run, sorted by file name.

    Raises:
        InputError: A file is damaged, or was written by a later version.
    """
    found = []
    for path in sorted((run / _FOLDER).glob("*.json")):
        document = read_json(path)
        check_typed(document, Cascade, str(path))
        if document["version"] > VERSION:
            raise InputError(f"{path} is of version {document['version']}: upgrade autodistill to read it")
        found.append(document)
    return found


def _path(run: Path, small: str, large: str, ending: str) -> Path:
    return run / _FOLDER / f"{small}+{large}{ending}"

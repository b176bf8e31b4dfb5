"""Write rows as a table in a Parquet file, and read them back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from autodistill.errors import InputError
from autodistill.runs.results.row import Row, field_types
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import replacing, strict_json
from autodistill.utils.plain_dataclass import plain, required
from autodistill.utils.typed_data import check_typed

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_VERSION = 2
"""Version of stored tables. The second one added `run`, `examples`, and metadata about the runs."""

_SAID = b"autodistill"


class _TableMetadata(TypedDict):
    """The metadata of a stored table."""

    table: int
    runs: Mapping[str, Any]


def to_parquet(rows: Sequence[Row], path: Path, run: str = "", about: Mapping[str, Any] | None = None) -> None:
    """Write rows as a Parquet file, atomically; docs/leaderboards.md describes the file.

    Args:
        rows: Rows of one run.
        path: The file.
        run: The run's name.
        about: Metadata of the run, as from `schema.about`.
    """
    write_table(table_of(rows, run), path, {run: about} if about is not None else {})


def table_of(rows: Sequence[Row], run: str) -> pa.Table:
    """Return rows as a table: a column for each field, with mappings as JSON text, and columns `run` and `examples`."""
    import pyarrow as pa

    columns = {name: [_cell(getattr(row, name)) for row in rows] for name in field_types()}
    columns |= {"run": [run] * len(rows), "examples": [examples_of(row.split, row.documents) for row in rows]}
    return pa.table(columns, schema=_table_schema())


def write_table(table: pa.Table, path: Path, about: Mapping[str, Any]) -> None:
    """Write a table made by `table_of`, atomically, with metadata for each of its runs."""
    import pyarrow.parquet as pq

    said = json.dumps({"table": TABLE_VERSION, "runs": strict_json(about)}, allow_nan=False)
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_SAID: said.encode()}), temporary)


def examples_of(split: str | None, documents: Mapping[str, Any] | None) -> str | None:
    """Return a hash of the documents that a row was measured on and their token counts, or None if they are unknown."""
    if documents is None or "ids" not in documents or "count" not in documents:
        return None
    return content_hash([split, list(documents["ids"]), [float(count) for count in documents["count"]]])


@cache
def arrow_schema() -> pa.Schema:
    """Return the columns of a table of rows."""
    import pyarrow as pa

    arrow = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return pa.schema([(name, arrow.get(kind, pa.string())) for name, kind in field_types().items()])


@cache
def _table_schema() -> pa.Schema:
    """Return the columns of a stored table: those of the rows, the run, and the hash of the examples."""
    import pyarrow as pa

    return pa.schema([*arrow_schema(), ("run", pa.string()), ("examples", pa.string())])


def _cell(value: Any) -> Any:
    value = plain(value)
    if not isinstance(value, Mapping):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # a value is not finite, which is rare; a check in every row would take longer than writing
        return json.dumps(strict_json(value), allow_nan=False)


def read_table(path: Path) -> tuple[pa.Table, Mapping[str, Any]]:
    """Read the table of a file, and its metadata of runs by name; an earlier version is converted to this one.

    Raises:
        InputError: The file is missing or damaged, has a later version, or is not a table of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path} as a leaderboard: {str(error).splitlines()[0]}") from error
    said = _runs_metadata(table, path)
    if (lacking := sorted(set(required(Row)) - set(table.column_names))) != []:
        raise InputError(f"{path} is no leaderboard: it lacks the column {', '.join(lacking)}")
    schema, count = _table_schema(), len(table)
    columns = {}
    for column in schema:
        if column.name not in table.column_names:
            columns[column.name] = pa.nulls(count, column.type)
            continue
        try:
            columns[column.name] = table.column(column.name).cast(column.type)
        except pa.ArrowException as error:
            raise InputError(f"{path} is no leaderboard: its column {column.name} is not of {column.type}") from error
    if "examples" not in table.column_names:
        parts = zip(columns["split"].to_pylist(), columns["documents"].to_pylist(), strict=True)
        try:
            found = [examples_of(split, text and json.loads(text)) for split, text in parts]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} has documents that cannot be read ({error}): make it again") from None
        columns["examples"] = pa.array(found, pa.string())
    if "run" not in table.column_names:
        columns["run"] = pa.array([""] * count, pa.string())
    return pa.table(columns, schema=schema), said


def _runs_metadata(table: pa.Table, path: Path) -> Mapping[str, Any]:
    """Return a file's metadata of runs, by name."""
    text = (table.schema.metadata or {}).get(_SAID)
    if text is None:  # the first version had no metadata
        return {}
    try:
        held = json.loads(text)
        check_typed(held, _TableMetadata, "its description")
    except (ValueError, InputError) as error:
        raise InputError(f"{path} is no leaderboard: {error}") from None
    if held["table"] > TABLE_VERSION:
        raise InputError(
            f"{path} is a table of version {held['table']}, and this autodistill reads up to {TABLE_VERSION}: "
            "upgrade it"
        )
    runs: Mapping[str, Any] = held["runs"]
    return runs


def read_rows(table: pa.Table, where: str) -> list[Row]:
    """Return the rows of a table.

    Args:
        table: A table as made by `table_of`.
        where: Name of the table for error messages.

    Raises:
        InputError: See `Row.from_json`.
    """
    nested = {name for name, kind in field_types().items() if kind not in (str, bool, int, float)}
    try:
        return [
            Row.from_json({k: json.loads(v) if k in nested and v is not None else v for k, v in record.items()})
            for record in table.select(list(field_types())).to_pylist()
        ]
    except ValueError as error:
        raise InputError(f"{where} has a row that cannot be read ({error}): make it again") from None

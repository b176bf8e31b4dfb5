"""Rows as a Parquet table and back, and files that are no such tables."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autodistill.errors import InputError
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import read_rows, read_table, to_parquet
from autodistill.strategy.strategy import Strategy
from tests.runs.results.test_row import FULL, LEAST


def read_parquet(path: Path) -> list[Row]:
    """Return the rows that `to_parquet` wrote."""
    return read_rows(read_table(path)[0], str(path))


def test_parquet_holds_the_rows_under_an_explicit_schema(tmp_path: Path) -> None:
    rows = [Row.from_json(FULL), Row.from_json(LEAST)]
    path = tmp_path / "leaderboard.parquet"
    to_parquet(rows, path)
    assert read_parquet(path) == rows
    table = pq.read_table(path)
    assert table.schema.field("memory_bytes").type == pa.int64()
    assert table.schema.field("accuracy").type == pa.float64()
    assert table.schema.field("feasible").type == pa.bool_()
    assert table["memory_bytes"].to_pylist() == [2**40 + 1, None]
    assert json.loads(table["strategy"][0].as_py()) == Strategy().to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["leaderboard.parquet"]


def test_types_by_tensor_and_of_the_cache_are_read_back(tmp_path: Path) -> None:
    typed = LEAST["deployment"] | {"types": {"embeddings": "q5_1"}, "cache_type_k": "q8_0", "cache_type_v": "q4_0"}
    to_parquet([Row.from_json(LEAST | {"deployment": typed})], tmp_path / "leaderboard.parquet")
    (found,) = read_parquet(tmp_path / "leaderboard.parquet")
    assert found.deployment.to_json() == typed
    assert found.deployment.types == (("embeddings", "q5_1"),)
    assert found.deployment.cache_types == ("q8_0", "q4_0")


def test_a_table_says_of_its_run_what_it_was_given_with_it(tmp_path: Path) -> None:
    to_parquet([Row.from_json(FULL)], tmp_path / "with.parquet", "run", {"metric": "kl", "budget": None})
    to_parquet([Row.from_json(FULL)], tmp_path / "without.parquet", "run")
    assert read_table(tmp_path / "with.parquet")[1] == {"run": {"metric": "kl", "budget": None}}
    assert read_table(tmp_path / "without.parquet")[1] == {}


def test_an_empty_leaderboard_keeps_its_schema(tmp_path: Path) -> None:
    to_parquet([], tmp_path / "empty.parquet")
    assert read_parquet(tmp_path / "empty.parquet") == []
    assert pq.read_schema(tmp_path / "empty.parquet").field("retention").type == pa.float64()


@pytest.mark.parametrize("content", [None, b"PAR1 no"])
def test_a_file_that_is_no_leaderboard_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "leaderboard.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"leaderboard\.parquet"):
        read_parquet(path)

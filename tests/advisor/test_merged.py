"""Rows of many runs are ranked together if they can be compared. If not, they stand apart with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from autodistill.advisor.merged import explain_split, merge, read_runs, write
from autodistill.cli.commands import leaderboard
from autodistill.cli.printing import rows as as_json
from autodistill.cli.printing import tables as as_text
from autodistill.errors import InputError
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import arrow_schema, examples_of, to_parquet
from autodistill.strategy.deployment import Deployment
from tests.runs.results.test_table import read_parquet

RESULTS = Path(__file__).parents[2] / "results"
DOCS = Path(__file__).parents[2] / "docs"
Q4 = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}


def row(name: str, right: tuple[int, ...] = (50, 40), **fields: Any) -> Row:
    """Return a row with `right` correct tokens of 100 in each document."""
    documents = {"ids": list(range(len(right))), "count": [100] * len(right), "sum": list(right)}
    least = {"row_id": f"{name}-q4", "trial": name, "kind": "student", "name": name, "deployment": Q4}
    least |= {"status": "completed", "feasible": True, "fidelity": 1.0, "split": "validation", "documents": documents}
    return Row.from_json(least | {"accuracy": sum(right) / (100 * len(right)), "memory_bytes": 10**8} | fields)


def about(**fields: Any) -> dict[str, Any]:
    return {"metric": "accuracy", "direction": "max", "data": {"name": "text"}} | fields


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that writes Parquet files of runs."""

    def made(**runs: tuple[list[Row], Mapping[str, Any]]) -> list[str]:
        for name, (rows, said) in runs.items():
            to_parquet(rows, tmp_path / f"{name}.parquet", name, said)
        return [str(tmp_path / f"{name}.parquet") for name in runs]

    return made


def test_rows_of_the_same_examples_are_one_table(files: Callable[..., list[str]], tmp_path: Path) -> None:
    names = files(
        mine=([row("a"), row("b", (30, 30)), row("c", (90, 90), kind="confirmation")], about()),
        theirs=([row("a", (60, 60), feasible=False, reason="memory"), row("d", (99, 99), split="test")], about()),
    )
    (board,) = merge(read_runs(names, tmp_path))
    assert [(one.place, one.row.row_id) for one in board.ranked] == [
        (1, "theirs/a-q4"),
        (2, "mine/a-q4"),
        (3, "mine/b-q4"),
    ]
    assert [one.row.feasible for one in board.ranked] == [False, True, True]
    assert explain_split([board]) == ""


def test_accuracy_on_other_examples_is_another_table(files: Callable[..., list[str]], tmp_path: Path) -> None:
    names = files(
        one=([row("a")], about()),
        two=([row("b", (1, 2, 3))], about(data={"name": "other text"})),
        three=([row("c", (9, 9), split="validation", documents=None)], about()),
    )
    boards = merge(read_runs(names, tmp_path))
    assert {board.runs for board in boards} == {("one",), ("two",), ("three",)}
    assert "different examples" in explain_split(boards)


def test_latency_is_ranked_within_one_machine_and_runtime(files: Callable[..., list[str]], tmp_path: Path) -> None:
    fast, slow = {"latency_ms": 5.0, "machine": "A"}, {"latency_ms": 9.0, "machine": "A"}
    names = files(
        one=([row("a", **slow), row("b", (1, 1, 1), **fast)], about()),
        two=([row("c", latency_ms=1.0, machine="B"), row("d")], about()),
    )
    boards = merge(read_runs(names, tmp_path), by="latency_ms")
    assert {board.on: [one.row.row_id for one in board.ranked] for board in boards} == {
        "llama.cpp on A": ["one/b-q4", "one/a-q4"],
        "llama.cpp on B": ["two/c-q4"],
    }
    assert "one machine and in one runtime" in explain_split(boards)


def test_agreement_is_ranked_within_one_teacher(files: Callable[..., list[str]], tmp_path: Path) -> None:
    def said(fingerprint: str) -> dict[str, Any]:
        return about(metric="agreement", teacher={"fingerprint": fingerprint})

    rows = {name: [row(name, agreement=0.5)] for name in "abc"}
    names = files(a=(rows["a"], said("x")), b=(rows["b"], said("x")), c=(rows["c"], said("y")))
    assert [board.runs for board in merge(read_runs(names, tmp_path))] == [("a", "b"), ("c",)]


def test_rows_that_cannot_be_told_apart_are_tied_and_the_smallest_stands_first(
    files: Callable[..., list[str]], tmp_path: Path
) -> None:
    large = row("a", (50, 41), memory_bytes=2 * 10**8)
    names = files(one=([large], about()), two=([row("b", (51, 39))], about()))
    (board,) = merge(read_runs(names, tmp_path))
    assert [(one.row.row_id, one.tied) for one in board.ranked] == [("two/b-q4", True), ("one/a-q4", True)]


def test_the_tracked_results_stand_in_tables_by_their_text() -> None:
    folders = [RESULTS / name for name in ("reference", "postgresql-four-budgets", "python-four-budgets")]
    boards = merge(read_runs([str(folder) for folder in folders], Path("nowhere")))
    assert all("postgresql" not in board.on or all("postgresql" in run for run in board.runs) for board in boards)
    # A search of several budgets repeats the rows of its runs.
    runs = [path.parent for folder in folders for path in folder.glob("*/search.json")]
    rows = [one for run in runs for one in read_parquet(run / "leaderboard.parquet")]
    assert sum(board.count for board in boards) == sum(one.kind != "confirmation" for one in rows)
    text = as_text(leaderboard([str(RESULTS / "reference")], merge=True))
    assert "search-20261128-114135/t001xx-gguf-q4_1" in text


def test_a_file_of_all_rows_is_read_again(files: Callable[..., list[str]], tmp_path: Path) -> None:
    names = files(one=([row("a"), row("b", (1, 2, 3))], about()), two=([row("a", (9, 9))], about()))
    runs = read_runs(names, tmp_path)
    write(runs, tmp_path / "all.parquet")
    again = read_runs([str(tmp_path / "all.parquet")], tmp_path)
    assert merge(again) == merge(runs)
    assert {one.run: dict(one.about) for one in again} == {one.run: dict(one.about) for one in runs}


def test_types_by_tensor_and_of_the_cache_are_ranked_and_written_with_their_version(
    files: Callable[..., list[str]], tmp_path: Path
) -> None:
    typed = Q4 | {"types": {"embeddings": "q5_1"}, "cache_type_k": "q8_0", "cache_type_v": "q4_0"}
    names = files(one=([row("a", deployment=typed, schema_version=1), row("b", schema_version=2)], about()))
    runs = read_runs(names, tmp_path)
    (board,) = merge(runs)
    write(runs, tmp_path / "all.parquet")
    for rows in ([one.row for one in board.ranked], read_parquet(tmp_path / "all.parquet")):
        found = {one.trial: one for one in rows}
        assert found["a"].deployment == Deployment.from_json(typed)
        assert found["a"].deployment.cache_types == ("q8_0", "q4_0")
        assert {name: one.schema_version for name, one in found.items()} == {"a": 1, "b": 2}


def test_pandas_and_duckdb_read_a_table(files: Callable[..., list[str]], tmp_path: Path) -> None:
    (name,) = files(one=([row("a"), row("b", (90, 90))], about()))
    frame = pd.read_parquet(name)
    assert frame.sort_values("accuracy").row_id.tolist() == ["a-q4", "b-q4"]
    assert set(frame.run) == {"one"}
    assert json.loads(pq.read_schema(name).metadata[b"autodistill"])["runs"]["one"]["metric"] == "accuracy"
    found = duckdb.sql(f"select row_id, accuracy from '{name}' order by accuracy desc").fetchall()
    assert found == [("b-q4", 0.9), ("a-q4", 0.45)]


def test_tables_of_the_first_version_are_read(tmp_path: Path) -> None:
    path = RESULTS / "reference" / "budget-210MB" / "leaderboard.parquet"
    assert b"autodistill" not in (pq.read_schema(path).metadata or {})
    copy = shutil.copy(path, tmp_path / "old.parquet")
    (board,) = [one for one in merge(read_runs([str(copy)], tmp_path)) if one.metric == "accuracy"][:1]
    first = board.ranked[0].row
    rows = {one.row_id: one for one in read_parquet(path)}
    assert first.accuracy == rows[first.row_id.removeprefix("old/")].accuracy


def test_every_column_is_documented() -> None:
    text = (DOCS / "leaderboards.md").read_text()
    assert {name for name in [*arrow_schema().names, "run", "examples"] if f"`{name}`" not in text} == set()


def test_examples_are_those_of_documents_and_counts() -> None:
    documents = {"ids": [1, 2], "count": [3, 4], "sum": [1, 1]}
    same = examples_of("validation", documents)
    assert same == examples_of("validation", {**documents, "sum": [0, 0]})
    assert same == examples_of("validation", {**documents, "count": [3.0, 4.0]})
    assert len({same, examples_of("test", documents), examples_of("validation", {**documents, "count": [3, 5]})}) == 3
    assert examples_of("validation", None) is None


def changed(path: Path, table: int) -> None:
    held = pq.read_table(path)
    said = json.loads(held.schema.metadata[b"autodistill"]) | {"table": table}
    pq.write_table(held.replace_schema_metadata({b"autodistill": json.dumps(said).encode()}), path)


def test_what_cannot_be_merged_is_named(files: Callable[..., list[str]], tmp_path: Path) -> None:
    (name,) = files(one=([row("a")], about()))
    path = Path(name)
    whole = path.read_bytes()

    def refused(match: str, *names: str, by: str | None = None) -> None:
        with pytest.raises(InputError, match=match) as error:
            merge(read_runs(names or [name], tmp_path), by)
        assert "\n" not in str(error.value)

    path.write_bytes(whole[: len(whole) // 2])
    refused(r"cannot read .*one\.parquet as a leaderboard")
    path.write_bytes(whole)
    changed(path, 3)
    refused(r"one\.parquet is a table of version 3, and this autodistill reads up to 2: upgrade it")
    path.write_bytes(whole)
    later = pq.read_table(path)
    place = later.schema.get_field_index("schema_version")
    pq.write_table(later.set_column(place, "schema_version", [[99]]), path)
    refused("schema version 99")
    pq.write_table(later.drop_columns(["kind"]), path)
    refused("lacks the column kind")
    pq.write_table(later.set_column(place, "schema_version", [["x"]]), path)
    refused("its column schema_version is not of int64")
    path.write_bytes(whole)
    refused("no row has ttft_ms: rank by another figure", by="ttft_ms")
    refused("no row has acuracy: .*; did you mean accuracy", by="acuracy")
    refused("there is no file or folder .*none.parquet", str(tmp_path / "none.parquet"))
    (tmp_path / "empty").mkdir()
    refused("empty has no run and no .parquet file", str(tmp_path / "empty"))
    (tmp_path / "more").mkdir()
    shutil.copy(path, tmp_path / "more" / "one.parquet")
    refused(r"two runs are named 'one', in .*one\.parquet and in .*one\.parquet", name, str(tmp_path / "more"))
    assert len(read_runs([name, name], tmp_path)) == 1


def test_a_log_that_was_cut_off_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    run = shutil.copytree(RESULTS / "reference" / "search-20261128-114135", tmp_path / "run")
    (run / "leaderboard.parquet").unlink()
    log = run / "trials.jsonl"
    text = log.read_text()
    log.write_text(text + text.splitlines()[2][:200])
    (board,) = merge(read_runs([str(run)], tmp_path))
    assert board.count == 7
    lines = text.splitlines(keepends=True)
    log.write_text("".join([*lines[:3], lines[3][:200] + "\n", *lines[4:]]))
    with pytest.raises(InputError, match=r"trials\.jsonl") as error:
        read_runs([str(run)], tmp_path)
    assert "\n" not in str(error.value)


def test_the_command_shows_and_writes(files: Callable[..., list[str]], tmp_path: Path) -> None:
    names = files(one=([row("a"), row("b", (9, 9))], about()), two=([row("c", (1, 2, 3))], about()))
    found = leaderboard(names, merge=True, parquet=tmp_path / "all.parquet", most=1)
    text = " ".join(as_text(found).split())  # independent of the terminal's width
    assert "2 tables, which cannot be compared" in text
    assert "the best 1 of 2 rows of one" in text
    assert [(one["run"], one["row_id"], one["place"]) for one in as_json(found)] in (
        [("one", "a-q4", 1), ("two", "c-q4", 1)],
        [("two", "c-q4", 1), ("one", "a-q4", 1)],
    )
    assert len(pq.read_table(tmp_path / "all.parquet")) == 3
    with pytest.raises(InputError, match="give it with --merge"):
        leaderboard(names, by="accuracy")
    for wrong in (tmp_path, tmp_path / "all.csv"):
        with pytest.raises(InputError, match=r"--parquet .*: name a file that ends in \.parquet"):
            leaderboard(names, merge=True, parquet=wrong)

"""This version reads the tracked leaderboards, they are consistent, and a student can be chosen from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from autodistill.cli.app import app
from autodistill.runs.results.table import read_rows, read_table
from autodistill.strategy.space import Space

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
RUNS = sorted(path.parent.name for path in REFERENCE.glob("*/search.json"))


def call(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--runs", str(REFERENCE), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_there_is_one():
    assert RUNS


@pytest.mark.parametrize("run", RUNS)
def test_the_table_and_the_log_tell_of_the_same_rows(run: str):
    logged = {row["row_id"] for row in call("leaderboard", run)}
    table = pq.read_table(REFERENCE / run / "leaderboard.parquet", columns=["row_id", "split"]).to_pylist()
    assert logged == {row["row_id"] for row in table if row["split"] != "test"}


@pytest.mark.parametrize("run", RUNS)
def test_nothing_of_the_machine_that_made_it_is_told(run: str):
    for path in (REFERENCE / run).iterdir():
        for place in (b"/root", b"/home/", b"/tmp/", b"/work/"):
            assert place not in path.read_bytes(), f"{path.name} names {place.decode()}"


def test_a_student_is_picked_for_each_tier():
    tiers = call("pick", "--tiers")["tiers"]
    small, gpus = (512 * 10**6, 10**9, 2 * 10**9), [size * 10**9 for size in (4, 8, 12, 16, 24, 48, 80)]
    assert [tier["memory_bytes"] for tier in tiers] == [*small, *gpus]
    # The limit is what every GPU of the tier leaves free, which is less than its nominal memory.
    assert all(tier["pick"]["needs"]["memory"] <= tier["usable_bytes"] < tier["memory_bytes"] * 1.074 for tier in tiers)


def test_where_nothing_was_solved_the_command_that_solves_is_told(tmp_path: Path):
    command = call("pick", "--budget", "210MB", "--cache", str(tmp_path))["solve"]
    assert command == "autodistill solve smollm2 --budget 210MB --data pydoc --context 2048"


@pytest.mark.parametrize("run", ["arithmetic-512MB", "arithmetic-66MB"])
def test_a_space_that_a_run_recorded_has_the_hash_that_it_recorded(run: str):
    """With another hash, rows of this version would not count as rows of the same space."""
    recorded = json.loads((REFERENCE.parent / "arithmetic" / run / "search.json").read_text())
    assert Space.from_json(recorded["space_definition"]).hash == recorded["space_hash"]


TABLES = sorted(REFERENCE.parent.glob("*/*/leaderboard.parquet"))
# These tables were made after rows got the second schema.
SECOND = ("arithmetic", "small")


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parent.name)
def test_rows_of_each_schema_are_read_and_keep_their_number_and_ids(table: Path):
    """An id consists of the trial and the name of the deployment, which depends on its types."""
    rows = read_rows(read_table(table)[0], str(table))
    assert rows
    assert {row.schema_version for row in rows} == {2 if table.parents[1].name in SECOND else 1}
    assert [row.row_id for row in rows if row.row_id != f"{row.trial}-{row.deployment.name}"] == []

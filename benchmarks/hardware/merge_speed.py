"""How long `leaderboard --merge` takes on 100,000 stored rows of ten runs: reading, ranking, and finding ties.

python -m benchmarks.hardware.merge_speed [--rows 100000] [--runs 10] [--repeats 5]
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from autodistill.advisor.describe import deployment_named
from autodistill.advisor.merged import StoredRun, merge, read_runs
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import to_parquet
from autodistill.strategy.strategy import Strategy
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of

FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0", "huggingface", "compressed-tensors-int8-g64")
DOCUMENTS, TOKENS = 40, 50


def write_runs(folder: Path, rows: int, runs: int) -> None:
    """Write this many rows in this many runs, each with the sums of its documents.

    Only the last run has another text.
    """
    dice, strategy = np.random.default_rng(0), Strategy()
    deployments = [deployment_named(form) for form in FORMS]
    for run in range(runs):
        made = []
        count = TOKENS + (run == runs - 1)
        for index in range(rows // runs):
            sums = dice.integers(0, TOKENS, DOCUMENTS)
            deployment = deployments[index % len(deployments)]
            made.append(
                Row(
                    row_id=f"t{index:05d}-{deployment.name}",
                    trial=f"t{index:05d}",
                    kind="student",
                    name="student",
                    deployment=deployment,
                    status="completed",
                    feasible=True,
                    strategy=strategy,
                    split="validation",
                    accuracy=float(sums.sum() / (DOCUMENTS * TOKENS)),
                    memory_bytes=int(dice.integers(10**8, 10**9)),
                    memory_source="predicted",
                    fidelity=1.0,
                    documents={"ids": list(range(DOCUMENTS)), "count": [count] * DOCUMENTS, "sum": sums.tolist()},
                )
            )
        about = {"metric": "accuracy", "direction": "max", "data": {"name": f"text {run == runs - 1}"}}
        to_parquet(made, folder / f"run{run}.parquet", f"run{run}", about)


def timed(folder: Path) -> tuple[float, float, int, list[StoredRun]]:
    """Return the CPU seconds of reading and of ranking, the number of tables, and the runs that were read."""
    began = time.process_time()
    runs = read_runs([str(folder)], folder)
    read = time.process_time()
    boards = merge(runs)
    return read - began, time.process_time() - read, len(boards), runs


def main() -> None:
    """Write runs of invented rows, time their merge, and write the report."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="of all runs together")
    parser.add_argument("--runs", type=int, default=10, help="among which they are divided")
    parser.add_argument("--repeats", type=int, default=5, help="of which the least counts")
    given = parse(parser, rows=200, runs=2, repeats=1)
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), given.rows, given.runs)
        found = [timed(Path(folder)) for _ in range(given.repeats)]
    reading, ranking = min(one[0] for one in found), min(one[1] for one in found)
    tables = found[0][2]
    report.note("seconds of CPU", {"reading": reading, "ranking": ranking})
    report.note("tables", tables)
    head = (
        f"{given.rows:,} rows in {given.runs} Parquet files of as many runs, {DOCUMENTS} documents a row, the last run "
        f"of another text: {tables} tables. Seconds of CPU, all threads together, the least of {given.repeats} runs in "
        "one process. Asked: ranking under 2 s. "
        f"The load average was {os.getloadavg()[0]:.1f}."
    )
    lines = [["reading the files", f"{reading:.2f}"], ["ranking, with ties", f"{ranking:.2f}"]]
    print(report.write("merge-speed", "Merging a hundred thousand rows", [head, report.table(["what", "s"], lines)]))


if __name__ == "__main__":
    main()

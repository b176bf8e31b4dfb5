"""Does a small student that defers to its teacher keep the teacher's accuracy, and how often must it defer?

    python -m benchmarks.search.cascade [--runs FOLDER/RUN:SMALL,LARGE ...]

Without `--runs` it trains a teacher of sums of two numbers, and searches students of it, in some minutes. It then
compares the smallest student and the teacher. For other runs it compares the rows that are named. Both rows are
exported temporarily and timed in their runtimes, unless `--untimed` is given. Both read the validation split.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import autodistill as ad
from autodistill.options import cache_folder
from autodistill.runs.run_folder import RunFolder
from benchmarks.common import math_teacher, program, report
from benchmarks.common.math_teacher import BATCH, LENGTH

_TENTHS = 10
STEP = 16 * LENGTH
# This is easier than the math teacher's own task, which takes a quarter of an hour: sums of two numbers with up to two
# digits.
TASK = "reasoning-gym:chain_sum?size=8000&seed=11&min_terms=2&max_terms=2&min_digits=1&max_digits=2"
# Students with one and with two of the teacher's four layers, served as the teacher is.
SPACE = """
name: cascade
dimensions:
  init.depth: {choices: [0.25, 0.5]}
  distillation.learning_rate: {choices: [2e-3]}
  distillation.divergence_weight: {choices: [0.5]}
deployments:
  - {runtime: transformers, format: huggingface, bits: 16, group_size: 0}
"""


def math_run(out: Path, *, tokens: int, trials: int) -> str:
    """Run a search on sums for students that some minutes of training can make. Return its name."""
    teacher = math_teacher.math_teacher(questions=200)
    assert teacher is not None  # no time limit
    name = "cascade-math"
    if (out / name / "search.json").exists():
        return name
    out.mkdir(parents=True, exist_ok=True)
    (out / "space.yaml").write_text(SPACE, encoding="utf-8")
    ad.search(
        budget="16GB",
        teacher=str(teacher.folder),
        data=math_teacher.TASK,
        space=str(out / "space.yaml"),
        metric="exact_match",
        context=64,
        trials=trials,
        tokens=tokens,
        step_tokens=STEP,
        sequence_length=LENGTH,
        runner="inline",
        name=name,
        runs=out,
    )
    return name


def smallest(out: Path, name: str) -> str:
    """Return the trained student with the least memory, among those with a model on disk."""
    run = RunFolder.open(out, name)
    rows = [row for row in run.events.rows() if row.kind == "student" and row.full and row.memory_bytes is not None]
    held = [row for row in rows if (run.checkpoints / row.trial / "student").is_dir()]
    if not held:
        sys.exit(f"the run {name} has no trained student on disk: remove {run.path} and try again")
    return min(held, key=lambda row: (row.memory_bytes or 0, row.row_id)).row_id


def lines(curve: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows of a table of a curve."""
    chosen = sorted({round(step * (len(curve) - 1) / _TENTHS) for step in range(_TENTHS + 1)})
    for one in (curve[place] for place in chosen):
        yield [
            f"{one['threshold']:.4f}",
            _pair(100 * one["deferred"], one["deferred_stderr"], 100, 1),
            _pair(100 * one["accuracy"], one["accuracy_stderr"], 100, 2),
            _pair(100 * one["over_chance"], one["over_chance_stderr"], 100, 2),
            "-" if one["latency_ms"] is None else _pair(one["latency_ms"], one["latency_stderr"], 1, 2),
            "-" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 1e6:.1f}",
        ]


def _pair(value: float, error: float | None, times: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {times * error:.{digits}f}")


def section(document: Mapping[str, Any]) -> str:
    """Return the part of the report about one cascade."""
    small, large, data = document["small"]["row_id"], document["large"]["row_id"], document["data"]["name"]
    parts = [f"## {small}, then {large}, on {data}\n\n" + " ".join(document["notes"])]
    titles = ["below", "deferred, %", "accuracy, %", "over chance, points", "ms an item", "memory, MB"]
    for unit, found in document["units"].items():
        best = found["suggestion"]
        parts.append(f"By {unit}, {found['items']:,} of {found['documents']:,} documents of the validation split:")
        parts.append(report.table(titles, lines(found["curve"])))
        parts.append(
            f"By {unit}, {small} alone {100 * found['small_accuracy']:.2f}%, {large} alone "
            f"{100 * found['large_accuracy']:.2f}%. A threshold that other documents chose defers "
            f"{_pair(100 * best['deferred'], best['deferred_stderr'], 100, 1)}% and has "
            f"{_pair(100 * best['accuracy'], best['accuracy_stderr'], 100, 2)}%, "
            f"{_pair(100 * best['over_large'], best['over_large_stderr'], 100, 2)} points to {large} alone."
        )
    return "\n\n".join(parts)


def main() -> None:
    """Measure pairs of a small and a large model, and write the report of accuracy and deferrals."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--runs", nargs="+", metavar="RUN:ROWS", default=[], help="folders of runs, and two rows each")
    parser.add_argument("--steps", type=int, default=300, help="that train the teacher of sums")
    parser.add_argument("--tokens", type=program.token_count, default=300 * STEP, help="of a student of it")
    parser.add_argument("--trials", type=int, default=2, help="of the search on sums")
    parser.add_argument("--untimed", action="store_true", help="time nothing, on a machine that is busy")
    given = program.parse(parser, steps=10, tokens=10 * STEP)
    math_teacher.TASK, math_teacher.TOKENS = TASK.replace("8000", "2000") if given.smoke else TASK, given.steps * BATCH
    asked = [(Path(folder), rows) for folder, _, rows in (one.rpartition(":") for one in given.runs)]
    if not asked:
        out = cache_folder() / "benchmarks" / "cascade"
        name = math_run(out, tokens=given.tokens, trials=given.trials)
        asked = [(out / name, f"{smallest(out, name)},teacher")]
    sections = []
    for folder, rows in asked:
        document = ad.cascade(folder, rows, measure=not given.untimed)
        kept = {name: value for name, value in document.items() if name not in ("paths", "data")}
        report.note(document["run"], kept | {"data": document["data"]["name"]})
        sections.append(section(document))
    print(report.write("cascade", "A small student that defers", sections))


if __name__ == "__main__":
    main()

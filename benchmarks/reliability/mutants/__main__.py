"""Random wrong changes of the core's lines, drawn by a seed, and how many of them the tests find.

    python -m benchmarks.reliability.mutants [--mutants 100] [--seed 0] [--jobs 2] [--limit 120] [--stop-after S]

First, test files run once over a copy of the tree whose core marks every statement that is reached. This shows which
tests reach which lines, and the cost of each test. The files are those in the folder of the mutated module (`tests/`
has the folders of `autodistill/`) that name it. `--wide` tries survivors once more, with all files of that folder, and
with those of other folders that name the module. `--all-tests` takes every file, whole searches included, and
takes an hour of a processor more. A mutant is then run against the tests that reach its line, the module's own and the
cheapest files first, until one fails. A mutant whose tests take far longer than without it counts as found too.
`--limit` is the processor time that the tests of one mutant may take, as measured without the mutant.

`--again` tries the survivors in the record of a seed, and keeps the other verdicts. After a change of the core, the
same seed would draw other mutants.

Results are kept in `--work`, and the same command continues there. A test file that has changed is run again, and so
are mutants that survived before tests changed. After a change of the core, no test is run again to see what it reaches.
Lines that moved are followed, and a new line belongs to the statement that it replaces or follows. To begin anew,
remove the folder. Mutants whose change no test could see are named in `equivalent.yaml`, with the reason for
each.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import program
from benchmarks.reliability.mutants.bench import Bench
from benchmarks.reliability.mutants.drawing import (
    CORE,
    ROOT,
    core_of,
    drawn,
    equivalents,
    hash_of,
    near,
    record_of,
    still_there,
    whole_id,
    without_effect,
)
from benchmarks.reliability.mutants.jobs import copy_tree, in_parallel

GOAL = 0.95
# These are imported once, before a process is forked for each run. None of them is part of AutoDistill.
LIBRARIES = (
    "compressed_tensors",
    "gguf",
    "hypothesis.extra.numpy",
    "numba",
    "optuna",
    "pyarrow.parquet",
    "ray",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "typer.testing",
)


def main() -> int:
    """Try wrong changes of the core's lines, write the report, and return the exit code."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--mutants", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="that draws them")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at once")
    parser.add_argument("--limit", type=float, default=120.0, help="processor seconds of tests for one mutant")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "runs" / "mutants", help="folder that is kept")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which nothing more is begun")
    parser.add_argument("--trace-only", action="store_true", help="end once it is known what each test reaches")
    parser.add_argument("--again", action="store_true", help="try what survived in the record; the rest stays as it is")
    parser.add_argument("--wide", action="store_true", help="try what survived once more, by tests farther away")
    parser.add_argument("--all-tests", action="store_true", help="trace every test file, not those near a mutant alone")
    parser.add_argument(
        "--files", nargs="+", type=Path, help="test files, whose modules alone are changed; all by default"
    )
    small = {"mutants": 3, "files": [Path("tests/distillation/losses/test_schedules.py")], "work": None}
    options = program.parse(parser, **small)
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in LIBRARIES:
        importlib.import_module(name)
    options.work = (options.work or Path(tempfile.mkdtemp())).resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"{options.work} is in use by another run: wait for it, or give another --work")
        return measure(options, began)


def measure(options: argparse.Namespace, began: float) -> int:
    """Trace the tests, run the drawn mutants, and report them. Return 3 if the time was up first."""
    same, made = equivalents(), _stamp()
    log = options.work / "verdicts.jsonl"
    earlier = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    record: list[dict[str, Any]] = []
    if options.again:
        kept = {one["number"]: one for one in map(json.loads, record_of(options.seed).read_text().splitlines())}
        mutants = still_there(one for one in kept.values() if one["verdict"] not in ("found", "equivalent"))
        record = [one for number, one in kept.items() if number not in mutants]
        earlier = [kept[number] | {"id": whole_id(one), "with": ""} for number, one in mutants.items()] + earlier
    else:
        mutants = dict(enumerate(drawn(options.mutants, options.seed, core_of(options.files))))
    count = len(record) + len(mutants)
    known: dict[str, dict[str, Any]] = {}
    survived: dict[tuple[str, bool], str] = {}  # by the mutant and whether wide: a hash of the tests
    for one in earlier:
        known[one["id"]] = one
        if one["verdict"] != "found":
            survived[one["id"], one.get("wide", False)] = one["with"]
    wide = {one["module"] for one in known.values() if options.wide and one["verdict"] != "found"}
    close = None if options.all_tests else near({one.module for one in mutants.values()}, wide)
    bench = Bench(work=options.work, jobs=options.jobs, files=options.files or close)
    if mutants and not bench.trace(began + options.stop_after):
        return 3
    traced = time.monotonic() - began
    if options.trace_only:
        return 0

    tests = hash_of(*sorted((ROOT / "tests").rglob("*.py")))
    work, again = [], []
    for number, mutant in mutants.items():
        said = {
            "id": whole_id(mutant),
            "number": number,
            "seed": options.seed,
            "module": mutant.module,
            "line": mutant.line,
            "kind": mutant.kind,
            "before": mutant.before,
            "after": mutant.after,
        }
        if why := without_effect(mutant, same):
            record.append(said | {"verdict": "equivalent", "by": why})
            continue
        before = known.get(whole_id(mutant))
        if before and (
            before["verdict"] == "found" or (before["with"] == tests and before.get("wide", False) >= options.wide)
        ):
            record.append(before | said)
            continue

        def tell(found: dict[str, Any], said: dict[str, Any] = said) -> None:
            one = said | found | {"with": tests, "made": made, "wide": options.wide}
            record.append(one)
            with log.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print(f"{len(record)}/{count} {_told(one)}", flush=True)

        # Mutants that survived earlier tests come after all unknown ones.
        (again if before else work).append(bench.try_out(mutant, options.limit, tell))
    if work := work + again:
        for place in range(options.jobs):
            copy_tree(options.work / f"tree-{place}")
        in_parallel(options.jobs, work, began + options.stop_after)
    if left := count - len(record):
        print(f"{left} mutants are left: the same command goes on with them")
        return 3
    record.sort(key=lambda one: one["number"])
    for one in (one for one in record if one["number"] in mutants):
        wide, found = one.get("wide", False), one["verdict"] == "found"
        nearest = survived.get((one["id"], False))
        # If tests changed since the nearest missed it, nobody knows whether a test farther away or a new one finds it.
        one["once_survived"] = found and ((one["id"], wide) in survived or nearest not in (None, tests))
        one["found_wide"] = found and wide and not one["once_survived"] and nearest is not None
    return tell_all(record, traced, bench, options)


def _stamp() -> dict[str, str]:
    """Return date and machine from another process, because this one may not import our modules before it forks."""
    program = "import json; from benchmarks.common import report; print(json.dumps(report.stamp()))"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(said))


def _told(one: dict[str, Any]) -> str:
    by = f" by {one['by']}" if one["by"] else ""
    place = f"{one['module']}:{one['line']}"
    change = f"{one['kind']}: {one['before'][:160]} -> {one['after'][:80]}"
    return f"{one['verdict']}{by}, {place}, {change} ({one.get('cpu_seconds', 0)} s, {one.get('tests', 0)} tests)"


def tell_all(record: list[dict[str, Any]], traced: float, bench: Bench, options: argparse.Namespace) -> int:
    """Print the score and the survivors, and write the record and the report. Return 1 if the goal is missed."""
    from benchmarks.common import report

    kept = record_of(options.seed)
    counts = Counter(one["verdict"] for one in record)
    counted = len(record) - counts["equivalent"]
    score = counts["found"] / counted
    alive = [one for one in record if one["verdict"] in ("survived", "not reached")]
    for one in alive:
        print(_told(one))
    spent = sum(one.get("cpu_seconds", 0) for one in record)
    summary = (
        f"{counts['found']} of {counted} mutants are found ({score:.1%}); {counts['equivalent']} more of the "
        f"{len(record)} drawn change nothing"
    )
    print(summary)
    kept.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "with"}) + "\n" for one in record))
    modules = Counter(one["module"] for one in record)
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in CORE)
    core = f"{len(CORE)} files of {lines:,} lines"
    if options.again:
        core = f"the core as it was on {min(one['made']['date'] for one in record if 'made' in one)}"
    late = sum(one["once_survived"] for one in record)
    before = counts["found"] - late
    wider = sum(one.get("found_wide", False) for one in record)
    by_others = f"{wider} are found by tests farther away, of the same folder or of another. " if wider else ""
    cut = sum(one.get("of", 0) > one.get("tests", 0) for one in alive)

    def shown(text: str) -> str:
        return "`" + text[:100].replace("|", "\\|").replace("`", "'") + "`"

    report.write(
        kept.stem,
        "What of wrong changes the tests find",
        [
            f"**{summary}.** Seed {options.seed}, out of all mutations of {core}: "
            "`benchmarks/reliability/mutants/mutations.py` says which kinds. "
            f"`{kept.name}` beside this names each with the test that finds it. The tests of one mutant may take "
            f"{options.limit:.0f} s of a processor; of {cut} survivors some were left out for that. {late} of those "
            "found survived an earlier run: tests farther away find them, or were written for them since: before, "
            f"{before} of {counted} were found ({before / counted:.1%}), and {before} of all {len(record)} "
            f"({before / len(record):.1%}) if those that change nothing count as not found. {by_others}"
            f"{options.jobs} at a time; the mutants took {spent / 60:.0f} minutes of a processor.",
            "## Survivors",
            report.table(
                ("place", "change", "before", "after"),
                [(f"{o['module']}:{o['line']}", o["kind"], shown(o["before"]), shown(o["after"])) for o in alive],
            )
            if alive
            else "None.",
            "## Those that change nothing",
            "\n".join(
                f"- {o['module']}:{o['line']}, {shown(o['before'])} becomes {shown(o['after'])}: {o['by']}"
                for o in record
                if o["verdict"] == "equivalent"
            )
            or "None of those drawn.",
            "## By file",
            report.table(
                ("file", "mutants", "found"),
                [
                    (name, count, sum(o["module"] == name and o["verdict"] == "found" for o in record))
                    for name, count in sorted(modules.items())
                ],
            ),
        ],
        kept,
    )
    return int(score < GOAL and not options.smoke)


if __name__ == "__main__":
    raise SystemExit(main())

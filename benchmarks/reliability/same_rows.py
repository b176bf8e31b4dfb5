"""Record the results of fixed searches and trainings, and compare two records to the last digit.

    python -m benchmarks.reliability.same_rows record before.json --inputs DIR [--only tiny,strategies,sums,smollm2]
    python -m benchmarks.reliability.same_rows compare before.json after.json

It checks a change that must not change any figure. Each search has a fixed seed, fixed tokens and trials, one thread
and the inline runner. It has no time budget: with one, rates and lengths follow from the measured speed of the machine.
It runs through the command line, so the names of the modules do not matter. Durations and measured memory are left out.
Predicted memory depends on measurements, and may differ by half a megabyte. Ids are hashes of content that has names.
They are compared through a map from old to new ids, which `compare` prints if they differ. Teachers and texts are made
once in `--inputs`, and shared by all records to be compared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.program import parse, parser_of

SETS = ("tiny", "strategies", "sums", "smollm2")
FIXED = ["--runner", "inline", "--seed", "0", "--json"]
# Fields of a row with durations, and measurements of a process.
TIMES = ("train_seconds", "latency_ms", "tokens_per_second", "machine")
OTHER_TIMES = ("answer_ms", "latency", "memory", "ttft", "tpot", "size_bytes_predicted")
# Predicted memory depends on the memory of llama.cpp's process, which each run measures. It may differ by this many
# bytes.
PROCESS_BYTES = 500_000
IDS = ("strategy_id", "deployment_id", "row_id", "id")


def main() -> None:
    """Record the results of fixed runs, or print the differences of two records and exit with 1 if there are any."""
    parser = parser_of(__doc__)
    verbs = parser.add_subparsers(dest="verb")
    recording = verbs.add_parser("record", help="run the searches and write their rows")
    recording.add_argument("out", type=Path, help="file of the record; what it has of other sets stays")
    recording.add_argument("--inputs", type=Path, required=True, help="folder of teachers and texts, made if missing")
    recording.add_argument("--only", default=",".join(SETS), help=f"some of {', '.join(SETS)}")
    comparing = verbs.add_parser("compare", help="compare two records")
    comparing.add_argument("before", type=Path, help="record of the code as it was")
    comparing.add_argument("after", type=Path, help="record of the code as it is")
    arguments = parse(parser)
    if arguments.smoke:
        folder = Path(tempfile.mkdtemp())
        for out in ("before.json", "after.json"):
            record(folder / out, folder, ["tiny"])
        compare(folder / "before.json", folder / "after.json")
        return
    if arguments.verb is None:
        parser.error("say whether to record or to compare")
    if arguments.verb == "record":
        names = arguments.only.split(",")
        if unknown := set(names) - set(SETS):
            parser.error(f"--only names {', '.join(sorted(unknown))}: name some of {', '.join(SETS)}")
        record(arguments.out, arguments.inputs.resolve(), names)
        return
    compare(arguments.before, arguments.after)


def compare(*records: Path) -> None:
    """Print how many rows of two records differ, and exit with their differences if any do."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in records)
    faults = [*differences(before, after)]
    rows = sum(len(found) for found in before.values())
    print(f"{rows} rows of {len(before)} runs compared: {len(faults)} differences")
    if faults:
        sys.exit("\n".join(faults))


def record(out: Path, inputs: Path, names: list[str]) -> None:
    """Run each search in a temporary folder, and add its rows to the record at once."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for name in names:
        for run, words in searches(name, inputs):
            print(f"{run} ...", file=sys.stderr, flush=True)
            found[run] = rows(words, inputs)
            out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def searches(name: str, inputs: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the command line of each run of a set."""
    if name == "smollm2":
        yield "smollm2", ["search", "--budget", "210MB", "--trials", "2", "--tokens", "1024", "--explore", "1"]
        return
    if name == "sums":
        teacher = sums_teacher(inputs)
        data = "reasoning-gym:chain_sum?size=2000&seed=11&min_terms=3&max_terms=3&min_digits=2&max_digits=2"
        options = ["--teacher", str(teacher), "--data", data, "--context", "64", "--sequence-length", "40"]
        trials = ["--trials", "3", "--tokens", "10240", "--step-tokens", "1280", "--explore", "1"]
        yield "sums", ["search", "--budget", "16GB", *options, *trials]
        return
    # Twelve layers are needed in the other set, because some strategies align eight layers.
    teacher, text = tiny_inputs(inputs, "tiny", 5) if name == "tiny" else tiny_inputs(inputs, "deep", 12)
    options = ["--teacher", str(teacher), "--data", str(text), "--context", "256"]
    if name == "tiny":
        yield "tiny", ["search", "--budget", "16GB", *options, "--trials", "4", "--tokens", "4608", "--explore", "1"]
        return
    folder = Path(__file__).parents[2] / "search_spaces" / "strategies"
    # "written" needs the output of an endpoint.
    for strategy in sorted({path.stem for path in folder.glob("*.yaml")} - {"written"}):
        yield f"distil {strategy}", ["distill", strategy, *options, "--tokens", "1024"]


def tiny_inputs(inputs: Path, name: str, layers: int) -> tuple[Path, Path]:
    """Return a tiny random teacher with this many layers, and a tiny text."""
    from autodistill.testing import save_tiny_teacher, tiny_text

    teacher, text = inputs / name, inputs / "text"
    if not teacher.exists():
        save_tiny_teacher(teacher, layers=layers)
    if not text.exists():
        tiny_text(text, documents=30, sentences=24)
    return teacher, text


def sums_teacher(inputs: Path) -> Path:
    """Return the small teacher of sums. Half a minute of training gives its students something to imitate."""
    folder = inputs / "sums"
    if not folder.exists():
        from benchmarks.common import math_teacher

        math_teacher.make_small(steps=600)
        made = math_teacher.math_teacher(0.0)
        assert made is not None
        shutil.copytree(made.folder, folder)
    return folder


def rows(words: list[str], inputs: Path) -> dict[str, Any]:
    """Run a command line, and return the comparable rows of its log by name and split."""
    with tempfile.TemporaryDirectory(prefix="same-rows-") as folder:
        places = ["--runs", folder, "--cache", str(inputs / "cache"), "--name", "run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "autodistill", *words, *FIXED, *places],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
        found = {}
        for line in (Path(folder) / "run" / "trials.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "row" or event["event"] == "test":
                for row in [event["row"]] if "row" in event else event.get("rows", []):
                    found[f"{row['row_id']} {row['split']}"] = comparable(row)
        return found


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Return everything in a row except durations and measured memory."""
    kept = {name: value for name, value in row.items() if name not in TIMES}
    if row.get("memory_source") == "measured":
        kept["memory_bytes"] = "measured"
    kept["other"] = {name: value for name, value in row["other"].items() if not name.startswith(OTHER_TIMES)}
    return kept


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Yield the differences between two records, and print which ids replace others."""
    renamed: dict[str, str] = {}
    for run in sorted(before.keys() ^ after.keys()):
        yield f"{run} is in one record only"
    for run in sorted(before.keys() & after.keys()):
        mine, theirs = before[run], after[run]
        for name in sorted(mine.keys() ^ theirs.keys()):
            yield f"{run}: {name} is {'missing' if name in mine else 'too many'}"
        for name in sorted(mine.keys() & theirs.keys()):
            for path, old, new in unequal(mine[name], theirs[name], ()):
                if path[-1] == "memory_bytes" and alike(old, new):
                    continue
                if path[-1] in IDS and isinstance(old, str) and renamed.setdefault(old, str(new)) == new:
                    continue
                yield f"{run}: {name}: {'.'.join(path)} is {new!r}, and was {old!r}"
    for old, new in sorted(renamed.items()):
        print(f"{old} -> {new}")
    if len(set(renamed.values())) < len(renamed):
        yield "two ids became one"


def alike(memory: Any, other: Any) -> bool:
    """Return whether two figures of memory differ by no more than two measurements of one process do."""
    return isinstance(memory, int) and isinstance(other, int) and abs(memory - other) < PROCESS_BYTES


def unequal(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield where two values differ, to the last digit."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from unequal(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from unequal(left, right, (*path, str(index)))
    elif old != new and not (re.fullmatch(r"nan", str(old), re.I) and re.fullmatch(r"nan", str(new), re.I)):
        yield path, old, new


if __name__ == "__main__":
    main()

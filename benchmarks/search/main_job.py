"""Wall-clock time of the default command by phase, its result, and the same students on the unseen test split.

    python -m benchmarks.search.main_job [--time 10m] [--out DIR]

Runs `autodistill search --budget 16GB` as a user would, in a process of its own, and reports what it printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from autodistill.runs.results.gains import Gains
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher


def main() -> None:
    """Run the default command in a process of its own, and write the report of its phases and result."""
    parser = parser_of(__doc__)
    parser.add_argument("--time", default=None, help="time budget of the search")
    parser.add_argument("--out", type=Path, default=None, help="folder of the run")
    parser.add_argument("--fresh-cache", action="store_true", help="also convert the teacher and cache its outputs")
    arguments = parse(parser)
    small: list[str] = []
    if arguments.smoke:
        small = ["--teacher", tiny_teacher(), "--data", tiny_data(), "--runner", "inline", "--trials", "2"]
        small += ["--tokens", "2048", "--context", "256"]
    out = arguments.out or Path(tempfile.mkdtemp(prefix="main-job-"))
    command = ["autodistill", "search", "--budget", "16GB"]
    if arguments.time:
        command += ["--time", arguments.time]
    extra = ["--json", "--runs", str(out), "--name", "main-job", *small]
    if arguments.fresh_cache:
        extra += ["--cache", tempfile.mkdtemp(prefix="main-job-cache-")]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command, *extra], stdout=subprocess.PIPE, check=True, text=True)
    wall = time.perf_counter() - began
    result = json.loads(done.stdout)
    report.note("the search's JSON document", result)
    report.note("seconds on the clock", wall)
    print(report.write("main-job", "The default command, end to end", sections(" ".join(command), result, wall)))


def sections(command: str, result: dict, wall: float) -> list[str]:
    """Return the parts of the report."""
    seconds, plan = result["seconds"], result["plan"]
    phases = [[name, f"{value:.1f}", f"{value / seconds['total']:.1%}"] for name, value in seconds.items()]
    rows = result["rows"]
    deepest: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "student":
            deepest[row["trial"]] = max(deepest.get(row["trial"], 0.0), row["fidelity"])
    first = plan["rungs"][0] / plan["tokens"] + 1e-6
    counts = [
        f"strategies trained: {len(deepest)}",
        f"past the first rung: {sum(fidelity > first for fidelity in deepest.values())}",
        f"to full fidelity: {sum(fidelity > 0.999 for fidelity in deepest.values())} and the baseline",
        f"rejected without training: {len(result['rejected'])}, failed: {len(result['failed'])}",
        f"plan: {plan['trials']} trials of {plan['tokens']:,} tokens, rungs {plan['rungs']}, {plan['workers']} workers",
    ]
    test = [
        [
            row["kind"],
            row["name"],
            row["row_id"].removesuffix("-test"),
            f"{row['accuracy']:.4f} ± {row['accuracy_stderr']:.4f}",
            f"{row['retention']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{row['agreement']:.3f}",
            f"{row['memory_bytes'] / 1e6:.1f}",
        ]
        for row in result["test"]
    ]
    gains, best = Gains.from_json(result), result["best"]
    gain_line = f"\n\n{gains.describe()}" if gains is not None else ""
    return [
        f"`{command}`: {wall:.0f} s as a process.",
        "## Seconds by phase\n\nOf the trials' wall-clock, training, evaluation and loading count as worker-seconds "
        "over workers; overhead is the rest.\n\n" + report.table(["phase", "seconds", "share"], phases),
        "## What fitted the box\n\n" + "\n".join(f"- {line}" for line in counts),
        "## Test split\n\n"
        + report.table(["what", "strategy", "row", "accuracy", "retention", "perplexity", "agreement", "MB"], test)
        + gain_line,
        "## The exported student\n\n"
        + f"{best['name']} as {best['deployment']['format']}: memory {best['memory_bytes'] / 1e6:.1f} MB "
        f"({best['memory_source']}), latency p95 {best['latency_ms'] or float('nan'):.1f} ms a token "
        f"({best['latency_source']}).\n\n"
        + report.table(
            ["container", "same token", "loss, nats more", "places"],
            [
                [name, f"{check['agreement']:.1%}", f"{check['excess']:+.4f}", check["positions"]]
                for name, check in result["runtime"].items()
            ],
        ),
        "## Notes\n\n" + "\n".join(f"- {note}" for note in result["notes"]),
    ]


if __name__ == "__main__":
    main()

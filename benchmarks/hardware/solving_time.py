"""How long does solving take with `--coarse` and without it, and what does the first answer lose?

    python -m benchmarks.hardware.solving_time [--budgets 175MB,150MB] [--tokens 2048] [--teacher smollm2]

Each call solves one budget with an empty cache, in a process of its own. Everything in this report is a time or follows
from one, so run it on a quiet machine. A measurement that is there is not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from autodistill.hardware.budget import Budget
from autodistill.search.solve import SolveRequest, plan_solve, solve
from autodistill.units import format_bytes, parse_bytes
from autodistill.utils.hashing import content_hash, file_hash
from benchmarks.common import program, report
from benchmarks.common.program import ROOT

WAYS = {"coarse": True, "whole": False}


def measure(budget: int, *, coarse: bool, teacher: str, data: str, tokens: int, context: int) -> dict[str, Any]:
    """Solve a budget with an empty cache. Return the planned and the measured time, and the solution's figures."""
    with tempfile.TemporaryDirectory() as folder:
        request = SolveRequest(
            budgets=(Budget(memory_bytes=budget, context=context),),
            cache=Path(folder),
            teacher=teacher,
            data=data,
            tokens=tokens,
            sequence_length=min(256, context // 4),
            coarse=coarse,
        )
        planned = plan_solve(request)["plan"]
        said: list[str] = []
        began, cpu = time.perf_counter(), time.process_time()
        (one,) = solve(request, said.append)["solutions"]
        return {
            "planned": planned["seconds"],
            "planned_with_cuts": planned["seconds_with_cuts"],
            "seconds": time.perf_counter() - began,
            "core_seconds": time.process_time() - cpu,
            "load": os.getloadavg()[0],
            "cuts": any("narrower FFNs" in line for line in said),
            "solution": {name: one["solution"][name] for name in ("name", "kl", "kl_stderr")},
        }


def lines(given: Any) -> Iterator[list[str]]:
    """Yield a row for each budget and way."""
    settings = {name: getattr(given, name) for name in ("teacher", "data", "tokens", "context")}
    kept = report.Kept("solving-time", content_hash([settings, _code()], 16))
    for text in given.budgets.split(","):
        budget = parse_bytes(text)
        for way in WAYS:
            found = kept.get(f"{text}, {way}", partial(in_its_process, budget, way, settings))
            one, planned = found["solution"], found["planned"]
            if found["cuts"] and found["planned_with_cuts"] is not None:
                planned = found["planned_with_cuts"]
            yield [
                format_bytes(budget),
                way,
                f"{planned:.0f} s",
                f"{found['seconds']:.0f} s",
                f"{found['core_seconds']:.0f} s",
                f"{found['load']:.1f}",
                one["name"],
                f"{one['kl']:.4f} ± {one['kl_stderr']:.4f}",
            ]


def _code() -> list[str]:
    """Return hashes of the code whose time is measured."""
    packages = (ROOT / "autodistill" / part for part in ("search/solve", "quantization", "inference"))
    return [file_hash(path) for package in packages for path in sorted(package.rglob("*.py"))]


def in_its_process(budget: int, way: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one call in a separate process, whose engines are imported and whose cache is empty."""
    command = [sys.executable, "-m", "benchmarks.hardware.solving_time", "--measure", way, "--budgets", str(budget)]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Time the calls one after another, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--measure", choices=list(WAYS), help="one measurement, for a process of its own")
    parser.add_argument("--budgets", default="175MB,150MB", help="parted by commas")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--tokens", type=program.token_count, default=2048)
    parser.add_argument("--context", type=program.token_count, default=2048)
    given = program.parse(parser, budgets="27MB", tokens=512, context=256)
    if given.smoke:
        given.teacher = program.tiny_teacher(layers=2, width=128, heads=2, kv_heads=1)
        given.data = program.tiny_data()
    settings = {name: getattr(given, name) for name in ("teacher", "data", "tokens", "context")}
    if given.measure:
        print(json.dumps(measure(parse_bytes(f"{given.budgets}B"), coarse=WAYS[given.measure], **settings)))
        return
    titles = ["budget", "way", "time, predicted", "measured", "of cores", "load", "solution", "KL, held out"]
    sections = [
        f"{Path(given.teacher).name}, text {Path(given.data).name}, context {given.context:,}. The whole call reads "
        f"{given.tokens:,} tokens to choose and twice as many to report, the coarse one a quarter of both, so their KL "
        "in nats a token is of different amounts of text. Nothing was known before. Times are those of the call, "
        "without starting Python; load is the mean of runnable processes in the minute before the end.",
        report.table(titles, lines(given)),
    ]
    print(report.write("solving-time", "Time of solving, coarse and whole", sections))


if __name__ == "__main__":
    main()

"""How long `pick` takes on 10,000 stored rows, with one shape or all different ones, if something fits or nothing.

python -m benchmarks.hardware.pick_speed [--rows 10000] [--repeats 3] [--before CHECKOUT]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from autodistill.advisor.describe import deployment_named, shape
from autodistill.estimates.serving_memory import memory
from autodistill.models.config import config_of, resized
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import to_parquet
from autodistill.strategy.strategy import Strategy
from autodistill.utils.json_files import write_json
from benchmarks.common import report
from benchmarks.common.program import ROOT, parse, parser_of

TEACHER = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab": 49152}
FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0", "huggingface", "compressed-tensors-int8-g64")


def lattice(rows: int) -> list[ModelSpec]:
    """Return every depth and FFN width, for any number of rows."""
    spec = shape(TEACHER, tied=True).spec
    return [resized(spec, range(layers), ffn_width=ffn) for layers in range(5, 31) for ffn in range(64, 1537, 64)]


def different(rows: int) -> list[ModelSpec]:
    """Return as many shapes as rows, by depth, heads, width and FFN."""
    return _drawn(range(len(_sizes())), rows)


def level(rows: int) -> list[ModelSpec]:
    """Return as many shapes as rows, nearest to half of the teacher's weights.

    Few of them are smaller than others in all sizes.
    """
    layer = [(4 * heads * 64 * width // 3 * 2 + 3 * width * ffn) for _, heads, width, ffn in _sizes()]
    weights = np.array([size[0] * one + TEACHER["vocab"] * size[2] for size, one in zip(_sizes(), layer, strict=True)])
    return _drawn(np.argsort(np.abs(weights - weights.max() / 2))[:rows], rows)


def _sizes() -> list[tuple[int, int, int, int]]:
    return list(product(range(5, 31), (3, 6, 9), range(64, 577, 64), range(64, 1537, 64)))


def _drawn(indices: Sequence[int], rows: int) -> list[ModelSpec]:
    spec, sizes = shape(TEACHER, tied=True).spec, _sizes()
    chosen = np.random.default_rng(1).permutation(indices)[:rows]
    return [
        resized(spec, range(layers), heads=heads, kv_heads=heads // 3, width=width, ffn_width=ffn)
        for layers, heads, width, ffn in (sizes[index] for index in chosen)
    ]


def write_run(out: Path, shapes: Sequence[ModelSpec], count: int) -> None:
    """Write a run of this many rows. They repeat the shapes in order, each in a format drawn from `FORMS`."""
    dice, strategy = np.random.default_rng(0), Strategy()
    rows = []
    for index in range(count):
        student, form = shapes[index % len(shapes)], FORMS[dice.integers(len(FORMS))]
        deployment = deployment_named(form)
        need = memory(student, deployment, context=2048, batch=1)
        rows.append(
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
                accuracy=float(dice.uniform(0.2, 0.6)),
                memory_bytes=need.total_bytes,
                memory_source="predicted",
                size_bytes=need.weights_bytes,
                shape=config_of(student),
                context=2048,
                batch=1,
                fidelity=1.0,
                documents={"ids": list(range(40)), "count": [50] * 40, "sum": dice.integers(0, 50, 40).tolist()},
                other={"ttft_ms": float(index)},
            )
        )
    (out / "run").mkdir(parents=True)
    asked = {
        "metric": "accuracy",
        "direction": "max",
        "teacher": {"reference": str(out / "gone")},
        "data": {"name": "made up", "fingerprint": "made up"},
    }
    write_json(out / "run" / "search.json", asked)
    to_parquet(rows, out / "run" / "leaderboard.parquet")


ASKED = (
    ("a budget that fits", ["--budget", "8GB"]),
    ("another context and streams", ["--budget", "300MB", "--context", "1024", "--streams", "4"]),
    ("latency on a device", ["--device", "pi 5", "--latency", "ttft_p95=20s,tpot_p95=30ms", "--context", "1024"]),
    ("nothing fits: memory", ["--budget", "50MB"]),
    ("nothing fits: another context", ["--budget", "50MB", "--context", "4096", "--streams", "16"]),
    ("nothing fits: latency", ["--device", "pi 4", "--latency", "tpot_p95=100us", "--context", "1024"]),
    ("tiers", ["--tiers"]),
)


_PROGRAM = (
    "import sys, time; from autodistill.cli.app import main; began = time.perf_counter(), time.process_time()\n"
    "main(sys.argv[1:]); now = time.process_time()\n"
    "print(time.perf_counter() - began[0], now - began[1], now, file=sys.stderr)"
)


def seconds(out: Path, words: Sequence[str], code: Path, repeats: int) -> list[float]:
    """Return wall-clock and CPU seconds after imports, and CPU seconds of the whole process: the least of several.

    Args:
        out: Folder of the runs.
        words: Arguments of `pick`.
        code: Folder of the version of autodistill that is timed.
        repeats: Number of runs.
    """
    found = []
    for _ in range(repeats):
        command = [sys.executable, "-c", _PROGRAM, "pick", *words, "--runs", str(out), "--json"]
        # With -c, a process first imports from the folder in which it starts.
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=code)
        found.append([float(word) for word in done.stderr.split()[-3:]])
    return [min(values) for values in zip(*found, strict=True)]


STORES = {
    "many rows of a shape": (lattice, ASKED),
    "all shapes differ": (different, ASKED[4:6]),
    "all differ, and are about as large": (level, ASKED[4:6]),
}


def main() -> None:
    """Write runs of invented rows, time `pick` on them, and write the report."""
    parser = parser_of(__doc__)
    parser.add_argument("--before", type=Path, help="a checkout of another version, to be timed beside this one")
    parser.add_argument("--rows", type=int, default=10_000, help="of the run that is picked from")
    parser.add_argument("--repeats", type=int, default=3, help="of each question, of which the least counts")
    given = parse(parser, rows=100, repeats=1)
    before, repeats = given.before, given.repeats
    titles = ["rows", "question", "wall, s", "CPU, s", "CPU of the process, s"]
    titles += ["CPU before, s", "before / now"] if before else []
    lines, told, loads = [], [], [os.getloadavg()[0]]
    for name, (made, asked) in STORES.items():
        with tempfile.TemporaryDirectory() as folder:
            shapes = made(given.rows)
            told.append(f"{name}: {len(shapes):,} shapes")
            write_run(Path(folder), shapes, given.rows)
            for question, words in asked[:1] if given.smoke else asked:
                now = seconds(Path(folder), words, ROOT, repeats)
                report.note(f"{name}: {' '.join(words)}", now)
                cells = [f"{value:.2f}" for value in now]
                if before:
                    then = seconds(Path(folder), words, before.absolute(), repeats)
                    cells += [f"{then[1]:.2f}", f"{then[1] / now[1]:.1f}"]
                lines.append([name, f"{question}: `pick {' '.join(words)}`", *cells])
                loads.append(os.getloadavg()[0])
                print(*lines[-1], flush=True)
    head = (
        f"{given.rows:,} rows in {len(FORMS)} formats ({'; '.join(told)}). The least of {repeats} runs of the command, "
        "each in a process of its own: on the clock and of CPU once `autodistill.cli.app` is imported, and of CPU from "
        f"the process's start. Asked: under 1 s. The load average was {min(loads):.1f} to {max(loads):.1f} meanwhile: "
        "the clock counts other work too where that is more than the cores."
    )
    sections = [head, report.table(titles, lines)]
    print(report.write("pick-speed", "Picking among ten thousand rows", sections))


if __name__ == "__main__":
    main()

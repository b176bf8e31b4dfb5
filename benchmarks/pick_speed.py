"""How long `pick` takes on 10,000 stored rows, of which many have shapes of their own, and where nothing fits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import report

from autodistill.described import deployment_named, shape
from autodistill.estimate import config_of, resized
from autodistill.records.row import Row, to_parquet
from autodistill.records.store import write_json
from autodistill.serving_memory import memory
from autodistill.strategy import Strategy

ROWS = 10_000
TEACHER = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab": 49152}
FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0", "huggingface", "compressed-tensors-int8-g64")
REPEATS = 5


def write_run(out: Path) -> int:
    """A run of as many rows as its shapes allow: every depth and width of FFN; gives how many shapes there are."""
    spec, dice = shape(TEACHER, tied=True).spec, np.random.default_rng(0)
    shapes = [resized(spec, layers=layers, ffn_width=ffn) for layers in range(5, 31) for ffn in range(64, 1537, 64)]
    strategy = Strategy().to_json()
    rows = []
    for index in range(ROWS):
        student, form = shapes[index % len(shapes)], FORMS[dice.integers(len(FORMS))]
        deployment = deployment_named(form)
        rows.append(
            Row(
                row_id=f"t{index:05d}-{deployment.name}",
                trial=f"t{index:05d}",
                kind="student",
                name="student",
                deployment=deployment.to_json(),
                status="completed",
                feasible=True,
                strategy=strategy,
                split="validation",
                accuracy=float(dice.uniform(0.2, 0.6)),
                memory_bytes=memory(student, deployment, context=2048, batch=1).total_bytes,
                memory_source="predicted",
                size_bytes=int(2e6 * student.layers),
                shape=config_of(student),
                context=2048,
                batch=1,
                fidelity=1.0,
                documents={"ids": list(range(40)), "count": [50] * 40, "sum": dice.integers(0, 50, 40).tolist()},
                other={"ttft_ms": float(index)},
            )
        )
    (out / "run").mkdir(parents=True)
    asked = {"metric": "accuracy", "direction": "max", "teacher": {"reference": str(out / "gone")}}
    write_json(out / "run" / "search.json", asked)
    to_parquet(rows, out / "run" / "leaderboard.parquet")
    return len(shapes)


ASKED = (
    ("a budget that fits", ["--budget", "8GB"]),
    ("another context and streams", ["--budget", "300MB", "--context", "1024", "--streams", "4"]),
    ("latency on a device", ["--device", "pi 5", "--latency", "ttft_p95=20s,tpot_p95=30ms", "--context", "1024"]),
    ("nothing fits: memory", ["--budget", "50MB"]),
    ("nothing fits: another context", ["--budget", "50MB", "--context", "4096", "--streams", "16"]),
    ("nothing fits: latency", ["--device", "pi 4", "--latency", "tpot_p95=100us", "--context", "1024"]),
    ("tiers", ["--tiers"]),
)


def seconds(out: Path, words: Sequence[str]) -> tuple[float, float]:
    """Of the whole command in a process of its own, and of that process's CPU time: the fastest of several."""
    program = (
        "import sys, time; from autodistill.cli import main; began = time.perf_counter(), time.process_time()\n"
        "main(sys.argv[1:]); print(time.perf_counter() - began[0], time.process_time() - began[1], file=sys.stderr)"
    )
    found = []
    for _ in range(REPEATS):
        command = [sys.executable, "-c", program, "pick", *words, "--out", str(out), "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall, cpu = done.stderr.split()[-2:]
        found.append((float(wall), float(cpu)))
    return min(found)[0], min(cpu for _, cpu in found)


def main() -> None:
    """Times every question and writes the report."""
    with tempfile.TemporaryDirectory() as folder:
        count = write_run(Path(folder))
        lines = []
        for name, words in ASKED:
            wall, cpu = seconds(Path(folder), words)
            lines.append([name, f"`pick {' '.join(words)}`", f"{wall:.2f}", f"{cpu:.2f}"])
            print(*lines[-1], flush=True)
    told = (
        f"{ROWS:,} rows of {count} shapes in {len(FORMS)} formats, whose teacher is gone. Seconds of the command in a "
        f"process that has started, the fastest of {REPEATS}: on the clock, and of CPU. Asked: under 1 s."
    )
    print(
        report.write(
            "pick-speed",
            "Picking among ten thousand rows",
            [told, report.table(["question", "command", "wall, s", "CPU, s"], lines)],
        )
    )


if __name__ == "__main__":
    main()

"""What quantisation-aware training adds to a step: ratios within alternating rounds, on a student of a teacher.

    python benchmarks/qat_step.py [--teacher smollm2] [--threads 1] [--rounds 5] [--batch 256 1024] [--bf16]

The plain step is a cross-entropy step with the embedding frozen, the cheapest there is: no share is larger than here.
CPU time is what is compared, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
import torch

from autodistill.contracts import Plan
from autodistill.data import TokenSet
from autodistill.distillation.memory import keep_freed_memory
from autodistill.distillation.student import build_student
from autodistill.distillation.teacher import materialise, resolve_teacher
from autodistill.distillation.trainer import Trainer
from autodistill.estimate import spec_from_config
from autodistill.formats import Grid
from autodistill.records.store import default_cache
from autodistill.strategy import Distillation, Finishing, Init, Strategy

LENGTH = 256
INIT = Init(depth=0.8)
INTEGERS = {"format": "compressed-tensors"}
FINISHINGS: dict[str, dict[str, Any]] = {
    "Q8_0": {"format": "gguf-q8_0", "bits": 8, "group_size": 32},
    "Q4_0": {"format": "gguf-q4_0", "bits": 4, "group_size": 32},
    "Q4_1 (minima)": {"format": "gguf-q4_1", "bits": 4, "group_size": 32, "symmetric": False},
    "int4, groups of 64": INTEGERS | {"bits": 4, "group_size": 64},
    "int4, groups of 64, zero points": INTEGERS | {"bits": 4, "group_size": 64, "symmetric": False},
    "int3, rows": INTEGERS | {"bits": 3, "group_size": 0},
}


def _plan(batch: int, threads: int, bf16: bool) -> Plan:
    return Plan(
        trials=1,
        tokens=10**9,
        rungs=(10**9,),
        keep=(),
        sequence_length=LENGTH,
        batch_tokens=batch,
        warmup_tokens=0,
        decay=0.2,
        rung_eval_tokens=LENGTH,
        eval_tokens=LENGTH,
        test_tokens=LENGTH,
        workers=1,
        threads=threads,
        bf16=bf16,
        seed=0,
        box_seconds=None,
        seconds={},
    )


def measure(folder: Path, batch: int, rounds: int, threads: int, bf16: bool) -> dict[str, list[float]]:
    """CPU seconds of a step by variant, one figure a round; "plain" is without a grid.

    Args:
        folder: Of the teacher.
        batch: Tokens of a step.
        rounds: In each, every variant takes two steps, of which the second counts.
        threads: Of torch.
        bf16: Whether the forward and backward pass compute in bfloat16.
    """
    model, kept = build_student(folder, INIT)
    spec = spec_from_config(model.config.to_dict())
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary, (batch // LENGTH, LENGTH)).astype(np.int32)
    trainer = Trainer(
        model,
        kept=kept,
        teacher_layers=spec.layers,
        teacher_width=spec.width,
        strategy=Strategy(init=INIT, distillation=Distillation(divergence_weight=0.0, learning_rate=1e-5)),
        plan=_plan(batch, threads, bf16),
        data=TokenSet(tokens=tokens, documents=np.zeros_like(tokens)),
        cache=None,  # type: ignore[arg-type]  # cross-entropy asks a teacher for nothing
        seed=0,
    )
    variants: dict[str, tuple[Callable[[str], Grid | None] | None, bool]] = {"plain": (None, False)}
    for name, fields in FINISHINGS.items():
        finishing = Finishing(**fields)
        storages = {tensor.name: finishing.storage(tensor) for tensor in spec.tensors}
        grids = {key: storage for key, storage in storages.items() if isinstance(storage, Grid)}
        variants |= {f"{name}, {kind}": (grids.get, kind == "learned") for kind in ("absmax", "learned")}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    list(trainer.train_stable(batch))
    for number in range(rounds):
        for name in sorted(variants, reverse=number % 2 == 1):
            storage_of, learned = variants[name]
            records = trainer.train_decay(trainer.tokens + 2 * batch, storage_of, learned=learned)
            next(records)
            began = time.process_time()
            next(records)
            seconds[name].append(time.process_time() - began)
            records.close()
    return seconds


def main() -> None:
    """Measures both sizes and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[LENGTH, 4 * LENGTH], help="tokens of a step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    teacher = materialise(resolve_teacher(arguments.teacher), default_cache())
    sections = []
    for batch in arguments.batch:
        seconds = measure(teacher.folder, batch, arguments.rounds, arguments.threads, arguments.bf16)
        plain = seconds.pop("plain")
        lines = []
        for name, values in seconds.items():
            shares = [one / other - 1 for one, other in zip(values, plain, strict=True)]
            lines.append([name, f"{statistics.median(shares):+.1%}", f"{min(shares):+.1%}", f"{max(shares):+.1%}"])
        sections += [
            f"## {batch} tokens a step\n\nThe plain step takes {statistics.median(plain):.3f} CPU seconds (median).",
            report.table(["grid", "added, median", "least", "most"], lines),
        ]
    precision = "bfloat16" if arguments.bf16 else "float32"
    head = (
        f"A student of 80% of the layers of {teacher.name}, {precision}, {arguments.threads} threads, "
        f"{arguments.rounds} rounds. Each round takes every variant's step once, in turn."
    )
    print(report.write("qat-step", "What quantisation-aware training adds to a step", [head, *sections]))


if __name__ == "__main__":
    main()

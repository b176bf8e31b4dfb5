"""Do gradients predict the cost of each narrower FFN as well as inserting it does, and how much time do they save?

    python -m benchmarks.engine.cut_scores [--data REF] [--every 1]

Two widths of every layer's FFN are scored in one process. Gradients score all at once. The other way inserts each cut
and recomputes the layers above it. Both need the activations to which cuts are fitted. These are read in advance.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.repair import HeldMoments
from autodistill.distillation.teacher.importance import PartImportance, ensure_importance
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.estimates.solving import CUT_TOKENS
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.shapes import MUCH, Shapes
from autodistill.utils.json_files import read_json
from benchmarks.common import program, report


def core_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that a call takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """Compare the gradients' scores with those of inserted cuts: over all, and by cut."""
    pairs = np.array([(row["told"], row["put_in"]) for row in rows if not row["measured"]])
    off = [
        abs(row["told"] - row["put_in"]) / math.hypot(row["told_stderr"], row["put_in_stderr"])
        for row in rows
        if not row["measured"]
    ]
    return [
        f"Where gradients are relied on they say {pairs[:, 0].sum():.3f} nats in all and putting in says "
        f"{pairs[:, 1].sum():.3f}; Kendall's tau {kendalltau(*pairs.T).statistic:.2f}. The difference is "
        f"{np.mean(off):.1f} of its stated standard error on average and {max(off):.1f} at the most.",
        report.table(
            ["layer", "neurons", "by gradients", "put in"],
            [
                [
                    row["layer"],
                    row["width"],
                    f"{row['told']:.4f} ± {row['told_stderr']:.4f}",
                    f"{row['put_in']:.4f} ± {row['put_in_stderr']:.4f}",
                ]
                for row in rows
            ],
        ),
    ]


def main() -> None:
    """Score each narrower FFN in both ways, and write the report of how they agree and what they took."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--every", type=int, default=1, help="put in are the cuts of every so many layers")
    parser.add_argument("--cache", type=Path, default=None)
    given = program.parse(parser)
    if given.smoke:
        given.teacher = program.tiny_teacher(layers=4, width=128, heads=2, kv_heads=1, ffn=256)
        given.data = program.tiny_data()
    cache, length = given.cache or cache_folder(), 64 if given.smoke else 256
    teacher = materialize(resolve_teacher(given.teacher), cache)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    data = prepare(resolve_data(given.data), teacher.folder, tokenizer_fingerprint(teacher.folder), length, cache)
    train = load_split(data.folder, "train")
    bench = Bench(load_model(teacher.folder, torch.float32), spec, {})
    importance = ensure_importance(
        lambda: bench.model,
        teacher_fingerprint=teacher.fingerprint,
        data_fingerprint=data.fingerprint,
        data=train,
        root=cache / "calibrations",
    )
    sample = bench.sample("calibration", train.head(CUT_TOKENS))
    calibration, moments = PartImportance.load(importance), HeldMoments()

    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        shapes = Shapes(scores, bench, sample, calibration, much=math.inf, moments=moments)
        chosen = [(layer, width) for layer in range(0, spec.layers, given.every) for width in shapes.scored]
        reading = core_seconds(lambda: moments.of(lambda: bench.model, spec, calibration.text, bench.device))
        by_gradients = core_seconds(shapes.build)
        before = {cut: shapes.ffn(*cut) for cut in chosen}
        costly = [cut for cut in chosen if before[cut].kl > MUCH]
        measuring = core_seconds(lambda: shapes.measure(costly))
        by_putting_in = measuring + core_seconds(lambda: shapes.measure(chosen))
        exact = {cut: shapes.ffn(*cut) for cut in chosen}
    scale = len(chosen) / (spec.layers * len(shapes.scored))
    old, new = by_putting_in / scale, by_gradients + measuring / scale
    rows = [
        {
            "layer": layer,
            "width": width,
            "told": before[layer, width].kl,
            "told_stderr": before[layer, width].stderr,
            "put_in": exact[layer, width].kl,
            "put_in_stderr": exact[layer, width].stderr,
            "measured": (layer, width) in costly,
        }
        for layer, width in chosen
    ]
    seconds = {"reading": reading, "gradients": by_gradients, "costly": measuring, "putting_in": by_putting_in}
    report.note("scores", {"rows": rows, "core_seconds": seconds, "share": scale})
    told = f"{teacher.name}, text {data.name}, {sample.data.predicted:,} tokens"
    every = "of every layer" if given.every == 1 else f"of one layer in {given.every}, and by proportion of all"
    sections = [
        f"{told}; cuts {every}. Reading the activations to which they are fitted takes {reading:.0f} s of cores in "
        "either way.",
        report.table(
            ["scores of two widths", "seconds of cores", "less by"],
            [
                ["each put in", f"{old:.0f}", ""],
                [
                    f"by gradients, and put in where that is above {MUCH} nats ({len(costly)} of {len(chosen)})",
                    f"{new:.0f}",
                    f"a factor of {old / new:.1f}; {(old + reading) / (new + reading):.1f} with the reading",
                ],
            ],
        ),
        *compared(rows),
    ]
    print(report.write("cut-scores", "Scores of narrower FFNs, by gradients and by putting in", sections))


if __name__ == "__main__":
    main()

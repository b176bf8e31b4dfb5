"""How much more does a solution lose than the best of all storages, found by trying every one?

    python -m benchmarks.engine.solve_regret [--kinds q8_0,q4_0,q3_k] [--tokens 128] [--seeds 3] [--best 3]

The models are small, with one layer and random weights. Each of their seven matrices may have some types. Every choice
is measured as a whole, on the calibration text. For memory limits between the smallest and the largest choice, the
solution's KL is compared with the lowest KL of all choices that fit. The solver measures the choice with the lowest sum
of scores as a whole, and exchanges matrices in it. The report also shows what it finds if it measures the few choices
with the lowest sums.
"""

from __future__ import annotations

import heapq
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.quantization.formats import TYPES
from autodistill.search.solve.bench import Bench, Sample
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.search.solve.solver import Solver
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Dimension
from autodistill.strategy.restriction import restriction
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json
from benchmarks.common import program, report

LIMITS = 9  # memory limits, evenly spaced between the smallest and the largest choice
MOST = 0.02  # the most nats that a solution may lose more than the best of all
SIZES = {"layers": 1, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 512}


def exhaustive(bench: Bench, options: Options, sample: Sample) -> list[tuple[int, float, Deployment]]:
    """Return bytes and KL of every choice of types for the matrices, with table and cache in 16 bits."""
    found = []
    for kinds in itertools.product(*(options.kinds(tensor) for tensor in options.matrices.values())):
        types = dict(zip(options.matrices, kinds, strict=True))
        deployment = options.deployment(types | dict.fromkeys(options.tables, "f16"), ("f16", "f16"))
        storages = {name: TYPES[kind] for name, kind in types.items()}
        kl = bench.measure_parts(storages, ("f16", "f16"), sample).kl
        found.append((options.memory(deployment).total_bytes, kl, deployment))
    return found


def regrets(kinds: tuple[str, ...], tokens: int, seed: int, best: int, folder: Path) -> list[dict[str, float]]:
    """Return for some limits the KL of the solution, of the one from several sums, and the lowest that fits."""
    teacher = save_tiny_teacher(folder / f"teacher-{seed}", seed=seed, **SIZES)  # type: ignore[arg-type]
    text = prepare(
        resolve_data(str(tiny_text(folder / "text", documents=32))), teacher, tokenizer_fingerprint(teacher), 64, folder
    )
    spec = spec_from_config(read_json(teacher / "config.json"))
    allowed = Dimension.from_json("finishing.format", {"choices": [f"gguf-{kind}" for kind in kinds]})
    options = Options(
        spec=spec,
        budget=Budget(memory_bytes=10**9, context=256),
        cache_type="f16",
        limits=restriction([allowed], None),
    )
    bench = Bench(load_model(teacher, torch.float32), spec, {})
    sample = bench.sample("calibration", load_split(text.folder, "train").head(tokens))
    library = Library(folder / f"library-{seed}.json", bench, options.free, sample, lambda _: None)
    library.build()
    every = exhaustive(bench, options, sample)
    solver = Solver(_whole_tables(options), library, sample)
    sizes, sums = [size for size, _, _ in every], [library.predict(one)[0] for _, _, one in every]
    rows = []
    for limit in np.linspace(min(sizes), max(sizes), LIMITS).astype(int).tolist():
        least = min(kl for size, kl, _ in every if size <= limit)
        began = time.process_time()
        found = solver.solve(limit, ())
        assert found is not None
        seconds = time.process_time() - began
        fitting = [(one, place) for place, one in enumerate(sums) if sizes[place] <= limit]
        several = solver.solve(limit, [every[place][2] for _, place in heapq.nsmallest(best, fitting)])
        assert several is not None
        kls = {"least": least, "solved": found.joint.kl, "of_several": several.joint.kl}
        rows.append({"seed": seed, "bytes": limit, **kls, "core_seconds": seconds})
    return rows


def _whole_tables(options: Options) -> Options:

    class WholeTables(Options):
        def kinds(self, tensor):  # type: ignore[no-untyped-def]
            return ("f16",) if tensor.name in self.tables else super().kinds(tensor)

    return WholeTables(spec=options.spec, budget=options.budget, cache_type=options.cache_type, limits=options.limits)


def main() -> None:
    """Measure all storages of tiny models and the solved ones, and write the report of the differences."""
    parser = program.parser_of(__doc__, seeds=3)
    parser.add_argument("--best", type=int, default=3, help="choices of the least sums that are measured whole")
    parser.add_argument("--kinds", default="q8_0,q4_0,q3_k", help="types, parted by commas")
    parser.add_argument("--tokens", type=program.token_count, default=128)
    arguments = program.parse(parser, kinds="q8_0,q4_0")
    kinds = tuple(arguments.kinds.split(","))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        of_seed = partial(regrets, kinds, arguments.tokens, best=arguments.best, folder=Path(folder))
        rows = [row for seed in range(arguments.seeds) for row in of_seed(seed)]
    report.note("regrets", rows)
    worst, mean, several = (
        summed(row[name] - row["least"] for row in rows)
        for summed, name in ((max, "solved"), (fmean, "solved"), (fmean, "of_several"))
    )
    gained = [row["solved"] - row["of_several"] for row in rows]
    verdict = "kept" if worst <= MOST else "NOT kept"
    print(
        report.write(
            "solve-regret",
            "A solution beside the best of all choices",
            [
                f"Tiny models of one layer, {len(kinds)} types for each of 7 matrices: {len(kinds) ** 7:,} choices, "
                f"each measured whole on {arguments.tokens} tokens. KL to the teacher in nats a token, on the text "
                f"that was chosen on. The largest regret is {worst:.4f} nats, its mean {mean:.4f}; at most {MOST} was "
                f"asked for, which is {verdict}.",
                f"If the {arguments.best} choices of the least sums are measured whole, and matrices exchanged in the "
                f"best of them, the mean is {several:.4f}: {sum(one > 0 for one in gained)} of {len(rows)} limits have "
                f"a lower KL so, and {sum(one < 0 for one in gained)} a higher one.",
                report.table(
                    [
                        "seed",
                        "limit",
                        "least KL of all",
                        "solved",
                        f"from {arguments.best} sums",
                        "regret",
                        "core-seconds",
                    ],
                    [
                        [
                            str(row["seed"]),
                            f"{row['bytes'] / 1e6:.3f} MB",
                            f"{row['least']:.4f}",
                            f"{row['solved']:.4f}",
                            f"{row['of_several']:.4f}",
                            f"{row['solved'] - row['least']:.4f}",
                            f"{row['core_seconds']:.1f}",
                        ]
                        for row in rows
                    ],
                ),
            ],
        )
    )


if __name__ == "__main__":
    main()

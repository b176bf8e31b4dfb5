"""How fast are scales by importance found in compiled loops, and are they those that single operations find?

    python -m benchmarks.engine.scales_by_importance [--teacher smollm2] [--data REF] [--layers 1] [--rounds 3]

The matrices are those of a teacher's first layers, each in every type whose scales are searched for. The importance of
their columns comes from 512 tokens of a text. Both ways take one thread, and are timed in turn, in CPU seconds. So
other work on the machine affects both alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.quantization import weighted_scales as searches
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.search.solve.bench import load_bench
from autodistill.search.solve.options import Options
from autodistill.utils.json_files import read_json
from benchmarks.common import program, report

LENGTH, TOKENS = 256, 512
WAYS = ("compiled", "operation by operation")
_BITS = 5  # the most bits of types whose scales `solve` searches for


def matrices(teacher: str, data: str, layers: int, length: int) -> Iterator[tuple[Tensor, Tensor, dict[str, Grid]]]:
    """Yield matrices with the importance of their columns, and the types that they may have."""
    found = materialize(resolve_teacher(teacher), cache_folder())
    spec = spec_from_config(read_json(found.folder / "config.json"))
    text = prepare(resolve_data(data), found.folder, tokenizer_fingerprint(found.folder), length, cache_folder())
    bench = load_bench(found, spec, None)
    bench.weigh(load_split(text.folder, "train").head(TOKENS))
    options = Options(spec=spec, budget=Budget(memory_bytes=10**12, context=length))
    for name, tensor in options.matrices.items():
        if int(name.split(".")[2]) < layers:
            grids = {kind: options.held[kind] for kind in options.kinds(tensor)}
            yield (
                bench.master(name).detach(),
                bench.importance(name),
                {kind: grid for kind, grid in grids.items() if isinstance(grid, Grid) and grid.bits <= _BITS},
            )


def search(weight: Tensor, grid: Grid, importance: Tensor, way: str) -> tuple[float, Scales]:
    """Return the CPU seconds that a search takes, and what it finds."""
    loops = searches.loops
    if way != WAYS[0]:
        searches.loops = lambda *_: None
    try:
        began = time.process_time()
        scales, offsets = searches.weighted_scales(weight, grid, importance)
        seconds = time.process_time() - began
    finally:
        searches.loops = loops
    return seconds, Scales(scales.numpy(), None if offsets is None else offsets.numpy())


def compared(weight: Tensor, grid: Grid, importance: Tensor, rounds: int) -> dict[str, Any]:
    """Return the seconds of both ways for a matrix in a type, and how far they agree."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found = {}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            taken, found[way] = search(weight, grid, importance, way)
            seconds[way].append(taken)
    mine, other = (found[way] for way in WAYS)
    values = [deploy_tensor(weight, grid, one) for one in (mine, other)]
    left = [float(((one - weight).double().square() * importance.double()).sum()) for one in values]
    return {
        "weights": weight.numel(),
        "seconds": {way: min(taken) for way, taken in seconds.items()},
        "same scales": float((mine.scales == other.scales).mean()),
        "same weights": float((values[0] == values[1]).float().mean()),
        "error": left,
    }


def lines(found: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Yield a row for each type, with all matrices together."""
    for kind, ones in found.items():
        weights = sum(one["weights"] for one in ones)
        taken = [sum(one["seconds"][way] for one in ones) / weights * 1e9 for way in WAYS]
        same = [np.average([one[name] for one in ones], weights=[one["weights"] for one in ones]) for name in _SAME]
        mine, other = (sum(one["error"][place] for one in ones) for place in (0, 1))
        yield [
            kind,
            *(f"{one:.1f}" for one in taken),
            f"{taken[1] / taken[0]:.1f}",
            *(f"{one:.2%}" for one in same),
            f"{mine / other - 1:+.1e}" if other else f"{mine:.1e} above none",
        ]


_SAME = ("same scales", "same weights")


def main() -> None:
    """Time both ways, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = program.parse(parser, rounds=1)
    length = LENGTH
    if arguments.smoke:
        arguments.teacher, length = program.tiny_teacher(layers=2, width=128, heads=2, kv_heads=1, ffn=256), 64
        arguments.data = program.tiny_data()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for weight, importance, grids in matrices(arguments.teacher, arguments.data, arguments.layers, length):
        for kind, grid in grids.items():
            search(weight[:64].contiguous(), grid, importance, WAYS[0])  # the first call compiles
            found.setdefault(kind, []).append(compared(weight, grid, importance, arguments.rounds))
    report.note("searches", found)
    sections = [
        f"Matrices of the first {arguments.layers} of {arguments.teacher}'s layers, by what their columns count on "
        f"{TOKENS} tokens; one thread, the best of {arguments.rounds} rounds in turn. Nanoseconds of a core for each "
        "weight. The weighted error that is left is that of the compiled loops beside that of single operations: sums "
        "are added up in another order, so that of two tries that are as good either may be taken.",
        report.table(
            ["type", "compiled, ns", "single operations, ns", "ratio", *_SAME, "error left, more or less"],
            lines(found),
        ),
    ]
    print(report.write("scales-by-importance", "Search of scales by importance", sections))


if __name__ == "__main__":
    main()

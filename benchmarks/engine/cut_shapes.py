"""Which shape loses least within budgets below a teacher's smallest types, and what does the repair of cut FFNs gain?

    python -m benchmarks.engine.cut_shapes [--data DIR] [--budgets 175MB,150MB,130MB,115MB] [--tokens 1024]

For each budget, it finds the best student of each family of shapes, with its types solved. The families are: all FFNs
equally narrow, each layer's FFN of its own width, fewer groups of heads, and a block of layers left out. Then it
compares FFNs cut to three widths, in 32 bits, with and without the repair. Nothing is trained. Scores are kept in the
cache, so a run can be continued.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.importance import PartImportance, ensure_importance
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.search.solve.bench import Bench, Measured, Sample
from autodistill.search.solve.forms import Form, best_forms, cut_forms
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import Shapes, ffn_widths, shapes_file
from autodistill.strategy.strategy import Init
from autodistill.units import format_bytes, parse_bytes
from autodistill.utils.json_files import read_json
from benchmarks.common import program, report

BUDGETS = "175MB,150MB,130MB,115MB"


def held_out(one: Form, library: Library, shapes: Shapes, sample: Sample) -> Measured:
    """Measure a student in its storage, on text that was not used to choose it."""
    whole = one.family == "whole"
    return library.joint(one.deployment, sample) if whole else shapes.joint(one.init, one.deployment, sample)


def repairs(spec_width: int, shapes: Shapes, sample: Sample) -> Iterator[dict[str, Any]]:
    """Yield students of three widths in 32 bits, as cut and as repaired."""
    widths = ffn_widths(spec_width)
    for width in (widths[len(widths) // 4], widths[len(widths) // 2], widths[-len(widths) // 4]):
        found = {
            repair: shapes.student(Init(depth=1.0, ffn=width / spec_width, repair=repair)).measure_parts(
                {}, ("f16", "f16"), sample
            )
            for repair in (False, True)
        }
        gained, stderr = found[False].kl_above(found[True])
        yield {"width": width, "plain": found[False].kl, "repaired": found[True].kl, "gain": gained, "stderr": stderr}


def solved(
    options: Options, library: Library, shapes: Shapes, calibration: Sample, unseen: Sample
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield the best student of each family within a budget: the report's note, and its row without the budget."""
    library.build()
    began = time.process_time()
    found = best_forms(options, library, lambda: shapes, calibration)
    if len(found) == 1 and found[0].family == "whole":
        # Uncut students suffice here, but cut ones are compared too.
        found += cut_forms(options, library, shapes, calibration)
    seconds = time.process_time() - began
    for one in found:
        on_unseen = held_out(one, library, shapes, unseen)
        told = {"family": one.family, "init": one.init.to_json(), "deployment": one.deployment.to_json()}
        told |= {"bytes": one.bytes, "predicted_kl": one.found.predicted[0], "joint": one.joint.to_json()}
        yield (
            {**told, "held_out": on_unseen.to_json(), "core_seconds": seconds},
            [
                one.family,
                one.name,
                format_bytes(one.bytes),
                f"{one.found.predicted[0]:.3f}",
                f"{one.joint.kl:.3f}",
                f"{on_unseen.kl:.3f} ± {on_unseen.kl_stderr or 0:.3f}",
                f"{on_unseen.nll:.3f}",
            ],
        )


def main() -> None:
    """Solve each budget for shapes, with and without repair, and write the report of their KL."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--budgets", default=BUDGETS, help=f"parted by commas, {BUDGETS} by default")
    parser.add_argument("--context", type=program.token_count, default=2048)
    parser.add_argument("--tokens", type=program.token_count, default=1024)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--cache", type=Path, default=None)
    arguments = program.parse(parser, budgets="23.6MB,23.4MB", context=256, tokens=256, sequence_length=64)
    if arguments.smoke:
        arguments.teacher = program.tiny_teacher(layers=4, width=128, heads=2, kv_heads=1, ffn=256)
        arguments.data = program.tiny_data()
    cache, length = arguments.cache or cache_folder(), arguments.sequence_length
    teacher = materialize(resolve_teacher(arguments.teacher), cache)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    data = prepare(resolve_data(arguments.data), teacher.folder, tokenizer_fingerprint(teacher.folder), length, cache)
    train, validation = load_split(data.folder, "train"), load_split(data.folder, "validation")
    bench = Bench(load_model(teacher.folder, torch.float32), spec, {})
    calibration = bench.sample("calibration", train.head(arguments.tokens))
    unseen = bench.sample("held-out", validation.head(2 * arguments.tokens))
    importance = ensure_importance(
        lambda: bench.model,
        teacher_fingerprint=teacher.fingerprint,
        data_fingerprint=data.fingerprint,
        data=train,
        root=cache / "calibrations",
    )

    def tell(line: str) -> None:
        print(line, flush=True)

    tokens = (arguments.tokens, int(unseen.data.tokens.size), length)
    shapes = Shapes(
        shapes_file(cache, teacher.fingerprint, data.fingerprint, tokens),
        bench,
        calibration,
        PartImportance.load(importance),
        tell,
    )
    rows, noted = [], []
    for limit in map(parse_bytes, arguments.budgets.split(",")):
        options = Options(spec=spec, budget=Budget(memory_bytes=limit, context=arguments.context))
        path = library_file(cache, teacher.fingerprint, data.fingerprint, tokens, options)
        for told, row in solved(options, Library(path, bench, options, calibration, tell), shapes, calibration, unseen):
            noted.append({"budget": limit, **told})
            rows.append([format_bytes(limit), *row])
    fitted = list(repairs(spec.ffn_width, shapes, unseen))
    report.note("constructions", noted)
    report.note("repair", fitted)
    sections = [
        f"{teacher.name}, context {arguments.context}, text {data.name}: scored and chosen on "
        f"{calibration.data.predicted:,} tokens, the last two columns on {unseen.data.predicted:,} held-out tokens "
        f"(± standard error over documents). Nats a token; the teacher's own NLL is {unseen.teacher.nll:.3f}. Nothing "
        "is trained.",
        report.table(
            ["budget", "shape", "student", "memory", "predicted KL", "KL", "held-out KL", "held-out NLL"], rows
        ),
        f"All FFNs cut from {spec.ffn_width} neurons, in 32 bits, held-out KL. The repair also chooses the neurons.",
        report.table(
            ["neurons", "cut", "cut and repaired", "gain, paired"],
            [
                [
                    one["width"],
                    f"{one['plain']:.3f}",
                    f"{one['repaired']:.3f}",
                    f"{one['gain']:.3f} ± {one['stderr']:.3f}",
                ]
                for one in fitted
            ],
        ),
    ]
    print(report.write("cut-shapes", "Shapes solved for budgets below the smallest types", sections))


if __name__ == "__main__":
    main()

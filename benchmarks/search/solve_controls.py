"""What are the types and the shape of a solution worth, each alone, beyond the choice of the table's type?

    python -m benchmarks.search.solve_controls [--tokens 6144] [--seeds 3] [--budgets 1.0,0.8] [--time 20m]

The small language model is stored in five ways. The budgets are shares of its memory in Q4_0, with its table and an
8-bit cache.

1. The whole model in the best single type that fits.
2. The whole model: all matrices have one type, and the types of table and cache are chosen.
3. Shape alone: everything is in Q4_0, with an 8-bit cache, and the solver cuts the model until it fits.
4. Types alone: the whole model, and the solver chooses every type.
5. Shape and types, as `autodistill solve` chooses them if it considers cuts in any case.

Each is scored untrained, and after the same training on its grid, so only the time for solving differs. Differences are
paired by document.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.distillation.student.shapes import cut_spec
from autodistill.errors import NothingFitsError
from autodistill.estimates.fit import cannot_hold
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.statistics import paired_bootstrap
from autodistill.hardware.budget import NO_LIMIT, Budget
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.spec import ModelSpec
from autodistill.options import cache_folder
from autodistill.search.solve import SolveRequest
from autodistill.search.solve.call.opened import open_request
from autodistill.search.solve.forms import best_forms
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE, Init
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash
from benchmarks.common import debian_texts, over_seeds, report
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher, token_count
from benchmarks.common.report import Kept
from benchmarks.search.constructions import SEQUENCE, Construction, Lab
from benchmarks.search.small_teacher import described, small_teacher

CONTEXT, HELD_OUT, BUDGETS = 512, 8192, "1.0,0.8"
UNIFORM, TABLE = "uniform, table too", "table and cache chosen"
SHAPE, TYPES, ALL = "shape alone solved", "types alone solved", "shape and types solved"
CACHES = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))
# How many storages with one type of matrices are measured: those with the most bits.
_MEASURED = 4


def budget_of(spec: ModelSpec, share: float) -> Budget:
    """Return a budget: the runtime's memory, and a share of the whole model's weights and cache.

    The model is in Q4_0 with an 8-bit cache.
    """
    need = memory(spec, plain(spec), context=CONTEXT, batch=1)
    own = int(share * (need.weights_bytes + need.kv_cache_bytes))
    return Budget(memory_bytes=need.compute_bytes + need.overhead_bytes + own, context=CONTEXT)


def plain(spec: ModelSpec) -> Deployment:
    """Return the storage in Q4_0 with its table and an 8-bit cache."""
    return _deployment(spec, "q4_0", "q4_0", ("q8_0", "q8_0"))


def _deployment(spec: ModelSpec, matrices: str, table: str, cache_types: tuple[str, str]) -> Deployment:
    options = _options(spec)
    types = dict.fromkeys(options.matrices, matrices) | dict.fromkeys(options.tables, table)
    return options.deployment(types, cache_types)


def _options(spec: ModelSpec) -> Options:
    return Options(spec=spec, budget=Budget(memory_bytes=1, context=CONTEXT))


def _fitting(spec: ModelSpec, budget: Budget, tables: Sequence[str] | None) -> Iterator[tuple[str, str, Deployment]]:
    """Yield the storages that fit, with one type for all matrices: its name, the table's, and the storage.

    Args:
        spec: The model's shape.
        budget: The limit.
        tables: Types of the table. None stands for the matrices' type and an 8-bit cache.
    """
    options = _options(spec)
    tensors = options.matrices | options.tables
    kinds = [kind for kind in options.kinds(next(iter(tensors.values()))) if kind != "f16"]
    kinds = [kind for kind in kinds if all(kind in options.kinds(tensor) for tensor in tensors.values())]
    for kind in kinds:
        for table in tables or (kind,):
            for cache_types in CACHES if tables else (("q8_0", "q8_0"),):
                if cache_types not in options.caches or table not in kinds:
                    continue
                one = _deployment(spec, kind, table, cache_types)
                fits = memory(spec, one, context=CONTEXT, batch=1).total_bytes <= budget.memory_bytes
                if fits and not cannot_hold(spec, one):
                    yield kind, table, one


def uniform(lab: Lab, budget: Budget) -> Deployment:
    """Return the single type with the most bits that fits.

    Raises:
        NothingFitsError: No type fits.
    """
    found = next(_fitting(lab.spec, budget, None), None)
    if found is None:
        raise NothingFitsError("no single type fits")
    return found[2]


def with_table(lab: Lab, budget: Budget) -> Deployment:
    """Return the storage with one type for all matrices whose table and cache give the lowest KL.

    Only the largest storages that fit are measured.
    """
    kinds = [kind for kind in _options(lab.spec).kinds(next(iter(_options(lab.spec).tables.values()))) if kind != "f16"]
    largest: dict[tuple[str, tuple[str, str]], Deployment] = {}
    for kind, _, one in _fitting(lab.spec, budget, kinds):
        # For each type of matrices and cache, the table with the most bits comes first.
        largest.setdefault((kind, one.cache_types), one)
    if not largest:
        raise NothingFitsError("no single type of matrices fits")
    sizes = sorted(largest.values(), key=lambda one: -memory(lab.spec, one, context=CONTEXT, batch=1).total_bytes)
    return min(sizes[:_MEASURED], key=lambda one: float(_read(lab, one)["kl"]))


def _read(lab: Lab, deployment: Deployment) -> dict[str, Any]:
    return lab.untrained(_whole(deployment))


def _whole(deployment: Deployment) -> Construction:
    return Construction(name=deployment.name, family="whole", init=WHOLE, deployment=deployment)


def _construction(told: Mapping[str, Any]) -> Construction:
    """Return a student that `students` wrote down."""
    init, deployment = Init.from_json(told["init"]), Deployment.from_json(told["deployment"])
    name = deployment.name if init == WHOLE else f"{deployment.name} ({init.describe()})"
    return Construction(name=name, family="solved", init=init, deployment=deployment)


def solved(lab: Lab, budget: Budget, data: str, sequence: int, *, shape: bool, types: bool) -> tuple[Init, Deployment]:
    """Return what AutoDistill's own solver chooses.

    Args:
        lab: The model.
        budget: The limit.
        data: Reference of the text.
        sequence: Length of its sequences.
        shape: Whether cuts are considered.
        types: Whether types are chosen; else everything is as `plain` stores it.

    Raises:
        NothingFitsError: Nothing fits.
    """
    request = SolveRequest(
        budgets=(replace(budget, memory_bytes=NO_LIMIT),),
        cache=cache_folder(),
        teacher=str(lab.teacher),
        data=data,
        sequence_length=sequence,
    )
    opened = open_request(request)
    # The process's memory is predicted, as for the other students, so that each has the same room.
    fixed = None if types else plain(lab.spec)
    options = replace(opened.options[0], spec=lab.spec, budget=budget, cuts=shape, fixed=fixed)
    with exclusive(path := opened.library_file(options)):
        library = Library(path, opened.bench, options.free, opened.calibration, print)
        library.build()
        shapes = cache(partial(opened.shapes, print))
        forms = best_forms(options, library, shapes, opened.calibration, thorough=True, tight=0.0)
    if not forms:
        raise NothingFitsError("no student fits")
    return forms[0].init, forms[0].deployment


def students(lab: Lab, budget: Budget, data: str, sequence: int) -> dict[str, Any]:
    """Return the five students as plain data, with the seconds to choose each.

    Those for which nothing fits are left out.
    """
    found: dict[str, Any] = {}
    solver = partial(solved, lab, budget, data, sequence)
    makers: dict[str, Callable[[], tuple[Init, Deployment]]] = {
        UNIFORM: lambda: (WHOLE, uniform(lab, budget)),
        TABLE: lambda: (WHOLE, with_table(lab, budget)),
        SHAPE: partial(solver, shape=True, types=False),
        TYPES: partial(solver, shape=False, types=True),
        ALL: partial(solver, shape=True, types=True),
    }
    for name, make in makers.items():
        began = time.monotonic()
        try:
            init, deployment = make()
        except NothingFitsError:
            continue
        need = memory(cut_spec(init, lab.spec), deployment, context=CONTEXT, batch=1)
        size = need.weights_bytes + need.kv_cache_bytes
        found[name] = {
            "init": init.to_json(),
            "deployment": deployment.to_json(),
            "bytes": size,
            "seconds": time.monotonic() - began,
        }
    return found


def less(mine: Mapping[str, Any], other: Mapping[str, Any], what: str) -> tuple[float, float]:
    """Return the difference per token and its standard error, paired by document."""
    gaps = np.asarray(mine[f"{what}_sums"], float) - np.asarray(other[f"{what}_sums"], float)
    values, errors = paired_bootstrap(gaps[None], np.asarray(mine["count"], float))
    return float(values[0]), float(errors[0])


def main() -> None:
    """Train each solution and control, and write the report of what solving is worth."""
    parser = parser_of(__doc__, seeds=3, time=True)
    parser.add_argument("--tokens", type=token_count, default=6144, help="that each is trained on")
    parser.add_argument("--budgets", default=BUDGETS, help=f"shares, {BUDGETS} by default")
    parser.add_argument("--data", help="the held-apart manuals by default")
    parser.add_argument("--teacher-tokens", type=token_count, help="of the small teacher; the newest by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parse(parser, tokens=1024, seeds=1, budgets="1.0")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    held_out, step, sequence = HELD_OUT, 512, SEQUENCE
    if arguments.smoke:
        teacher = Path(tiny_teacher(layers=2, width=256, heads=4, ffn=256))
        arguments.data, held_out = tiny_data(60), 512
    else:
        teacher = small_teacher(arguments.teacher_tokens)
    data = arguments.data or str(debian_texts.debian_texts().folder / "manuals")
    lab = Lab(teacher, data, held_out=held_out, sequence=sequence, step=step)
    source = content_hash([teacher.name, teacher.parent.name, lab.fingerprint, held_out, step])
    kept = Kept("solve-controls", source, arguments.time)
    itself = kept.get("teacher", lab.teacher_itself)
    rows, differences = list[list[str]](), list[list[str]]()
    for share in map(float, arguments.budgets.split(",")):
        budget = budget_of(lab.spec, share)
        chosen = kept.get(f"{share:g}, students", partial(students, lab, budget, data, sequence))
        read: dict[str, Any] = {}
        for name, one in chosen.items():
            student = _construction(one)
            before = kept.get(f"{share:g}, {name}, untrained", partial(lab.untrained, student))
            after = [
                kept.get(
                    f"{share:g}, {name}, {arguments.tokens}, {seed}",
                    partial(lab.trained, student, arguments.tokens, seed),
                )
                for seed in range(arguments.seeds)
            ]
            read[name] = before, after
            nll, points = ([found[what] for found in after] for what in ("nll", "accuracy"))
            size, seconds = f"{one['bytes'] / 1e6:.3f}", f"{one['seconds']:.0f}"
            cells = [f"{share:g}", name, student.name, size, seconds]
            cells += [f"{before['kl']:.4f}", f"{before['nll']:.4f}"]
            rows.append([*cells, over_seeds.mean(nll), over_seeds.mean(points, 2, factor=100)])
        differences += _differences(share, read)
    titles = [
        "budget",
        "storage",
        "types and shape",
        "MB",
        "s to choose",
        "KL untrained",
        "NLL untrained",
        "NLL after",
        "accuracy, %",
    ]
    said = (
        f"Of {described(teacher)}, text {Path(data).name}: {held_out:,} held-out tokens, "
        f"{arguments.seeds} seeds of {arguments.tokens:,} training tokens each, on the grid that each is stored in. "
        f"MB of weights and cache at context {CONTEXT}. The teacher itself: NLL {itself['nll']:.4f}."
    )
    titles_of = ["budget", "storage", "less", "nats untrained", "nats after, by seed", "points after, by seed"]
    sections = [
        said,
        report.table(titles, rows),
        "Differences in NLL and accuracy, paired by document; below zero in nats is better:\n\n"
        + report.table(titles_of, differences),
    ]
    print(
        report.write("solve-controls", "What types and shape are worth, each alone, beyond the table's type", sections)
    )


def _differences(share: float, read: Mapping[str, tuple[Any, Sequence[Any]]]) -> Iterator[list[str]]:
    for name, other in ((TABLE, UNIFORM), (SHAPE, UNIFORM), (TYPES, TABLE), (ALL, TABLE), (ALL, SHAPE), (ALL, TYPES)):
        if name not in read or other not in read:
            continue
        value, error = less(read[name][0], read[other][0], "nll")
        pairs = list(zip(read[name][1], read[other][1], strict=True))
        nats = ", ".join("{:+.4f} ± {:.4f}".format(*less(mine, theirs, "nll")) for mine, theirs in pairs)
        points = ", ".join("{:+.2f}".format(100 * less(mine, theirs, "accuracy")[0]) for mine, theirs in pairs)
        yield [f"{share:g}", name, other, f"{value:+.4f} ± {error:.4f}", nats, points]


if __name__ == "__main__":
    main()

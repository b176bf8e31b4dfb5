"""Solves a teacher's storage for budgets: loads, scores, solves, measures, and compares solutions with rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autodistill.advisor.solved import Solved, keep_solved
from autodistill.distillation.student.build import save_student
from autodistill.distillation.teacher.any_model import spec_of
from autodistill.distillation.teacher.resolve import resolve_teacher
from autodistill.errors import InputError
from autodistill.estimates.solving import CUT_SCORES
from autodistill.estimates.solving_on_gpu import FILE_BYTES, FILE_RATES, check_solves_on, seconds_on
from autodistill.evaluation.precision import check_scoring_on
from autodistill.export.whole.file import cannot_write
from autodistill.hardware.budget import on_gpu
from autodistill.hardware.device import Device
from autodistill.search.solve.bench import compute_device, speeds
from autodistill.search.solve.call.candidates import Candidate
from autodistill.search.solve.call.document import of_budget
from autodistill.search.solve.call.export import READERS, export
from autodistill.search.solve.call.opened import Opened, open_request
from autodistill.search.solve.call.request import check_fits, options_of, room_of, within_context, work_of
from autodistill.search.solve.compensation import Compensated, compensate
from autodistill.search.solve.cuts import may_cut, named, smallest
from autodistill.search.solve.disk_limit import mark_used
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import Shapes
from autodistill.search.solve_request import SolveRequest
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE, Init
from autodistill.utils.file_locks import exclusive
from autodistill.utils.json_files import unwritable, write_json

DOCUMENT = "solve.json"


def solve(request: SolveRequest, notify: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Find the storage of a teacher with the least KL to itself for each budget, before anything is trained.

    Scores and measurements are kept in the cache. So an interrupted call continues where it stopped, and another budget
    takes seconds.

    Args:
        request: The request.
        notify: Called with messages about progress.

    Returns:
        Plain data. "solutions" has the solution and its rivals for each budget that something fits, and "nothing_fits"
        has the other budgets. The smallest storage and the teacher's own NLL on the held-out text are included too.

    Raises:
        InputError: The teacher is not found, or llama.cpp cannot hold it. Or a candidate is damaged, or has another
            model or tokenizer. Or there is too little data.
        NothingFitsError: The smallest storage, which is named, fits no budget.
        VerificationError: The exported solution differs from what was measured.
    """
    opened = open_request(request)
    shapes = cache(partial(opened.shapes, notify))  # so that the data for cuts is read only once
    found = [_solved(one, opened, shapes, notify) for one in opened.options]
    solutions = [one for one in found if one is not None]
    with suppress(OSError, InputError):  # on a full disk only a line of `pick` is lost
        # `pick` compares solutions, so only those that were scored in the same way are kept.
        if request.runtime == "llama.cpp" and request.scoring == "float32":
            keep_solved(request.cache, opened.teacher.fingerprint, _known(solutions, opened))
    document = _document(opened, found)
    if request.export:
        document["exported"] = _exported(solutions[0], opened, shapes, notify)
    if request.out is not None:
        try:
            write_json(request.out / DOCUMENT, document)
        except OSError as error:
            raise unwritable(request.out, error) from error
    return document


def _solved(
    options: Options, opened: Opened, shapes: Callable[[], Shapes], notify: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return the solution of a budget and its rivals as plain data, or None if nothing fits."""
    _, _, least = smallest(options)
    if least > options.budget.memory_bytes:
        return None
    with exclusive(path := opened.library_file(options)):
        mark_used(path)
        library = Library(path, opened.bench, options, opened.calibration, notify, opened.held_out)
        library.build()
        return of_budget(opened, options, library, shapes)


def _document(opened: Opened, found: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the result of a call, before any export."""
    teacher, data, itself = opened.teacher, opened.data, opened.held_out.teacher
    init, deployment, least = smallest(opened.options[0])
    tried = zip(opened.options, found, strict=True)
    return {
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint, "stored": opened.note},
        "data": {"name": data.name, "fingerprint": data.fingerprint, "license": data.license},
        "calibration_tokens": int(opened.calibration.data.predicted),
        "held_out_tokens": int(opened.held_out.data.predicted),
        "sequence_length": opened.request.sequence_length,
        "streamed": not opened.options[0].cuts,
        "scoring": opened.request.scoring,
        "coarse": opened.request.coarse,
        "teacher_nll": itself.nll,
        "teacher_nll_stderr": itself.nll_stderr,
        "teacher_accuracy": itself.accuracy,
        "teacher_accuracy_stderr": itself.accuracy_stderr,
        "smallest": {"name": named(init, deployment), "bytes": least},
        "solutions": [one for one in found if one is not None],
        "nothing_fits": [options.budget.to_json() for options, one in tried if one is None],
        "not_exported": opened.unwritten or None,
        "exported": None,
    }


def _chosen(solved: Mapping[str, Any], candidates: Sequence[Candidate], options: Options) -> Deployment | Candidate:
    """Return the solution of a budget, or the better file of another tool."""
    path = (solved["winner"] or {}).get("path")
    winner = next((one for one in candidates if str(one.path) == path), None)
    return Deployment.from_json(solved["solution"]["deployment"]) if winner is None else winner.fitting(options)


def _exported(
    solved: Mapping[str, Any], opened: Opened, shapes: Callable[[], Shapes], notify: Callable[[str], None]
) -> dict[str, Any]:
    """Write the chosen storage and verify it in its runtime. A cut student is first saved to a temporary folder."""
    request, options, teacher, bench = opened.request, opened.options[0], opened.teacher, opened.bench
    assert request.out is not None
    chosen: Deployment | Candidate | Compensated = _chosen(solved, opened.candidates, options)
    notify(f"writing {chosen.name} and running it in {READERS[options.runtime]}")
    init = WHOLE if isinstance(chosen, Candidate) else Init.from_json(solved["solution"]["init"])
    with ExitStack() as stack:
        if init != WHOLE:
            with exclusive(opened.library_file(options)):
                bench = shapes().student(init)
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".student-", dir=request.cache)))
            save_student(bench.model, teacher.folder, folder)
            teacher = replace(teacher, folder=folder)
        if isinstance(chosen, Deployment) and solved["solution"]["compensated"]:
            chosen = compensate(bench, chosen, opened.compensation)
        return export(bench, teacher, chosen, options.budget, opened.data, request.out)


def _known(solutions: Sequence[Mapping[str, Any]], opened: Opened) -> Iterator[Solved]:
    """Yield the records of the solutions that other commands show."""
    budgets = {one.budget.memory_bytes: one.budget for one in opened.options}
    for one in solutions:
        budget, found = budgets[one["budget"]["memory_bytes"]], one["solution"]
        yield Solved(
            teacher=opened.teacher.name,
            data=opened.data.name,
            budget_bytes=budget.memory_bytes,
            context=budget.context,
            batch=budget.batch,
            on_gpu=on_gpu(budget),
            name=found["name"],
            bytes=found["bytes"],
            kl=found["kl"],
            nll=found["nll"],
            accuracy=found["accuracy"],
            tokens=int(opened.held_out.data.predicted),
        )


def plan_solve(request: SolveRequest, elsewhere: Device | None = None) -> dict[str, Any]:
    """Return the time and memory of solving as plain data. Nothing is downloaded, converted or scored.

    The speed of products and of rounding on this machine is measured, for about a second. That of a GPU elsewhere is
    predicted from its data sheet.

    Args:
        request: The request.
        elsewhere: A GPU that is not here, if solving is planned for it instead of this machine.

    Raises:
        InputError, NothingFitsError: As `solve`, as far as the teacher's config is enough to tell. Or the time on such
            a device cannot be predicted.
    """
    if elsewhere is None:
        check_scoring_on(request.scoring, compute_device())
    else:
        check_solves_on(elsewhere, request.scoring)
    found = resolve_teacher(request.teacher, trained=False, weights=False)
    spec = spec_of(found.config)
    request = within_context(request, spec)
    check_fits(every := options_of(request, spec, found.config, elsewhere))
    options = every[0]
    init, deployment, least = smallest(options)
    return {
        "teacher": {"name": found.name, "parameters": spec.parameters},
        "plan": _plan(request, options, elsewhere),
        "smallest": {"name": named(init, deployment), "bytes": least},
        "solutions": [],
        "nothing_fits": [],
        "not_exported": (cannot_write(spec, found.config) if request.runtime == "llama.cpp" else "") or None,
        "exported": None,
    }


def _plan(request: SolveRequest, options: Options, elsewhere: Device | None) -> dict[str, Any]:
    """Predict time and memory of solving from the sizes of the model and the speed of the machine."""
    work = work_of(options, request, streamed=not options.cuts, elsewhere=elsewhere)
    of_cuts = work.operations[CUT_SCORES] / sum(work.operations.values())
    if elsewhere is None:
        rate, rounding = speeds(options.held, request.scoring)
        seconds, cuts = work.seconds(rate, rounding), work.operations[CUT_SCORES] / rate
        speed: dict[str, Any] = {"operations_per_second": rate, "elsewhere": None}
    else:
        parts, slow = (
            seconds_on(work, elsewhere, request.scoring, request.sequence_length, end) for end in ("typical", "low")
        )
        seconds, cuts = sum(parts.values()), parts["products"] * of_cuts
        speed = {
            "operations_per_second": None,
            "elsewhere": {
                "device": elsewhere.name,
                "seconds_by_part": parts | {"products": parts["products"] - cuts},
                "slow_seconds": sum(slow.values()) - slow["products"] * of_cuts,
                "readings": work.readings,
                "file_bytes": FILE_BYTES * work.weights,
                "file_bytes_per_second": FILE_RATES["typical"],
            },
        }
    cut = may_cut(options)
    return {
        "seconds": seconds - cuts,
        "seconds_with_cuts": seconds if cut else None,
        "cuts_seconds": cuts if cut else 0.0,
        "memory_bytes": work.memory_bytes,
        "memory_bytes_whole": work_of(options, request, streamed=False, elsewhere=elsewhere).memory_bytes,
        "streamed": not options.cuts,
        "machine_bytes": room_of(request, elsewhere),
        "operations": dict(work.operations),
        **speed,
    }

"""Solves a teacher's storage for budgets: loads, scores, solves, measures, and says what it found beside its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autodistill.advisor.solved import Solved, keep_solved
from autodistill.data.dataset import Prepared, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.data.tokenization import check_ids
from autodistill.distillation.student.build import save_student
from autodistill.distillation.student.shapes import cut_spec
from autodistill.distillation.teacher.any_model import holds_cache, is_known, spec_of
from autodistill.distillation.teacher.resolve import Teacher, materialise, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.fit import fits
from autodistill.estimates.solving import CUT_SCORES, solving_work
from autodistill.export.gguf_mixtures import cannot_write
from autodistill.export.tokenizer_check import cannot_cut
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget, on_gpu
from autodistill.hardware.machine import memory_bytes
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.search.solve.bench import Bench, Measured, Sample, copying, load_bench, speeds
from autodistill.search.solve.candidates import Candidate, check_candidate, open_candidate
from autodistill.search.solve.export import export
from autodistill.search.solve.forms import CUTS, WHOLE, Form, best_forms, can_cut, copied, named, smallest
from autodistill.search.solve.kept import use
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import Rival, fitting, rivals
from autodistill.search.solve.shapes import Shapes, open_shapes
from autodistill.search.solve.solver import Found, Solver
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init
from autodistill.units import format_bytes
from autodistill.utils.file_locks import alone
from autodistill.utils.json_files import read_json, unwritable, write_json
from autodistill.utils.plain_dataclass import check_no_blank

DOCUMENT = "solve.json"
PROBED = 1024  # tokens of a text that is copied, at the most
_MORE = 5 * 10**6  # bytes, of which is told what they would buy
_CLEAR = 2.0  # standard errors by which a solution must be better than a plain storage


@dataclass(frozen=True, kw_only=True)
class SolveRequest:
    """What is solved, for which budgets, and where it goes.

    Attributes:
        budgets: Limits of the process's memory at one context and batch, and perhaps on a device.
        cache: Folder of teachers, data and scores.
        teacher: As `resolve_teacher` takes it.
        data: As `resolve_data` takes it.
        tokens: Of the calibration text; the held-out text has twice as many.
        sequence_length: Of either, each read on its own. A longer one shows more of what the cache's types do.
        out: Folder in which the document is kept, and the solution where it is exported; None keeps nothing.
        export: Whether the solution is written and verified in its runtime.
        candidates: GGUF files of the same model that are measured beside the solution, and may be taken in its place.
        file_bytes: What the weights may take in a file; None for no limit.
        context_by_default: Whether nobody asked for the budgets' context, so that a model's shorter one goes before it.
    """

    budgets: tuple[Budget, ...]
    cache: Path
    teacher: str = "smollm2"
    data: str = "pydoc"
    tokens: int = 2048
    sequence_length: int = 256
    out: Path | None = None
    export: bool = False
    candidates: tuple[Path, ...] = ()
    file_bytes: int | None = None
    context_by_default: bool = False

    def __post_init__(self) -> None:
        check_no_blank(self)
        if not self.budgets:
            raise InputError(
                "solve takes a budget: give --budget like 200MB, --sweep like 100MB..400MB, --device or --tiers"
            )
        if self.export and (self.out is None or len(self.budgets) > 1):
            raise InputError(
                "--export writes the solution of one budget into a folder: give --budget or --device, and --out"
            )
        if self.tokens < 2 * self.sequence_length or self.sequence_length < 2:
            raise InputError(
                f"{self.tokens} tokens are fewer than two sequences of {self.sequence_length}, of which scores have "
                "errors: give more --tokens"
            )
        for budget in self.budgets:
            if isinstance(budget, DeviceBudget) and (lacks := budget.device.lacks("llama.cpp")):
                raise InputError(f"solutions are of llama.cpp, and {lacks}: name another --device")


def solve(request: SolveRequest, notify: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Finds for each budget how a teacher is stored at the least KL to itself, before anything is trained.

    What is scored and measured is kept in the cache, so that a call that was cut off goes on, and another budget costs
    seconds.

    Args:
        request: What is asked for.
        notify: Told of what is done.

    Returns:
        Plain data: under "solutions" for each budget that something fits the solution and its rivals, and under
        "nothing_fits" the others; the smallest storage; the teacher's own NLL on the held-out text.

    Raises:
        InputError: A teacher that is not found, or that llama.cpp cannot hold; a candidate of another model or
            tokenizer, or a damaged one; too little data.
        NothingFitsError: No budget is met by the smallest storage, which is named.
        VerificationError: The solution, exported, is not what was measured.
    """
    found = resolve_teacher(request.teacher, trained=False)
    spec = spec_of(found.config)
    request = _within_context(request, spec)
    # Before anything is downloaded or converted.
    cache_type = None if holds_cache(found.config) else "f16"
    first = Options(spec=spec, budget=request.budgets[0], cache_type=cache_type, file_bytes=request.file_bytes)
    options = [replace(first, budget=budget) for budget in request.budgets]
    unwritten = cannot_write(spec, found.config)
    if request.export and unwritten:
        raise InputError(f"{found.name} is solved and not exported: {unwritten}; leave --export out")
    _check_fits(options)
    candidates = [open_candidate(path, spec) for path in request.candidates]
    source = resolve_data(request.data)
    if source.conversations:
        raise InputError(f"{request.data} holds conversations: solve takes plain text, of which every token counts")
    teacher = materialise(found, request.cache)
    config = read_json(teacher.folder / "config.json")
    spec = spec_of(config)
    reason = cannot_cut(teacher.folder, spec.vocabulary)
    if reason and (is_known(config) or request.export):
        raise InputError(f"a GGUF file cannot hold this teacher: {reason}")
    unwritten = unwritten or reason or ""
    for candidate in candidates:
        check_candidate(candidate, teacher.folder, spec)
    teacher, stored = stored_as(found, teacher, spec, request.cache) if is_known(config) else (teacher, None)
    own = stored.deployment if stored and stored.deployment and stored.deployment.container == "gguf" else None
    fingerprint = tokenizer_fingerprint(teacher.folder)
    data = prepare(source, teacher.folder, fingerprint, request.sequence_length, request.cache)
    bench = load_bench(teacher, spec, own)
    samples = _samples(request, data, bench)
    calibration, held_out = samples
    documents, misses = [], []
    init, deployment, least = smallest(options[0])
    tokens = (request.tokens, held_out.data.tokens.size, request.sequence_length)
    shapes = partial(open_shapes, request.cache, bench, calibration, teacher.fingerprint, data, tokens, notify)
    for one in options:
        if least > one.budget.memory_bytes:
            misses.append(one.budget.to_json())
            continue
        path = library_file(request.cache, teacher.fingerprint, data.fingerprint, tokens, one)
        with alone(path):
            use(path)
            library = Library(path, bench, one, calibration, notify)
            library.build()
            thorough = len(options) == 1
            solved = _solved(one, library, bench, shapes, samples, own, candidates, thorough=thorough)
            documents += [solved] if solved else []
            misses += [] if solved else [one.budget.to_json()]
    with suppress(OSError, InputError):  # a full disk loses a line that pick would show
        keep_solved(request.cache, teacher.fingerprint, _known(documents, options, teacher, data, held_out))
    document: dict[str, Any] = {
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint, "stored": stored and stored.note},
        "data": {"name": data.name, "fingerprint": data.fingerprint, "license": data.license},
        "calibration_tokens": int(calibration.data.predicted),
        "held_out_tokens": int(held_out.data.predicted),
        "sequence_length": request.sequence_length,
        "teacher_nll": held_out.teacher.nll,
        "teacher_nll_stderr": held_out.teacher.nll_stderr,
        "teacher_accuracy": held_out.teacher.accuracy,
        "teacher_accuracy_stderr": held_out.teacher.accuracy_stderr,
        "smallest": {"name": named(init, deployment), "bytes": least},
        "solutions": documents,
        "nothing_fits": misses,
        "not_exported": unwritten or None,
        "exported": None,
    }
    if request.export:
        path = library_file(request.cache, teacher.fingerprint, data.fingerprint, tokens, options[0])

        def cut(init: Init) -> Bench:
            with alone(path):
                return shapes().student(init)

        chosen = _chosen(documents[0], candidates, options[0])
        notify(f"writing {chosen.name} and running it in llama.cpp")
        init = WHOLE if isinstance(chosen, Candidate) else Init.from_json(documents[0]["solution"]["init"])
        document["exported"] = _export(request, chosen, bench if init == WHOLE else cut(init), teacher, data)
    if request.out is not None:
        try:
            write_json(request.out / DOCUMENT, document)
        except OSError as error:
            raise unwritable(request.out, error) from error
    return document


def plan_solve(request: SolveRequest) -> dict[str, Any]:
    """What solving would take on this machine, as plain data: nothing is downloaded, converted or scored.

    How fast this machine multiplies and rounds is measured, for about a second.

    Raises:
        InputError, NothingFitsError: As `solve`, as far as the teacher's config says so.
    """
    found = resolve_teacher(request.teacher, trained=False)
    spec = spec_of(found.config)
    request = _within_context(request, spec)
    cache_type = None if holds_cache(found.config) else "f16"
    options = Options(spec=spec, budget=request.budgets[0], cache_type=cache_type, file_bytes=request.file_bytes)
    _check_fits([replace(options, budget=one) for one in request.budgets])
    kinds = {name: options.kinds(tensor) for name, tensor in (options.matrices | options.tables).items()}
    caches = sum(len({pair[half] for pair in options.caches} - {"f16"}) for half in (0, 1))
    work = solving_work(spec, kinds, caches, request.tokens)
    rate, rounding = speeds()
    seconds = work.seconds(rate, rounding)
    cuts = work.operations[CUT_SCORES] / rate if can_cut(spec) else 0.0
    init, deployment, least = smallest(options)
    return {
        "teacher": {"name": found.name, "parameters": spec.parameters},
        "plan": {
            "seconds": seconds - work.operations[CUT_SCORES] / rate,
            "seconds_with_cuts": seconds if can_cut(spec) else None,
            "cuts_seconds": cuts,
            "memory_bytes": work.memory_bytes,
            "machine_bytes": memory_bytes(),
            "operations": dict(work.operations),
            "operations_per_second": rate,
        },
        "smallest": {"name": named(init, deployment), "bytes": least},
        "solutions": [],
        "nothing_fits": [],
        "not_exported": cannot_write(spec, found.config) or None,
        "exported": None,
    }


def _chosen(solved: Mapping[str, Any], candidates: Sequence[Candidate], options: Options) -> Deployment | Candidate:
    """The solution of a budget, or the file of another tool that is better."""
    path = (solved["winner"] or {}).get("path")
    winner = next((one for one in candidates if str(one.path) == path), None)
    return Deployment.from_json(solved["solution"]["deployment"]) if winner is None else winner.fitting(options)


def _export(
    request: SolveRequest, chosen: Deployment | Candidate, bench: Bench, teacher: Teacher, data: Prepared
) -> dict[str, Any]:
    """Writes what was chosen and verifies it in its runtime; a cut student is laid down beside the teacher's text."""
    assert request.out is not None
    with ExitStack() as stack:
        if bench.cut:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".student-", dir=request.cache)))
            save_student(bench.model, teacher.folder, folder)
            teacher = replace(teacher, folder=folder)
        return export(bench, teacher, chosen, request.budgets[0], data, request.out)


def _known(
    documents: Sequence[Mapping[str, Any]],
    options: Sequence[Options],
    teacher: Teacher,
    data: Prepared,
    held_out: Sample,
) -> Iterator[Solved]:
    """What others may be told of the solutions."""
    budgets = {one.budget.memory_bytes: one.budget for one in options}
    for one in documents:
        budget, found = budgets[one["budget"]["memory_bytes"]], one["solution"]
        yield Solved(
            teacher=teacher.name,
            data=data.name,
            budget_bytes=budget.memory_bytes,
            context=budget.context,
            batch=budget.batch,
            on_gpu=on_gpu(budget),
            name=found["name"],
            bytes=found["bytes"],
            kl=found["kl"],
            nll=found["nll"],
            accuracy=found["accuracy"],
            tokens=int(held_out.data.predicted),
        )


def _within_context(request: SolveRequest, spec: ModelSpec) -> SolveRequest:
    """The request with the model's context where nobody asked for one.

    Raises:
        InputError: A context, or sequences, beyond the model's.
    """
    most = spec.max_context
    if request.context_by_default and most < CONTEXT:
        request = replace(request, budgets=tuple(replace(one, context=most) for one in request.budgets))
    if request.budgets[0].context > most:
        raise InputError(f"{request.teacher} has a context of {most} tokens: give --context {most} or less")
    if request.sequence_length > most:
        raise InputError(f"{request.teacher} reads {most} tokens: give --sequence-length {most} or less")
    return request


def _check_fits(options: Sequence[Options]) -> None:
    """Refuses budgets of which none holds even the smallest storage.

    Raises:
        InputError: The model is nothing that llama.cpp holds.
        NothingFitsError: Names the smallest storage and what would hold it.
    """
    first = options[0]
    first.check()
    init, deployment, need = smallest(first)
    largest = max(one.budget.memory_bytes for one in options)
    _, least = replace(first, spec=_shape(init, first.spec)).smallest()
    if not first.fits_file(least.weights_bytes):
        raise NothingFitsError(
            f"nothing fits a file of {format_bytes(first.file_bytes or 0)}: the smallest that is solved for, "
            f"{named(init, deployment)}, has {format_bytes(least.weights_bytes)} of weights; give a --file-size of "
            f"{math.ceil(least.weights_bytes / 1e6)}MB"
        )
    (fit,) = fits(_shape(init, first.spec), (deployment,), first.budget)
    if fit.late and need <= largest:
        raise NothingFitsError(
            f"nothing keeps to the latency: of the smallest that is solved for, {named(init, deployment)}, "
            f"{'; '.join(fit.late)}; raise --latency, or name a faster --device"
        )
    if need > largest:
        raise NothingFitsError(
            f"nothing fits {format_bytes(largest)}: the smallest that is solved for, {named(init, deployment)}, needs "
            f"{format_bytes(need)} at context {first.budget.context}, {format_bytes(need - largest)} more; give a "
            f"--budget of {math.ceil(need / 1e6)}MB, or a shorter --context"
        )


def _shape(init: Init, spec: ModelSpec) -> ModelSpec:
    """The shape of a student; of a model that is in no family its own."""
    return spec if init == WHOLE else cut_spec(init, spec)


def _samples(request: SolveRequest, data: Prepared, bench: Bench) -> tuple[Sample, Sample]:
    train, validation = load_split(data.folder, "train"), load_split(data.folder, "validation")
    check_ids(int(max(train.tokens.max(initial=0), validation.tokens.max(initial=0))), bench.spec.vocabulary, "teacher")
    if train.tokens.size < 2 * request.sequence_length:
        raise InputError(
            f"{request.data} has less than two sequences of {request.sequence_length} tokens: give more text"
        )
    calibration = bench.sample("calibration", train.head(request.tokens))
    return calibration, bench.sample("held-out", validation.head(2 * request.tokens))


def _solved(
    options: Options,
    library: Library,
    bench: Bench,
    shapes: Callable[[], Shapes],
    samples: tuple[Sample, Sample],
    own: Deployment | None,
    candidates: Sequence[Candidate],
    *,
    thorough: bool,
) -> dict[str, Any] | None:
    """The solution for a budget with its rivals and candidates, as plain data; None where nothing fits."""
    calibration, held_out = samples

    def predicted(one: Deployment) -> float:
        return library.predict(one)[0]

    plain = rivals(options, own, options.budget.memory_bytes, predicted)
    near = fitting(plain, options, predicted)
    probe = copying(bench, calibration.data, min(options.budget.context, PROBED))
    forms = best_forms(options, library, shapes, calibration, near, thorough=thorough, probe=probe)
    if not forms:
        return None
    best, *others = forms
    mine = best.scores.joint(best.deployment, held_out)
    lines = [_of_plain(one, options, library, mine, held_out, measured=one.deployment in (*near, own)) for one in plain]
    lines += [_of_form(one, mine, held_out) for one in others]
    tried, winner = _of_candidates(candidates, options, library, bench, samples, best.joint.kl, mine)
    lines += tried
    won = winner and winner["name"]
    return {
        "budget": options.budget.to_json(),
        "solution": {
            "family": best.family,
            "init": best.init.to_json(),
            **_solution(best.options, best.name, best.found, mine),
            "copied": copied(best, probe),
            "teacher_copied": probe.teacher.accuracy,
        },
        "next": _next(Solver(best.options, best.scores, calibration), best.found, options.budget.memory_bytes),
        "rivals": lines,
        "as_good": next((line["name"] for line in lines if _as_good(line) and line["name"] != won), None),
        "winner": winner,
    }


def _of_plain(
    rival: Rival, options: Options, library: Library, mine: Measured, held_out: Sample, *, measured: bool
) -> dict[str, Any]:
    """A plain storage beside the solution."""
    deployment = rival.deployment
    need = options.memory(deployment).total_bytes
    return {
        "what": rival.what,
        "name": deployment.name,
        "deployment": deployment.to_json(),
        "bytes": need,
        "fits": options.fits(deployment),
        "predicted_kl": library.predict(deployment)[0],
        **_beside(mine, library.joint(deployment, held_out) if measured else None),
    }


def _of_form(form: Form, mine: Measured, held_out: Sample) -> dict[str, Any]:
    """The best of another family beside the solution."""
    return {
        "what": form.family,
        "name": form.name,
        "init": form.init.to_json(),
        "deployment": form.deployment.to_json(),
        "bytes": form.bytes,
        "fits": True,
        "predicted_kl": form.found.predicted[0],
        **_beside(mine, form.scores.joint(form.deployment, held_out)),
    }


def _of_candidates(
    candidates: Sequence[Candidate],
    options: Options,
    library: Library,
    bench: Bench,
    samples: tuple[Sample, Sample],
    least: float,
    mine: Measured,
) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
    """Files of other tools beside the solution; and the one that loses less than it on the calibration text, if any.

    Args:
        candidates, options, library, bench, samples: As for `_solved`.
        least: KL of the solution on the calibration text.
        mine: The solution on the held-out text.
    """
    lines, winner = [], None
    for candidate in (one.fitting(options) for one in candidates):
        known, joint = library.kept(
            candidate.key,
            candidate.name,
            samples,
            lambda *texts, one=candidate: bench.measure_weights(one.weights(bench), one.cache_types, texts),
        )
        need = candidate.memory(options)
        takes = need.total_bytes
        fits = takes <= options.budget.memory_bytes and options.fits_file(need.weights_bytes)
        fits = fits and options.in_time(candidate.deployment)
        if fits and known.kl < least:
            least, winner = known.kl, {"name": candidate.name, "path": str(candidate.path)}
        lines.append(
            {
                "what": "candidate",
                "name": candidate.name,
                "path": str(candidate.path),
                "deployment": None if candidate.stored is None else candidate.deployment.to_json(),
                "bytes": takes,
                "fits": fits,
                "predicted_kl": None,
                **_beside(mine, joint),
            }
        )
    return lines, winner


def _beside(mine: Measured, joint: Measured | None) -> dict[str, float | None]:
    """The figures of a rival, and how far its KL is above the solution's."""
    above = None if joint is None else joint.kl_above(mine)
    return {
        **_figures(joint),
        "kl_above_solution": above and above[0],
        "kl_above_solution_stderr": above and above[1],
    }


def _as_good(line: Mapping[str, Any]) -> bool:
    above = line["kl_above_solution"]
    return bool(
        line["what"] not in CUTS
        and line["fits"]
        and above is not None
        and above <= _CLEAR * line["kl_above_solution_stderr"]
    )


def _solution(options: Options, name: str, found: Found, held_out: Measured) -> dict[str, Any]:
    deployment, estimate = found.deployment, options.memory(found.deployment)
    return {
        "name": name,
        "deployment": deployment.to_json(),
        "types": _counted(options, deployment),
        "bytes": estimate.total_bytes,
        "weights_bytes": estimate.weights_bytes,
        "kv_cache_bytes": estimate.kv_cache_bytes,
        "compute_bytes": estimate.compute_bytes,
        "overhead_bytes": estimate.overhead_bytes,
        "left_bytes": options.budget.memory_bytes - estimate.total_bytes,
        "predicted_kl": found.predicted[0],
        "predicted_kl_stderr": found.predicted[1] if math.isfinite(found.predicted[1]) else None,
        "calibration_kl": found.joint.kl,
        "calibration_kl_stderr": found.joint.kl_stderr,
        **_figures(held_out),
    }


def _figures(joint: Measured | None) -> dict[str, float | None]:
    names = ("kl", "kl_stderr", "nll", "nll_stderr", "accuracy", "accuracy_stderr")
    return {name: None if joint is None else getattr(joint, name) for name in names}


def _counted(options: Options, deployment: Deployment) -> dict[str, Any]:
    """The tables' types, the cache's, and how many other matrices have each type."""
    types = options.types(deployment)
    matrices: dict[str, int] = {}
    for name in options.matrices:
        matrices[types[name]] = matrices.get(types[name], 0) + 1
    tables = {name.split(".")[-2]: types[name] for name in options.tables}
    keys, values = deployment.cache_types
    return {"tables": tables, "cache_keys": keys, "cache_values": values, "matrices": matrices}


def _next(solver: Solver, found: Found, limit: int) -> dict[str, Any]:
    """What some more bytes would buy, by the scores alone."""
    here, more = solver.predicted(limit), solver.predicted(limit + _MORE)
    assert here is not None
    assert more is not None
    return {"more_bytes": _MORE, "predicted_kl": more[0], "predicted_gain": max(0.0, here[0] - more[0])}

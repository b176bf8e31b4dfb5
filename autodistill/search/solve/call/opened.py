"""Checks and loads the inputs of a call of solve: teacher, text, candidates, and the scores of earlier calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autodistill.data.dataset import Prepared, TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.data.tokenization import check_ids
from autodistill.distillation.teacher.any_model import is_known, spec_of
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher, text_files
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.solving import COMPENSATION
from autodistill.evaluation.precision import check_scoring_on
from autodistill.export.graphs.onnx import served
from autodistill.export.process_memory import measured_process_bytes
from autodistill.export.tokenizer_check import cannot_cut
from autodistill.export.whole.file import cannot_write
from autodistill.hardware.budget import on_gpu
from autodistill.models.model_folder import read_config, tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.search.solve.bench import Bench, Sample, compute_device, load_bench
from autodistill.search.solve.call.candidates import Candidate, check_candidate, open_candidate
from autodistill.search.solve.call.request import check_fits, options_of, within_context
from autodistill.search.solve.library import library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import Shapes, open_shapes
from autodistill.search.solve.streamed import load_streamed
from autodistill.search.solve_request import SolveRequest
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class Opened:
    """All inputs of solving.

    Attributes:
        request: The request, within the model's context.
        options: The options of each budget.
        teacher: The teacher.
        own: The deployment that has the teacher's own codes, if its file lies on grids of GGUF.
        note: A note on how the teacher's file stores it, or None.
        unwritten: Why no file that is written can hold the teacher; empty if one can.
        candidates: Files that are measured for comparison.
        data: The text, in tokens.
        bench: The teacher, loaded.
        calibration, held_out: Text for choosing, and text for the figures that are reported.
        compensation: Text that error compensation reads; it contains the calibration text.
    """

    request: SolveRequest
    options: list[Options]
    teacher: Teacher
    own: Deployment | None
    note: str | None
    unwritten: str
    candidates: list[Candidate]
    data: Prepared
    bench: Bench
    calibration: Sample
    held_out: Sample
    compensation: TokenSet

    @property
    def _tokens(self) -> tuple[int, ...]:
        request = self.request
        return (request.read_tokens, self.held_out.data.tokens.size, request.sequence_length)

    def library_file(self, options: Options) -> Path:
        """Return the file of the scores of types."""
        request, of = self.request, (self.teacher.fingerprint, self.data.fingerprint)
        return library_file(request.cache, *of, self._tokens, options, request.scoring)

    def shapes(self, notify: Callable[[str], None]) -> Shapes:
        """Return the scores of cuts, with those that are already known."""
        return open_shapes(
            self.request.cache,
            self.bench,
            self.calibration,
            self.teacher.fingerprint,
            self.data,
            self._tokens,
            notify,
        )


def open_request(request: SolveRequest) -> Opened:
    """Check a request, as far as possible before anything is downloaded or converted, and load its inputs.

    Raises:
        InputError, NothingFitsError: As `solve`.
    """
    check_scoring_on(request.scoring, compute_device())
    found = resolve_teacher(request.teacher, trained=False)
    spec = spec_of(found.config)
    request = within_context(request, spec)
    options = options_of(request, spec, found.config)
    in_gguf, own_codes = request.runtime == "llama.cpp", request.runtime != "vllm"
    unwritten = cannot_write(spec, found.config) if in_gguf or not is_known(found.config) else ""
    if request.export and unwritten:
        raise InputError(f"{found.name} is solved and not exported: {unwritten}; leave --export out")
    measured = in_gguf and not on_gpu(options[0].budget)
    try:
        check_fits(options)
    except NothingFitsError:
        # The overhead of llama.cpp's process was predicted. What is measured decides, if the tokenizer is here.
        if not measured or found.path is None:
            raise
        with text_files(found) as folder:
            options = _with_process(options, spec, folder, request.cache)
        check_fits(options)
    candidates = [open_candidate(path, spec) for path in request.candidates]
    source = resolve_data(request.data)
    if source.conversations:
        raise InputError(f"{request.data} holds conversations: solve takes plain text, in which every token counts")
    teacher = materialize(found, request.cache)
    config = read_config(teacher.folder)
    spec = spec_of(config)
    reason = cannot_cut(teacher.folder, spec.vocabulary) if in_gguf else ""
    if reason and (is_known(config) or request.export):
        raise InputError(f"a GGUF file cannot hold this teacher: {reason}")
    if measured and not reason:
        options = _with_process(options, spec, teacher.folder, request.cache)
        spec = options[0].spec
        check_fits(options)
    for candidate in candidates:
        check_candidate(candidate, teacher.folder, spec)
    teacher, stored = stored_as(found, teacher, spec, request.cache) if is_known(config) else (teacher, None)
    own = stored.deployment if stored and stored.deployment and stored.deployment.container == "gguf" else None
    own = (own if in_gguf else served(own)) if own and own_codes else None
    fingerprint = tokenizer_fingerprint(teacher.folder)
    data = prepare(source, teacher.folder, fingerprint, request.sequence_length, request.cache)
    bench = (load_bench if options[0].cuts else load_streamed)(teacher, spec, own, request.scoring)
    train, validation = _texts(request, data, spec)
    calibration = bench.sample("calibration", train.head(request.read_tokens))
    held_out = bench.sample("held-out", validation.head(2 * request.read_tokens))
    if is_known(config) or not unwritten:  # other models are not written, so plain rounding is enough for them
        bench.weigh(calibration.data)
    return Opened(
        request=request,
        options=options,
        teacher=teacher,
        own=own,
        note=stored.note if stored else None,
        unwritten=unwritten or reason or "",
        candidates=candidates,
        data=data,
        bench=bench,
        calibration=calibration,
        held_out=held_out,
        compensation=train.head(COMPENSATION * request.read_tokens),
    )


def _with_process(options: Sequence[Options], spec: ModelSpec, folder: Path, cache: Path) -> list[Options]:
    """Return the options with the measured overhead of llama.cpp's process with the folder's tokenizer."""
    spec = replace(spec, process_bytes=measured_process_bytes(folder, spec.vocabulary, cache))
    return [replace(one, spec=spec) for one in options]


def _texts(request: SolveRequest, data: Prepared, spec: ModelSpec) -> tuple[TokenSet, TokenSet]:
    """Return the text for choosing, and the text for the figures that are reported."""
    train, validation = load_split(data.folder, "train"), load_split(data.folder, "validation")
    check_ids(int(max(train.tokens.max(initial=0), validation.tokens.max(initial=0))), spec.vocabulary, "teacher")
    if train.tokens.size < 2 * request.sequence_length:
        raise InputError(
            f"{request.data} has less than two sequences of {request.sequence_length} tokens: give more text"
        )
    return train, validation

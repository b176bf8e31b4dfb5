"""The solver's part of a search: finds what fits the budget with the least KL, before any plan or training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from autodistill.data.dataset import load_split
from autodistill.distillation.student.check import student_spec
from autodistill.errors import InputError
from autodistill.estimates.block_times import times_within
from autodistill.estimates.fit import cannot_hold, fits
from autodistill.estimates.solving import CUT_SCORES, SolvingWork
from autodistill.estimates.solving_on_gpu import FILE_RATES
from autodistill.evaluation.base import Scoring
from autodistill.hardware.budget import served
from autodistill.search.construction.construction import FEWEST_BITS, FEWEST_BITS_OF_CUT, Construction
from autodistill.search.construction.plain import in_gguf, plain_constructions
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.candidates import candidate_constructions
from autodistill.search.setup.loading import Loaded
from autodistill.search.setup.measure_plan import LONG, time_budget_of
from autodistill.search.solve.bench import Bench, Measured, Sample, copying, load_bench, speeds
from autodistill.search.solve.call.request import work_on
from autodistill.search.solve.cuts import CutScores, whole_allowed
from autodistill.search.solve.disk_limit import mark_used
from autodistill.search.solve.forms import TIGHT, Form, best_forms, plain_cut
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import fitting, nearest, rivals
from autodistill.search.solve.shapes import open_shapes
from autodistill.search.solve.solver import by_block
from autodistill.search.solve.streamed import load_streamed
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE, Strategy
from autodistill.units import format_bytes, format_duration, with_error
from autodistill.utils.file_locks import exclusive

_PROBED = 512  # longest text for the copying test, in tokens
_TOKENS, _MORE_TOKENS = 512, 2048  # tokens of calibration text in a short and in a long time budget
# Scoring cuts takes about as long as so many passes of the sample through the teacher, at so many operations a second
# (a slow core). If that is within this share of the time budget, cuts are considered even for a small loss of the
# teacher.
_PASSES, _OPERATIONS, _LIGHT = 40, 2e10, 0.05
_MOST_OF_TIME = 0.5  # largest share of the time budget that scoring layer by layer may take
_NOT_HELD = "no device holds the teacher in float32"
_ONLY_CUTS = (
    f"{_NOT_HELD}, and with one layer in memory at a time only the whole teacher is scored, which the budget or the "
    "space leaves out"
)
_LITTLE = 0.02  # nats of loss: in a short time budget, training gains more than this in the time of solving


def construct(config: SearchConfig, loaded: Loaded, notify: Callable[[str], None]) -> SearchConfig:
    """Return the settings with the constructions that the solver finds, and a space in which they are choices.

    Args:
        config: Settings with plain constructions, for a space that is solved.
        loaded: Teacher and data.
        notify: Called with messages about progress.
    """
    return construct_each([config], loaded, notify)[0]


def construct_each(
    configs: Sequence[SearchConfig], loaded: Loaded, notify: Callable[[str], None]
) -> list[SearchConfig]:
    """Do the same for several budgets. The teacher is loaded once, its text is read once, and scores are shared.

    Args:
        configs: Settings as for `construct`, which differ only in their budgets.
        loaded: Teacher and data.
        notify: Called with messages about progress.
    """
    made = []
    why_before = ""
    for config, (found, why_not) in zip(configs, solved_constructions(configs, loaded, notify), strict=True):
        if why_not and why_not != why_before:
            notify(f"nothing is solved, and plain storages and shapes are searched: {why_not}")
        why_before = why_not
        plain = found or plain_constructions(loaded.spec, config.declared, config.budget, config.kv_type)
        made.append(config.with_constructions(plain))
    return made


def solved_constructions(
    configs: Sequence[SearchConfig], loaded: Loaded, notify: Callable[[str], None]
) -> list[tuple[tuple[Construction, ...], str]]:
    """Find the solutions within each budget, and the plain storages of the whole teacher that fit, with their KL.

    If none of these has enough bits, a plain cut is added.

    Args:
        configs: The settings of each budget.
        loaded: Teacher and data.
        notify: Called with messages about progress.

    Returns:
        A pair for each budget: the constructions, and the reason in words if nothing can be solved. Then there are no
        constructions.

    Raises:
        InputError: Candidate files are named, but nothing can be solved; or as `candidate_constructions`.
    """
    asked = [_options(config, loaded) for config in configs]
    first = configs[0]
    time_budget = time_budget_of(first, loaded)
    thorough = (first.time_seconds or 0.0) >= LONG
    train = load_split(loaded.data.folder, "train")
    text = train.head(max(_MORE_TOKENS if thorough else _TOKENS, 2 * first.sequence_length))
    possible = next((one for one in asked if isinstance(one, Options)), None)
    if possible and not loaded.teacher_fit.in_float32:
        work = work_on(possible, text.tokens.size, streamed=True, thorough=thorough, held_out=False)
        why_not = _too_much(work, possible, loaded, first.scoring, time_budget, notify)
        asked = [one if isinstance(one, str) else why_not or one for one in asked]
    if all(isinstance(one, str) for one in asked):
        if first.candidates:
            raise InputError(f"--candidate is compared with what is solved, and nothing can be solved: {asked[0]}")
        return [((), str(one)) for one in asked]
    own = loaded.stored.deployment if loaded.stored else None
    own = own if own and own.container == "gguf" and not cannot_hold(loaded.spec, own) else None
    load = load_bench if loaded.teacher_fit.in_float32 else load_streamed
    bench = load(loaded.teacher, loaded.spec, own, first.scoring)
    room = _SharedInputs(
        loaded=loaded,
        bench=bench,
        own=own,
        sample=bench.sample("calibration", text),
        tokens=(text.tokens.size, 0, first.sequence_length),
        thorough=thorough,
        hurried=time_budget is not None and time_budget < LONG,
        light=time_budget is not None and _seconds_of_cuts(loaded, text.tokens.size) <= _LIGHT * time_budget,
        notify=notify,
    )
    found: list[tuple[tuple[Construction, ...], str]] = []
    for config, options in zip(configs, asked, strict=True):
        made = () if isinstance(options, str) else _within(config, options, room)
        found.append((made, options if isinstance(options, str) else "" if made or options.cuts else _ONLY_CUTS))
    return found


@dataclass(frozen=True, kw_only=True)
class _SharedInputs:
    """The inputs of solving that all budgets share.

    Attributes:
        loaded: Teacher and data.
        bench: The teacher in float32, whole or with one layer in memory at a time.
        own: The storage of its own codes, if its file has any.
        sample: The calibration text.
        tokens: Numbers of tokens that identify the file of scores.
        thorough: Whether types are exchanged in the best of each family.
        hurried: Whether the time budget is so short that training may need the time of solving.
        light: Whether the teacher is so small that a training has many tokens for each of its weights. Then cuts are
            considered even for a small loss of the whole teacher, and faster shapes are preferred to slightly better
            ones.
        notify: Called with messages about progress.
    """

    loaded: Loaded
    bench: Bench
    own: Deployment | None
    sample: Sample
    tokens: tuple[int, ...]
    thorough: bool
    hurried: bool
    light: bool
    notify: Callable[[str], None]


def _seconds_of_cuts(loaded: Loaded, tokens: int) -> float:
    """Estimate the seconds that scoring cuts of the teacher takes on so many tokens."""
    return _PASSES * 2 * loaded.spec.parameters * tokens / _OPERATIONS


def _options(config: SearchConfig, loaded: Loaded) -> Options | str:
    """Return the options within a budget, or in words why nothing can be solved."""
    if not in_gguf(config.declared, config.budget):
        return "no deployment of the space is for llama.cpp, and only its types are solved"
    whole = loaded.teacher_fit.in_float32
    if not whole and config.candidates:
        return f"{_NOT_HELD}, and a file is compared with the whole teacher"
    options = Options(
        spec=loaded.spec,
        budget=config.budget,
        cache_type=config.kv_type,
        limits=config.declared.restriction,
        cuts=whole,
        times=times_within(config.cache, config.budget, loaded.spec),
    )
    try:
        options.check()
    except InputError as error:
        return str(error)
    fits = whole_allowed(options) and options.smallest()[1].total_bytes <= config.budget.memory_bytes
    return options if whole or fits else _ONLY_CUTS


def _too_much(
    work: SolvingWork,
    options: Options,
    loaded: Loaded,
    scoring: Scoring,
    time_budget: float | None,
    notify: Callable[[str], None],
) -> str:
    """Return why scoring a teacher with one layer in memory at a time takes too much here.

    If it does not, the user is told what it takes, and the result is "".

    Args:
        work: The work of scoring.
        options: What may be chosen.
        loaded: The teacher.
        scoring: Precision of products.
        time_budget: Seconds of the whole search, or None.
        notify: Called with the message.
    """
    fit = loaded.teacher_fit
    need = format_bytes(work.memory_bytes)
    if work.memory_bytes > fit.limit_bytes:
        return f"{_NOT_HELD}, and one layer at a time takes {need} of {format_bytes(fit.limit_bytes)}"
    rate, rounding = speeds(options.held, scoring)
    stored = (4 if fit.stored == "float32" else 2) * work.weights
    seconds = work.seconds(rate, rounding) - work.operations[CUT_SCORES] / rate
    seconds += work.readings * stored / FILE_RATES["typical"]
    if time_budget is not None and seconds > _MOST_OF_TIME * time_budget:
        return (
            f"{_NOT_HELD}, and one layer at a time takes {format_duration(seconds)}, as predicted, of the "
            f"{format_duration(time_budget)} of the search; with more --time types are solved"
        )
    notify(
        f"{_NOT_HELD}, so types are solved with one layer in memory at a time, in {need} and "
        f"{format_duration(seconds)}, as predicted; cuts are not scored, since that takes the whole teacher"
    )
    return ""


def _within(config: SearchConfig, options: Options, room: _SharedInputs) -> tuple[Construction, ...]:
    """Return the constructions of one budget."""
    budget, bench, sample = config.budget, room.bench, room.sample
    own = room.own if room.own and served((room.own,), budget) else None
    teacher, data = room.loaded.teacher.fingerprint, room.loaded.data
    file = library_file(config.cache, teacher, data.fingerprint, room.tokens, options, config.scoring)
    with exclusive(path := file):
        mark_used(path)
        library = Library(path, bench, options.free, sample, room.notify)
        named = candidate_constructions(config, options, library, bench, sample, room.notify)
        near = _near_enough(options, own, library, sample) if room.hurried else None
        if near is not None and _in_time(near, config):
            loses = with_error(near.kl, near.kl_stderr)
            room.notify(
                f"nothing is solved: {near.deployment.name} fits and loses {loses} nats a token to the teacher; "
                "training gains more in the time that solving takes. With --time 30m or more it is solved anyway"
            )
            return (_of_own_codes(near, own, options), *named)
        library.build()

        def predicted(one: Deployment) -> float:
            return library.predict(one)[0]

        told = rivals(options, own, budget.memory_bytes, predicted) if whole_allowed(options) else ()
        plain = fitting((one for one in told if options.allows(one.deployment)), options, predicted)
        opened = (config.cache, bench, sample, teacher, data, room.tokens, room.notify, room.loaded.moments)
        shapes = cache(lambda: open_shapes(*opened))
        probe = copying(bench, sample.data, min(budget.context, room.loaded.spec.max_context, _PROBED))
        forms = best_forms(
            options,
            library,
            shapes,
            sample,
            plain,
            thorough=room.thorough,
            tight=_LITTLE if room.light else TIGHT,
            level=_LITTLE if room.light else 0.0,
            probe=probe,
        )
        found = [_of(one, one.deployment not in plain) for one in forms]
        solved = {one.deployment for one in forms if one.init == WHOLE}
        beside = (one for one in plain if one not in solved)
        found += [_plain(one, options, library.joint(one, sample), library) for one in beside]
        if not any(one.bits >= FEWEST_BITS for one in plain) and not options.cuts:
            cuts = (one for one in config.constructions if not one.whole)
            found += [one for one in cuts if one.deployment.bits >= FEWEST_BITS_OF_CUT]
        elif not any(one.bits >= FEWEST_BITS for one in plain):
            cut = plain_cut(options, library, shapes, sample, FEWEST_BITS_OF_CUT)
            found += [] if cut is None else [_of(cut, False)]
    made = [_of_own_codes(one, own, options) for one in found]
    return tuple(one for one in (*made, *named) if _in_time(one, config))


def _near_enough(options: Options, own: Deployment | None, library: Library, sample: Sample) -> Construction | None:
    """Return the whole teacher in a plain storage whose loss is too small for a search to pay, or None.

    The storage is measured. No scores are made.
    """
    plain = nearest(options, own) if whole_allowed(options) else None
    if plain is None:
        return None
    found = _plain(plain, options, library.joint(plain, sample))
    return found if found.kl is not None and found.kl <= _LITTLE else None


def _of(form: Form, solved: bool) -> Construction:
    return Construction(
        init=form.init,
        deployment=form.deployment,
        bytes=form.bytes,
        solved=solved,
        kl=form.joint.kl,
        kl_stderr=form.joint.kl_stderr,
        stored_kl=tuple(by_block(form.options, form.scores, form.deployment).items()),
        cut_kl=tuple(form.scores.cuts.items()) if isinstance(form.scores, CutScores) else (),
    )


def _of_own_codes(one: Construction, own: Deployment | None, options: Options) -> Construction:
    """Return the construction with `own_codes` set if its matrices have the teacher's own codes.

    Its tables may be smaller than the teacher's.
    """
    if not one.whole or own is None:
        return one
    types, owned = options.types(one.deployment), options.types(own)
    return replace(one, own_codes=all(types[name] == owned[name] for name in options.matrices))


def _plain(deployment: Deployment, options: Options, joint: Measured, library: Library | None = None) -> Construction:
    """Return the whole teacher in a plain storage, with the costs of its blocks if the library is built."""
    return Construction(
        init=WHOLE,
        deployment=deployment,
        bytes=options.memory(deployment).total_bytes,
        kl=joint.kl,
        kl_stderr=joint.kl_stderr,
        stored_kl=tuple(by_block(options, library, deployment).items()) if library else (),
    )


def _in_time(one: Construction, config: SearchConfig) -> bool:
    """Return whether a construction keeps to the limits of latency by the roofline too, by which a search counts rows.

    The solver may go by times of blocks instead.
    """
    (fit,) = fits(student_spec(Strategy(init=one.init), config.spec), (one.deployment,), config.budget)
    return fit.slack <= 0

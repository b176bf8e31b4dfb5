"""The solver's part of a search: what fits the budget at the least KL, found before anything is planned or trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from autodistill.data.dataset import load_split
from autodistill.distillation.student.check import student_spec
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits
from autodistill.hardware.budget import served
from autodistill.search.construction.construction import Construction
from autodistill.search.construction.plain import in_gguf
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.loading import Loaded
from autodistill.search.solve.bench import Measured, copying, load_bench
from autodistill.search.solve.forms import WHOLE, Form, best_forms, whole_allowed
from autodistill.search.solve.kept import use
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import fitting, rivals
from autodistill.search.solve.shapes import open_shapes
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.file_locks import alone

_PROBED = 512  # tokens of a text that is copied, at the most
_TOKENS, _MORE_TOKENS, _LONG = 512, 2048, 1800.0  # of calibration text; the more in a time budget of so many seconds


def construct(config: SearchConfig, loaded: Loaded, notify: Callable[[str], None]) -> SearchConfig:
    """The settings with the constructions that the solver finds, and the space in which these are choices.

    Args:
        config: With plain constructions, in a space that is solved.
        loaded: Teacher and data.
        notify: Told of what is done.
    """
    found, why_not = solved_constructions(config, loaded, notify)
    if why_not:
        notify(f"nothing is solved, and plain storages and shapes are searched: {why_not}")
    return config.with_constructions(found or config.constructions)


def solved_constructions(
    config: SearchConfig, loaded: Loaded, notify: Callable[[str], None]
) -> tuple[tuple[Construction, ...], str]:
    """What the solver finds within the budget, and the plain storages of the whole teacher that fit, each with its KL.

    Args:
        config: Budget, space and cache.
        loaded: Teacher and data.
        notify: Told of what is done.

    Returns:
        The constructions, none where nothing can be solved; and why not, in words.
    """
    spec, budget = loaded.spec, config.budget
    if not in_gguf(config.declared, budget):
        return (), "no deployment of the space is of llama.cpp, whose types alone are solved"
    if loaded.teacher_fit.held != "float32":
        return (), "memory does not hold the teacher in float32, which it is scored in"
    options = Options(spec=spec, budget=budget, cache_type=config.kv_type, limits=config.declared.restriction)
    try:
        options.check()
    except InputError as error:
        return (), str(error)
    thorough = (config.time_seconds or 0.0) >= _LONG
    train = load_split(loaded.data.folder, "train")
    text = train.head(max(_MORE_TOKENS if thorough else _TOKENS, 2 * config.sequence_length))
    own = loaded.stored.deployment if loaded.stored else None
    own = own if own and own.container == "gguf" and served((own,), budget) and not cannot_hold(spec, own) else None
    bench = load_bench(loaded.teacher, spec, own)
    sample = bench.sample("calibration", text)
    tokens = (text.tokens.size, 0, config.sequence_length)
    teacher, data = loaded.teacher.fingerprint, loaded.data
    with alone(path := library_file(config.cache, teacher, data.fingerprint, tokens, options)):
        use(path)
        library = Library(path, bench, options.free, sample, notify)
        library.build()

        def predicted(one: Deployment) -> float:
            return library.predict(one)[0]

        told = rivals(options, own, budget.memory_bytes, predicted) if whole_allowed(options) else ()
        plain = fitting((one for one in told if options.allows(one.deployment)), options, predicted)
        shapes = partial(open_shapes, config.cache, bench, sample, teacher, data, tokens, notify)
        probe = copying(bench, sample.data, min(budget.context, spec.max_context, _PROBED))
        forms = best_forms(options, library, shapes, sample, plain, thorough=thorough, probe=probe)
        found = [_of(one, one.deployment not in plain) for one in forms]
        solved = {one.deployment for one in forms if one.init == WHOLE}
        beside = (one for one in plain if one not in solved)
        found += [_plain(one, options, library.joint(one, sample)) for one in beside]
    return tuple(one for one in found if _in_time(one, config)), ""


def _of(form: Form, solved: bool) -> Construction:
    return Construction(
        init=form.init,
        deployment=form.deployment,
        bytes=form.bytes,
        solved=solved,
        kl=form.joint.kl,
        kl_stderr=form.joint.kl_stderr,
    )


def _plain(deployment: Deployment, options: Options, joint: Measured) -> Construction:
    return Construction(
        init=WHOLE,
        deployment=deployment,
        bytes=options.memory(deployment).total_bytes,
        kl=joint.kl,
        kl_stderr=joint.kl_stderr,
    )


def _in_time(one: Construction, config: SearchConfig) -> bool:
    """Whether a construction keeps to the limits of latency too, which nothing is solved under."""
    (fit,) = fits(student_spec(Strategy(init=one.init), config.spec), (one.deployment,), config.budget)
    return fit.slack <= 0

"""The solver's part of a search: what fits the budget at the least KL, found before anything is planned or trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autodistill.data.dataset import load_split
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.importance import PartImportance, ensure_importance
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits
from autodistill.hardware.budget import served
from autodistill.search.construction.construction import Construction
from autodistill.search.construction.plain import in_gguf
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.loading import Loaded
from autodistill.search.solve.bench import Bench, Measured, Sample
from autodistill.search.solve.constructions import CUTS, WHOLE, can_cut, constructions
from autodistill.search.solve.constructions import Construction as Solved
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import rivals
from autodistill.search.solve.run import load_bench
from autodistill.search.solve.shapes import Shapes, shapes_file
from autodistill.search.solve.solver import Solver
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.file_locks import alone

_PLAIN = 3  # plain storages that are measured
_TOKENS, _MORE_TOKENS, _LONG = 512, 2048, 1800.0  # of calibration text; the more in a time budget of so many seconds
_NEAR = 0.1  # nats: where the whole teacher fits at less KL, cutting it cannot pay, and no cut is scored


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
    shapes = {one.init for one in found}
    rest = () if found else config.constructions
    return config.with_constructions((*found, *(one for one in rest if one.init not in shapes)))


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
    options = Options(spec=spec, budget=budget, cache_type=config.kv_type)
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
    key = (config.cache, loaded.teacher.fingerprint, loaded.data.fingerprint, tokens)
    with alone(path := library_file(*key, options)):
        library = Library(path, bench, options, sample, notify)
        library.build()
        plain = _plain(options, library, own)
        solution = Solver(options, library, sample).solve(budget.memory_bytes, plain, thorough=thorough)
        found = [
            _of_whole(one, options, library.joint(one, sample), solved=one not in plain)
            for one in dict.fromkeys((*plain, *([solution.deployment] if solution else [])))
        ]
        if can_cut(spec) and (solution is None or solution.joint.kl > _NEAR):
            shapes = _shapes(config, loaded, bench, sample, key, notify)
            cut = constructions(options, library, shapes, sample, families=CUTS, thorough=thorough)
            found += [_of_cut(one) for one in cut]
    return tuple(one for one in found if _in_time(one, config)), ""


def _plain(options: Options, library: Library, own: Deployment | None) -> list[Deployment]:
    """The plain storages of the whole teacher that fit, those of the least predicted KL."""

    def predicted(one: Deployment) -> float:
        return library.predict(one)[0]

    limit = options.budget.memory_bytes
    listed = (one.deployment for one in rivals(options, own, limit, predicted))
    return sorted((one for one in listed if options.memory(one).total_bytes <= limit), key=predicted)[:_PLAIN]


def _of_whole(deployment: Deployment, options: Options, joint: Measured, *, solved: bool) -> Construction:
    return Construction(
        init=WHOLE,
        deployment=deployment,
        bytes=options.memory(deployment).total_bytes,
        solved=solved,
        kl=joint.kl,
        kl_stderr=joint.kl_stderr,
    )


def _of_cut(one: Solved) -> Construction:
    return Construction(
        init=one.init,
        deployment=one.deployment,
        bytes=one.bytes,
        solved=True,
        kl=one.joint.kl,
        kl_stderr=one.joint.kl_stderr,
    )


def _in_time(one: Construction, config: SearchConfig) -> bool:
    """Whether a construction keeps to the limits of latency too, which nothing is solved under."""
    (fit,) = fits(student_spec(Strategy(init=one.init), config.spec), (one.deployment,), config.budget)
    return fit.slack <= 0


def _shapes(
    config: SearchConfig,
    loaded: Loaded,
    bench: Bench,
    sample: Sample,
    key: tuple[Path, str, str, tuple[int, ...]],
    notify: Callable[[str], None],
) -> Shapes:
    """The scores of the teacher's cuts."""
    importance = ensure_importance(
        loaded.load_teacher,
        teacher_fingerprint=loaded.outputs_of,
        data_fingerprint=loaded.data.fingerprint,
        data=load_split(loaded.data.folder, "train"),
        root=config.cache / "calibrations",
        device=loaded.device,
    )
    return Shapes(shapes_file(*key), bench, sample, PartImportance.load(importance), notify)

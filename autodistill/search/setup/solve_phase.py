"""The solver's part of a search: what fits the budget at the least KL, found before anything is planned or trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autodistill.data.dataset import load_split
from autodistill.distillation.teacher.importance import PartImportance, ensure_importance
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits
from autodistill.hardware.budget import served
from autodistill.search.construction.construction import WHOLE, Construction
from autodistill.search.construction.plain import in_gguf
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.loading import Loaded
from autodistill.search.solve.bench import Bench, Sample
from autodistill.search.solve.constructions import Construction as Solved
from autodistill.search.solve.constructions import constructions
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import rivals
from autodistill.search.solve.run import load_bench
from autodistill.search.solve.shapes import Shapes, shapes_file
from autodistill.strategy.deployment import Deployment
from autodistill.utils.file_locks import alone

_PLAIN = 3  # plain storages that are measured
_TOKENS, _MORE_TOKENS, _LONG = 512, 2048, 1800.0  # of calibration text; the more in a time budget of so many seconds
_NEAR = 0.1  # nats: where the whole teacher fits at less KL, cutting it cannot pay, and no cut is scored


def construct(config: SearchConfig, loaded: Loaded, notify: Callable[[str], None]) -> SearchConfig:
    """The settings with the constructions that the solver finds, and the space in which these are choices.

    Args:
        config: With plain constructions.
        loaded: Teacher and data.
        notify: Told of what is done.
    """
    if not config.declared.solved:
        return config
    found, why_not = solved_constructions(config, loaded, notify)
    if why_not:
        notify(f"nothing is solved, and plain storages and shapes are searched: {why_not}")
    shapes = {one.init for one in found}
    rest = () if any(one.solved for one in found) else config.constructions
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
    options = Options(spec=spec, budget=budget)
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
        solved = constructions(
            options, library, _shapes(config, loaded, bench, sample, key, notify),
            sample, families=("whole",), others=plain, thorough=thorough
        )
        found = [_measured(deployment, options, library, sample) for deployment in plain]
        if not solved or solved[0].joint.kl > _NEAR:
            shapes = _shapes(config, loaded, bench, sample, key, notify)
            cut = ("narrow", "layered", "shallow")
            solved = (*solved, *constructions(options, library, shapes, sample, families=cut, thorough=thorough))
    taken = [_of(one) for one in solved if one.deployment not in plain and _fits(options, one)]
    return (*found, *taken), ""


def _shapes(
    config: SearchConfig, loaded: Loaded, bench: Bench, sample: Sample, key: tuple, notify: Callable[[str], None]
) -> Shapes:
    importance = PartImportance.load(
        ensure_importance(
            loaded.load_teacher,
            teacher_fingerprint=loaded.outputs_of,
            data_fingerprint=loaded.data.fingerprint,
            data=load_split(loaded.data.folder, "train"),
            root=config.cache / "calibrations",
            device=loaded.device,
        )
    )
    return Shapes(shapes_file(*key), bench, sample, importance, notify)

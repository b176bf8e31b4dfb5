"""The solver's part of a search: what fits the budget at the least KL, found before anything is planned or trained."""

from __future__ import annotations

from collections.abc import Callable

from autodistill.data.dataset import load_split
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits
from autodistill.hardware.budget import served
from autodistill.search.construction.construction import WHOLE, Construction
from autodistill.search.construction.plain import in_gguf
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.loading import Loaded
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import rivals
from autodistill.search.solve.run import load_bench
from autodistill.search.solve.solver import Solver
from autodistill.strategy.deployment import Deployment
from autodistill.utils.file_locks import alone

_PLAIN = 3  # plain storages that are measured
_TOKENS, _MORE_TOKENS, _LONG = 512, 2048, 1800.0  # of calibration text; the more in a time budget of so many seconds


def solved_constructions(
    config: SearchConfig, loaded: Loaded, notify: Callable[[str], None]
) -> tuple[tuple[Construction, ...], str | None]:
    """What the solver finds for the whole teacher, the plain storages that fit beside it, and their KL.

    Args:
        config: Budget, space and cache.
        loaded: Teacher and data.
        notify: Told of what is done.

    Returns:
        The constructions, none where nothing can be solved or fits; and why not, in a sentence.
    """
    spec, budget = loaded.spec, config.budget
    if not in_gguf(config.declared, budget):
        return (), "no deployment of the space is of llama.cpp, whose types alone are solved"
    if loaded.teacher_fit.held != "float32":
        return (), "memory does not hold the teacher in float32, which its types are solved in"
    options = Options(spec=spec, budget=budget)
    try:
        options.check()
    except InputError as error:
        return (), str(error)
    if options.smallest()[1].total_bytes > budget.memory_bytes:
        return (), None
    train = load_split(loaded.data.folder, "train")
    thorough = (config.time_seconds or 0.0) >= _LONG
    wanted = max(_MORE_TOKENS if thorough else _TOKENS, 2 * config.sequence_length)
    text = train.head(min(wanted, train.tokens.size))
    own = loaded.stored.deployment if loaded.stored else None
    own = own if own and own.container == "gguf" and served((own,), budget) and not cannot_hold(spec, own) else None
    bench = load_bench(loaded.teacher, spec, own)
    sample = bench.sample("calibration", text)
    tokens = (text.tokens.size, 0, config.sequence_length)
    path = library_file(config.cache, loaded.teacher.fingerprint, loaded.data.fingerprint, tokens, options)
    with alone(path):
        library = Library(path, bench, options, sample, notify)
        library.build()

        def predicted(one: Deployment) -> float:
            return library.predict(one)[0]

        listed = rivals(options, own, budget.memory_bytes, predicted)
        plain = [one.deployment for one in listed if _fits(options, one.deployment)]
        plain = sorted(plain, key=predicted)[:_PLAIN]
        solution = Solver(options, library, sample).solve(budget.memory_bytes, plain, thorough=thorough)
        chosen = [*plain, *([solution.deployment] if solution and _fits(options, solution.deployment) else [])]
        found = []
        for deployment in dict.fromkeys(chosen):
            joint = library.joint(deployment, sample)
            found.append(
                Construction(
                    init=WHOLE,
                    deployment=deployment,
                    bytes=options.memory(deployment).total_bytes,
                    solved=deployment not in plain,
                    kl=joint.kl,
                    kl_stderr=joint.kl_stderr,
                )
            )
    return tuple(found), None


def _fits(options: Options, deployment: Deployment) -> bool:
    """Whether a storage keeps to all limits of the budget, those of latency too."""
    (fit,) = fits(options.spec, (deployment,), options.budget)
    return fit.slack <= 0


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
    if why_not is not None:
        notify(f"types by tensor are not solved: {why_not}")
    shapes = {one.init for one in found}
    together = (*found, *(one for one in config.constructions if one.init not in shapes))
    return config.with_constructions(together)

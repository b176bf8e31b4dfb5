"""Plain constructions: the shapes and storages that a person would choose under a budget, without a solver."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autodistill.distillation.student.check import student_spec
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.fit import Fit, Miss, fits, holdable, nearest_miss, smallest
from autodistill.hardware.budget import Budget, served
from autodistill.models.spec import ModelSpec
from autodistill.search.construction.construction import Construction
from autodistill.search.solve import cuts
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import rivals
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import WHOLE, Init, Strategy

SHAPES = (
    WHOLE,
    *(Init(depth=1.0, ffn=ffn) for ffn in (0.7, 0.4, 0.2)),
    *(Init(depth=depth, layers="block-influence") for depth in (0.8, 0.6, 0.5)),
)
"""The whole teacher, and narrower and shallower ones. Every budget is tried with at least these."""


def plain_constructions(
    spec: ModelSpec, space: Space, budget: Budget, kv_type: str | None = None
) -> tuple[Construction, ...]:
    """Return the widest plain storage of each shape within a budget.

    Args:
        spec: The teacher's shape.
        space: The space, whose deployments define the runtimes that may serve the student.
        budget: Budget of the student.
        kv_type: Type of all caches in llama.cpp; None for any.

    Raises:
        InputError: None of the space's deployments can hold any of the shapes.
        NothingFitsError: No shape fits. The message names the smallest one.
    """
    found: list[Construction] = []
    nearest: tuple[Init, Fit] | None = None
    refused: InputError | None = None
    options = Options(spec=spec, budget=budget, cache_type=kv_type, limits=space.restriction)
    cuts.check_shapes(options)
    shapes = _shapes(options)
    for init in dict.fromkeys((*shapes, *_smallest(options, space))):
        if found and init not in shapes:
            break
        try:
            student = student_spec(Strategy(init=init), spec)
        except InputError:
            continue
        try:
            tried = list(_tried(replace(options, spec=student), space))
        except InputError as error:
            refused = refused or error
            continue
        for fit in sorted((fit for fit in tried if fit.slack <= 0), key=lambda fit: -fit.need)[:1]:
            found.append(Construction(init=init, deployment=fit.deployment, bytes=fit.need))
        least = smallest(tried)
        if nearest is None or least.slack < nearest[1].slack:
            nearest = init, least
    if found:
        return tuple(found)
    if nearest is None:
        assert refused is not None
        raise refused
    init, fit = nearest
    miss = nearest_miss((fit,), budget)
    assert miss is not None, "nothing fits"
    among = ", of those that the space allows" if space.restrictions or not space.types_solved else ""
    raise nothing_fits(init, miss, budget, among)


def nothing_fits(init: Init, miss: Miss, budget: Budget, among: str = "", left_out: str = "") -> NothingFitsError:
    """Return the error for a budget that nothing fits.

    Args:
        init: Init of the student with the lowest requirements.
        miss: The limit that it misses, and by how much.
        budget: Budget of the student.
        among: Words for the set in which its requirements are the lowest.
        left_out: The reason, in words, why storages with lower requirements cannot hold this teacher's students.
    """
    remedy = (
        "--latency, or name a faster --device"
        if miss.limit == "latency"
        else "--budget, or lower --context" + (" or the streams (--batch, @streams)" if budget.batch > 1 else "")
    )
    return NothingFitsError(
        f"nothing fits, not even the student with the lowest requirements{among} ({init.describe()}): {miss.text}; "
        f"raise {remedy}{f'. What needs less memory is left out: {left_out}' if left_out else ''}"
    )


def in_gguf(space: Space, budget: Budget) -> bool:
    """Return whether llama.cpp may serve the student. A search solves types only for llama.cpp."""
    return any(one.runtime == "llama.cpp" for one in served(space.deployments, budget))


def _shapes(options: Options) -> tuple[Init, ...]:
    """Return the `SHAPES` that a space allows, and shapes with the fractions that it lists or has as ends of ranges."""
    limits = options.limits
    if limits.inits is not None:
        return limits.inits
    found = [one for one in SHAPES if limits.depth(one.depth) and limits.ffn(one.ffn)]
    for depth in limits.ends("init.depth") or (1.0,):
        for ffn in limits.ends("init.ffn") or (1.0,):
            found.append(Init(depth=depth, ffn=ffn, layers="block-influence" if depth < 1 else "even"))
    return tuple(dict.fromkeys(one for one in found if limits.depth(one.depth) and limits.ffn(one.ffn)))


def _smallest(options: Options, space: Space) -> tuple[Init, ...]:
    """Return the shape of the smallest student that can be solved for. It is used if nothing else fits."""
    try:
        options.check()
    except InputError:
        return ()
    return (cuts.smallest(options)[0],) if in_gguf(space, options.budget) else ()


def _tried(options: Options, space: Space) -> Iterator[Fit]:
    """Yield how the plain storages of a shape fit a budget: those of the space, and in GGUF also with smaller tables.

    Raises:
        InputError: No storage can hold the shape.
    """
    student, budget = options.spec, options.budget
    told = (one for one in served(space.deployments, budget) if options.limits.holds(one.scheme))
    held = list(holdable(student, tuple(told)))
    if in_gguf(space, budget):
        try:
            options.check()
            plain = rivals(options, None, budget.memory_bytes, lambda one: -_bytes(options, one))
            held += [one.deployment for one in plain if options.allows(one.deployment)] + [options.smallest()[0]]
        except InputError:
            pass
    if not held:
        raise InputError(f"no deployment of the space {space.name} can hold the student")
    yield from fits(student, tuple(dict.fromkeys(held)), budget)


def _bytes(options: Options, deployment: Deployment) -> float:
    return float(options.memory(deployment).total_bytes)

"""What a person would take instead of a solution: the teacher's own codes, plain formats, llama.cpp's mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from autodistill.estimates.fit import cannot_hold
from autodistill.quantization.formats import FORMATS
from autodistill.quantization.grids import Grid
from autodistill.search.solve.options import Options, with_cache
from autodistill.strategy.deployment import IN_16_BITS, Deployment

OWN_CODES = "teacher's own codes"
"""What a rival is called, or begins with, that keeps them."""

_MEASURED = 3
_INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
_IN_16_BITS = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
_IN_8_BITS = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
_CACHES = (("f16", "f16"), ("q8_0", "q8_0"))


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A storage that nobody has to search for.

    Attributes:
        what: In words.
        deployment: Which.
    """

    what: str
    deployment: Deployment


def rivals(
    options: Options, own: Deployment | None, limit: int, predict: Callable[[Deployment], float]
) -> tuple[Rival, ...]:
    """The plain storages, the teacher's own first, each once as it is and once as what of it fits a limit best.

    Args:
        options: Of the model and budget.
        own: The deployment that has the teacher's own codes, if its file lies on grids of GGUF.
        limit: Bytes.
        predict: The KL of a deployment.
    """
    found: dict[Deployment, str] = {}
    for what, one in _plain(options, own):
        kind = options.cache_type
        plain = one if kind is None else with_cache(one, (kind, kind))
        found.setdefault(plain, what)
        if options.fits(plain, limit):
            continue
        smaller = [one for one in _smaller(options, plain) if options.fits(one, limit)]
        if smaller:
            found.setdefault(min(smaller, key=predict), f"{what}, smaller table or cache")
    return tuple(Rival(what=what, deployment=deployment) for deployment, what in found.items())


def fitting(plain: Iterable[Rival], options: Options, predict: Callable[[Deployment], float]) -> list[Deployment]:
    """The few plain storages within the budget that are predicted to lose least: those that are measured.

    Args:
        plain: As `rivals` gives them.
        options: Of the model and budget.
        predict: The KL of a deployment.
    """
    held = (one.deployment for one in plain if options.fits(one.deployment))
    return sorted(held, key=predict)[:_MEASURED]


def nearest(options: Options, own: Deployment | None) -> Deployment | None:
    """The plain storage within the budget that loses hardly anything, if there is one, found without any score.

    The teacher's own codes, else 16 bits, else Q8_0: as they are, or with the largest tables that fit, and a cache of 8
    bits where one of 16 does not.

    Args:
        options: Of the model and budget, in llama.cpp.
        own: As of `rivals`.
    """
    for plain in (one for one in (own, _IN_16_BITS, _IN_8_BITS) if one is not None):
        if cannot_hold(options.spec, plain):
            continue
        kind = options.cache_type
        tried = (plain if kind is None else with_cache(plain, (kind, kind)), *_smaller(options, plain))
        held = [one for one in tried if options.fits(one) and options.allows(one)]
        if held:
            return min(held, key=lambda one: (_tables(one, options), -options.memory(one).total_bytes))
    return None


def _tables(deployment: Deployment, options: Options) -> int:
    """The place of its smallest table's type among all types, which have the most bits first."""
    types, order = options.types(deployment), list(options.held)
    return max((order.index(types[name]) for name in options.tables), default=0)


def _plain(options: Options, own: Deployment | None) -> Iterator[tuple[str, Deployment]]:
    if options.runtime == "vllm":
        yield "uniform", replace(IN_16_BITS, runtime="vllm")
        for one in options.held.values():
            if isinstance(one, Grid):
                plain = replace(_INT4, bits=one.bits, group_size=one.group_size, symmetric=one.symmetric)
                if not cannot_hold(options.spec, plain):
                    yield "uniform", plain
        return
    if own is not None:
        yield OWN_CODES, own
    for form in FORMATS.values():
        if form.container != "gguf":
            continue
        (linear,) = form.linears
        grid = (16, 0, True) if isinstance(linear, str) else (linear.bits, linear.group_size, linear.symmetric)
        plain = Deployment(
            runtime=options.runtime, format=form.name, bits=grid[0], group_size=grid[1], symmetric=grid[2]
        )
        if not cannot_hold(options.spec, plain):
            yield "mixture of llama.cpp" if form.mixture else "uniform", plain


def _smaller(options: Options, plain: Deployment) -> Iterator[Deployment]:
    """The same matrices with tables of fewer bits, and with a cache of 8."""
    types = options.types(plain)
    order = list(options.held)
    kinds = [set(options.kinds(tensor)) for tensor in options.tables.values()]
    held = [order.index(types[name]) for name in options.tables]
    for kind in order:
        if all(kind in one for one in kinds) and order.index(kind) >= max(held, default=0):
            for cache_types in _CACHES:
                if cache_types in options.caches:
                    table = dict.fromkeys(options.tables, kind)
                    yield with_cache(options.deployment(types | table, ("f16", "f16")), cache_types)

"""What a person would use instead of a solution: the teacher's own codes, plain formats, llama.cpp's mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from autodistill.estimates.fit import cannot_hold
from autodistill.quantization.formats import FORMATS
from autodistill.quantization.grids import Grid
from autodistill.search.solve.options import Options, with_cache
from autodistill.strategy.deployment import IN_16_BITS, Deployment

OWN_CODES = "teacher's own codes"
"""The name of a rival that keeps these codes, or the beginning of its name."""

_MEASURED = 3
_INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
_IN_16_BITS = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
_IN_8_BITS = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
_CACHES = (("f16", "f16"), ("q8_0", "q8_0"))


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A plain storage that needs no search.

    Attributes:
        what: Its description in words.
        deployment: How it is stored.
    """

    what: str
    deployment: Deployment


def rivals(
    options: Options, own: Deployment | None, limit: int, predict: Callable[[Deployment], float]
) -> tuple[Rival, ...]:
    """Return the plain storages, the teacher's own first.

    A storage that does not fit is followed by its best variant that fits, with a smaller table or cache.

    Args:
        options: The options of the model and budget.
        own: The deployment that has the teacher's own codes, if its file lies on grids of GGUF.
        limit: Memory limit in bytes.
        predict: Returns the predicted KL of a deployment.
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
    """Return the few plain storages that are measured: those within the budget with the least predicted KL.

    Args:
        plain: The storages that `rivals` returns.
        options: The options of the model and budget.
        predict: Returns the predicted KL of a deployment.
    """
    held = (one.deployment for one in plain if options.fits(one.deployment))
    return sorted(held, key=predict)[:_MEASURED]


def nearest(options: Options, own: Deployment | None) -> Deployment | None:
    """Return the plain storage within the budget that loses hardly anything, or None. No scores are needed.

    The teacher's own codes are tried first, then 16 bits, then Q8_0. Each is taken as it is, or with the largest tables
    that fit, and with an 8-bit cache if a 16-bit cache does not fit.

    Args:
        options: The options of the model and budget, in llama.cpp.
        own: As for `rivals`.
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
    """Return the position of the smallest table type of a deployment in the list of types, most bits first."""
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
        (linear, *_) = form.linears
        if form.container != "gguf" or linear == "bf16":  # as large as f16
            continue
        grid = (16, 0, True) if isinstance(linear, str) else (linear.bits, linear.group_size, linear.symmetric)
        plain = Deployment(
            runtime=options.runtime, format=form.name, bits=grid[0], group_size=grid[1], symmetric=grid[2]
        )
        if not cannot_hold(options.spec, plain):
            yield "mixture of llama.cpp" if form.mixture else "uniform", plain


def _smaller(options: Options, plain: Deployment) -> Iterator[Deployment]:
    """Yield the same matrices with tables of at most as many bits, each with a 16-bit and with an 8-bit cache."""
    types = options.types(plain)
    order = list(options.held)
    kinds = [set(options.kinds(tensor)) for tensor in options.tables.values()]
    held = [order.index(types[name]) for name in options.tables]
    for kind in order:
        if all(kind in one for one in kinds) and order.index(kind) >= max(held, default=0):
            stored = options.deployment(types | dict.fromkeys(options.tables, kind), ("f16", "f16"))
            for cache_types in _CACHES:
                if cache_types in options.caches:
                    yield with_cache(stored, cache_types)

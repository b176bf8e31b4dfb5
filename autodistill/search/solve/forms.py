"""Finds the best student of each family of shapes within a budget, with its types, before any training."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from autodistill.quantization.formats import CACHE_BYTES
from autodistill.quantization.grids import Grid
from autodistill.search.solve.bench import Measured, Sample
from autodistill.search.solve.cuts import (
    CutScores,
    grouped,
    layered,
    may_cut,
    named,
    named_cuts,
    narrow,
    shallow,
    storable,
    whole_allowed,
)
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import KEYS, VALUES, Options
from autodistill.search.solve.rivals import fitting, rivals
from autodistill.search.solve.shapes import Shapes
from autodistill.search.solve.solver import Scores, SolvedStorage, Solver
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE, Init

FAMILIES = ("whole", "narrow", "layered", "grouped", "shallow", "named")
"""Families of shapes: the teacher's own; all FFNs equally narrow; each FFN with its own width; fewer groups of heads in
all layers, and all FFNs equally narrow if need be; one block of layers left out; and the shapes that a space names."""

CUTS = FAMILIES[1:]
"""The families of cut shapes."""

TIGHT = 0.1
"""Cuts are considered if the whole teacher loses more nats than this, unless the caller sets another value."""

# Shapes of a family that are measured whole, those with the least sums of scores: with time for it, and in a hurry.
_BEST, _BEST_IN_A_HURRY = 3, 2
_COPIES = 0.3  # a teacher counts as copying if it predicts at least this share of a repeating text
_FORGOTTEN = 0.05  # how much smaller the copied share of the tokens may become
# Nats a token by which a cache may change the teacher on a repeating text. SmolLM2's changes are 0.016 with values in
# Q4_0 and 0.126 with keys in Q4_0. With such keys llama.cpp also chooses other tokens than its simulation in 5 of 100
# clear positions.
_CHANGED = 0.05
_SEEN = 0.002  # a cache is tested on a repeating text if it costs more nats than this on ordinary text
_NEAR = 1.2  # types are exchanged in a family's best if its KL is within this factor of the least: exchanges gain less
_NAMED = 4  # shapes that are measured whole among those that a space names
# A family is not measured if its sums of scores are above this factor times another family's best KL. Sums of scores
# have been within this factor of what is measured.
_HOPELESS = 1.3
_PATIENCE = 2  # failures in a row after which no smaller shapes are tried


@dataclass(frozen=True, kw_only=True)
class Form:
    """A shape with its best storage.

    Attributes:
        family: One of `FAMILIES`.
        init: How the shape is made from the teacher.
        options: The options for its storage.
        scores: The costs of these options.
        found: The best storage.
    """

    family: str
    init: Init
    options: Options
    scores: Scores
    found: SolvedStorage

    @property
    def deployment(self) -> Deployment:
        """The deployment that stores and serves it."""
        return self.found.deployment

    @property
    def joint(self) -> Measured:
        """KL and NLL of the student as it is stored, on the calibration sample."""
        return self.found.joint

    @property
    def bytes(self) -> int:
        """Predicted memory of its process."""
        return self.options.memory(self.deployment).total_bytes

    @property
    def name(self) -> str:
        """Its name; that of the storage if it is the whole teacher."""
        return named(self.init, self.deployment)


def best_forms(
    options: Options,
    library: Library,
    shapes: Callable[[], Shapes],
    sample: Sample,
    others: Sequence[Deployment] = (),
    *,
    thorough: bool = False,
    tight: float = TIGHT,
    level: float = 0.0,
    probe: Sample | None = None,
) -> list[Form]:
    """Return the best student of each family that fits, the least KL to the teacher first.

    Cuts are considered if the whole teacher does not fit or loses much. If the teacher can no longer copy with some
    types of the cache, they are excluded, provided that something else fits.

    Args:
        options: The options of the teacher and the budget.
        library: The teacher's scores, already built.
        shapes: Returns the scores of its cuts; called only if they are needed.
        sample: The calibration text of both.
        others: Further storages of the whole teacher to measure, if they fit.
        thorough: Whether types are exchanged in the best students and in those near it, as in `Solver.solve`, and
            whether cuts are measured even if their scores are far from the best.
        tight: Nats of the whole teacher's loss above which cuts are considered.
        level: Nats above a family's least KL up to which a shape with fewer weights is preferred. It trains faster.
        probe: Text for the copying test, as `bench.copying` makes it; None for no test.
    """
    without = _forgetting(options, library, probe)
    given = (library, shapes, sample, others, thorough, tight, level)
    found = _of_variants(replace(options, without_caches=without), *given)
    if without and not found:  # a student that fits matters more than one that copies
        found = _of_variants(options, *given)
    found = _remembering(found, probe)
    return _remembering(_exchanged(found, sample, others), probe) if thorough and found else found


def with_measured_cut(form: Form, sample: Sample) -> Form:
    """Return the same student. The cost of its cuts in the prediction is measured, instead of a sum over layers."""
    if not isinstance(form.scores, CutScores):
        return form
    scores = form.scores.measured_whole(sample)
    return replace(form, scores=scores, found=replace(form.found, predicted=scores.predict(form.deployment)))


def _remembering(found: Sequence[Form], probe: Sample | None) -> list[Form]:
    """Return the students that still copy, or all students if none does. The least KL comes first."""
    left = [one for one in found if not forgets(one, probe)]
    return sorted(left or found, key=lambda one: one.joint.kl)


def _exchanged(found: Sequence[Form], sample: Sample, others: Sequence[Deployment]) -> list[Form]:
    """Return the same with types exchanged in the best student and those near it. Others could not catch up.

    Args:
        found: The best of each family, the least KL first.
        sample, others: As for `best_forms`.
    """
    made = []
    for one in found:
        if one.joint.kl <= _NEAR * found[0].joint.kl:
            members = [other for other in others if one.init == WHOLE and one.options.fixed in (None, other)]
            solver = Solver(one.options, one.scores, sample)
            better = solver.solve(one.options.budget.memory_bytes, members, thorough=True)
            assert better is not None
            one = replace(one, found=better)
        made.append(one)
    return made


def _of_variants(
    options: Options,
    library: Library,
    shapes: Callable[[], Shapes],
    sample: Sample,
    others: Sequence[Deployment],
    thorough: bool,
    tight: float,
    level: float,
) -> list[Form]:
    """Return the best student of each family, for each storage that a space lists."""
    found: list[Form] = []
    for variant in options.variants():
        whole = None
        if whole_allowed(variant):
            members = [one for one in others if variant.fixed in (None, one)]
            whole = Solver(variant, library, sample).solve(variant.budget.memory_bytes, members, thorough=False)
        if whole:
            found.append(Form(family=FAMILIES[0], init=WHOLE, options=variant, scores=library, found=whole))
        named = variant.limits.inits is not None
        if may_cut(variant) and (named or whole is None or whole.joint.kl > tight):
            found += cut_forms(variant, library, shapes(), sample, thorough=thorough, level=level)
    return found


def _forgetting(options: Options, library: Library, probe: Sample | None) -> frozenset[tuple[str, str]]:
    """Return the pairs of types of keys and values with which the teacher itself copies less from distant tokens.

    The test uses the teacher in 16 bits: low-bit weights copy less with any cache, which says nothing about the cache.
    """
    if probe is None or probe.teacher.accuracy < _COPIES or options.cache_type is not None or options.fixed is not None:
        return frozenset()
    found: set[tuple[str, str]] = set()
    halves = [(kind, "f16") for kind in CACHE_BYTES] + [("f16", kind) for kind in CACHE_BYTES]
    for pair in sorted(options.caches, key=lambda one: one not in halves):
        keys, values = pair
        cost = library.score(KEYS, keys).kl + library.score(VALUES, values).kl
        if {(keys, "f16"), ("f16", values)} & found:
            found.add(pair)
        elif cost > _SEEN:  # a smaller cost does not show in the copying test either
            held = library.joint(_with_cache(pair), probe)
            if held.kl > _CHANGED or _forgotten(held.accuracy, probe):
                found.add(pair)
    return frozenset(found)


def _with_cache(pair: tuple[str, str]) -> Deployment:
    """Return the deployment of the teacher in 16 bits with a pair of cache types."""
    return Deployment(
        runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0, cache_type_k=pair[0], cache_type_v=pair[1]
    )


def _forgotten(accuracy: float, probe: Sample) -> bool:
    return accuracy < probe.teacher.accuracy - _FORGOTTEN


def forgets(form: Form, probe: Sample | None) -> bool:
    """Return whether a student without some layers or heads copies clearly less from distant tokens than the teacher.

    False if the teacher itself does not copy.
    """
    if probe is None or probe.teacher.accuracy < _COPIES:
        return False
    init = form.init
    if not init.dropped and init.depth == 1 and init.heads == 1:
        return False
    return _forgotten(copied(form, probe), probe)


def copied(form: Form, probe: Sample) -> float:
    """Return the share of the probe's tokens that a student copies; measured once and kept."""
    return form.scores.joint(form.deployment, probe).accuracy


def cut_forms(
    options: Options,
    library: Library,
    shapes: Shapes,
    sample: Sample,
    *,
    families: Sequence[str] = CUTS,
    thorough: bool = True,
    level: float = 0.0,
) -> list[Form]:
    """Return the best of each family of cuts, if something of it fits.

    Args:
        options, library, sample: As for `best_forms`.
        shapes: The scores of the cuts; missing ones are made.
        families: Some of `CUTS`.
        thorough: Whether more shapes of each family are measured, and also a family whose sums of scores are far above
            an earlier family's KL.
        level: As for `best_forms`.
    """
    found: list[Form] = []
    limit = options.budget.memory_bytes
    if options.limits.inits is not None:
        return _best("named", [named_cuts(options, library, shapes, sample)], limit, sample, _NAMED)
    given, count = (options, library, shapes), _BEST if thorough else _BEST_IN_A_HURRY
    proposed: dict[str, Iterable[Iterator[CutScores]]] = {
        "narrow": [narrow(*given)],
        "layered": [layered(*given, count)],
        "shallow": [shallow(*given)],
        "grouped": grouped(*given),
    }
    for family, cuts in proposed.items():
        if family in families:
            near = min((_HOPELESS * one.joint.kl for one in found if not thorough), default=math.inf)
            measured = _best(family, cuts, limit, sample, count, near)
            best = [one for one in measured if one.joint.kl <= measured[0].joint.kl + level]
            found += sorted(best, key=lambda one: one.options.spec.parameters)[:1]
    return found


def plain_cut(
    options: Options, library: Library, shapes: Callable[[], Shapes], sample: Sample, bits: int
) -> Form | None:
    """Return the widest cut that fits in a plain storage: what a person would take, without a solver.

    Args:
        options, library, shapes, sample: As for `best_forms`. The cuts have equally narrow FFNs.
        bits: Fewest bits of every matrix.

    Returns:
        The cut, or None if there is none that fits and that the space allows.
    """
    if not may_cut(options) or options.limits.inits is not None:
        return None
    limit = options.budget.memory_bytes
    cuts = [cut for cut in narrow(options, library, shapes()) if storable(cut.options)]

    @cache
    def stored(place: int) -> list[Deployment]:
        """Return the plain storages in which a cut fits, the best by its scores first."""
        cut = cuts[place]

        def predicted(one: Deployment) -> float:
            return cut.predict(one)[0]

        def enough(one: Deployment) -> bool:
            """Return whether a storage is allowed, and all of its matrices have enough bits."""
            held = (cut.options.held[kind] for kind in cut.options.types(one).values())
            return cut.options.allows(one) and all(not isinstance(kind, Grid) or kind.bits >= bits for kind in held)

        plain = rivals(cut.options, None, limit, predicted)
        return fitting((one for one in plain if enough(one.deployment)), cut.options, predicted)

    # The cuts become narrower, so those that do not fit come first.
    place = bisect_left(range(len(cuts)), True, key=lambda one: bool(stored(one)))
    if place == len(cuts):
        return None
    cut, deployment = cuts[place], stored(place)[0]
    found = SolvedStorage(deployment=deployment, predicted=cut.predict(deployment), joint=cut.joint(deployment, sample))
    return Form(family="narrow", init=cut.init, options=cut.options, scores=cut, found=found)


def _best(
    family: str,
    proposed: Iterable[Iterator[CutScores]],
    limit: int,
    sample: Sample,
    count: int,
    near: float = math.inf,
) -> list[Form]:
    """Measure the shapes with the least sums of scores, and return them with the least KL first.

    Args:
        family: Family of the shapes.
        proposed: Sequences of shapes, each in ascending order of the cut's own cost. A sequence is read until that cost
            exceeds the whole sum of an earlier shape several times in a row.
        limit: Bytes.
        sample: The calibration text.
        count: How many shapes are measured.
        near: Sum of scores, in nats, above which a shape is not measured.
    """
    sums: list[tuple[float, CutScores, Solver]] = []
    least = near
    for cuts in proposed:
        vain = 0
        for cut in cuts:
            vain = vain + 1 if cut.cost >= least else 0
            if vain == _PATIENCE:
                break
            if not storable(cut.options):
                continue
            solver = Solver(cut.options, cut, sample)
            found = solver.predicted(limit)
            if found is not None and cut.cost + found[0] <= near:
                sums.append((cut.cost + found[0], cut, solver))
                least = min(least, sums[-1][0])
    measured = []
    for _, cut, solver in sorted(sums, key=lambda one: one[0])[:count]:
        solved = solver.solve(limit, (), thorough=False)
        assert solved is not None
        measured.append(Form(family=family, init=cut.init, options=cut.options, scores=cut, found=solved))
    return sorted(measured, key=lambda one: one.found.joint.kl)

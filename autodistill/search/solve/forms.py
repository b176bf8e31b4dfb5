"""Students within a budget before any training: of each family of shapes the best, with its types, measured whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from autodistill.quantization.formats import CACHE_BYTES
from autodistill.search.solve.bench import Measured, Sample
from autodistill.search.solve.cuts import (
    CutScores,
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
from autodistill.search.solve.shapes import Shapes
from autodistill.search.solve.solver import Found, Scores, Solver
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE, Init

FAMILIES = ("whole", "narrow", "layered", "shallow", "named")
"""Of shapes: the teacher's own, all FFNs as narrow, each FFN as narrow as it may be, one block of layers left out, and
those that a space names."""

CUTS = FAMILIES[1:]
"""The families of those that are not whole."""

TIGHT = 0.1
"""Nats that the whole teacher loses, beyond which cuts are looked at where nobody says how little they take."""

_MEASURED = 2  # shapes of a family that are measured whole
_COPIES = 0.3  # share of a text that repeats itself, from which on a teacher copies
_FORGOTTEN = 0.05  # of its tokens, fewer of which may be copied
# Nats a token by which a cache may change the teacher there: 0.016 with values of SmolLM2 in Q4_0 and 0.126 with keys,
# with which llama.cpp also chooses other tokens than its simulation in 5 of 100 clear positions.
_CHANGED = 0.05
_SEEN = 0.002  # nats that a cache costs on any text, from which on it is tried there
_NEAR = 1.2  # times the least KL, within which types are exchanged in a family's best, which gains less
_NAMED = 4  # of the shapes that a space names
_HOPELESS = 1.3  # times the KL of another family's best: sums of scores have been within that of what is measured
_PATIENCE = 2  # shapes in vain, one after another, after which no smaller ones are asked for


@dataclass(frozen=True, kw_only=True)
class Form:
    """A shape with the best storage of it.

    Attributes:
        family: One of `FAMILIES`.
        init: How it is made.
        options: What may be chosen for it.
        scores: What that costs.
        found: The best.
    """

    family: str
    init: Init
    options: Options
    scores: Scores
    found: Found

    @property
    def deployment(self) -> Deployment:
        """How it is stored and served."""
        return self.found.deployment

    @property
    def joint(self) -> Measured:
        """KL and NLL of the student as it is stored, on the calibration sample."""
        return self.found.joint

    @property
    def bytes(self) -> int:
        """Memory of its process, as predicted."""
        return self.options.memory(self.deployment).total_bytes

    @property
    def name(self) -> str:
        """What it is called: as its storage where it is the whole teacher."""
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
    probe: Sample | None = None,
) -> list[Form]:
    """Return the best student of each family that fits, the least KL to the teacher first.

    Cuts are looked at where the whole teacher does not fit, or loses much. Types of the cache with which the teacher
    cannot copy any more are left out where something else fits.

    Args:
        options: Of the teacher and the budget.
        library: The teacher's, built.
        shapes: Gives the scores of its cuts, once they are asked for.
        sample: The calibration text of both.
        others: Storages of the whole teacher that are members too, where they fit.
        thorough: Whether types are then exchanged in the best, and in those near it, as `Solver.solve` does, and
            whether cuts are measured that by their scores are far from it.
        tight: Nats that the whole teacher loses, beyond which cuts are looked at.
        probe: Text that is copied, as `bench.copying` makes it; None asks for nothing.
    """
    without = _forgetting(options, library, probe)
    found = _of_variants(replace(options, without_caches=without), library, shapes, sample, others, thorough, tight)
    if without and not found:  # what fits is worth more than what remembers
        found = _of_variants(options, library, shapes, sample, others, thorough, tight)
    found = _remembering(found, probe)
    return _remembering(_exchanged(found, sample, others), probe) if thorough and found else found


def _remembering(found: Sequence[Form], probe: Sample | None) -> list[Form]:
    """Return the students that copy, or all if none does, the least KL first."""
    left = [one for one in found if not forgets(one, probe)]
    return sorted(left or found, key=lambda one: one.joint.kl)


def _exchanged(found: Sequence[Form], sample: Sample, others: Sequence[Deployment]) -> list[Form]:
    """Return the same with types exchanged in the best, and in those near it: the others would stay behind.

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
            found += cut_forms(variant, library, shapes(), sample, thorough=thorough)
    return found


def _forgetting(options: Options, library: Library, probe: Sample | None) -> frozenset[tuple[str, str]]:
    """Return the types of keys and values with which the teacher itself copies less of what lies far behind.

    Weights of few bits copy less with any cache, which is not the cache's doing.
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
        elif cost > _SEEN:  # less is not seen by what copies either
            held = library.joint(_with_cache(pair), probe)
            if held.kl > _CHANGED or _forgotten(held.accuracy, probe):
                found.add(pair)
    return frozenset(found)


def _with_cache(pair: tuple[str, str]) -> Deployment:
    """Return the teacher in 16 bits with types of its cache."""
    return Deployment(
        runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0, cache_type_k=pair[0], cache_type_v=pair[1]
    )


def _forgotten(accuracy: float, probe: Sample) -> bool:
    return accuracy < probe.teacher.accuracy - _FORGOTTEN


def forgets(form: Form, probe: Sample | None) -> bool:
    """Return whether a student with layers left out copies clearly less than the teacher does, of what lies far behind.

    A teacher that does not copy says nothing.
    """
    if probe is None or probe.teacher.accuracy < _COPIES:
        return False
    if not form.init.dropped and form.init.depth == 1:
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
) -> list[Form]:
    """Return the best of each family of cuts that has one.

    Args:
        options, library, sample: As for `best_forms`.
        shapes: The scores of the cuts; those that are missing are made.
        families: Which of `CUTS`.
        thorough: Whether a family is also measured whose sums of scores are far above what an earlier one has.
    """
    found: list[Form] = []
    limit = options.budget.memory_bytes
    if options.limits.inits is not None:
        return _best("named", named_cuts(options, library, shapes, sample), limit, sample)
    for family, proposed in (("narrow", narrow), ("layered", layered), ("shallow", shallow)):
        if family in families:
            near = min((_HOPELESS * one.joint.kl for one in found if not thorough), default=math.inf)
            found += _best(family, proposed(options, library, shapes), limit, sample, near)[:1]
    return found


def _best(family: str, proposed: Iterator[CutScores], limit: int, sample: Sample, near: float = math.inf) -> list[Form]:
    """Return the shapes of the least sums of scores, the one of least KL as a whole first.

    Args:
        family: Of the shapes.
        proposed: Shapes that cost more and more by themselves; asked for until that is more than another's all.
        limit: Bytes.
        sample: The calibration text.
        near: Sum of scores, in nats, above which a shape is not measured.
    """
    sums: list[tuple[float, CutScores, Solver]] = []
    least, vain = near, 0
    for cut in proposed:
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
    for _, cut, solver in sorted(sums, key=lambda one: one[0])[: _NAMED if family == "named" else _MEASURED]:
        solved = solver.solve(limit, (), thorough=False)
        assert solved is not None
        measured.append(Form(family=family, init=cut.init, options=cut.options, scores=cut, found=solved))
    return sorted(measured, key=lambda one: one.found.joint.kl)

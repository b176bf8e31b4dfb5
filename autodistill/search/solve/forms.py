"""Students within a budget before any training: of each family of shapes the best, with its types, measured whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from autodistill.distillation.student.shapes import cut_spec, student_depth
from autodistill.errors import InputError
from autodistill.models.families import FAMILIES as MODEL_FAMILIES
from autodistill.models.families import GGUF_BY_LAYER, get_family
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.quantization.formats import CACHE_BYTES
from autodistill.search.solve.bench import Measured, Sample
from autodistill.search.solve.library import Library, Score
from autodistill.search.solve.options import KEYS, VALUES, Options
from autodistill.search.solve.shapes import Shapes, ffn_widths
from autodistill.search.solve.solver import Found, Scores, Solver
from autodistill.search.solve.widths import Widths
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init

FAMILIES = ("whole", "narrow", "layered", "shallow", "named")
"""Of shapes: the teacher's own, all FFNs as narrow, each FFN as narrow as it may be, one block of layers left out, and
those that a space names."""

CUTS = FAMILIES[1:]
"""The families of those that are not whole."""

WHOLE = Init(depth=1.0)
"""How the teacher itself begins."""

_TIGHT = 0.1  # nats that the whole teacher loses, beyond which cuts are looked at
_MEASURED = 2  # shapes of a family that are measured whole
_ROUNDS = 4  # of widths by layer, each of which may have narrower ones measured
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


def can_cut(spec: ModelSpec) -> bool:
    """Whether students are cut from a model of this architecture."""
    return spec.architecture in MODEL_FAMILIES and not spec.experts


def may_cut(options: Options) -> bool:
    """Whether students that are cut are among what may be chosen."""
    return options.cuts and options.runtime == "llama.cpp" and can_cut(options.spec)


def smallest(options: Options) -> tuple[Init, Deployment, int]:
    """The student of the least memory in any family: its shape, its storage, and what it takes.

    Args:
        options: Of the teacher and the budget.

    Raises:
        InputError: A space allows shapes that none of the types that it allows can hold.
    """
    found = [(WHOLE, options)] if whole_allowed(options) else []
    found += [(init, replace(options, spec=cut_spec(init, options.spec))) for init in _extremes(options)]
    sizes = [(init, *cut.smallest()) for init, cut in found if _storable(cut)]
    if not sizes:
        raise InputError("the shapes that the space allows have rows that no type divides that it allows: allow others")
    init, deployment, estimate = min(sizes, key=lambda one: one[2].total_bytes)
    return init, deployment, estimate.total_bytes


def whole_allowed(options: Options) -> bool:
    """Whether the teacher's own shape may be chosen."""
    limits = options.limits
    return WHOLE in limits.inits if limits.inits is not None else limits.depth(1.0) and limits.ffn(1.0)


def _extremes(options: Options) -> list[Init]:
    """Of each family of cuts the shape that needs least."""
    spec, limits = options.spec, options.limits
    if limits.inits is not None:
        return [init for init in limits.inits if init != WHOLE]
    if not may_cut(options):
        return []
    drops, widths = allowed_drops(options), allowed_widths(options)
    found = [_narrowed(widths[-1], spec)] if 0 in drops and widths[-1] < spec.ffn_width else []
    return found + (
        [_dropped(1, drops[-1], widths[-1 if widths[0] < spec.ffn_width else 0], spec)] if drops[-1] else []
    )


def check_shapes(options: Options) -> None:
    """Refuses shapes that a space asks for and this teacher cannot be cut to.

    Raises:
        InputError: Says which.
    """
    for init in options.limits.inits or ():
        cut_spec(init, options.spec)
    if options.limits.inits is None and not can_cut(options.spec):
        if not whole_allowed(options):
            raise InputError("the space asks for a student that is cut, and this model cannot be: allow init.depth 1")
        return
    allowed_drops(options)


def allowed_widths(options: Options) -> tuple[int, ...]:
    """The widths that all FFNs may have, the widest first."""
    spec, limits = options.spec, options.limits
    found = [width for width in ffn_widths(spec.ffn_width) if limits.ffn(width / spec.ffn_width)]
    # Fractions that are listed, and the ends of a range, are rounded to widths as everywhere.
    told = [cut_spec(Init(depth=1.0, ffn=share), spec).ffn_width for share in limits.ends("init.ffn")]
    return tuple(sorted({*found, *told}, reverse=True))


def allowed_drops(options: Options) -> tuple[int, ...]:
    """How many layers may be left out, in one block between the first and the last; the fewest first.

    Raises:
        InputError: So few layers are to be kept that there is no such block.
    """
    layers, limits = options.spec.layers, options.limits
    ends = [layers - student_depth(Init(depth=share), layers) for share in limits.ends("init.depth")]
    counts = [count for count in range(_most_dropped(layers) + 1) if limits.depth((layers - count) / layers)]
    found = sorted({*counts, *(count for count in ends if count == 0 or count <= layers - 2)})
    if not found:
        raise InputError(
            f"init.depth leaves fewer than two of the teacher's {layers} layers, and the first and the last are kept: "
            f"allow {2 / layers:.2g} or more"
        )
    return tuple(found)


def _narrowed(width: int, spec: ModelSpec) -> Init:
    return Init(depth=1.0, ffn=width / spec.ffn_width, repair=True)


def _dropped(first: int, count: int, width: int, spec: ModelSpec) -> Init:
    """Without a block of layers, and with FFNs of a width."""
    init = Init(depth=1.0, dropped=(first, count))
    return init if width == spec.ffn_width else replace(init, ffn=width / spec.ffn_width, repair=True)


def named(init: Init, deployment: Deployment) -> str:
    """What a student in a storage is called: as the storage where it is the whole teacher."""
    return deployment.name if init == WHOLE else f"{deployment.name} ({init.describe()})"


def _most_dropped(layers: int) -> int:
    """How many layers are left out at the most: half of them, and neither the first nor the last."""
    return max(0, min(layers // 2, layers - 2))


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
        """Its KL and NLL as it is stored, on the calibration sample."""
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
    probe: Sample | None = None,
) -> list[Form]:
    """The best student of each family that fits, the least KL to the teacher first.

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
        probe: Text that is copied, as `bench.copying` makes it; None asks for nothing.
    """
    without = _forgetting(options, library, probe)
    found = _of_variants(replace(options, without_caches=without), library, shapes, sample, others, thorough)
    if without and not found:  # what fits is worth more than what remembers
        found = _of_variants(options, library, shapes, sample, others, thorough)
    found = _remembering(found, probe)
    return _remembering(_exchanged(found, sample, others), probe) if thorough and found else found


def _remembering(found: Sequence[Form], probe: Sample | None) -> list[Form]:
    """Those that copy, or all where none does, the least KL first."""
    left = [one for one in found if not forgets(one, probe)]
    return sorted(left or found, key=lambda one: one.joint.kl)


def _exchanged(found: Sequence[Form], sample: Sample, others: Sequence[Deployment]) -> list[Form]:
    """The same with types exchanged in the best, and in those that are near it: all else would stay behind.

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
) -> list[Form]:
    """The best student of each family, for each storage that a space lists."""
    found: list[Form] = []
    for variant in options.variants():
        members = [one for one in others if variant.fixed in (None, one)]
        found += _forms_of(variant, library, shapes, sample, members, thorough)
    return found


def _forgetting(options: Options, library: Library, probe: Sample | None) -> frozenset[tuple[str, str]]:
    """The types of keys and values with which the teacher itself copies worse what lies far behind.

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
    """The teacher in 16 bits with types of its cache."""
    return Deployment(
        runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0, cache_type_k=pair[0], cache_type_v=pair[1]
    )


def _forgotten(accuracy: float, probe: Sample) -> bool:
    return accuracy < probe.teacher.accuracy - _FORGOTTEN


def forgets(form: Form, probe: Sample | None) -> bool:
    """Whether a student with layers left out copies clearly less than the teacher does, of what lies far behind.

    A teacher that does not copy says nothing.
    """
    if probe is None or probe.teacher.accuracy < _COPIES:
        return False
    if not form.init.dropped and form.init.depth == 1:
        return False
    return _forgotten(copied(form, probe), probe)


def copied(form: Form, probe: Sample) -> float:
    """The share of the probe's tokens that a student copies; measured once and kept."""
    return form.scores.joint(form.deployment, probe).accuracy


def _forms_of(
    options: Options,
    library: Library,
    shapes: Callable[[], Shapes],
    sample: Sample,
    others: Sequence[Deployment],
    thorough: bool,
) -> list[Form]:
    """The best student of each family, of options that are no list of storages."""
    whole = None
    if whole_allowed(options):
        whole = Solver(options, library, sample).solve(options.budget.memory_bytes, others, thorough=False)
    found = [Form(family=FAMILIES[0], init=WHOLE, options=options, scores=library, found=whole)] if whole else []
    named = options.limits.inits is not None
    if may_cut(options) and (named or whole is None or whole.joint.kl > _TIGHT):
        found += cut_forms(options, library, shapes(), sample, thorough=thorough)
    return found


def cut_forms(
    options: Options,
    library: Library,
    shapes: Shapes,
    sample: Sample,
    *,
    families: Sequence[str] = CUTS,
    thorough: bool = True,
) -> list[Form]:
    """The best of each family of cuts that has one.

    Args:
        options, library, sample: As for `best_forms`.
        shapes: The scores of the cuts; those that are missing are made.
        families: Which of `CUTS`.
        thorough: Whether a family is also measured whose sums of scores are far above what an earlier one has.
    """
    limit, found = options.budget.memory_bytes, []
    if options.limits.inits is not None:
        return _best("named", _named(options, library, shapes, sample), limit, sample)
    for family, proposed in (("narrow", _narrow), ("layered", _layered), ("shallow", _shallow)):
        if family in families:
            near = min((_HOPELESS * one.joint.kl for one in found if not thorough), default=math.inf)
            found += _best(family, proposed(options, library, shapes), limit, sample, near)[:1]
    return found


@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    """The types that a student's matrices may have: those that the teacher's were scored in.

    Attributes:
        scored: Of each matrix, by the student's name of it.
    """

    scored: Mapping[str, tuple[str, ...]]

    def kinds(self, tensor: TensorSpec) -> tuple[str, ...]:
        """The types whose blocks divide a matrix's rows, the most bits first."""
        return tuple(kind for kind in super().kinds(tensor) if kind in self.scored[tensor.name])


class CutScores:
    """What storages cost a student: the costs of its cuts, and of types the share of the teacher's that is kept.

    Args:
        init: How it is made: FFNs narrower, a block of layers left out, or both.
        teacher: Options of the teacher.
        library: The teacher's.
        shapes: Where the student is made and measured.
        cost: Of the cut, where it was measured as a whole.
    """

    def __init__(
        self, init: Init, teacher: Options, library: Library, shapes: Shapes, cost: Score | None = None
    ) -> None:
        self.init, self._library, self._shapes = init, library, shapes
        layers = shapes.kept_layers(init)
        self._deep = len(layers) / teacher.spec.layers
        spec = cut_spec(init, teacher.spec)
        widths = zip(layers, spec.ffn_by_layer, strict=True)
        self._costs = [cost] if cost else [shapes.ffn(layer, width) for layer, width in widths]
        self._costs += [shapes.span(*init.dropped)] if init.dropped and not cost else []
        tensors = {tensor.name: tensor for tensor in teacher.spec.tensors}
        family = get_family(spec.architecture)
        self._origins: dict[str, tuple[str, float]] = {}
        for tensor in spec.tensors:
            part = family.layer_part(tensor.name)
            origin = tensor.name if part is None else f"{family.body}.layers.{layers[part[0]]}.{part[1]}"
            share = math.prod(tensor.shape) / math.prod(tensors[origin].shape)
            self._origins[tensor.name] = (origin, share)
        scored = {
            name: teacher.free.kinds(tensors[origin])
            for name, (origin, _) in self._origins.items()
            if origin in teacher.matrices or origin in teacher.tables
        }
        given = {field.name: getattr(teacher, field.name) for field in fields(Options)}
        self.options = CutOptions(**given | {"spec": spec, "scored": scored})

    def score(self, name: str, kind: str) -> Score:
        """What it costs to store a matrix, or a half of the cache, as a type."""
        origin, share = (name, self._deep) if name in (KEYS, VALUES) else self._origins[name]
        found = self._library.score(origin, kind)
        return replace(found, kl=share * found.kl, stderr=share * found.stderr, exact=found.exact and share == 1)

    def predict(self, deployment: Deployment) -> tuple[float, float]:
        """The sum of the scores of the cuts and of a deployment, and its standard error with scores independent."""
        keys, values = deployment.cache_types
        chosen = [*self.options.types(deployment).items(), (KEYS, keys), (VALUES, values)]
        scores = [*self._costs, *(self.score(name, kind) for name, kind in chosen)]
        return sum(one.kl for one in scores), math.sqrt(sum(one.stderr**2 for one in scores))

    @property
    def cost(self) -> float:
        """Of the cuts alone, in nats."""
        return sum(one.kl for one in self._costs)

    def joint(self, deployment: Deployment, sample: Sample) -> Measured:
        """What the whole student does on a sample."""
        return self._shapes.joint(self.init, deployment, sample)


def _best(family: str, proposed: Iterator[CutScores], limit: int, sample: Sample, near: float = math.inf) -> list[Form]:
    """The shapes of the least sums of scores, the one of least KL as a whole first.

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
        if not _storable(cut.options):
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


def _storable(options: Options) -> bool:
    """Whether llama.cpp holds a shape in some of the types that may be chosen."""
    try:
        options.check()
    except InputError:
        return False
    return True


def _named(options: Options, library: Library, shapes: Shapes, sample: Sample) -> Iterator[CutScores]:
    """The shapes that a space names and of which some storage fits, the one that costs least by itself first."""
    found = []
    for init in options.limits.inits or ():
        kept = replace(options, spec=cut_spec(init, options.spec))
        if init == WHOLE or not _storable(kept) or not kept.fits(kept.smallest()[0]):
            continue
        found.append(CutScores(init, options, library, shapes, shapes.whole(init, sample)))
    yield from sorted(found, key=lambda one: one.cost)


def _narrow(options: Options, library: Library, shapes: Shapes) -> Iterator[CutScores]:
    """The teacher with all FFNs as narrow, and repaired; the wider ones first."""
    if 0 not in allowed_drops(options):
        return
    shapes.build()
    for width in allowed_widths(options):
        if width < options.spec.ffn_width:
            yield CutScores(_narrowed(width, options.spec), options, library, shapes)


def _layered(options: Options, library: Library, shapes: Shapes) -> Iterator[CutScores]:
    """The teacher with the widths of least cost, where llama.cpp holds layers that differ."""
    allowed = allowed_widths(options)
    by_layer = get_family(options.spec.architecture).gguf in GGUF_BY_LAYER
    if not by_layer or 0 not in allowed_drops(options) or len(allowed) == 1:
        return
    shapes.build()
    widths = None
    for _ in range(_ROUNDS):
        widths = Widths(options, library, shapes, allowed).best(options.budget.memory_bytes)
        # What is narrower than all that was measured is measured before it is relied on.
        beyond = [(layer, width) for layer, width in enumerate(widths or ()) if width < shapes.scored[-1]]
        beyond = [(layer, width) for layer, width in beyond if not shapes.ffn(layer, width).exact]
        if not beyond:
            break
        shapes.measure(beyond)
    if widths is not None and len(set(widths)) > 1:
        yield CutScores(Init(depth=1.0, ffn_widths=widths, repair=True), options, library, shapes)


def _shallow(options: Options, library: Library, shapes: Shapes) -> Iterator[CutScores]:
    """The teacher without a block of layers, for each number of layers the block that costs least; few layers first."""
    spec, widths = options.spec, allowed_widths(options)
    # Both are cut only where a space leaves no FFN whole.
    widths = widths[:1] if widths[0] == spec.ffn_width else widths
    for count, width in product(allowed_drops(options), widths):
        kept = replace(options, spec=cut_spec(_dropped(1, count, width, spec), spec)) if count else options
        if not count or not kept.fits(kept.smallest()[0]):
            continue
        if width < spec.ffn_width:
            shapes.build()
        first, _ = shapes.spans(count)[0]
        yield CutScores(_dropped(first, count, width, spec), options, library, shapes)

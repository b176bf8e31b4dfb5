"""Students that are cut from a teacher: the shapes that a space allows, and the cost of each with its types."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, fields, replace
from itertools import product

from autodistill.distillation.student.shapes import cut_spec, student_depth
from autodistill.errors import InputError
from autodistill.models.families import FAMILIES as MODEL_FAMILIES
from autodistill.models.families import GGUF_BY_LAYER, get_family
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.search.solve.bench import Measured, Sample
from autodistill.search.solve.library import Library, Score
from autodistill.search.solve.options import KEYS, VALUES, Options
from autodistill.search.solve.shapes import Shapes, ffn_widths
from autodistill.search.solve.widths import Widths
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE, Init

_GROUPS = (0.75, 0.5, 0.25)  # shares of the groups of heads that are kept; the possible number next to each is tried
_ROUNDS = 4  # how often widths by layer are solved; after each round, narrower widths may be measured


def can_cut(spec: ModelSpec) -> bool:
    """Return whether students are cut from a model of this architecture."""
    return spec.architecture in MODEL_FAMILIES and not spec.experts


def may_cut(options: Options) -> bool:
    """Return whether cut students may be chosen."""
    return options.cuts and options.runtime != "vllm" and can_cut(options.spec)


def smallest(options: Options) -> tuple[Init, Deployment, int]:
    """Return the student of any family that takes the least memory: its shape, its storage and its bytes.

    Args:
        options: The options of the teacher and the budget.

    Raises:
        InputError: None of the allowed types can hold the shapes that the space allows.
    """
    found = [(WHOLE, options)] if whole_allowed(options) else []
    found += [(init, replace(options, spec=cut_spec(init, options.spec))) for init in _extremes(options)]
    sizes = [(init, *cut.smallest()) for init, cut in found if storable(cut)]
    if not sizes:
        raise InputError("the shapes that the space allows have rows that no type divides that it allows: allow others")
    init, deployment, estimate = min(sizes, key=lambda one: one[2].total_bytes)
    return init, deployment, estimate.total_bytes


def whole_allowed(options: Options) -> bool:
    """Return whether the teacher's own shape may be chosen."""
    limits = options.limits
    if limits.inits is not None:
        return WHOLE in limits.inits
    return limits.depth(1.0) and limits.ffn(1.0) and limits.heads(1.0)


def _extremes(options: Options) -> list[Init]:
    """Return the smallest shape of each family of cuts."""
    spec, limits = options.spec, options.limits
    if limits.inits is not None:
        return [init for init in limits.inits if init != WHOLE]
    if not may_cut(options):
        return []
    drops, widths, heads = allowed_drops(options), allowed_widths(options), limits.heads(1.0)
    found = [_narrowed(widths[-1], spec)] if heads and 0 in drops and widths[-1] < spec.ffn_width else []
    if heads and drops[-1]:
        found.append(_dropped(1, drops[-1], widths[-1 if widths[0] < spec.ffn_width else 0], spec))
    groups = allowed_groups(options) if 0 in drops else ()
    return found + [_grouped(count, widths[-1], spec) for count in groups[-1:]]


def check_shapes(options: Options) -> None:
    """Refuse a space with shapes that this teacher cannot be cut to.

    Raises:
        InputError: The message names the shape.
    """
    for init in options.limits.inits or ():
        cut_spec(init, options.spec)
    if options.limits.inits is None and not can_cut(options.spec):
        if not whole_allowed(options):
            raise InputError(
                "the space asks for a student that is cut, and this model cannot be cut: allow init.depth 1"
            )
        return
    allowed_drops(options)
    if not options.limits.heads(1.0) and not allowed_groups(options):
        for share in options.limits.ends("init.heads"):
            cut_spec(Init(depth=1.0, heads=share), options.spec)
        raise InputError(f"init.heads leaves no number of heads that {options.runtime} supports: allow 1.0 too")


def allowed_widths(options: Options) -> tuple[int, ...]:
    """Return the widths that all FFNs may have, the widest first."""
    spec, limits = options.spec, options.limits
    found = [width for width in ffn_widths(spec.ffn_width, options.multiple) if limits.ffn(width / spec.ffn_width)]
    # Listed fractions and the ends of ranges are rounded to widths as in every student.
    told = [cut_spec(Init(depth=1.0, ffn=share), spec).ffn_width for share in limits.ends("init.ffn")]
    return tuple(sorted({*found, *told}, reverse=True))


def allowed_groups(options: Options) -> tuple[int, ...]:
    """Return how many groups of heads all layers may keep if some are left out, the most first.

    Only numbers are returned for which the family's models and the runtime exist, near a few shares of the teacher's.
    """
    spec, limits = options.spec, options.limits
    # Listed fractions and the ends of ranges are rounded to groups as in every student.
    told = {max(1, round(share * spec.kv_heads)) for share in limits.ends("init.heads")}
    possible = []
    for count in range(spec.kv_heads - 1, 0, -1):
        if limits.heads(count / spec.kv_heads) or count in told:
            with suppress(InputError):
                kept = replace(options, spec=cut_spec(_grouped(count, spec.ffn_width, spec), spec))
                possible += [count] if storable(kept) else []
    if not possible:
        return ()
    near = {min(possible, key=lambda count: abs(count - share * spec.kv_heads)) for share in _GROUPS}
    return tuple(sorted(near | told.intersection(possible), reverse=True))


def allowed_drops(options: Options) -> tuple[int, ...]:
    """Return how many layers may be left out as one block between the first and the last layer, the fewest first.

    Raises:
        InputError: The space keeps so few layers that there is no such block.
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


def _grouped(count: int, width: int, spec: ModelSpec) -> Init:
    """Return the init with fewer groups of heads in all layers, and with FFNs of a width."""
    init = Init(depth=1.0, heads=count / spec.kv_heads, repair=True)
    return init if width == spec.ffn_width else replace(init, ffn=width / spec.ffn_width)


def _dropped(first: int, count: int, width: int, spec: ModelSpec) -> Init:
    """Return the init without a block of layers, and with FFNs of a width."""
    init = Init(depth=1.0, dropped=(first, count))
    return init if width == spec.ffn_width else replace(init, ffn=width / spec.ffn_width, repair=True)


def named(init: Init, deployment: Deployment) -> str:
    """Return the name of a student in a storage: that of the storage if it is the whole teacher."""
    return deployment.name if init == WHOLE else f"{deployment.name} ({init.describe()})"


def _most_dropped(layers: int) -> int:
    """Return the largest number of layers that may be left out: half of them, but neither the first nor the last."""
    return max(0, min(layers // 2, layers - 2))


def storable(options: Options) -> bool:
    """Return whether the runtime can hold a shape in any of the allowed types."""
    try:
        options.check()
    except InputError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    """Options of a cut student: its matrices may have the types in which the teacher's matrices were scored.

    Attributes:
        scored: Scored types of each matrix, by its name in the student.
    """

    scored: Mapping[str, tuple[str, ...]] = field(hash=False)

    def kinds(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Return the scored types whose blocks divide a matrix's rows, the most bits first."""
        return tuple(kind for kind in super().kinds(tensor) if kind in self.scored[tensor.name])


class CutScores:
    """The costs of storages of a cut student.

    They are the costs of its cuts, and the teacher's costs of types in proportion to the share of each matrix that is
    kept.

    Args:
        init: How the student is made: with narrower FFNs, and without groups of heads or a block of layers.
        teacher: Options of the teacher.
        library: Scores of the teacher's types.
        shapes: Scores of cuts; also makes and measures the student.
        cost: Cost of the cut, if it was measured as a whole.
    """

    def __init__(
        self, init: Init, teacher: Options, library: Library, shapes: Shapes, cost: Score | None = None
    ) -> None:
        self.init, self._library, self._shapes = init, library, shapes
        layers = shapes.kept_layers(init)
        spec = cut_spec(init, teacher.spec)
        self._kept_cache_share = len(layers) * spec.kv_heads / (teacher.spec.layers * teacher.spec.kv_heads)
        widths = zip(layers, spec.ffn_by_layer, strict=True)
        found = {"the cut": cost} if cost else {str(i): shapes.ffn(*one) for i, one in enumerate(widths)}
        found |= {"layers left out": shapes.span(*init.dropped)} if init.dropped and not cost else {}
        found |= {"heads left out": shapes.groups(spec.kv_heads)} if init.heads < 1 and not cost else {}
        self._costs: dict[str, Score] = found
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
        """Return the cost of storing a matrix, or the cache's keys or values, as a type."""
        origin, share = (name, self._kept_cache_share) if name in (KEYS, VALUES) else self._origins[name]
        found = self._library.score(origin, kind)
        return replace(found, kl=share * found.kl, stderr=share * found.stderr, exact=found.exact and share == 1)

    def predict(self, deployment: Deployment) -> tuple[float, float]:
        """Return the sum of the scores of cuts and deployment, and its standard error if scores are independent."""
        return Score.sum(self.behind(deployment))

    def behind(self, deployment: Deployment) -> list[Score]:
        """Return the scores of which the prediction for a deployment is the sum."""
        keys, values = deployment.cache_types
        chosen = [*self.options.types(deployment).items(), (KEYS, keys), (VALUES, values)]
        return [*self._costs.values(), *(self.score(name, kind) for name, kind in chosen)]

    def measured_whole(self, sample: Sample) -> CutScores:
        """Return the same scores with all cuts measured together on a sample, because their costs do not add up."""
        made = copy(self)
        made._costs = {"the cut": self._shapes.whole(self.init, sample)}
        return made

    @property
    def cost(self) -> float:
        """Cost of the cuts alone, in nats."""
        return sum(self.cuts.values())

    @property
    def cuts(self) -> Mapping[str, float]:
        """Nats that each cut costs, by the block whose FFN is cut, or by what else is cut."""
        return {name: one.kl for name, one in self._costs.items()}

    def joint(self, deployment: Deployment, sample: Sample) -> Measured:
        """Return the measurement of the whole student on a sample."""
        return self._shapes.joint(self.init, deployment, sample)


def named_cuts(options: Options, library: Library, shapes: Shapes, sample: Sample) -> Iterator[CutScores]:
    """Yield the shapes that a space names and that fit in some storage, the least cost of the cut first."""
    found = []
    for init in options.limits.inits or ():
        kept = replace(options, spec=cut_spec(init, options.spec))
        if init == WHOLE or not storable(kept) or not kept.fits_memory(kept.smallest()[0]):
            continue
        found.append(CutScores(init, options, library, shapes, shapes.whole(init, sample)))
    yield from sorted(found, key=lambda one: one.cost)


def narrow(options: Options, library: Library, shapes: Shapes) -> Iterator[CutScores]:
    """Yield the teacher with all FFNs equally narrow and repaired, the wider ones first."""
    if 0 not in allowed_drops(options) or not options.limits.heads(1.0):
        return
    shapes.build()
    for width in allowed_widths(options):
        if width < options.spec.ffn_width:
            yield CutScores(_narrowed(width, options.spec), options, library, shapes)


def layered(options: Options, library: Library, shapes: Shapes, count: int) -> Iterator[CutScores]:
    """Yield the teacher with the widths by layer of least cost, if llama.cpp supports layers of different widths.

    Args:
        options, library, shapes: As for `narrow`.
        count: Number of choices of widths, the one with the least sum first.
    """
    allowed = allowed_widths(options)
    by_layer = get_family(options.spec.architecture).gguf in GGUF_BY_LAYER
    if not by_layer or 0 not in allowed_drops(options) or len(allowed) == 1 or not options.limits.heads(1.0):
        return
    shapes.build()
    found: list[tuple[int, ...]] = []
    for _ in range(_ROUNDS):
        found = Widths(options, library, shapes, allowed).best(options.budget.memory_bytes, count)
        # Widths below all scored ones are measured before a solution uses them.
        beyond = {(layer, width) for widths in found for layer, width in enumerate(widths)}
        beyond = {(layer, width) for layer, width in beyond if width < shapes.scored[-1]}
        beyond = {(layer, width) for layer, width in beyond if not shapes.ffn(layer, width).exact}
        if not beyond:
            break
        shapes.measure(sorted(beyond))
    for widths in found:
        if len(set(widths)) > 1:
            yield CutScores(Init(depth=1.0, ffn_widths=widths, repair=True), options, library, shapes)


def grouped(options: Options, library: Library, shapes: Shapes) -> Iterator[Iterator[CutScores]]:
    """Yield, for each smaller number of groups of heads, the teacher with FFNs of all widths, the wider ones first."""
    if 0 not in allowed_drops(options):
        return
    for count in allowed_groups(options):
        yield _with_groups(count, options, library, shapes)


def _with_groups(count: int, options: Options, library: Library, shapes: Shapes) -> Iterator[CutScores]:
    for width in allowed_widths(options):
        init = _grouped(count, width, options.spec)
        kept = replace(options, spec=cut_spec(init, options.spec))
        if storable(kept) and kept.fits_memory(kept.smallest()[0]):
            if width < options.spec.ffn_width:
                shapes.build()
            yield CutScores(init, options, library, shapes)


def shallow(options: Options, library: Library, shapes: Shapes) -> Iterator[CutScores]:
    """Yield the teacher without the block of least cost, for each number of layers, small numbers first."""
    spec, widths = options.spec, allowed_widths(options)
    if not options.limits.heads(1.0):
        return
    # FFNs are cut in addition only if the space allows no whole FFN.
    widths = widths[:1] if widths[0] == spec.ffn_width else widths
    for count, width in product(allowed_drops(options), widths):
        kept = replace(options, spec=cut_spec(_dropped(1, count, width, spec), spec)) if count else options
        if not count or not kept.fits_memory(kept.smallest()[0]):
            continue
        if width < spec.ffn_width:
            shapes.build()
        first, _ = shapes.spans(count)[0]
        yield CutScores(_dropped(first, count, width, spec), options, library, shapes)

"""A construction is how a student begins and is stored. This module also makes the space of these choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from autodistill.search.prior.knowledge import RATE
from autodistill.search.prior.prior import Prior
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Dimension, Point, find, look_up
from autodistill.strategy.domains import Range, Value
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import ALL_LAYERS, WHOLE, Finishing, Init, Strategy
from autodistill.units import format_bytes, with_error
from autodistill.utils.plain_dataclass import ToJson, left_out

FEWEST_BITS = 3
"""Fewest bits in which a person would train the whole teacher. In two bits, the small language model ends 0.3 nats
behind its cut in four."""

FEWEST_BITS_OF_CUT = 4
"""Fewest bits in which a person would train a plain cut of the teacher."""

_NOT_TRAINED_ON = "none"  # the label for no finishing
# Numbers whose prior holds regardless of other choices. The prior of temperatures holds only for schedules, and the
# best share of the teacher in the loss depends on how far the text is from the teacher.
_BELIEVED = (RATE, "distillation.alignment.weight")
_LABELS, _TAUGHT = "labels alone", "by its teacher too"
# Endings of the labels of grids whose scales alone are trained, for codes that are found and for codes of a file.
_BY_SCALES, _BY_OWN_SCALES = " by its scales", " by its own scales"
_NEAR = 0.1  # nats of KL below which a student has more to learn from the text than from its teacher
# If training may reach so many tokens, students that are further from their teacher learn more from the text too. With
# a cut of SmolLM2 in 4 bits, labels alone were behind at 6,000 tokens (3.52 nats against 3.48) and ahead at 13,000
# (3.12 against 3.15).
_LONG = 8_192
_FAR = 0.3  # nats: a cut student is not raced if its KL is so much above that of the best


@dataclass(frozen=True, kw_only=True)
class Construction(ToJson):
    """How a student begins and is stored, before anything is trained.

    Attributes:
        init: Its shape and first weights.
        deployment: Its storage, which fits the budget.
        bytes: Predicted memory.
        solved: Whether its types were solved for the budget. If not, it is plain: what a person would choose.
        kl, kl_stderr: KL of the teacher to it on calibration text, in nats a token, and its standard error; None if it
            was not measured.
        own_codes: Whether nothing is rounded, because its weights stay as in the teacher's file or the candidate file.
        stored_kl: Nats that the types of each block, of embeddings, head and cache cost by the solver's scores. Empty
            if it was not scored, as in runs of earlier versions.
        cut_kl: Nats that the cuts of each block cost, or of what else is cut.
    """

    init: Init
    deployment: Deployment
    bytes: int
    solved: bool = False
    kl: float | None = None
    kl_stderr: float | None = None
    own_codes: bool = False
    stored_kl: tuple[tuple[str, float], ...] = left_out((), mapping=True)
    cut_kl: tuple[tuple[str, float], ...] = left_out((), mapping=True)

    @property
    def whole(self) -> bool:
        """Whether it is the whole teacher."""
        return self.init == WHOLE

    @property
    def candidate(self) -> bool:
        """Whether it is a file of the teacher's model that the user named."""
        return self.init.source == "pretrained"

    @property
    def how(self) -> str:
        """How its storage was found, in a word."""
        return "solved" if self.solved else "candidate" if self.candidate else "plain"

    @property
    def near(self) -> bool:
        """Whether it is so near to the teacher that it has little to learn from the teacher on the training text."""
        return (self.whole or self.candidate) and self.kl is not None and self.kl < _NEAR

    def finishings(self, many: bool = False) -> dict[str, Finishing | None]:
        """Return how it may be trained on its grid, by the names of a space, with the best known way first.

        In few steps, training scales alone gains more than training weights, if the codes are rounded with error
        compensation. This is true of cut students too. The teacher's own codes have no rounding errors, and are also
        kept in many steps.

        Args:
            many: Whether a training has many tokens per weight (`Prior.many`).
        """
        scheme = self.deployment.scheme
        # Only grids with fewer bits are trained on. Matrices with types of their own, like a table, are rounded last.
        if scheme.bits == 16:
            return {_NOT_TRAINED_ON: None}
        weights = Finishing(**asdict(scheme))
        if not weights.scalable:
            return {scheme.name: weights}
        if self.own_codes:
            return {f"{scheme.name}{_BY_OWN_SCALES}": replace(weights, scales="alone"), scheme.name: weights}
        by_scales = replace(weights, scales="alone", rounding="compensated")
        found: dict[str, Finishing | None] = {f"{scheme.name}{_BY_SCALES}": by_scales, scheme.name: weights}
        return dict(reversed(found.items())) if many else found

    def describe(self) -> str:
        """Describe the student, its memory and its loss in one line for the user."""
        said = f"{label(self)} as {self.deployment.name}, {self.how}"
        if self.kl is None:
            return f"{said}, {format_bytes(self.bytes)}"
        kl = with_error(self.kl, self.kl_stderr)
        return f"{said}, {format_bytes(self.bytes)}: {kl} nats a token from the teacher, untrained"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        parts = {"init": Init.from_json(data["init"]), "deployment": Deployment.from_json(data["deployment"])}
        costs = {name: tuple(data[name].items()) for name in ("stored_kl", "cut_kl") if name in data}
        return cls(**{**data, **parts, **costs})


def arms(constructions: Sequence[Construction]) -> tuple[Construction, ...]:
    """Return the constructions that a search races, the least KL first. A short time budget trains only the first.

    One of them is "no search": the whole teacher in the best plain storage that fits, or the best plain cut if no plain
    storage of the whole teacher with at least `FEWEST_BITS` fits. The others are the best solution of each shape and
    the candidate files, unless their KL is far above the best.
    """
    plain = min((one for one in constructions if not (one.solved or one.candidate)), key=_order, default=None)
    best: dict[Init, Construction] = {}
    # If nothing could be scored, plain cuts are raced in addition to the whole teacher.
    unknown = all(one.kl is None for one in constructions)
    for one in sorted((one for one in constructions if one.solved or one.candidate or unknown), key=_order):
        best.setdefault(one.init, one)
    others = list(best.values())
    known = [one.kl for one in (plain, *others) if one is not None and one.kl is not None]
    near = [one for one in others if one.kl is None or one.kl <= min(known) + _FAR]
    raced = dict.fromkeys(one for one in (plain, *near) if one is not None)
    return tuple(sorted(raced, key=lambda one: (one.kl is None, one.kl or 0.0)))


def _order(one: Construction) -> tuple[bool, bool, bool, float, int]:
    """Return the sort key: enough bits, then the whole teacher, then known KLs in ascending order, then larger ones."""
    few = one.deployment.bits < FEWEST_BITS
    return (few, not one.whole, one.kl is None, one.kl or 0.0, -one.bytes)


def with_constructions(
    declared: Space, constructions: Sequence[Construction], prior: Prior, *, general: bool = False
) -> Space:
    """Return the space whose `init` and `finishing` are those of constructions, and whose starts are a race's arms.

    Args:
        declared: A space that leaves both to the solver.
        constructions: At least one construction.
        prior: The recipe that students are trained with by default, and how far other recipes may be from it. The
            space's own values take precedence.
        general: Whether a student that forgets general text is not exported.
    """
    recipe, many = prior.recipe, prior.many
    raced = arms(constructions)
    inits = {label(one): one.init.to_json() for one in raced}
    # If the space declares how training ends on a grid, this is a dimension of its own.
    ending = declared.restriction.training
    grids = {name: grid and grid.to_json() for one in raced for name, grid in _finishings(one, ending, many).items()}
    for grid, one in product(grids.values(), ending):
        (grid or {}).pop(one.path.rpartition(".")[2], None)
    trained = tuple(name for name, grid in grids.items() if grid is not None)
    dimensions = (
        Dimension.from_json("init", {"choices": inits}),
        Dimension.from_json("finishing", {"choices": grids}),
        *(replace(one, when={"finishing": trained}) for one in ending if trained),
        *(
            Dimension.from_json(f"distillation.{name}", {"choices": [getattr(recipe, name)]})
            for name in ("signal", "signal_tokens", *(("train_embeddings",) if many else ()))
            if not any(f"distillation.{name}".startswith(one.path) for one in declared.dimensions)
        ),
        *(_near(one, prior) for one in declared.dimensions),
    )
    deployments = dict.fromkeys((*(one.deployment for one in constructions), *declared.deployments))
    made = replace(
        declared,
        dimensions=dimensions,
        deployments=tuple(deployments),
        solved=False,
        restrictions=(),
        types_solved=False,
        narrowed_from=declared.hash,
    )
    # The first control of a distillation is the same student without its teacher, which adds nothing new on known text.
    alone = replace(recipe, divergence_weight=0.0)
    free = not _start(made, raced[0], alone, many).distillation.weighs_teacher
    long, drifts = prior.tokens >= _LONG, many and general
    starts = {
        _name(one, raced): _start(made, one, alone if free and not drifts and (one.near or long) else recipe, many)
        for one in raced
    }
    # In the few steps of a race, learning from the teacher leads, even if a long training would show the opposite.
    if free and not long:
        first, *others = starts.items()
        control = (_TAUGHT, recipe) if raced[0].near else (_LABELS, alone)
        starts = dict([first, (control[0], _start(made, raced[0], control[1], many)), *others])
    return replace(made, starts=starts)


def _start(space: Space, one: Construction, recipe: Distillation, many: bool) -> Strategy:
    """Return the strategy of a construction that is nearest to a recipe."""
    data = Strategy(distillation=recipe).to_json()
    ending = [found for found in space.dimensions if found.path.startswith("finishing.")]
    finishing = next(iter(_finishings(one, ending, many)))
    return space.strategy(_nearest(space, data, {"init": label(one), "finishing": finishing}))


def _near(dimension: Dimension, prior: Prior) -> Dimension:
    """Return a dimension with its range limited to the prior's, if the two ranges overlap."""
    domain = dimension.domain
    believed = prior.numbers.get(dimension.path) if dimension.path in _BELIEVED else None
    if believed is None or not isinstance(domain, Range) or domain.step is not None:
        return dimension
    low, high = max(domain.low, believed.low), min(domain.high, believed.high)
    return replace(dimension, domain=replace(domain, low=low, high=high)) if low < high else dimension


def _finishings(one: Construction, ending: Sequence[Dimension], many: bool) -> dict[str, Finishing | None]:
    """Return how a construction may be trained on its grid, if the dimensions `ending` declare how training ends."""
    found = one.finishings(many)
    return {name: grid for name, grid in found.items() if not (ending and grid and grid.scales == "alone")}


def label(one: Construction) -> str:
    """Return the name of a shape, or of a candidate file, among the choices of a space."""
    if one.whole:
        return "whole"
    if one.candidate:
        return Path(one.init.model).name
    return one.init.describe().removeprefix(f"{ALL_LAYERS} ").replace(" ", "-")


def _name(one: Construction, raced: Sequence[Construction]) -> str:
    plain = next((other for other in raced if not (other.solved or other.candidate)), None)
    return "no search" if one is plain else f"{one.how} {label(one)}"


def _nearest(space: Space, data: Mapping[str, Any], fixed: Mapping[str, Value]) -> Point:
    """Return the point with fixed values, and in other dimensions the values nearest to a strategy's plain data."""
    point: Point = {}
    for dimension in space.dimensions:
        if not dimension.active(point):
            continue
        if dimension.path in fixed:
            point[dimension.path] = fixed[dimension.path]
            continue
        wanted = look_up(data, dimension.path)
        domain = dimension.domain
        if isinstance(domain, Range) and isinstance(wanted, int | float):
            point[dimension.path] = domain.snap(min(max(float(wanted), domain.low), domain.high))
        else:
            found = find(domain, wanted)
            point[dimension.path] = domain.at(0.0) if found is None else found
    return point

"""What trained students teach about recipes: their rows become evidence, which makes beliefs surer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.models.config import spec_from_config
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.prior.knowledge import CHOICES, LAW, RATE, UNITS, Belief, Knowledge, covariates
from autodistill.strategy.recipe import Distillation, OnPolicy
from autodistill.strategy.strategy import Strategy

# Nats of a figure that the model does not explain, at least, and as a share of how far a student is behind its group's
# best: of what lies far off nothing is said but that it is worse.
_NOISE, _FAR = 0.02, 0.25
# Of the logarithm of all costs, from teacher to teacher.
_SCALE = 0.7


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One trained student.

    Attributes:
        teacher: Teacher and text; students of one name are of the same.
        group: Students of one name differ in their recipe alone: one teacher, text, shape, deployment and length.
        architecture: transformers' `model_type`.
        width, batch, steps: The student's width, tokens of an optimiser step, and steps.
        cut: Whether the student is smaller than the teacher.
        recipe: How it was trained.
        nll: Nats per held-out token.
    """

    teacher: str
    group: str
    architecture: str
    width: int
    batch: int
    steps: int
    cut: bool
    recipe: Distillation
    nll: float

    @property
    def covariates(self) -> dict[str, float]:
        """What the beliefs of `LAW` are multiplied by, in a sum that is the decimal logarithm of the best rate."""
        return covariates(width=self.width, batch=self.batch, steps=self.steps, cut=self.cut)


def evidence_of(rows: Sequence[Row], *, batch: int, teacher: str, name: str) -> tuple[Evidence, ...]:
    """Return what the rows of one leaderboard tell, of each student under one deployment.

    Rows of untrained students, of the test split, and of students that were not made of the teacher tell nothing here.

    Args:
        rows: Of one run.
        batch: Tokens of an optimiser step.
        teacher: Teacher and text.
        name: Of the run.
    """
    found: dict[tuple[str, int], Evidence] = {}
    for row in rows:
        strategy, tokens = row.strategy, row.train_tokens
        if row.kind not in DISTILLED or row.split != "validation" or strategy is None or row.shape is None:
            continue
        if not tokens or tokens < batch or not row.perplexity or strategy.init.source != "teacher":
            continue
        spec, shape = spec_from_config(row.shape), strategy.init.describe()
        told = Evidence(
            teacher=teacher,
            group=f"{name}, {shape}, {row.deployment_name}, {tokens} tokens, seed {row.seed}",
            architecture=spec.architecture,
            width=spec.width,
            batch=batch,
            steps=tokens // batch,
            cut=is_cut(strategy),
            recipe=strategy.distillation,
            nll=math.log(row.perplexity),
        )
        found.setdefault((row.trial, tokens), told)
    return tuple(found.values())


def evidence_of_run(run: RunFolder, teacher: str) -> tuple[Evidence, ...]:
    """Return what a run tells, finished or not: its students at every rung.

    Args:
        run: On disk.
        teacher: Teacher and text.

    Raises:
        InputError: A log or settings that cannot be read.
    """
    asked = run.asked("plan.batch_tokens")
    rows: dict[tuple[str, int | None], Row] = {}
    for event in run.events.read():
        if event["event"] == "row":
            row = Row.from_json(event["row"])
            rows[row.row_id, row.train_tokens] = row
    return evidence_of(list(rows.values()), batch=asked["plan"]["batch_tokens"], teacher=teacher, name=run.name)


def is_cut(strategy: Strategy) -> bool:
    """Whether a student is smaller than its teacher."""
    init = strategy.init
    return (init.depth, init.ffn, init.heads, init.width) != (1, 1, 1, 1)


def number(recipe: Distillation, path: str) -> float | None:
    """Return a number of a recipe on the scale on which it is believed in; None where the recipe has none."""
    temperature, alignment = recipe.temperature, recipe.alignment
    if path == RATE:
        return math.log10(recipe.learning_rate)
    if path == "distillation.divergence_weight":
        return recipe.divergence_weight
    if path == "distillation.alignment.weight":
        return math.log10(alignment.weight) if alignment else None
    if not recipe.weighs_teacher or temperature.shape == "constant":
        return None
    return math.log10(temperature.start if path == "distillation.temperature.start" else temperature.end)


def chosen(recipe: Distillation, path: str) -> str | None:
    """Return the name of a recipe's choice, as `CHOICES` has it; None where it is none of them."""
    alignment = recipe.alignment
    if path == "distillation.on_policy":
        return {None: "none", OnPolicy(): "half"}.get(recipe.on_policy)
    if path == "distillation.temperature.shape":
        return recipe.temperature.shape if recipe.weighs_teacher else None
    if path == "distillation.alignment.projection":
        found = alignment.projection if alignment else None
    else:
        found = alignment.name if alignment else "none"
    return found if found in CHOICES[path] else None


def known(recipe: Distillation) -> bool:
    """Whether the beliefs say what a recipe costs: its losses are those that they know."""
    alignment = recipe.alignment
    aligned = alignment is None or (
        alignment.distance == "cosine"
        and not alignment.balance
        and all(chosen(recipe, path) for path in CHOICES if path.startswith("distillation.alignment"))
    )
    phased = chosen(recipe, "distillation.on_policy") is not None
    constant = not recipe.weighs_teacher or recipe.temperature.shape != "constant" or recipe.temperature.start == 1
    return (
        recipe.divergence == "forward_kl" and not (recipe.attention or recipe.lora) and aligned and constant and phased
    )


def telling(evidence: Iterable[Evidence]) -> list[Evidence]:
    """Return the students that say something: of known losses, in groups of several recipes."""
    groups: dict[str, list[Evidence]] = {}
    for one in evidence:
        if known(one.recipe) and math.isfinite(one.nll):
            groups.setdefault(one.group, []).append(one)
    return [one for group in groups.values() if len({each.recipe for each in group}) > 1 for one in group]


def updated(
    knowledge: Knowledge, evidence: Iterable[Evidence], *, own: bool, made: Mapping[str, Any] | None = None
) -> Knowledge:
    """Return what is believed after some trained students.

    A student's nats are those of its group, and of each number the cost of its distance from the best one: cost times
    the square of the distance in units; and of each choice its own. Each teacher has its own best values about the
    common ones, and its own scale of the costs. The most likely values under the beliefs before, with standard
    deviations by the curvature there (Laplace's approximation). Groups in which all recipes are the same, and recipes
    with other losses, say nothing.

    Args:
        knowledge: The beliefs before.
        evidence: Students.
        own: Whether they are of the very teacher and text that the knowledge is to be used for, as those of a warm
            start are: then its beliefs are of that teacher alone afterwards.
        made: What the result says of where it comes from; by default as before.
    """
    used = telling(evidence)
    knowledge = replace(knowledge, made=knowledge.made if made is None else made)
    if not used:
        return knowledge
    if own:
        knowledge = _of_one_teacher(knowledge)
    families = {one.architecture for one in used}
    before = {**knowledge.beliefs, **{f"family {one}": knowledge.family(one) for one in sorted(families)}}
    teachers = () if own else sorted({one.teacher for one in used})
    nuisance = {
        **{f"{path} of {one}": Belief(mean=0.0, sd=knowledge.between[path]) for one in teachers for path in UNITS},
        **{f"scale of {one}": Belief(mean=0.0, sd=_SCALE) for one in teachers},
    }
    every = before | nuisance
    order = list(every)
    mean, sd = (np.array([getattr(every[name], part) for name in order]) for part in ("mean", "sd"))
    model = _Model(used, order)

    def loss(point: npt.NDArray[np.float64]) -> float:
        return model.loss(mean + sd * point) + float(point @ point) / 2

    from scipy.optimize import minimize

    point = minimize(loss, np.zeros(len(order)), method="L-BFGS-B", options={"maxfun": 10**6}).x
    covariance = np.linalg.inv(_curvature(loss, point))
    found = {
        name: Belief(mean=float(mean[i] + sd[i] * point[i]), sd=float(sd[i] * math.sqrt(covariance[i, i])))
        for i, name in enumerate(order)
        if name in before
    }
    return replace(knowledge, beliefs=found)


def _of_one_teacher(knowledge: Knowledge) -> Knowledge:
    """Return the beliefs of a teacher that nothing is known of yet: it may differ from others."""
    wider = {
        name: replace(belief, sd=math.hypot(belief.sd, knowledge.between.get(RATE if name == LAW[0] else name, 0.0)))
        for name, belief in knowledge.beliefs.items()
    }
    return replace(knowledge, beliefs=wider, between=dict.fromkeys(knowledge.between, 0.0))


class _Model:
    """What the beliefs predict of students, and how unlikely those make the beliefs.

    Args:
        evidence: Students.
        order: Names of the beliefs.
    """

    def __init__(self, evidence: Sequence[Evidence], order: Sequence[str]) -> None:
        place = {name: index for index, name in enumerate(order)}
        _, self._group = np.unique([one.group for one in evidence], return_inverse=True)
        self._nll = np.array([one.nll for one in evidence])
        best = np.full(self._group.max() + 1, math.inf)
        np.minimum.at(best, self._group, self._nll)
        self._weight = 1 / (_NOISE**2 + (_FAR * (self._nll - best[self._group])) ** 2)
        # Of each number the value, 0 where there is none, whether there is one, and what its best value is a sum of.
        self._numbers = []
        for path, unit in UNITS.items():
            values = [number(one.recipe, path) for one in evidence]
            design = np.zeros((len(evidence), len(order)))
            for row, one in enumerate(evidence):
                terms = {**one.covariates, f"family {one.architecture}": 1.0} if path == RATE else {path: 1.0}
                for name, factor in (terms | {f"{path} of {one.teacher}": 1.0}).items():
                    if name in place:
                        design[row, place[name]] = factor
            has = np.array([value is not None for value in values], float)
            told = np.array([0.0 if value is None else value for value in values])
            self._numbers.append((told, has / unit, design, place[f"cost {path}"]))
        self._scales = np.zeros((len(evidence), len(order)))
        self._choices = np.zeros((len(evidence), len(order)))
        for row, one in enumerate(evidence):
            if (scale := f"scale of {one.teacher}") in place:
                self._scales[row, place[scale]] = 1.0
            for path in CHOICES:
                name = f"{'cut' if one.cut else 'whole'} {path}={chosen(one.recipe, path)}"
                if name in place:
                    self._choices[row, place[name]] = 1.0

    def loss(self, values: npt.NDArray[np.float64]) -> float:
        """Half the weighted squares of what is not explained, each group about its own mean."""
        predicted = self._choices @ values
        for told, has, design, cost in self._numbers:
            predicted = predicted + math.exp(values[cost]) * (has * (told - design @ values)) ** 2
        rest = self._nll - predicted * np.exp(self._scales @ values)
        sums, weights = (np.bincount(self._group, part) for part in (self._weight * rest, self._weight))
        rest = rest - (sums / weights)[self._group]
        return float((self._weight * rest**2).sum() / 2)


def _curvature(loss: Any, point: npt.NDArray[np.float64], step: float = 0.02) -> npt.NDArray[np.float64]:
    """Second derivatives by differences, no direction flatter than the beliefs before make it."""
    size = len(point)
    moves = np.eye(size) * step
    at = loss(point)
    single = [loss(point + move) for move in moves]
    found = np.zeros((size, size))
    for i in range(size):
        found[i, i] = (single[i] - 2 * at + loss(point - moves[i])) / step**2
        for j in range(i):
            both = loss(point + moves[i] + moves[j])
            found[i, j] = found[j, i] = (both - single[i] - single[j] + at) / step**2
    values, vectors = np.linalg.eigh(found)
    return (vectors * np.maximum(values, 1.0)) @ vectors.T

"""Evidence about recipes from trained students. Their rows make the beliefs about recipes more certain."""

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

# Standard deviation of a figure around the model, in nats: at least this, plus this share of a student's distance from
# its group's best. So a student that is far off only tells that its recipe is worse.
_NOISE, _FAR = 0.02, 0.25
# Standard deviation of the logarithm of all costs, between teachers.
_SCALE = 0.7


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One trained student.

    Attributes:
        teacher: Teacher and text. Students with the same name share both.
        group: Students of one group share teacher, text, shape, deployment and length, and differ only in their recipe.
        architecture: transformers' `model_type`.
        width, batch, steps: The student's width, tokens of an optimiser step, and steps.
        cut: Whether the student is smaller than its teacher.
        recipe: The recipe that trained it.
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
        """The factors of the beliefs of `LAW`. The sum of the products is the log10 of the best learning rate."""
        return covariates(width=self.width, batch=self.batch, steps=self.steps, cut=self.cut)


def evidence_of(rows: Sequence[Row], *, batch: int, teacher: str, name: str) -> tuple[Evidence, ...]:
    """Return the evidence in the rows of one leaderboard: each student once, under one deployment.

    Untrained students, rows of the test split, and students that were not made from the teacher give no evidence.

    Args:
        rows: The rows of one run.
        batch: Tokens of an optimiser step.
        teacher: Teacher and text.
        name: The run's name.
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
    """Return the evidence in a run, finished or not: its students at every rung.

    Args:
        run: The run's folder.
        teacher: Teacher and text.

    Raises:
        InputError: The log or the settings cannot be read.
    """
    asked = run.read_settings("plan.batch_tokens")
    rows: dict[tuple[str, int | None], Row] = {}
    for event in run.events.read():
        if event["event"] == "row":
            row = Row.from_json(event["row"])
            rows[row.row_id, row.train_tokens] = row
    return evidence_of(list(rows.values()), batch=asked["plan"]["batch_tokens"], teacher=teacher, name=run.name)


def is_cut(strategy: Strategy) -> bool:
    """Return whether a student is smaller than its teacher."""
    init = strategy.init
    return (init.depth, init.ffn, init.heads, init.width) != (1, 1, 1, 1)


def number(recipe: Distillation, path: str) -> float | None:
    """Return a number of a recipe on the scale that the beliefs use, or None if the recipe has no such number."""
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
    """Return the name of a recipe's choice in `CHOICES`, or None if it is none of them."""
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
    """Return whether the beliefs cover a recipe: they know all its losses."""
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
    """Return the students that carry information: their losses are known, and their group has several recipes."""
    groups: dict[str, list[Evidence]] = {}
    for one in evidence:
        if known(one.recipe) and math.isfinite(one.nll):
            groups.setdefault(one.group, []).append(one)
    return [one for group in groups.values() if len({each.recipe for each in group}) > 1 for one in group]


def updated(
    knowledge: Knowledge, evidence: Iterable[Evidence], *, own: bool, made: Mapping[str, Any] | None = None
) -> Knowledge:
    """Return the beliefs after observing some trained students.

    The model explains a student's nats as its group's level plus costs. Each number of the recipe costs its factor
    times the squared distance from the best value, in units. Each choice has a cost of its own. Each teacher has its
    own best values around the common ones, and its own scale of the costs. The result is the most likely values under
    the earlier beliefs, with standard deviations from the curvature there (Laplace's approximation). Groups whose
    recipes are all the same, and recipes with other losses, are left out.

    Args:
        knowledge: The earlier beliefs.
        evidence: The trained students.
        own: Whether the students have the same teacher and text that the knowledge will be used for, as in a warm
            start. Then the resulting beliefs hold for that teacher alone.
        made: The result's record of its origin; by default that of `knowledge`.
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
    """Return the beliefs about a new teacher. They are wider, as it may differ from others."""
    wider = {
        name: replace(belief, sd=math.hypot(belief.sd, knowledge.between.get(RATE if name == LAW[0] else name, 0.0)))
        for name, belief in knowledge.beliefs.items()
    }
    return replace(knowledge, beliefs=wider, between=dict.fromkeys(knowledge.between, 0.0))


class _Model:
    """What the beliefs predict for students, and how unlikely the students make those beliefs.

    Args:
        evidence: Trained students.
        order: Names of the beliefs.
    """

    def __init__(self, evidence: Sequence[Evidence], order: Sequence[str]) -> None:
        place = {name: index for index, name in enumerate(order)}
        _, self._group = np.unique([one.group for one in evidence], return_inverse=True)
        self._nll = np.array([one.nll for one in evidence])
        best = np.full(self._group.max() + 1, math.inf)
        np.minimum.at(best, self._group, self._nll)
        self._weight = 1 / (_NOISE**2 + (_FAR * (self._nll - best[self._group])) ** 2)
        # For each number: its values (0 if there is none), whether there is one, and the terms that sum to its best
        # value.
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
        """Return half the weighted sum of squared residuals, each group around its own mean."""
        predicted = self._choices @ values
        for told, has, design, cost in self._numbers:
            predicted = predicted + math.exp(values[cost]) * (has * (told - design @ values)) ** 2
        rest = self._nll - predicted * np.exp(self._scales @ values)
        sums, weights = (np.bincount(self._group, part) for part in (self._weight * rest, self._weight))
        rest = rest - (sums / weights)[self._group]
        return float((self._weight * rest**2).sum() / 2)


def _curvature(loss: Any, point: npt.NDArray[np.float64], step: float = 0.02) -> npt.NDArray[np.float64]:
    """Return second derivatives by differences. No direction may be flatter than under the earlier beliefs."""
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

"""Finds budgets that can share the student of a smaller budget, because it is as good as their own would be."""

from __future__ import annotations

from collections.abc import Sequence

from autodistill.distillation.student.check import student_spec
from autodistill.estimates.fit import fits, holdable
from autodistill.hardware.budget import Budget
from autodistill.models.spec import ModelSpec
from autodistill.search.construction.construction import Construction, arms
from autodistill.search.request.feasibility import by_size
from autodistill.search.request.resolve import SearchConfig
from autodistill.strategy.strategy import Strategy

ALIKE = 0.005
"""Largest difference in KL, in nats a token, at which two students count as equally good (0.5% of perplexity)."""


def shared(configs: Sequence[SearchConfig]) -> list[int]:
    """Return for each configuration the index of the one whose student it uses: its own, or a smaller budget's.

    Args:
        configs: The settings of each budget, with what was solved for it.
    """
    order = sorted(range(len(configs)), key=lambda place: configs[place].budget.memory_bytes)
    found: dict[int, int] = {}
    for place in order:
        # Try the largest smaller budget with its own student first, because its student is the hardest to beat.
        before = [one for one in reversed(order[: order.index(place)]) if found[one] == one]
        found[place] = next((one for one in before if _serves(configs[one], configs[place])), place)
    return [found[place] for place in range(len(configs))]


def _serves(small: SearchConfig, large: SearchConfig) -> bool:
    """Return whether a smaller budget's student is as good, before training, as the larger budget's would be."""
    if not (small.constructions and large.constructions):
        fitting = _fitting(small)
        return bool(fitting) and fitting == _fitting(large)
    mine, theirs = arms(small.constructions)[0], arms(large.constructions)[0]
    if not _holds(mine, large.spec, large.budget):
        return False
    if (mine.init, mine.deployment) == (theirs.init, theirs.deployment):
        return True
    return mine.kl is not None and theirs.kl is not None and mine.kl - theirs.kl <= ALIKE


def _holds(one: Construction, spec: ModelSpec, budget: Budget) -> bool:
    student = student_spec(Strategy(init=one.init), spec)
    return any(fit.slack <= 0 for fit in fits(student, (one.deployment,), budget))


def _fitting(config: SearchConfig) -> set[tuple[str, str]]:
    """Return what fits the budget in a space that is not solved: its extreme strategies with their deployments."""
    return {
        (strategy.id, fit.deployment.name)
        for strategy, student in by_size(config.space, config.spec)
        for fit in fits(student, holdable(student, config.space.deployments), config.budget)
        if fit.slack <= 0
    }

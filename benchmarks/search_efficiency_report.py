"""The report of `search_efficiency.py`: targets, curves, compute to come as far, test and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import report
from curves import FIFTH, at, difference, gap, passes, speedup
from kept import mean
from math_search import METRIC, RECIPE, TEST_QUESTIONS
from math_table import RUNGS, Line
from prepared import learns_from_teacher
from simulate import TRIALS, Table, Worker, plan

from autodistill.strategy import Strategy

# How far below the best of the table a student counts as near it.
NEAR = 0.001
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NAMES = {
    "a": "(a) this search",
    "b": "(b) random search, to the end",
    "c": "(c) an afternoon's script",
    "d": "(d) the recipe, tuned",
    "e": "(e) fine-tuning, tuned",
    "d, untuned": "the recipe as it stands",
    "teacher": "the teacher, 16 bits (does not fit)",
}


@dataclass(frozen=True, kw_only=True)
class Known:
    """A student at full fidelity, and what had been spent when it was known.

    Attributes:
        operations: On everything so far.
        value: Accuracy on validation.
        strategy, seed, deployment: Which student, and how it is packed.
    """

    operations: int
    value: float
    strategy: str
    seed: int
    deployment: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the program found.

    Attributes:
        table: Where students are looked up.
        arms: Curves of each arm, one a seed.
        box: Operations of this search, the mean of its seeds.
        followed: Boxes up to which the others are followed.
        chosen: The best of each arm and seed at the end of the box.
        test: What these are worth on test, and the teacher and the recipe as it stands.
        checks: Searches that trained: how many stretches, and how many of them were as recorded.
        lines: The recorded students.
    """

    table: Table
    arms: dict[str, list[list[Known]]]
    box: float
    followed: int
    chosen: dict[str, list[Known]]
    test: dict[str, list[dict[str, Any]]]
    checks: list[dict[str, float]]
    lines: list[Line]

    @property
    def recipe(self) -> float:
        """Operations of training the recipe."""
        costs = Worker(self.table, plan(1, (RUNGS[-1],), ())).costs
        return costs.stretch(self.table.space.baselines[RECIPE], 0, -1)

    @property
    def values(self) -> tuple[float, float, float]:
        """Of the recipe as it stands, tuned, and near the best of the table."""
        first = self.arms["d"][0]
        return first[0].value, max(one.value for one in first), self.table.best() - NEAR


def sections(found: Outcome) -> list[str]:
    """The report's parts."""
    untuned, tuned, _ = found.values
    times, verdict = training(found)
    return [
        opening(found),
        "## Targets\n\n" + "\n".join(f"- {line}" for line in verdicts(found, verdict)),
        "## Best validation accuracy by compute, in percent\n\n" + best_by_compute(found),
        f"## Compute to come as far\n\nThe recipe as it stands has {100 * untuned:.2f}%, tuned {100 * tuned:.2f}%; "
        f"the best of the table {100 * found.table.best():.2f}%, and near it is {100 * NEAR:g} points less. Share of "
        f"the seeds that ever pass it ((a) within its box, the others within {found.followed}), and the median "
        "compute at which they do, in trainings of the recipe.\n\n" + compute_to_pass(found),
        f"## Test\n\n{TEST_QUESTIONS} questions that no arm saw. Differences are paired and bootstrapped by "
        "document.\n\n" + tested(found),
        "## Training a student\n\n" + times,
        "## Limits\n\nCut to fit: students are looked up in one recorded table instead of trained for each arm and "
        "seed; the searches' seeds so share one seed of the students, and errors are over proposals alone. "
        "`search_smollm2.py` repeats it on the 135M teacher, smaller and all trained. The narrow shape keeps a sixth "
        "of the FFN neurons because in a pilot one with two thirds of them answered as well before training as after "
        "it, so that nothing was to be searched.",
    ]


def opening(found: Outcome) -> str:
    """What was compared."""
    checked = "; ".join(
        f"of {one['stretches']} stretches of seed {seed} {one['same']} had the recorded value to the last bit"
        + (f", on another processor than the table's up to {100 * one['off']:.2f} points off" if one["off"] else "")
        + (f", and {one['others']} were others" if one["others"] else "")
        for seed, one in enumerate(found.checks)
    )
    shown = f" {checked[:1].upper()}{checked[1:]}." if checked else ""
    return (
        f"The math teacher, `math_space.yaml` with {len(found.table.recorded)} strategies that fit the budget and as "
        f"many that do not, {RUNGS[-1]:,} tokens a trial, plans of {TRIALS} trials; {len(found.arms['a'])} seeds of "
        "(a), (b) and (c), one of the students but for (d) and (e), which choose among several. Values are accuracies "
        "of an answer's next token on validation. Compute is operations: 6 for each weight and token trained, 2 for "
        "each read, of teacher, cache and evaluations too. The box is what (a) spends on the mean, "
        f"{found.box:.3g} operations: {found.box / found.recipe:.1f} times the recipe's training.{shown}"
    )


def verdicts(found: Outcome, time: str) -> Iterator[str]:
    """What the targets come to."""
    ends = [found.followed * found.box] * len(found.arms["c"])
    ratios = [speedup(found.arms["a"], found.arms["c"], value, ends) for value in found.values]
    points, error = gap(found.test["a"], found.test["d"][0], "answers", "asked")
    yield f"(a) passes the recipe as it stands at one fifth of the compute of (c): {ratios[0]}"
    yield f"(a) passes the tuned recipe at one fifth of the compute of (c): {ratios[1]}"
    yield within_reach(found)
    yield f"The same for the best of the table less {100 * NEAR:g} points, which is no target: {ratios[2]}"
    yield (
        f"At the end of the box at least 1.8 points above (d) on test: {'held' if points >= 1.8 else 'not held'}, "
        f"{points:+.2f} ± {error:.2f} points of exact match (mean over the searches, paired and bootstrapped by "
        "document)."
    )
    yield f"With a student trained in 40% less time than (d)'s: {time}"


def within_reach(found: Outcome) -> str:
    """What passing the tuned recipe takes at the least, were the student known that does, beside the target."""
    tuned = found.values[1]
    fifth = float(np.median([passes(curve, tuned) for curve in found.arms["c"]])) / FIFTH / found.recipe
    least = cheapest(found.table, tuned)
    known = "No student of the table passes it at any rung"
    if least is not None:
        known = (
            f"The cheapest student of the table that passes it, at whatever rung, takes {least / found.recipe:.2f} "
            "trainings of the recipe with the teacher's outputs for its own tokens, one evaluation and nothing else"
        )
    told = least is not None and least / found.recipe <= fifth
    first = " A search that trains the recipe first, as (a) does, could not: that alone takes 1." if fifth < 1 else ""
    return f"{known}; one fifth of (c) is {fifth:.2f}: {'one told that student' if told else 'nobody'} could.{first}"


def cheapest(table: Table, value: float) -> int | None:
    """Operations of the cheapest student that is better than this, trained alone as far as it must be, if one is."""
    costs = Worker(table, plan(1, RUNGS, (1,) * (len(RUNGS) - 1))).costs
    found = []
    for line in table.recorded:
        strategy = Strategy.from_json(line.strategy)
        for place, reached in enumerate((*line.decayed[: len(RUNGS) - 1], max(line.rows.values()))):
            if reached > value:
                tokens = RUNGS[place]
                taught = costs.online(tokens) if learns_from_teacher(strategy) else 0
                evaluated = costs.evaluation(strategy, costs.read_at(place))
                found.append(costs.train(strategy, tokens) + evaluated + taught)
    return min(found, default=None)


def best_by_compute(found: Outcome) -> str:
    """Best values after shares of the box."""
    rows = []
    for name, curves in found.arms.items():
        cells = [NAMES[name]]
        for share in SHARES:
            values = [best.value for curve in curves if (best := at(curve, share * found.box)) is not None]
            follows = name in ("b", "c") or share <= 1
            cells.append(mean(values, 100, 2) if follows and len(values) == len(curves) else "")
        rows.append(cells)
    return report.table(["best accuracy after", *(f"{share:g} boxes" for share in SHARES)], rows)


def compute_to_pass(found: Outcome) -> str:
    """How many seeds of each search pass the recipe, tuned and near the best, and when the median does."""
    limit = found.followed * found.box / found.recipe
    rows = []
    for name in ("a", "b", "c"):
        cells = [NAMES[name]]
        for value in found.values:
            times = [passes(curve, value) for curve in found.arms[name]]
            middle = float(np.median(times)) / found.recipe
            cells.append(f"{np.mean(np.isfinite(times)):.0%}")
            cells.append(f"{middle:.1f}" if np.isfinite(middle) else f"more than {limit:.0f}")
        rows.append(cells)
    return report.table(["", "pass the recipe", "at", "pass the tuned recipe", "at", "come near the best", "at"], rows)


def tested(found: Outcome) -> str:
    """What was chosen, on test."""
    rows = []
    recipe = found.test["d"][0]
    for name, tests in found.test.items():
        gains = [
            "" if name == "d" else difference(tests, recipe, *of) for of in (("tokens", "count"), ("answers", "asked"))
        ]
        token, answer = (f"{100 * np.mean([one[key] for one in tests]):.2f}" for key in (METRIC, "exact_match"))
        distinct = len({(one.strategy, one.seed, one.deployment) for one in found.chosen.get(name, [])}) or 1
        rows.append([NAMES[name], distinct, token, gains[0], answer, gains[1]])
    less = "less (d), points"
    return report.table(["chosen in the box", "students", "next token, %", less, "exact match, %", less], rows)


def training(found: Outcome) -> tuple[str, str]:
    """What training the chosen students took, and whether that is 40% less than the recipe's."""
    by = {(line.id, line.seed): line for line in found.lines}
    costs = Worker(found.table, plan(1, (RUNGS[-1],), ())).costs
    rows, seconds, operations = [], {}, {}
    for name in ("a", "d", "e"):
        lines = [by[one.strategy, one.seed] for one in found.chosen[name]]
        seconds[name] = float(np.mean([line.train_seconds for line in lines])) * RUNGS[-1]
        operations[name] = float(np.mean([costs.train(Strategy.from_json(line.strategy), RUNGS[-1]) for line in lines]))
        rows.append([NAMES[name], f"{seconds[name]:.1f}", f"{operations[name]:.3g}"])
    less = 1 - seconds["a"] / seconds["d"]
    text = "Seconds of one thread at the rate of the stable part, the same tokens for all.\n\n"
    saved = 1 - operations["a"] / operations["d"]
    verdict = f"{'held' if less >= 0.4 else 'not held'}, {less:+.0%} less time ({saved:+.0%} less operations)."
    return text + report.table(["", "seconds", "operations"], rows), verdict

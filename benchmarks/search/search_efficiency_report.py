"""The report of `search_efficiency.py`: targets, curves, the compute to catch up, test scores and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from autodistill.estimates.training_fit import CPU_PASS_TOKENS
from autodistill.strategy.strategy import Strategy
from benchmarks.common import report, timed_parts
from benchmarks.common.curves import FIFTH, at, difference, gap, passes, speedup
from benchmarks.common.expenses import Expense
from benchmarks.common.math_search import METRIC, RECIPE, STEP, TEST_QUESTIONS
from benchmarks.common.math_table import RUNGS
from benchmarks.common.math_teacher import LENGTH
from benchmarks.common.over_seeds import mean
from benchmarks.common.recorded import TRIALS, Table
from benchmarks.common.simulate import Worker, plan

# A student that is at most this far below the best of the table counts as near it.
NEAR = 0.001
EXPENSES = ("operations", "seconds")
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
        operations, seconds: Spent on everything so far.
        value: Accuracy on validation.
        strategy, seed, deployment: The student, and how it is packed.
    """

    operations: float
    seconds: float
    value: float
    strategy: str
    seed: int
    deployment: str

    @classmethod
    def of(cls, spent: Expense, value: float, strategy: str, seed: int, deployment: str) -> Known:
        """Return what is known after an expense."""
        given = {"value": value, "strategy": strategy, "seed": seed, "deployment": deployment}
        return cls(operations=spent.operations, seconds=spent.seconds, **given)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The program's results.

    Attributes:
        table: The table of recorded students.
        arms: Curves of each arm, one for each seed.
        box: What this search spends: the mean over its seeds.
        followed: Number of boxes up to which the other arms are followed.
        chosen: The best student of each arm and seed at the end of the box.
        test: Test scores of these students, of the teacher and of the untuned recipe.
        checks: For each search that trained: its segments, how many were as recorded, and their seconds.
    """

    table: Table
    arms: dict[str, list[list[Known]]]
    box: Expense
    followed: int
    chosen: dict[str, list[Known]]
    test: dict[str, list[dict[str, Any]]]
    checks: list[dict[str, float]]

    @property
    def recipe(self) -> Expense:
        """The expense of one training of the recipe."""
        return Worker(self.table, plan(1, (RUNGS[-1],), ())).expenses.whole(self.table.space.baselines[RECIPE])

    @property
    def values(self) -> tuple[float, float, float]:
        """Accuracies of the untuned recipe, of the tuned recipe, and near the best of the table."""
        first = self.arms["d"][0]
        tuned = at(first, self.box.operations) or first[0]
        return first[0].value, tuned.value, self.table.best() - NEAR

    def end(self, what: str) -> float:
        """Return the operations or seconds up to which (b) and (c) are followed."""
        return self.followed * float(getattr(self.box, what))

    def curves(self, name: str, what: str) -> list[list[Known]]:
        """Return the curves of an arm, up to the end of the comparison."""
        end = self.end(what)
        return [[one for one in curve if getattr(one, what) <= end] for curve in self.arms[name]]


def sections(found: Outcome) -> list[str]:
    """Return the parts of the report."""
    untuned, tuned, _ = found.values
    times, verdict = training(found)
    return [
        opening(found),
        "## Targets\n\n" + "\n".join(f"- {line}" for line in verdicts(found, verdict)),
        "## Best validation accuracy by compute, in percent\n\nBoxes of operations:\n\n"
        + best_by_compute(found, "operations")
        + "\n\nBoxes of seconds:\n\n"
        + best_by_compute(found, "seconds"),
        f"## Compute to come as far\n\nThe recipe as it stands has {100 * untuned:.2f}%, tuned {100 * tuned:.2f}%; "
        f"the best of the table {100 * found.table.best():.2f}%, and near it is {100 * NEAR:g} points less. Share of "
        f"the seeds that ever pass it ((a) within its box, the others within {found.followed}), and the median "
        "compute at which they do. By operations, in trainings of the recipe:\n\n"
        + compute_to_pass(found, "operations")
        + "\n\nBy seconds, in trainings of the recipe, and the seconds in brackets:\n\n"
        + compute_to_pass(found, "seconds"),
        "## What the seconds are\n\n" + clock(found),
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
    """Describe what was compared, and how the table was checked."""
    checked = "; ".join(
        f"of {one['segments']} segments of seed {seed} {one['same']} had the recorded value to the last bit"
        + (f", on another processor than the table's up to {100 * one['off']:.2f} points off" if one["off"] else "")
        + (f", and {one['others']} were others" if one["others"] else "")
        for seed, one in enumerate(found.checks)
    )
    shown = f" {checked[:1].upper()}{checked[1:]}." if checked else ""
    return (
        f"The math teacher, `math_space.yaml` with {len(found.table.recorded)} strategies that fit the budget and as "
        f"many that do not, {RUNGS[-1]:,} tokens a trial, plans of {TRIALS} trials; {len(found.arms['a'])} seeds of "
        "(a), (b) and (c), one of the students but for (d) and (e), which choose among several. Values are accuracies "
        "of an answer's next token on validation. Compute is operations, 6 for each weight and token trained and 2 for "
        "each read, and seconds, both with teacher, cache and evaluations. The box is what (a) spends on the mean: "
        f"{found.box.operations:.3g} operations, {found.box.operations / found.recipe.operations:.1f} times the "
        f"recipe's training, and {found.box.seconds:.0f} seconds, {found.box.seconds / found.recipe.seconds:.1f} times "
        f"it.{shown}"
    )


def verdicts(found: Outcome, time: str) -> Iterator[str]:
    """Yield whether each target is met, with its figures."""

    def ratios(value: float) -> str:
        told = []
        for what in EXPENSES:
            theirs, end = found.curves("c", what), found.end(what)
            ratio = speedup(found.arms["a"], theirs, value, [end] * len(theirs), what)
            told.append(f"{what.capitalize()}: {ratio}")
        return " ".join(told)

    untuned, tuned, near = found.values
    points, error = gap(found.test["a"], found.test["d"][0], "answers", "asked")
    yield f"(a) passes the recipe as it stands at one fifth of the compute of (c). {ratios(untuned)}"
    yield f"(a) passes the tuned recipe at one fifth of the compute of (c). {ratios(tuned)}"
    for what in EXPENSES:
        yield within_reach(found, what)
    yield f"The same for the best of the table less {100 * NEAR:g} points, which is no target. {ratios(near)}"
    yield (
        f"At the end of the box at least 1.8 points above (d) on test: {'held' if points >= 1.8 else 'not held'}, "
        f"{points:+.2f} ± {error:.2f} points of exact match (mean over the searches, paired and bootstrapped by "
        "document)."
    )
    yield f"With a student trained in 40% less time than (d)'s: {time}"


def within_reach(found: Outcome, what: str) -> str:
    """Describe the least that passing the tuned recipe costs if the right student is known, next to the target."""
    tuned, unit = found.values[1], float(getattr(found.recipe, what))
    fifth = float(np.median([passes(curve, tuned, what) for curve in found.curves("c", what)])) / FIFTH / unit
    least = cheapest(found.table, tuned, what)
    known = f"By {what}: no student of the table passes it at any rung"
    if least is not None:
        known = (
            f"By {what}: the cheapest student of the table that passes it, at whatever rung, takes {least / unit:.2f} "
            "trainings of the recipe with the teacher live, one evaluation and nothing else"
        )
    told = least is not None and least / unit <= fifth
    first = " A search that trains the recipe first, as (a) does, could not: that alone takes 1." if fifth < 1 else ""
    return f"{known}; one fifth of (c) is {fifth:.2f}: {'one told that student' if told else 'nobody'} could.{first}"


def cheapest(table: Table, value: float, what: str) -> float | None:
    """Return the operations or seconds of the cheapest student that beats a value.

    It is trained alone, and only as far as necessary.
    """
    expenses = Worker(table, plan(1, RUNGS, (1,) * (len(RUNGS) - 1))).expenses
    found = []
    for line in table.recorded:
        strategy = Strategy.from_json(line.strategy)
        for place, reached in enumerate((*line.decayed[: len(RUNGS) - 1], max(line.rows.values()))):
            if reached > value:
                evaluated = expenses.evaluation(strategy, expenses.costs.read_at(place))
                found.append(getattr(expenses.train(strategy, RUNGS[place], live=True) + evaluated, what))
    return min(found, default=None)


def best_by_compute(found: Outcome, what: str) -> str:
    """Return the table of the best values by compute."""
    rows = []
    for name, curves in found.arms.items():
        cells = [NAMES[name]]
        for share in SHARES:
            known = [at(curve, share * getattr(found.box, what), what) for curve in curves]
            values = [best.value for best in known if best is not None]
            follows = name in ("b", "c") or share <= 1
            cells.append(mean(values, 2, factor=100) if follows and len(values) == len(curves) else "")
        rows.append(cells)
    return report.table(["best accuracy after", *(f"{share:g} boxes" for share in SHARES)], rows)


def compute_to_pass(found: Outcome, what: str) -> str:
    """Return the table of how many seeds of each search pass each value, and when the median seed does."""
    unit = float(getattr(found.recipe, what))
    rows = []
    for name in ("a", "b", "c"):
        curves = found.arms[name] if name == "a" else found.curves(name, what)
        cells = [NAMES[name]]
        for value in found.values:
            times = [passes(curve, value, what) for curve in curves]
            middle = float(np.median(times))
            followed = float(np.mean([curve[-1].operations for curve in curves])) if name == "a" else found.end(what)
            cells.append(f"{np.mean(np.isfinite(times)):.0%}")
            cells.append(f"{middle / unit:.1f}" if np.isfinite(middle) else f"more than {followed / unit:.0f}")
            if what == "seconds" and np.isfinite(middle):
                cells[-1] += f" ({middle:.0f} s)"
        rows.append(cells)
    return report.table(["", "pass the recipe", "at", "pass the tuned recipe", "at", "come near the best", "at"], rows)


def clock(found: Outcome) -> str:
    """Describe where the seconds come from, what they leave out, and how a search that trained compares."""
    parts = timed_parts.read()
    expenses = Worker(found.table, plan(1, (RUNGS[-1],), ())).expenses
    recipe = found.table.space.baselines[RECIPE]
    trained = expenses.train(recipe, RUNGS[-1])
    more = expenses.train(recipe, RUNGS[-1], live=True).operations / trained.operations - 1
    told = [
        f" In the search of seed {seed} that trained, the last two were {one['other'] / whole:.0%} of its segments' "
        "seconds."
        for seed, one in enumerate(found.checks)
        if (whole := one["train"] + one["evaluate"] + one["other"])
    ]
    return (
        "Simulated: those of a box with one worker on one thread of one core, which trains or judges one student at "
        "a time, on its wall where nothing else runs there. The teacher's work comes before the first trial. Training "
        "and evaluating take what they took where the table was recorded, in the thread's own time: the median of the "
        "records of a shape, with a teacher or without, since learning rates change no work and single records are off "
        "by what else that machine did. An evaluation takes by the tokens that it reads. Training on a grid is taken "
        "for as long as training without, as it is in operations.\n\n"
        "Three parts were not recorded, and were timed apart by `timed_parts.py`, each over a part that was, so that "
        f"the pace of the machine cancels ({parts.machine}). The teacher live in every step of (c) adds "
        f"{parts.live_over_training:.0%} to the training of the recipe's student (by operations {more:.0%}). The "
        f"cache, which (a), (b) and (d) pay for, takes {parts.cache_over_training:.2f} times that training ("
        f"{expenses.cache.operations / trained.operations:.2f} by operations): {expenses.cache.seconds:.1f} s, where "
        f"training takes {trained.seconds:.1f} s. On a CPU the teacher reads {CPU_PASS_TOKENS // LENGTH} sequences of "
        f"{LENGTH} tokens at once for it, where a step reads {STEP // LENGTH}. The teacher's score and rows, which all "
        f"arms pay for, take {parts.rows_over_evaluation:.1f} evaluations of that student, "
        f"{expenses.teacher_rows.seconds:.1f} s."
        "\n\nLeft out of seconds as of operations, in all arms: starting, reading data, proposals, making students, "
        "and writing and reading checkpoints." + "".join(told) + " The recorded training reads a cache, in (c) too, "
        "where it would not."
    )


def tested(found: Outcome) -> str:
    """Return the table of test scores."""
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
    """Return the expense of training the chosen students, and whether it is 40% less than the recipe's."""
    expenses = Worker(found.table, plan(1, (RUNGS[-1],), ())).expenses
    rows, taken = [], {}
    for name in ("a", "d", "e"):
        lines = [found.table.every[one.strategy, one.seed] for one in found.chosen[name]]
        each = [expenses.train(Strategy.from_json(line.strategy), RUNGS[-1]) for line in lines]
        taken[name] = sum(each, Expense()) * (1 / len(each))
        rows.append([NAMES[name], f"{taken[name].seconds:.1f}", f"{taken[name].operations:.3g}"])
    less = 1 - taken["a"].seconds / taken["d"].seconds
    text = "Seconds of one thread at the rate of the stable part, the same tokens for all.\n\n"
    saved = 1 - taken["a"].operations / taken["d"].operations
    verdict = f"{'held' if less >= 0.4 else 'not held'}, {less:+.0%} less time ({saved:+.0%} less operations)."
    return text + report.table(["", "seconds", "operations"], rows), verdict

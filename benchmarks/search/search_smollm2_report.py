"""The report of `search_smollm2.py`: targets, curves, the compute to catch up, and test scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autodistill.distillation.training.plan import Plan
from benchmarks.common import report
from benchmarks.common.curves import at, gap, passes, speedup
from benchmarks.common.over_seeds import mean

ARMS = {
    "a": "(a) this search",
    "a, no start": "(a) without the space's start",
    "c": "(c) an afternoon's script",
    "c, told": "(c) told the space's start",
    "d": "(d) the recipe, tuned",
    "e": "(e) fine-tuning, tuned",
}


@dataclass(frozen=True, kw_only=True)
class Known:
    """The state of an arm after a piece of its work.

    Attributes:
        operations, seconds: Spent so far. Operations are 6 for each weight and trained token and 2 for each that is
            read, the teacher's included. Seconds are the process's CPU time.
        value: Validation accuracy of a student that was just trained to the end, or None after other work.
        judged: Validation accuracy of a student at a rung before the end.
        name: A short description of its strategy.
        train: Operations of its training from beginning to end, including parts that were shared.
        test: Correct tokens and all tokens of each test document. Set if the student was its arm's best so far, or the
            best of those at a rung whose training was 40% shorter than the recipe's.
    """

    operations: float
    seconds: float
    value: float | None = None
    judged: float | None = None
    name: str = ""
    train: float = 0.0
    test: dict[str, list[float]] | None = None


def sections(arms: dict[str, list[list[Known]]], plan: Plan, dimensions: int, asked: int) -> list[str]:
    """Return the report's parts.

    Args:
        arms: Curves of each arm, one for each seed.
        plan: The plan of every search.
        dimensions: Number of the space's dimensions.
        asked: Tokens of the test split.
    """
    untuned = as_it_stands(arms)
    assert untuned.value is not None
    target = max(one.value or 0.0 for one in arms["d"][0])
    unit = untuned.train
    box = float(np.mean([curve[-1].operations for curve in arms["a"]]))
    seeds = f"{len(arms['a'])} seeds" if len(arms["a"]) > 1 else "one seed"
    head = (
        f"SmolLM2-135M, the default space of {dimensions} dimensions and llama.cpp's deployments, "
        f"{plan.tokens:,} tokens at full fidelity, rungs {', '.join(f'{rung:,}' for rung in plan.rungs)}, "
        f"{plan.trials} trials, one thread; {seeds} of (a) and (c), proposals and students alike, one "
        "run of (d) and (e), which choose among several seeds. Values are accuracies of the next token over "
        f"{plan.eval_tokens:,} tokens of validation. The box is what (a) spends on the mean, {box:.3g} operations: "
        f"{box / unit:.1f} times the recipe's training. The space's start is what "
        "`student_init.py` and `alignments.py` had found on this teacher and text: knowledge that the search is given, "
        "so that both are shown with it and without."
    )
    return [
        head,
        "## Targets\n\n" + "\n".join(f"- {line}" for line in verdicts(arms, untuned.value, target, box)),
        "## Best validation accuracy by compute, in percent\n\n" + curves(arms, box),
        f"## Compute to come as far\n\nThe recipe as it stands has {100 * untuned.value:.2f}%, tuned "
        f"{100 * target:.2f}%. Operations in trainings of the recipe, and seconds of the process's own time, at which "
        "each seed first passes it with a student that is trained to the end; a dash where it never did, with what it "
        "had spent in brackets.\n\n"
        + passing(arms, untuned.value, target, unit)
        + "\n\nThe same where a student counts from the first rung on that judges it better. Of (a) that is after its "
        "decay, and what a search exports that is broken off there; of the script it is a student that its pruner may "
        "throw away.\n\n" + passing({name: early(found) for name, found in arms.items()}, untuned.value, target, unit),
        f"## Test\n\nThe best on validation at the end of the box, on {asked:,} tokens that no arm saw. "
        "Differences are paired and bootstrapped by document.\n\n" + tested(arms, box, unit),
        "## Limits\n\nShort trainings of a small teacher, and few seeds. Seconds are those of a shared machine's "
        "cores, of the process alone; (a) pays for the teacher's outputs and its rows, (c) for the teacher's score, "
        "and its seconds not for loading. The script judges a student at a rung as it stands, and under one "
        "deployment; this search after a short decay, and a trained student under every deployment.",
    ]


def verdicts(arms: dict[str, list[list[Known]]], untuned: float, target: float, box: float) -> Iterator[str]:
    """Yield whether each target is met, with its figures."""
    for name, value in (("the recipe as it stands", untuned), ("the tuned recipe", target)):
        for mine, theirs in (("a", "c"), ("a, no start", "c"), ("a, no start", "c, told"), ("a", "c, told")):
            yield f"{ARMS[mine]} passes {name} at one fifth of the compute of {ARMS[theirs]}: " + speedup(
                arms[mine], arms[theirs], value, [curve[-1].operations for curve in arms[theirs]]
            )
    for mine, theirs in (("a", "c"), ("a, no start", "c"), ("a, no start", "c, told"), ("a", "c, told")):
        ends = [curve[-1].operations for curve in arms[theirs]]
        yield (
            f"{ARMS[mine]} passes the tuned recipe at one fifth of the compute of {ARMS[theirs]}, students at rungs "
            f"counted: {speedup(early(arms[mine]), early(arms[theirs]), target, ends)}"
        )
    chosen = [at(curve, box) for curve in arms["a"]]
    recipe = at(arms["d"][0], box)
    points, error = gap([one.test for one in chosen if one and one.test], recipe.test, "sum", "count")  # type: ignore[union-attr, arg-type]
    held = "held" if points >= 1.8 else "not held"
    yield f"At the end of the box at least 1.8 points above (d) on test: {held}, {points:+.2f} ± {error:.2f} points."
    saved = 1 - np.mean([one.train for one in chosen if one]) / recipe.train  # type: ignore[union-attr]
    yield (
        f"With a student trained in 40% less time than (d)'s: {'held' if saved >= 0.4 else 'not held'}, "
        f"{saved:+.0%} less operations."
    )
    for name in ("a", "a, no start"):
        brief = short(arms[name])
        points, error = gap([one.test for one in brief if one.test], recipe.test, "sum", "count")  # type: ignore[union-attr, arg-type]
        saved = 1 - np.mean([one.train for one in brief]) / recipe.train  # type: ignore[union-attr]
        yield (
            f"The best student of {ARMS[name]} that a rung judged after at most 60% of (d)'s training at least 1.8 "
            f"points above (d) on test: {'held' if points >= 1.8 else 'not held'}, {points:+.2f} ± {error:.2f} points "
            f"at {saved:.0%} less operations."
        )


def as_it_stands(arms: dict[str, list[list[Known]]]) -> Known:
    """Return the recipe before it was tuned, which is the first that is trained to the end."""
    return next(one for one in arms["d"][0] if one.value is not None)


def early(found: Sequence[Sequence[Known]]) -> list[list[Known]]:
    """Return curves on which a student counts as soon as a rung has judged it."""
    return [[replace(one, value=one.judged if one.value is None else one.value) for one in curve] for curve in found]


def short(found: Sequence[Sequence[Known]]) -> list[Known]:
    """Return each curve's student that a rung judged after a shorter training, and that was tested."""
    return [one for curve in found for one in curve if one.judged is not None and one.test is not None]


def curves(arms: dict[str, list[list[Known]]], box: float) -> str:
    """Return the table of the best values by compute."""
    shares = (0.25, 0.5, 0.75, 1.0, 2.0)
    rows = []
    for name, found in arms.items():
        cells = [ARMS[name]]
        for share in shares:
            values = [one.value for curve in found if (one := at(curve, share * box)) is not None]
            whole = len(values) == len(found) and all(curve[-1].operations >= 0.95 * share * box for curve in found)
            cells.append(mean(values, 2, factor=100) if whole else "")
        rows.append(cells)
    return report.table(["best accuracy after", *(f"{share:g} boxes" for share in shares)], rows)


def passing(arms: dict[str, list[list[Known]]], untuned: float, target: float, unit: float) -> str:
    """Return the table of the compute at which each arm passes the recipes."""

    def cell(curve: Sequence[Known], value: float, what: str, scale: float) -> str:
        found = passes(curve, value, what)
        if np.isfinite(found):
            return f"{found / scale:.{1 if what == 'operations' else 0}f}"
        return f"– ({getattr(curve[-1], what) / scale:.{1 if what == 'operations' else 0}f})"

    rows = [
        [
            ARMS[name],
            *(
                ", ".join(cell(curve, value, what, scale) for curve in arms[name])
                for value in (untuned, target)
                for what, scale in (("operations", unit), ("seconds", 1.0))
            ),
        ]
        for name in ARMS
        if name[0] in "ac"
    ]
    return report.table(["", "pass the recipe", "seconds", "pass the tuned recipe", "seconds"], rows)


def tested(arms: dict[str, list[list[Known]]], box: float, unit: float) -> str:
    """Return the table of test scores."""
    chosen = {name: [at(curve, box) for curve in found] for name, found in arms.items()}
    chosen["d, untuned"] = [as_it_stands(arms)]
    recipe = chosen["d"][0]
    assert recipe is not None
    assert recipe.test is not None
    rows = []
    for name, found in chosen.items():
        tests = [one.test for one in found if one is not None and one.test is not None]
        right = [100 * sum(one["sum"]) / sum(one["count"]) for one in tests]
        points = "" if name == "d" else "{:+.2f} ± {:.2f}".format(*gap(tests, recipe.test, "sum", "count"))
        spent = np.mean([one.train for one in found if one is not None]) / unit
        names = "; ".join(dict.fromkeys(one.name for one in found if one is not None))
        rows.append([ARMS.get(name, "the recipe as it stands"), mean(right, 2), points, f"{spent:.2f}", names])
    for name in ("a", "a, no start"):
        brief = short(arms[name])
        tests = [one.test for one in brief if one.test is not None]
        right = [100 * sum(one["sum"]) / sum(one["count"]) for one in tests]
        points = "{:+.2f} ± {:.2f}".format(*gap(tests, recipe.test, "sum", "count"))
        names, spent = "; ".join(dict.fromkeys(one.name for one in brief)), np.mean([one.train for one in brief]) / unit
        rows.append([f"{ARMS[name]}, at a rung", mean(right, 2), points, f"{spent:.2f}", names])
    return report.table(
        ["chosen in the box", "next token, %", "less (d), points", "operations of its training", "students"], rows
    )

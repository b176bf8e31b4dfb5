"""What trained students teach about recipes: the beliefs that every search begins with, and their certainty.

    python -m benchmarks.search.learn_prior [--write]

Reads the leaderboards of `results/reference`, the sweep of the hand-designed recipe, the recorded students of sums, the
alignments, and the measurements of `range_test`. It begins with vague beliefs and prints the resulting ones. With
--write it writes `autodistill/search/prior/knowledge.yaml`. Nothing is trained.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import yaml

from autodistill.distillation.student.check import student_spec
from autodistill.runs.run_folder import RunFolder
from autodistill.search.prior.knowledge import (
    CHOICES,
    FILE,
    LAW,
    RATE,
    Belief,
    Knowledge,
    alignment_of,
    names,
)
from autodistill.search.prior.prior import Prior, prior_for
from autodistill.search.prior.tried_rates import FACTOR
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common import math_table, report, trials
from benchmarks.common.evidence import Evidence, evidence_of_run, is_cut, telling, updated
from benchmarks.common.math_search import STEP
from benchmarks.common.program import ROOT, TRACKED, parse, parser_of
from benchmarks.common.recorded import teacher_spec
from benchmarks.search.baseline_sweep import candidates
from benchmarks.search.range_test.students import RECIPE, SHAPES, smollm2_cases

REFERENCE = ROOT / "results" / "reference"
# SmolLM2's width and batch. It is the teacher of the records that name none.
WIDTH, BATCH = 576, 256

# Beliefs before any evidence: means and standard deviations.
_LAW = {
    # The project's earlier rule of thumb, within a factor of three.
    "rate": (math.log10(2e-4), 0.5),
    # Adam's rate for hidden matrices falls as their width grows (muP, arXiv:2203.03466).
    "rate.width": (-1.0, 0.3),
    # Adam's rate grows with the root of the batch (arXiv:2205.10287).
    "rate.batch": (0.5, 0.25),
    # The rate falls slowly with the length of a training (arXiv:2409.19913).
    "rate.steps": (-0.3, 0.2),
    "rate.cut": (0.0, 0.3),
}
_NUMBERS = {
    "distillation.divergence_weight": (0.5, 0.3),
    "distillation.temperature.start": (math.log10(4), 0.3),
    "distillation.temperature.end": (0.0, 0.2),
    "distillation.alignment.weight": (0.5, 0.5),
}
# Nats at one unit from the best value, within a factor of two.
_COSTS = {RATE: 0.1, "distillation.divergence_weight": 0.03}
_COST, _COST_SD = 0.01, 0.7
# Nats of a choice, for a smaller student and for a whole one, whose states equal the teacher's at the beginning.
_CHOICES = {
    "distillation.temperature.shape": (0.03, 0.01),
    "distillation.alignment": (0.05, 0.01),
    "distillation.alignment.projection": (0.02, 0.01),
    "distillation.on_policy": (0.03, 0.03),
}
# Standard deviations between teachers.
_BETWEEN = {
    RATE: 0.15,
    "distillation.divergence_weight": 0.2,
    "distillation.temperature.start": 0.15,
    "distillation.temperature.end": 0.1,
    "distillation.alignment.weight": 0.3,
}
# The belief about an unknown family. A Gemma 3 of 268M parameters loses at the rule's rate, and gains at a tenth.
UNSEEN = Belief(mean=-0.5, sd=0.7)


def vague() -> Knowledge:
    """Return the beliefs before any evidence. Rates are relative to those of Llamas."""
    beliefs = {}
    for name in names():
        path = name.removeprefix("cost ")
        if name in LAW:
            mean, sd = _LAW[name]
        elif name in _NUMBERS:
            mean, sd = _NUMBERS[name]
        elif name != path:
            mean, sd = math.log(_COSTS.get(path, _COST)), _COST_SD
        else:
            kind, _, choice = name.partition(" ")
            mean, sd = 0.0, _CHOICES[choice.partition("=")[0]][kind == "whole"]
        beliefs[name] = Belief(mean=mean, sd=sd)
    return Knowledge(beliefs=beliefs | {"family llama": Belief(mean=0.0, sd=0.0)}, unseen=UNSEEN, between=_BETWEEN)


def of_reference() -> Iterator[Evidence]:
    """Yield the evidence of the reference runs."""
    for path in sorted(REFERENCE.glob("*/search.json")):
        yield from evidence_of_run(RunFolder.open(REFERENCE, path.parent.name), "smollm2")


def of_sweep() -> Iterator[Evidence]:
    """Yield the evidence of the recipe's sweep."""
    store = TRACKED / "baseline-sweep.json"
    for tokens, done in json.loads(store.read_text()).items():
        for name, result in done.items():
            rate, weight, pull = map(float, name.split(" / "))
            (strategy,) = candidates([rate], [weight], [pull]).values()
            group = f"sweep, {tokens} tokens, seed {result['seed']}"
            yield _told(group, strategy, int(tokens) // BATCH, math.log(result["perplexity"]))


def of_alignments() -> Iterator[Evidence]:
    """Yield students with and without aligned states, if the beliefs know their alignment."""
    shapes = itertools.product(CHOICES["distillation.alignment"], ("none", "linear"), (10.0,))
    recipes = [replace(trials.LOGITS, alignment=alignment_of(*shape)) for shape in shapes]
    strategies = {one.id: one for one in (Strategy(init=Init(depth=0.8), distillation=recipe) for recipe in recipes)}
    for result in trials.kept(TRACKED / "alignments.jsonl"):
        if result.strategy in strategies:
            group = f"alignments, {result.tokens} tokens, seed {result.seed}"
            steps = result.tokens // result.batch_tokens
            yield _told(group, strategies[result.strategy], steps, math.log(result.perplexity))


def of_sums() -> Iterator[Evidence]:
    """Yield students of the teacher of sums, at every rung. Minus the logarithm of accuracy replaces nats."""
    spec = teacher_spec()
    for line in math_table.read():
        strategy = Strategy.from_json(line.strategy)
        packed = strategy.finishing.name if strategy.finishing else "none"
        for tokens, accuracy in zip(line.tokens, line.decayed, strict=True):
            yield Evidence(
                teacher="sums",
                group=f"sums, {strategy.init.describe()}, {packed}, {tokens} tokens, seed {line.seed}",
                architecture=spec.architecture,
                width=student_spec(strategy, spec).width,
                batch=STEP,
                steps=tokens // STEP,
                cut=is_cut(strategy),
                recipe=strategy.distillation,
                nll=-math.log(accuracy),
            )


def of_range_test() -> Iterator[Evidence]:
    """Yield students of SmolLM2 at several rates. Small teachers are left out: they are no real language models."""
    for path in sorted(TRACKED.glob("*-range-test.json"))[-1:]:
        record = json.loads(path.read_text())["record"]
        for case in smollm2_cases():
            if (before := record.get(f"{case.name}: before")) is None:
                continue
            for steps, power in itertools.product((*case.short, case.steps), case.powers):
                (sums,) = record[f"{case.name}: {steps} steps, power {power}"]
                if sums is not None:
                    recipe = replace(RECIPE, learning_rate=case.first * FACTOR**power)
                    strategy = Strategy(init=SHAPES[case.shape], distillation=recipe)
                    nll = sum(sums) / sum(before[0]["counts"])
                    yield _told(f"range test, {case.name}, {steps} steps", strategy, steps, nll)


def _told(group: str, strategy: Strategy, steps: int, nll: float) -> Evidence:
    return Evidence(
        teacher="smollm2",
        group=group,
        architecture="llama",
        width=WIDTH,
        batch=BATCH,
        steps=steps,
        cut=is_cut(strategy),
        recipe=strategy.distillation,
        nll=nll,
    )


SOURCES = {
    "reference runs": of_reference,
    "sweep of the recipe": of_sweep,
    "alignments": of_alignments,
    "sums": of_sums,
    "range test": of_range_test,
}


def shown(before: Knowledge, after: Knowledge) -> str:
    """Return the beliefs before and after as a table, by name."""
    lines = []
    for name, belief in after.beliefs.items():
        old = before.beliefs.get(name, before.unseen)
        learnt = 1 - belief.sd / old.sd if old.sd else 0.0
        lines.append([name, _figure(old), _figure(belief), f"{learnt:.0%}"])
    return report.table(["belief", "before", "after", "of the uncertainty gone"], lines)


def _figure(belief: Belief) -> str:
    return f"{belief.mean:+.3f} ± {belief.sd:.3f}"


def _recipe(prior: Prior) -> str:
    numbers = [[path, f"{one.value:g}", f"{one.low:g} to {one.high:g}"] for path, one in prior.numbers.items()]
    choices = [
        [path, one.value, ", ".join(f"{n} {m:+.3f} ± {sd:.3f}" for n, (m, sd) in one.nats.items())]
        for path, one in prior.choices.items()
    ]
    return report.table(["dimension", "value", "one standard deviation"], [*numbers, *choices])


def main() -> None:
    """Learn the beliefs from recorded students and print them, or also write the file that ships."""
    parser = parser_of(__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}, which ships")
    arguments = parse(parser)
    before = vague()
    found = {name: list(read()) for name, read in SOURCES.items()}
    counts = {}
    for name, part in found.items():
        told = telling(part)
        whole = sum(not one.cut for one in told)
        groups = len({one.group for one in told})
        counts[name] = f"{len(told)} students in {groups} groups, {whole} of them whole"
        print(f"{name}: {counts[name]} ({len(part)} students were read)")
    made = {"date": report.stamp()["date"], "by": "python -m benchmarks.search.learn_prior --write", "from": counts}
    after = updated(before, [one for part in found.values() for one in part], own=False, made=made)
    print(shown(before, after))
    spec = teacher_spec()
    for width, batch, steps, cut in ((576, 256, 24, False), (576, 256, 24, True), (576, 256, 150, False)):
        prior = prior_for(replace(spec, width=width), batch_tokens=batch, steps=steps, cut=cut, knowledge=after)
        print(f"\nA {'smaller' if cut else 'whole'} student of width {width}, {steps} steps of {batch} tokens:")
        print(_recipe(prior))
    if arguments.write and not arguments.smoke:
        head = "# Written by `python -m benchmarks.search.learn_prior --write`; `Knowledge` says what the names mean.\n"
        rounded = {
            name: replace(one, mean=round(one.mean, 4), sd=round(one.sd, 4)) for name, one in after.beliefs.items()
        }
        data = replace(after, beliefs=rounded).to_json()
        FILE.write_text(head + yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Often-quoted figures on a math task: losses of recipes against their teacher, temperatures, losses of quantisation.

    python -m benchmarks.engine.claims [--time 5m] [--seeds 5] [--sweep] [--report]

The teacher is that of `math_teacher.py`. Students begin with three of its four layers. They learn from a part of its
training questions, another one for each seed, at equal tokens. Learning rates and weights come from `--sweep`, on
validation questions with a seed of its own. Everything else is judged on test questions. Each finished figure is a line
of `reports/claims.jsonl`. Existing lines are not made again. A time budget ends after the current figure.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.loading import load_model
from autodistill.strategy.deployment import Deployment, serving
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Temperature
from autodistill.strategy.strategy import Finishing
from benchmarks.common import over_seeds, program, report
from benchmarks.common.math_teacher import DEPLOYMENT, LENGTH, MathTeacher, ask, math_teacher
from benchmarks.engine import math_students
from benchmarks.engine.math_students import INIT, Bench, Line

SWEEP_SEED = 100

CONSTANT, FALLING = Temperature(), Temperature(shape="linear", start=5.0, end=1.0)
# A cache of this many tokens holds the whole vocabulary, so the divergence is exact.
OUTPUTS = Distillation(divergence_weight=1.0, temperature=CONSTANT, learning_rate=1e-3, train_embeddings=True)
STATES = Alignment(layers="even", count=2, distance="l2", projection="linear", weight=10.0)
MAPS = Attention(kind="maps", weight=1.0)
FULL = replace(OUTPUTS, temperature=FALLING, alignment=STATES, attention=MAPS)
RECIPES = {
    "cross-entropy": replace(OUTPUTS, divergence_weight=0.0),
    "outputs": OUTPUTS,
    "outputs, T 5": replace(OUTPUTS, temperature=Temperature(start=5.0, end=5.0)),
    "outputs, T 5 to 1": replace(OUTPUTS, temperature=FALLING),
    "outputs and states": replace(OUTPUTS, alignment=STATES),
    "outputs and attention": replace(OUTPUTS, attention=MAPS),
    "full recipe": FULL,
}
CLAIMED = ("cross-entropy", "outputs", "outputs, T 5 to 1", "full recipe")
# The recipe that is quantised, with and without quantisation-aware distillation, and the grids: bits and groups. Group
# 0 is a whole row.
QUANTISED = "outputs"
GRIDS = tuple((bits, group) for group in (0, 32, 64) for bits in (8, 4, 3, 2))


def sweep_cases() -> dict[str, Distillation]:
    """Return the variants among which the recipes' values are the best."""

    def full(rate: float, states: float, maps: float) -> Distillation:
        alignment, attention = replace(STATES, weight=states), replace(MAPS, weight=maps)
        return replace(FULL, learning_rate=rate, alignment=alignment, attention=attention)

    found = {}
    for rate in (5e-4, 1e-3, 2e-3):
        for name in ("cross-entropy", "outputs"):
            found[f"{name}, rate {rate:g}"] = replace(RECIPES[name], learning_rate=rate)
        found[f"full recipe, rate {rate:g}"] = full(rate, 1.0, 1.0)
    for states, maps in ((0.1, 0.1), (1.0, 0.1), (10.0, 1.0)):
        found[f"full recipe, states {states:g}, attention {maps:g}"] = full(1e-3, states, maps)
    return found


def quantized(bits: int, group: int) -> Deployment:
    """Return symmetric integers as compressed-tensors packs them. The tied table of tokens stays in 16 bits."""
    finishing = Finishing(format="compressed-tensors", bits=bits, group_size=group)
    return Deployment(runtime=serving(finishing)[0], format="compressed-tensors", bits=bits, group_size=group)


def mean(values: list[float]) -> str:
    """Return mean and standard error in percent. For one value, there is no error."""
    return over_seeds.mean(values, 2, factor=100)


def verdict(values: list[float]) -> str:
    """Describe the mean of paired differences. It is clear if chance would cause it less than once in twenty times."""
    return f"{mean(values)} points, {'a clear' if over_seeds.is_clear(values) else 'no clear'} difference"


class Findings:
    """The lines of the claims, by case, packing and seed."""

    def __init__(self, lines: list[Line], teacher_exact: float, teacher_accuracy: float) -> None:
        self.exact, self.accuracy = teacher_exact, teacher_accuracy
        self._lines = {(one.case, one.packing, one.aware, one.seed): one for one in lines}

    def of(self, case: str, packing: str = DEPLOYMENT.name, aware: bool = False) -> dict[int, Line]:
        """Return the lines of a case by seed."""
        wanted = (case, packing, aware)
        return {seed: line for (*key, seed), line in sorted(self._lines.items()) if tuple(key) == wanted}

    def less(self, case: str, base: str) -> list[float]:
        """Return by how much a case is better than another, for the seeds that both have."""
        found, other = self.of(case), self.of(base)
        return [found[seed].exact_match - other[seed].exact_match for seed in sorted(found.keys() & other.keys())]

    def lost(self, case: str) -> str:
        """Return the exact match that a case lost against the teacher."""
        return mean([self.exact - line.exact_match for line in self.of(case).values()])

    def retention(self, line: Line) -> float:
        """Return the share of the teacher's exact match, or NaN if the teacher answers nothing."""
        return line.exact_match / self.exact if self.exact else math.nan

    def retained(self, bits: int, group: int) -> tuple[list[float], list[float]]:
        """Return the retention of the teacher's exact match on a grid, without and with training on it, by seed."""
        name = quantized(bits, group).name
        sides = self.of(QUANTISED, name), self.of(QUANTISED, name, True)
        both = sorted(sides[0].keys() & sides[1].keys())
        without, with_it = ([self.retention(side[seed]) for seed in both] for side in sides)
        return without, with_it

    def summary(self) -> list[str]:
        """Return sentences that compare the findings with what is often quoted."""
        sentences = [
            f"Lost against the teacher, in points of exact match: outputs alone {self.lost('outputs')} (often quoted: "
            f"8), the full recipe {self.lost('full recipe')} (often quoted: at most 3), cross-entropy without the "
            f"teacher {self.lost('cross-entropy')}.",
            f"The full recipe less outputs alone: {verdict(self.less('full recipe', 'outputs'))}.",
            f"The full recipe less outputs alone at the same falling temperature: "
            f"{verdict(self.less('full recipe', 'outputs, T 5 to 1'))}.",
            f"Outputs and hidden states less outputs alone: {verdict(self.less('outputs and states', 'outputs'))}.",
            f"Outputs and attention less outputs alone: {verdict(self.less('outputs and attention', 'outputs'))}.",
            f"Outputs alone less cross-entropy: {verdict(self.less('outputs', 'cross-entropy'))}.",
            f"A temperature that falls from 5 to 1 less one that stays at 1: "
            f"{verdict(self.less('outputs, T 5 to 1', 'outputs'))}.",
            f"A temperature that stays at 5 less one that stays at 1: {verdict(self.less('outputs, T 5', 'outputs'))}.",
            f"A temperature that falls from 5 to 1 less one that stays at 5: "
            f"{verdict(self.less('outputs, T 5 to 1', 'outputs, T 5'))}.",
        ]
        for bits, group in GRIDS:
            if group == 0:
                without, with_it = self.retained(bits, group)
                gain = [after - before for before, after in zip(without, with_it, strict=True)]
                sentences.append(
                    f"{bits} bits, whole rows: retention {mean(without)}% without and {mean(with_it)}% with training "
                    f"on the grid, {verdict(gain)}{' (often quoted: 72% and 89%)' if bits == 8 else ''}."
                )
        return sentences

    def recipes(self, cases: list[str], base: str) -> str:
        """Return the table of each recipe's loss against the teacher, and its paired difference from another's."""
        rows = []
        for case in cases:
            found = self.of(case)
            if not found:
                continue
            rows.append(
                [
                    case,
                    len(found),
                    mean([line.exact_match for line in found.values()]),
                    self.lost(case),
                    "" if case == base else mean(self.less(case, base)),
                    mean([line.accuracy for line in found.values()]),
                    mean([self.accuracy - line.accuracy for line in found.values()]),
                ]
            )
        titles = ["recipe", "seeds", "exact match, %", "lost, points", f"less {base}", "next token, %", "lost, points"]
        return report.table(titles, rows)

    def quantization(self) -> str:
        """Return the table of the retention without and with the grid in training, by bits and groups."""
        plain = self.of(QUANTISED)
        kept = [self.retention(line) for line in plain.values()]
        rows = [["16", "", len(kept), mean(kept), "", "", "", ""]]
        for bits, group in sorted(GRIDS, key=lambda grid: (-grid[0], grid[1] or math.inf)):
            name = quantized(bits, group).name
            without, with_it = self.retained(bits, group)
            if not without:
                continue
            gain = [after - before for before, after in zip(without, with_it, strict=True)]
            tokens = [
                mean([line.accuracy for line in self.of(QUANTISED, name, aware).values()]) for aware in (False, True)
            ]
            rows.append([bits, group or "row", len(gain), mean(without), mean(with_it), mean(gain), *tokens])
        titles = ["bits", "group", "seeds", "retention without, %", "with, %", "gain, points"]
        return report.table([*titles, "next token without, %", "with, %"], rows)


def write_report(bench: Bench, teacher: MathTeacher) -> Path:
    """Ask the teacher the questions that its students were asked, and write the report."""
    model = load_model(teacher.folder, torch.float32)
    measured = ask(model, teacher.spec, teacher.test.head(math_students.QUESTIONS * LENGTH)).measurements
    exact, accuracy = measured["exact_match"], measured["accuracy"]
    tokens, asked = math_students.TOKENS, math_students.QUESTIONS
    lines = [line for line in bench.lines if (line.tokens, line.questions) == (tokens, asked)]
    found = Findings([line for line in lines if line.study == "claims"], exact.value, accuracy.value)
    swept = [line for line in lines if line.study == "sweep"]
    sweep = [[line.case, f"{line.exact_match:.3f}", f"{line.accuracy:.4f}"] for line in swept]
    head = (
        f"Teacher: {teacher.spec.parameters:,} weights in {teacher.spec.layers} layers, trained by `math_teacher.py`; "
        f"on {asked} test questions that it never saw it answers {exact.value:.1%} ± {exact.stderr:.1%} by "
        f"reasoning-gym's own marks, and {accuracy.value:.2%} of the answers' tokens. Students: {INIT.depth:.0%} of "
        f"the layers, {tokens:,} training tokens ({tokens // LENGTH:,} questions), float32, one core. Figures are "
        "means over seeds and their standard errors; differences are paired by seed. A seed decides which questions a "
        "student learns from, and in which order; all are asked the same test questions. So few tokens leave every "
        "student short of its teacher: the losses compare recipes at this budget, and are no limits of any of them. "
        "A row of fewer seeds is what the time allowed, and of one seed no finding. Alignments and constructions on "
        "the 135M teacher: the reports `alignments` and `student-init`."
    )
    temperatures = [name for name in RECIPES if name == "outputs" or name.startswith("outputs, T")]
    return report.write(
        "claims",
        "Often-quoted figures, on sums",
        [
            head,
            "## What was found\n\n" + "\n".join(f"- {sentence}" for sentence in found.summary()),
            "## What each recipe loses\n\nOften quoted: output-only distillation loses 8% of accuracy on math, the "
            "full recipe at most 3%.",
            found.recipes([name for name in RECIPES if name != "outputs, T 5"], "outputs"),
            "## Temperature\n\nOften quoted: 5 falling to 1.",
            found.recipes(temperatures, "outputs"),
            "## Quantisation\n\nOften quoted: retention after INT8 rises from 72% to 89% by quantisation-aware "
            f'distillation. Students of the recipe "{QUANTISED}", symmetric integers with absmax scales; with it, the '
            "decay (the last fifth of the same tokens) was trained on the grid.",
            found.quantization(),
            "## The sweep\n\nOn validation questions, one seed that is none of the above. The full recipe, which has "
            "weights of its own, was given twice as many variants to choose from.",
            report.table(["variant", "exact match", "next token"], sweep),
        ],
        program.REPORTS / math_students.STORE,
    )


def make(bench: Bench, seeds: Sequence[int]) -> None:
    """Train and judge all claims. The recipes in `CLAIMED` come first, in case the time ends."""
    for seed, case in itertools.product(seeds, CLAIMED):
        bench.judge("claims", case, RECIPES[case], seed)
    for (bits, group), seed, aware in itertools.product(GRIDS, seeds, (False, True)):
        bench.judge("claims", QUANTISED, RECIPES[QUANTISED], seed, quantized(bits, group), aware)
    for seed, case in itertools.product(seeds, RECIPES):
        bench.judge("claims", case, RECIPES[case], seed)


def main() -> None:
    """Train and measure what the claims need and write the report, or do only one part of this."""
    parser = program.parser_of(__doc__, seeds=5, time=True)
    parser.add_argument("--sweep", action="store_true", help="only the choice of rates and weights")
    parser.add_argument("--report", action="store_true", help="only the report of what is there")
    arguments = program.parse(parser, seeds=1)
    if arguments.smoke:
        math_students.make_small()
    torch.set_num_threads(1)
    keep_freed_memory()
    deadline = time.monotonic() + arguments.time
    teacher = math_teacher(arguments.time)
    if teacher is None:
        sys.exit("the teacher is not trained yet: call again")
    bench = Bench(teacher, RECIPES.values(), deadline)
    try:
        if arguments.sweep:
            for case, recipe in sweep_cases().items():
                bench.judge("sweep", case, recipe, SWEEP_SEED)
        elif not arguments.report:
            make(bench, range(arguments.seeds))
    except TimeoutError:
        sys.exit("the time is over: call again for the rest")
    if not arguments.sweep:
        print(write_report(bench, teacher))


if __name__ == "__main__":
    main()

"""The guide's claims on a math task: what recipes lose against their teacher, temperatures, what quantisation takes.

    python benchmarks/claims.py [--time 5m] [--seeds 5] [--sweep] [--report]

The teacher is that of `math_teacher.py`; students begin as three of its four layers and learn from a part of its
training questions, another one for each seed, at equal tokens. Learning rates and weights come from `--sweep`, on
validation questions with a seed of its own; everything else is judged on test questions. Each finished figure is a line
of `reports/claims.jsonl`; what is there is not made again, and a time box ends after the figure at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
import torch
from math_teacher import DEPLOYMENT, LENGTH, MathTeacher, ask, math_plan, math_teacher

from autodistill.distillation.alignment import layer_map
from autodistill.distillation.attention import TeacherBlock, teacher_layer
from autodistill.distillation.memory import keep_freed_memory
from autodistill.distillation.signals import LiveTeacher
from autodistill.distillation.student import build_student, init_spec, kept_layers
from autodistill.distillation.teacher import load_model
from autodistill.distillation.teacher_cache import CacheSettings, TeacherCache, ensure_cache
from autodistill.distillation.trainer import Trainer, branch_point
from autodistill.formats import Grid
from autodistill.search.request import default_cache
from autodistill.strategy import (
    Alignment,
    Attention,
    Deployment,
    Distillation,
    Finishing,
    Init,
    Strategy,
    Temperature,
    serving,
)
from autodistill.units import parse_duration

STORE = report.REPORTS / "claims.jsonl"
BATCH = 32 * LENGTH
TOKENS = 400 * BATCH
QUESTIONS = 500
# Questions of all seeds' students together; those of one are drawn from them.
SEQUENCES = 40_000
SWEEP_SEED = 100

INIT = Init(depth=0.75)
CONSTANT, FALLING = Temperature(), Temperature(shape="linear", start=5.0, end=1.0)
# A cache of so many tokens holds all of the vocabulary: the divergence is exact.
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
# What is quantised, with and without quantisation-aware distillation: bits and groups, of which 0 is a whole row.
QUANTISED = "outputs"
GRIDS = ((8, 32), (8, 0), *((bits, group) for bits in (4, 3, 2) for group in (32, 64, 0)))


def sweep_cases() -> dict[str, Distillation]:
    """Variants of which the recipes' values are the best."""

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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One judged student.

    Attributes:
        study: "sweep" or "claims".
        case: Name of the recipe.
        seed: Of the choice and order of questions.
        packing: How it is packed.
        aware: Whether the decay was trained on this grid.
        exact_match, accuracy: Of answers written, and of their next tokens given those before.
        tokens: Trained on.
        seconds: That training took.
    """

    study: str
    case: str
    seed: int
    packing: str
    aware: bool
    exact_match: float
    accuracy: float
    tokens: int
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What is not made twice."""
        return self.study, self.case, self.seed, self.packing, self.aware, self.tokens


class Bench:
    """Trains and judges students of the math teacher, and keeps what is found."""

    def __init__(self, teacher: MathTeacher, deadline: float) -> None:
        self._teacher = teacher
        self._deadline = deadline
        self._data = teacher.train.head(SEQUENCES * LENGTH)
        self._cache = TeacherCache(self._ensure_cache())
        self._block = TeacherBlock(load_model(teacher.folder, torch.float32), teacher_layer(MAPS, teacher.spec.layers))
        self.lines = [Line(**json.loads(text)) for text in STORE.read_text().splitlines()] if STORE.exists() else []
        self._done = {line.key for line in self.lines}

    def _ensure_cache(self) -> Path:
        layers = self._teacher.spec.layers
        states = {pair.teacher_state for pair in layer_map(STATES, kept_layers(INIT, layers), layers)}
        states.add(teacher_layer(MAPS, layers) - 1)
        return ensure_cache(
            lambda: load_model(self._teacher.folder, torch.float32),
            teacher_fingerprint=self._teacher.folder.name,
            data_fingerprint=self._teacher.data_fingerprint,
            data=self._data,
            vocabulary=self._teacher.spec.vocabulary,
            width=self._teacher.spec.width,
            settings=CacheSettings.for_recipes(RECIPES.values(), states, bf16=False),
            root=default_cache() / "math-outputs",
            limit_bytes=4 * 10**9,
        )

    def has(self, *key: Any) -> bool:
        """Whether a figure is there, by the fields of its key but the tokens."""
        return (*key, TOKENS) in self._done

    def trainer(self, recipe: Distillation, seed: int) -> Trainer:
        """A student before its first step."""
        model, kept = build_student(self._teacher.folder, INIT)
        return Trainer(
            model,
            kept=kept,
            teacher_layers=self._teacher.spec.layers,
            teacher_width=self._teacher.spec.width,
            strategy=Strategy(init=INIT, distillation=recipe),
            plan=math_plan(TOKENS, batch=BATCH, warmup=TOKENS // 20),
            data=self._data,
            cache=self._cache,
            teacher_block=self._block if recipe.attention else None,
            seed=seed,
            teacher=LiveTeacher(self._teacher.folder),
        )

    def judge(
        self, study: str, case: str, seed: int, trainer: Trainer, deployment: Deployment, aware: bool, seconds: float
    ) -> None:
        """Asks a trained student and writes a line.

        Raises:
            TimeoutError: The time box is over, after the line is written.
        """
        data = self._teacher.validation if study == "sweep" else self._teacher.test
        spec = init_spec(INIT, self._teacher.spec)
        figures = ask(trainer.model, spec, data.head(QUESTIONS * LENGTH), deployment).measurements
        line = Line(
            study=study,
            case=case,
            seed=seed,
            packing=deployment.name,
            aware=aware,
            exact_match=figures["exact_match"].value,
            accuracy=figures["accuracy"].value,
            tokens=TOKENS,
            seconds=round(seconds, 1),
        )
        with STORE.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        self.lines.append(line)
        self._done.add(line.key)
        how = " (trained so)" if aware else ""
        print(
            f"{case}, seed {seed}, {line.packing}{how}: exact match {line.exact_match:.3f}, next token "
            f"{line.accuracy:.4f}, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if time.monotonic() > self._deadline:
            raise TimeoutError

    def recipe(self, study: str, case: str, recipe: Distillation, seed: int) -> None:
        """Trains by one recipe and judges the student in 16 bits, if that is not yet done."""
        if self.has(study, case, seed, DEPLOYMENT.name, False):
            return
        began = time.monotonic()
        trainer = self.trainer(recipe, seed)
        exhaust(trainer.train_stable(branch_point(TOKENS, 0.2, BATCH)))
        exhaust(trainer.train_decay(TOKENS))
        self.judge(study, case, seed, trainer, DEPLOYMENT, False, time.monotonic() - began)

    def _grids(self, deployment: Deployment) -> dict[str, Grid]:
        storages = {tensor.name: deployment.storage(tensor) for tensor in init_spec(INIT, self._teacher.spec).tensors}
        return {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}

    def quantise(self, seed: int) -> None:
        """Judges one student in 16 bits and on each grid, and those of its stable part whose decay was on the grid."""
        grids = [quantised(bits, group) for bits, group in GRIDS]
        wanted = [(one, False) for one in (DEPLOYMENT, *grids)] + [(one, True) for one in grids]
        missing = [one for one in wanted if not self.has("claims", QUANTISED, seed, one[0].name, one[1])]
        if not missing:
            return
        checkpoint = default_cache() / "math-outputs" / f"stable-{seed}.safetensors"
        stable = self.trainer(RECIPES[QUANTISED], seed)
        exhaust(stable.train_stable(branch_point(TOKENS, 0.2, BATCH)))
        stable.save(checkpoint)
        exhaust(stable.train_decay(TOKENS))
        for deployment, aware in missing:
            began, trainer = time.monotonic(), stable
            if aware:
                trainer = self.trainer(RECIPES[QUANTISED], seed)
                trainer.load(checkpoint)
                exhaust(trainer.train_decay(TOKENS, self._grids(deployment).get))
            self.judge("claims", QUANTISED, seed, trainer, deployment, aware, time.monotonic() - began)
        checkpoint.unlink()


def exhaust(records: Iterator[Any]) -> None:
    """Trains to the end."""
    for _ in records:
        pass


def quantised(bits: int, group: int) -> Deployment:
    """Symmetric integers as compressed-tensors packs them; the tied table of tokens stays in 16 bits."""
    finishing = Finishing(format="compressed-tensors", bits=bits, group_size=group)
    return Deployment(runtime=serving(finishing)[0], format="compressed-tensors", bits=bits, group_size=group)


def mean(values: list[float], scale: float = 100.0) -> str:
    """Mean and standard error, in percent."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{scale * np.mean(values):.2f} ± {scale * error:.2f}"


class Findings:
    """The lines of the claims, by case, packing and seed."""

    def __init__(self, lines: list[Line], teacher_exact: float, teacher_accuracy: float) -> None:
        self.exact, self.accuracy = teacher_exact, teacher_accuracy
        self._lines = {(one.case, one.packing, one.aware, one.seed): one for one in lines if one.tokens == TOKENS}

    def of(self, case: str, packing: str = DEPLOYMENT.name, aware: bool = False) -> dict[int, Line]:
        """By seed."""
        wanted = (case, packing, aware)
        return {seed: line for (*key, seed), line in sorted(self._lines.items()) if tuple(key) == wanted}

    def recipes(self, cases: list[str], base: str) -> str:
        """What each recipe loses against the teacher, and how its exact match differs from another's, by seed."""
        rows = []
        other = self.of(base)
        for case in cases:
            found = self.of(case)
            both = sorted(found.keys() & other.keys())
            difference = [found[seed].exact_match - other[seed].exact_match for seed in both]
            rows.append(
                [
                    case,
                    len(found),
                    mean([line.exact_match for line in found.values()]),
                    mean([self.exact - line.exact_match for line in found.values()]),
                    "" if case == base else mean(difference),
                    mean([line.accuracy for line in found.values()]),
                    mean([self.accuracy - line.accuracy for line in found.values()]),
                ]
            )
        titles = ["recipe", "seeds", "exact match, %", "lost, points", f"less {base}", "next token, %", "lost, points"]
        return report.table(titles, rows)

    def quantisation(self) -> str:
        """Retention of the teacher's exact match without and with the grid in training, by bits and groups."""
        plain = self.of(QUANTISED)
        kept = [line.exact_match / self.exact for line in plain.values()]
        rows = [["16", "", len(kept), mean(kept), "", "", "", ""]]
        for bits, group in GRIDS:
            name = quantised(bits, group).name
            sides = self.of(QUANTISED, name), self.of(QUANTISED, name, True)
            both = sorted(sides[0].keys() & sides[1].keys())
            without, with_it = ([side[seed].exact_match / self.exact for seed in both] for side in sides)
            gain = [after - before for before, after in zip(without, with_it, strict=True)]
            tokens = [mean([side[seed].accuracy for seed in both]) for side in sides]
            rows.append([bits, group or "row", len(both), mean(without), mean(with_it), mean(gain), *tokens])
        titles = ["bits", "group", "seeds", "retention without, %", "with, %", "gain, points"]
        return report.table([*titles, "next token without, %", "with, %"], rows)


def write_report(bench: Bench, teacher: MathTeacher) -> Path:
    """Asks the teacher the questions that its students were asked, and writes the report."""
    model = load_model(teacher.folder, torch.float32)
    measured = ask(model, teacher.spec, teacher.test.head(QUESTIONS * LENGTH)).measurements
    exact, accuracy = measured["exact_match"], measured["accuracy"]
    found = Findings([line for line in bench.lines if line.study == "claims"], exact.value, accuracy.value)
    swept = [line for line in bench.lines if line.study == "sweep"]
    sweep = [[line.case, f"{line.exact_match:.3f}", f"{line.accuracy:.4f}"] for line in swept]
    head = (
        f"Teacher: {teacher.spec.parameters:,} weights in {teacher.spec.layers} layers, trained by `math_teacher.py`; "
        f"on {QUESTIONS} test questions that it never saw it answers {exact.value:.1%} ± {exact.stderr:.1%} by "
        f"reasoning-gym's own marks, and {accuracy.value:.2%} of the answers' tokens. Students: {INIT.depth:.0%} of "
        f"the layers, {TOKENS:,} training tokens ({TOKENS // LENGTH:,} questions), float32, one core. Figures are "
        "means over seeds and their standard errors; differences are paired by seed. A seed decides which questions a "
        "student learns from, and in which order; all are asked the same test questions."
    )
    temperatures = [name for name in RECIPES if name == "outputs" or name.startswith("outputs, T")]
    return report.write(
        "claims",
        "The guide's claims, on sums",
        [
            head,
            "## What each recipe loses\n\nThe guide: output-only distillation loses 8% of accuracy on math, the full "
            "recipe at most 3%.",
            found.recipes([name for name in RECIPES if name not in temperatures[1:]], "outputs"),
            "## Temperature\n\nThe guide: 5 falling to 1.",
            found.recipes(temperatures, "outputs"),
            "## Quantisation\n\nThe guide: retention after INT8 rises from 72% to 89% by quantisation-aware "
            f'distillation. Students of the recipe "{QUANTISED}", symmetric integers with absmax scales; with it, the '
            "decay (the last fifth of the same tokens) was trained on the grid.",
            found.quantisation(),
            "## The sweep\n\nOn validation questions, one seed that is none of the above.",
            report.table(["variant", "exact match", "next token"], sweep),
        ],
    )


def main() -> None:
    """Makes what is missing, as far as the time box goes, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=parse_duration, default=float("inf"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="only the choice of rates and weights")
    parser.add_argument("--report", action="store_true", help="only the report of what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    deadline = time.monotonic() + arguments.time
    teacher = math_teacher(arguments.time)
    if teacher is None:
        sys.exit("the teacher is not trained yet: call again")
    bench = Bench(teacher, deadline)
    try:
        if arguments.sweep:
            for case, recipe in sweep_cases().items():
                bench.recipe("sweep", case, recipe, SWEEP_SEED)
        elif not arguments.report:
            for seed in range(arguments.seeds):
                bench.quantise(seed)
                for case, recipe in RECIPES.items():
                    bench.recipe("claims", case, recipe, seed)
    except TimeoutError:
        sys.exit("the time is over: call again for the rest")
    if not arguments.sweep:
        print(write_report(bench, teacher))


if __name__ == "__main__":
    main()

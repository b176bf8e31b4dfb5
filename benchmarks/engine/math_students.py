"""Trains students of the math teacher, judges them on unseen questions, and stores each figure as a line of a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodistill.distillation.losses.attention import TeacherBlock, teacher_layer
from autodistill.distillation.losses.hidden_states import layer_map
from autodistill.distillation.student.build import build_student, init_spec, kept_layers
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.trainer import Trainer
from autodistill.models.loading import load_model
from autodistill.options import cache_folder
from autodistill.quantization.grids import Grid
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common import math_teacher, program, report
from benchmarks.common.math_table import exhaust
from benchmarks.common.math_teacher import DEPLOYMENT, LENGTH, MathTeacher, ask, math_plan

STORE = "claims.jsonl"
INIT = Init(depth=0.75)
BATCH = 32 * LENGTH
TOKENS = 400 * BATCH
QUESTIONS = 500
# Questions of the students of all seeds together. Those of one seed are drawn from them.
SEQUENCES = 40_000


def make_small() -> None:
    """Train the small teacher, and set few tokens and questions for students, in this process."""
    global TOKENS, QUESTIONS
    TOKENS, QUESTIONS = 10 * BATCH, 20
    math_teacher.make_small()


@dataclass(frozen=True, kw_only=True)
class Line:
    """One judged student.

    Attributes:
        study: "sweep" or "claims".
        case: Name of the recipe.
        seed: Seed of the choice and order of questions.
        packing: Name of the deployment.
        aware: Whether the decay was trained on this grid.
        exact_match, accuracy: Shares of correct written answers, and of correct next tokens given those before.
        tokens: Training tokens.
        questions: Number of questions asked.
    """

    study: str
    case: str
    seed: int
    packing: str
    aware: bool
    exact_match: float
    accuracy: float
    tokens: int
    questions: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that identify a line."""
        return self.study, self.case, self.seed, self.packing, self.aware, self.tokens, self.questions


class Bench:
    """Trains and judges students of the math teacher, and keeps the results."""

    def __init__(self, teacher: MathTeacher, recipes: Iterable[Distillation], deadline: float) -> None:
        self._teacher = teacher
        self._recipes = tuple(recipes)
        self._deadline = deadline
        self._data = teacher.train.head(SEQUENCES * LENGTH)
        self._cache = TeacherCache(self._ensure_cache())
        self.lines = [Line(**line) for line in report.lines_of(program.REPORTS / STORE)]
        self._done = {line.key for line in self.lines}

    def _ensure_cache(self) -> Path:
        layers = self._teacher.spec.layers
        kept = kept_layers(INIT, layers)
        aligned = [recipe.alignment for recipe in self._recipes if recipe.alignment]
        states = {pair.teacher_state for alignment in aligned for pair in layer_map(alignment, kept, layers)}
        states |= {teacher_layer(recipe.attention, layers) - 1 for recipe in self._recipes if recipe.attention}
        return ensure_cache(
            lambda: load_model(self._teacher.folder, torch.float32),
            teacher_fingerprint=self._teacher.folder.name,
            data_fingerprint=self._teacher.data_fingerprint,
            data=self._data,
            vocabulary=self._teacher.spec.vocabulary,
            width=self._teacher.spec.width,
            settings=CacheSettings.for_recipes(self._recipes, states, bf16=False),
            root=cache_folder() / "math-outputs",
            limit_bytes=4 * 10**9,
        )

    def _new(self, recipe: Distillation, seed: int, name: str) -> tuple[Trainer, Path]:
        """Return a student before its first step, or as saved under a name, and the file of that name."""
        model, kept = build_student(self._teacher.folder, INIT)
        block = None
        if recipe.attention:
            layer = teacher_layer(recipe.attention, self._teacher.spec.layers)
            block = TeacherBlock(load_model(self._teacher.folder, torch.float32), layer)
        strategy = Strategy(init=INIT, distillation=recipe)
        trainer = Trainer(
            model,
            teaching=Teaching(
                kept_layers=kept,
                layers=self._teacher.spec.layers,
                width=self._teacher.spec.width,
                cache=self._cache,
                block=block,
                live=LiveTeacher(self._teacher.folder),
            ),
            strategy=strategy,
            plan=math_plan(TOKENS, batch=BATCH, warmup=TOKENS // 20),
            data=self._data,
            seed=seed,
        )
        folder = cache_folder() / "math-students" / f"{self._teacher.folder.name}-{strategy.stable_id}-{TOKENS}"
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / f"{seed}-{name}.safetensors"
        if checkpoint.exists():
            trainer.load(checkpoint)
        return trainer, checkpoint

    def trained(self, recipe: Distillation, seed: int) -> Trainer:
        """Return a student at the end of its training. It is kept on disk."""
        trainer, checkpoint = self._new(recipe, seed, "trained")
        if not checkpoint.exists():
            trainer = self._stable(recipe, seed)
            exhaust(trainer.train_decay(TOKENS))
            trainer.save(checkpoint)
        return trainer

    def trained_on(self, recipe: Distillation, seed: int, deployment: Deployment) -> Trainer:
        """Return a student of the same stable part, whose decay was trained on a deployment's grid."""
        trainer = self._stable(recipe, seed)
        storages = {tensor.name: deployment.storage(tensor) for tensor in init_spec(INIT, self._teacher.spec).tensors}
        grids = {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}
        exhaust(trainer.train_decay(TOKENS, grids.get))
        return trainer

    def _stable(self, recipe: Distillation, seed: int) -> Trainer:
        trainer, checkpoint = self._new(recipe, seed, "stable")
        if not checkpoint.exists():
            exhaust(trainer.train_stable(branch_point(TOKENS, 0.2, BATCH)))
            trainer.save(checkpoint)
        return trainer

    def judge(
        self,
        study: str,
        case: str,
        recipe: Distillation,
        seed: int,
        deployment: Deployment = DEPLOYMENT,
        aware: bool = False,
    ) -> None:
        """Train a student, ask it the questions and write a line, unless this is already done.

        Args:
            study, case: Names.
            recipe: The recipe that trains it.
            seed: Seed of its questions.
            deployment: How it is packed.
            aware: Whether its decay is trained on that grid.

        Raises:
            TimeoutError: The time budget ended; the line was written before.
        """
        if (study, case, seed, deployment.name, aware, TOKENS, QUESTIONS) in self._done:
            return
        trainer = self.trained_on(recipe, seed, deployment) if aware else self.trained(recipe, seed)
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
            questions=QUESTIONS,
        )
        report.add_line(program.REPORTS / STORE, line)
        self.lines.append(line)
        self._done.add(line.key)
        how = " (trained so)" if aware else ""
        print(
            f"{case}, seed {seed}, {line.packing}{how}: exact match {line.exact_match:.3f}, "
            f"next token {line.accuracy:.4f}",
            file=sys.stderr,
            flush=True,
        )
        if time.monotonic() > self._deadline:
            raise TimeoutError

"""The students that are trained at several rates, and their small teachers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.student.check import probe_deployment, student_spec
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import TrialFailedError
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.search.construction.recipe import first_prior
from autodistill.search.prior.range_test import STEPS, HeldOut, train_briefly
from autodistill.search.prior.tried_rates import (
    FACTOR,
)
from autodistill.search.worker.begin import initial_student
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialTask
from autodistill.search.worker.trial import trainer_of
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.space import load_space
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json
from benchmarks.common import debian_texts, trials
from benchmarks.common.plans import straight_plan
from benchmarks.search.small_teacher import described
from benchmarks.search.small_teacher import small_teacher as language_model

FAMILIES, WIDTHS = ("llama", "qwen3", "gemma3_text"), (32, 64, 128)
# Layers, FFN neurons relative to the width, and vocabulary of a small teacher, and its training.
LAYERS, FFN, VOCABULARY, LENGTH, BATCH = 4, 4, 300, 64, 512
TEACHER_STEPS, TEACHER_RATE = 300, 3e-3
SHORT, LONG = (8,), 64
Q4_0 = Finishing(format="gguf-q4_0", bits=4, group_size=32)
SHAPES = {"whole": Init(depth=1.0), "narrow": Init(depth=1.0, ffn=0.5)}
RECIPE = Distillation(divergence_weight=0.25)
# The rates are the first one times powers of `FACTOR`. The first is the rule's for small students, and the prior's for
# SmolLM2's.
POWERS = (-2, -1, 0, 1)
SMOLLM2_POWERS = (-1, 0, 1)
SMOLLM2_FIRST = {"whole": 1e-4, "narrow": 3e-4}
# The small language model learns a manual through the scales of its codes alone, as a search trains it.
SMALL_LM_POWERS, SMALL_LM_SHORT, SMALL_LM_LONG, SMALL_LM_TEXT = (-1, 0, 1, 2, 3), (12, 48), 400, "postgresql"
BY_SCALES = Strategy(
    init=Init(depth=1.0), distillation=Distillation(divergence_weight=0.0), finishing=replace(Q4_0, scales="alone")
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One student of one teacher.

    Attributes:
        name: The case's name.
        first: The rate that a test begins with.
        powers: Powers of `FACTOR` that give the rates to train at.
        short, steps: Steps of the short trainings, and of the long one.
        shape: Name of the student's shape.
        teacher: Family and width of a small teacher, or None for SmolLM2 and the small language model.
        folder: Folder of the small language model.
        seed: Seed of data order, and of a small teacher.
    """

    name: str
    first: float
    powers: tuple[int, ...]
    short: tuple[int, ...]
    steps: int
    shape: str
    teacher: tuple[str, int] | None = None
    folder: Path | None = None
    seed: int = 0

    @property
    def kind(self) -> str:
        """The teacher and the shape, in words."""
        if self.folder is not None:
            return "small language model, scales alone"
        return f"{'SmolLM2' if self.teacher is None else 'small'}, {self.shape}"

    @property
    def strategy(self) -> Strategy:
        """The strategy that is trained."""
        if self.folder is not None:
            return BY_SCALES
        return Strategy(init=SHAPES[self.shape], distillation=RECIPE, finishing=Q4_0)


def cases(seeds: int, long: int) -> list[Case]:
    """Return small students of each family and width, alternately whole and narrow. Every other seed swaps the two.

    Rates begin with the rule 2e-4 x 576 / width.
    """
    found = []
    places = list(enumerate(itertools.product(range(len(WIDTHS)), range(len(FAMILIES)))))
    # The first three cases cover all widths and all families.
    places.sort(key=lambda item: ((item[1][0] - item[1][1]) % len(FAMILIES), item[0]))
    for seed in range(seeds):
        for place, (width, family) in places:
            shape = list(SHAPES)[(place + seed) % 2]
            one = Case(
                name=f"{FAMILIES[family]}-{WIDTHS[width]} {shape}, seed {seed}",
                first=2e-4 * 576 / WIDTHS[width],
                powers=POWERS,
                short=SHORT,
                steps=long,
                shape=shape,
                teacher=(FAMILIES[family], WIDTHS[width]),
                seed=seed,
            )
            found.append(one)
    return found


def smollm2_cases() -> list[Case]:
    """Return SmolLM2 unchanged on a grid, and with half of its FFN neurons."""
    return [
        Case(
            name=f"smollm2 {shape}",
            first=SMOLLM2_FIRST[shape],
            powers=SMOLLM2_POWERS,
            short=(STEPS,),
            steps=LONG,
            shape=shape,
        )
        for shape in SHAPES
    ]


def small_lm_case() -> Case:
    """Return the small language model, as far as it is trained, on a grid."""
    folder = language_model()
    spec = spec_from_config(read_json(folder / "config.json"))
    return Case(
        name=f"{described(folder).partition(' tokens')[0]} tokens, {SMALL_LM_TEXT}",
        first=first_prior(spec, batch_tokens=256, steps=SMALL_LM_LONG).recipe.learning_rate,
        powers=SMALL_LM_POWERS,
        short=SMALL_LM_SHORT,
        steps=SMALL_LM_LONG,
        shape="whole",
        folder=folder,
    )


def small_teacher(family: str, width: int, seed: int, steps: int) -> tuple[Path, Path]:
    """Return a small model trained on a small text, and the folder of another text for its students."""
    cache = cache_folder() / "benchmarks" / "range-test"
    text, other = (tiny_text(cache / f"text-{kind}", documents=240, sentences=10, seed=kind) for kind in (1, 2))
    key = content_hash([family, width, seed, steps, LAYERS, FFN, VOCABULARY, TEACHER_RATE])
    folder = cache / key
    if folder.exists():
        return folder, other
    start = save_tiny_teacher(
        cache / f"{key}-start",
        architecture=family,
        layers=LAYERS,
        width=width,
        heads=4,
        kv_heads=2,
        ffn=FFN * width,
        vocabulary=VOCABULARY,
        seed=seed,
    )
    data = prepare(resolve_data(str(text)), start, tokenizer_fingerprint(start), LENGTH, cache)
    strategy = Strategy(
        init=Init(depth=1.0),
        distillation=Distillation(
            divergence_weight=0.0, learning_rate=TEACHER_RATE * 64 / width, train_embeddings=True
        ),
    )
    model, kept = build_student(start, strategy.init)
    trainer = Trainer(
        model,
        teaching=Teaching(kept_layers=kept, layers=LAYERS, width=width),
        strategy=strategy,
        plan=straight_plan(
            steps * BATCH,
            sequence_length=LENGTH,
            batch_tokens=BATCH,
            micro_batch=BATCH // LENGTH,
            warmup_tokens=10 * BATCH,
        ),
        data=load_split(data.folder, "train"),
        seed=seed,
    )
    for _ in trainer.train_stable(steps * BATCH * 4 // 5):
        pass
    for _ in trainer.train_decay(steps * BATCH):
        pass
    save_student(model, start, folder)
    return folder, other


class Student:
    """A student before training, in memory. Every training starts again from there.

    Args:
        bench: Has the teacher, its outputs and the text.
        case: The student's case.
        tokens: Validation tokens that are read.
    """

    def __init__(self, bench: Workbench, case: Case, tokens: int) -> None:
        setting = bench.setting
        self._plan, self._first = setting.plan, case.first
        self._strategy = case.strategy
        self._spec = student_spec(self._strategy, setting.teacher_spec)
        deployment = probe_deployment(self._strategy, load_space("default").deployments)
        task = TrialTask(id="x", strategy=self._strategy, seed=case.seed, deployments=(deployment,), probe=deployment)
        model, kept = initial_student(setting, self._strategy.init, case.seed)
        self._weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        self._make = partial(trainer_of, bench, task, model, kept)
        self._held = HeldOut(model, self._spec, bench.held_out(tokens)[0], deployment, "cpu")

    def before(self) -> dict[str, Any]:
        """Return the tokens and nats of each held-out document before training."""
        return {"counts": self._held.counts, "sums": self._held.sums(None)}

    def after(self, power: int, steps: int) -> list[float] | None:
        """Return the nats of each held-out document after training, or None if they are not finite."""
        with torch.no_grad():
            for parameter, values in self._weights:
                parameter.copy_(values)
        rate = self._first * FACTOR**power
        try:
            _, scales = train_briefly(self._make, self._strategy, self._plan, self._spec, rate, steps)
        except TrialFailedError:
            return None
        found = self._held.sums(scales)
        return None if found is None else list(found)


@contextmanager
def opened(case: Case, teacher_steps: int, eval_tokens: int) -> Iterator[Student]:
    """Yield the student of a case."""
    batch, length, teacher, data = 256, 256, "smollm2", "pydoc"
    if case.folder is not None:
        teacher, data = str(case.folder), str(debian_texts.debian_texts().folder / SMALL_LM_TEXT)
    elif case.teacher is not None:
        folder, text = small_teacher(*case.teacher, case.seed, teacher_steps)
        batch, length, teacher, data = BATCH, LENGTH, str(folder), str(text)
    tokens = case.steps * batch
    request = trials.request_of(teacher, data, tokens=tokens, step_tokens=batch, context=length, length=length)
    with trials.ready(request, {"x": case.strategy}, 2, eval_tokens) as (setting, _):
        # A step takes all its sequences at once, which trains small models faster.
        plan = replace(setting.plan, micro_batch=batch // length, threads=1)
        yield Student(Workbench(replace(setting, plan=plan)), case, eval_tokens)

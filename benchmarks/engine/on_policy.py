"""Is a last phase on the student's own answers worth its time, against distillation from the text and labels alone?

    python -m benchmarks.engine.on_policy [--seeds 3] [--teacher-steps 600] [--steps 60] [--time 20m]

The task is sums of three digits, worked out step by step. A teacher of two layers is trained here. Its students have
one of them, and are trained on the same questions in the same order. Except in the first arm, the loss is half labels
and half forward KL from the live teacher. The decay is the last two fifths of the steps. "On policy" means that the
student writes its answers itself in the decay, or in its second half, and the teacher judges them by reverse KL. An
arm's cost is CPU seconds on one core. The last arm is distilled from the text for as many seconds as the phase takes.
Measurements are kept, and the same command continues them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.trainer import Trainer
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.strategy.recipe import Distillation, OnPolicy
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json
from benchmarks.common import math_teacher, program, report
from benchmarks.common.math_teacher import MathTeacher, ask
from benchmarks.common.plans import straight_plan

SIZE = 20000  # in questions
TASK = "reasoning-gym:chain_sum?size={size}&seed=11&min_terms=3&max_terms=3&min_digits=1&max_digits=1"
# The longest record has 29 tokens, so a sequence holds one record.
LENGTH = 30
SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 192}
BATCH = 64 * LENGTH
DECAY = 0.4
TAUGHT = Distillation(
    divergence_weight=0.5, signal="online", signal_tokens=0, learning_rate=1e-3, train_embeddings=True
)
PHASE = OnPolicy(share=0.5, length=20)
ARMS: Mapping[str, Distillation] = {
    "labels alone": replace(TAUGHT, divergence_weight=0.0),
    "from the text": TAUGHT,
    "on policy in half of the decay": replace(TAUGHT, on_policy=PHASE),
    "on policy in the decay": replace(TAUGHT, on_policy=replace(PHASE, share=1.0)),
}
BASE, TESTED, WHOLE = "from the text", "on policy in half of the decay", "on policy in the decay"
LONGER = "from the text, for as many seconds"
INIT = Init(depth=0.5)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained student.

    Attributes:
        steps, seconds: Steps and CPU seconds of its training, on one core.
        exact_match, accuracy: Shares of written answers and of next tokens that are correct, on unseen questions.
    """

    steps: int
    seconds: float
    exact_match: float
    accuracy: float


def teacher_of(steps: int, size: int, shape: Mapping[str, Any] = SHAPE) -> MathTeacher:
    """Return the teacher of a shape. It is trained if it does not exist yet."""
    task = TASK.format(size=size)
    cache = cache_folder()
    key = content_hash([shape, task, LENGTH, BATCH, steps])
    folder, start = (cache / "teachers" / f"sums-{key}{end}" for end in ("", "-start"))
    math_teacher.new_model(start, shape)
    prepared = prepare(resolve_data(task), start, tokenizer_fingerprint(start), LENGTH, cache)
    train, validation, test = (load_split(prepared.folder, split) for split in prepared.splits)
    made = MathTeacher(
        folder=folder,
        spec=spec_from_config(read_json(start / "config.json")),
        data=prepared.folder,
        data_fingerprint=prepared.fingerprint,
        train=train,
        validation=validation,
        test=test,
    )
    if not folder.exists():
        recipe = replace(math_teacher.RECIPE.distillation, signal="online", signal_tokens=0)
        model, kept = build_student(start, Init(depth=1.0))
        trainer = _trainer(made, model, kept, recipe, steps, seed=0)
        _run(trainer, steps)
        save_student(model, start, folder)
    return made


def _plan(steps: int) -> Plan:
    warmup = min(20, steps // 4) * BATCH
    fields = {"warmup_tokens": warmup, "decay": DECAY, "micro_batch": BATCH // LENGTH}
    return straight_plan(steps * BATCH, sequence_length=LENGTH, batch_tokens=BATCH, **fields)


def _trainer(
    made: MathTeacher, model: Any, kept: tuple[int, ...], recipe: Distillation, steps: int, seed: int
) -> Trainer:
    return Trainer(
        model,
        teaching=Teaching(
            kept_layers=kept, layers=made.spec.layers, width=made.spec.width, live=LiveTeacher(made.folder)
        ),
        strategy=Strategy(init=INIT, distillation=recipe),
        plan=_plan(steps),
        data=made.train,
        seed=seed,
    )


def _run(trainer: Trainer, steps: int) -> None:
    branch = branch_point(steps * BATCH, DECAY, BATCH)
    for records in (trainer.train_stable(branch), trainer.train_decay(steps * BATCH)):
        for record in records:
            done = record.tokens // BATCH
            if done % 100 == 0:
                print(f"step {done}: loss {record.loss:.4f}", file=sys.stderr, flush=True)


def trained(made: MathTeacher, recipe: Distillation, steps: int, seed: int, questions: int) -> dict[str, Any]:
    """Train one student, and ask it the questions. Return a `Trained` as plain data."""
    model, kept = build_student(made.folder, INIT)
    trainer = _trainer(made, model, kept, recipe, steps, seed)
    began = time.process_time()
    _run(trainer, steps)
    seconds = time.process_time() - began
    return asdict(Trained(steps=steps, seconds=seconds, **asked(made, model, questions)))


def asked(made: MathTeacher, model: Any, questions: int) -> dict[str, float]:
    """Return the shares of unseen questions that a model answers, and of their next tokens."""
    spec = spec_from_config(model.config.to_dict())
    found = ask(model, spec, made.test.head(questions * LENGTH)).measurements
    return {name: found[name].value for name in ("exact_match", "accuracy")}


def main() -> None:
    """Train what is missing, and write the report."""
    parser = program.parser_of(__doc__, seeds=3, time=True)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60, help="of a student")
    parser.add_argument("--questions", type=int, default=240, help="that each student is asked")
    parser.add_argument("--size", type=int, default=SIZE, help="of the task, in questions")
    arguments = program.parse(parser, seeds=2, teacher_steps=6, steps=10, questions=20, size=2000)
    torch.set_num_threads(1)
    keep_freed_memory()
    made = teacher_of(arguments.teacher_steps, arguments.size)
    source = content_hash([made.folder.name, {name: one.to_json() for name, one in ARMS.items()}, arguments.questions])
    kept = report.Kept("on-policy", source, arguments.time)
    ask_teacher = partial(asked, made, load_model(made.folder, torch.float32), arguments.questions)
    of_teacher = kept.get("the teacher", ask_teacher)
    found: dict[str, list[Trained]] = {}
    for seed in range(arguments.seeds):
        for name in (*ARMS, LONGER):
            steps = arguments.steps
            if name == LONGER:
                mine, other = (found[arm][seed].seconds for arm in (TESTED, BASE))
                steps = max(steps, round(steps * mine / other))
            make = partial(trained, made, ARMS.get(name, TAUGHT), steps, seed, arguments.questions)
            one = Trained(**kept.get(f"{name}, {arguments.steps} steps, seed {seed}", make))
            found.setdefault(name, []).append(one)
            print(f"seed {seed}, {name}: {one}", file=sys.stderr, flush=True)
    title = "A last phase on what the student writes itself"
    print(report.write("on-policy", title, sections(found, of_teacher, arguments.questions)))


def sections(found: Mapping[str, list[Trained]], of_teacher: Mapping[str, float], questions: int) -> list[str]:
    """Return the report's text and table."""
    base = found[BASE]
    share = float(np.mean([one.exact_match for one in base]))

    def gain(name: str, key: str) -> tuple[float, float]:
        """Return how many points an arm is above the text, and the standard error over seeds."""
        pairs = zip(found[name], base, strict=True)
        gains = [100 * (getattr(one, key) - getattr(other, key)) for one, other in pairs]
        return float(np.mean(gains)), float(np.std(gains, ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0

    lines = []
    for name, students in found.items():
        above, error = gain(name, "exact_match")
        means = [float(np.mean([getattr(one, key) for one in students])) for key in ("exact_match", "accuracy")]
        lines.append(
            [
                name,
                f"{np.mean([one.steps for one in students]):.0f}",
                f"{np.mean([one.seconds for one in students]):.1f}",
                *(f"{100 * value:.2f}" for value in means),
                "" if name == BASE else f"{above:+.2f} ± {error:.2f}",
            ]
        )
    (half, half_error), (whole, whole_error) = (gain(name, "accuracy") for name in (TESTED, WHOLE))
    return [
        f"The teacher answers {100 * of_teacher['exact_match']:.2f}% exactly. {len(base)} seeds, each with the same "
        f"questions in the same order for all arms, paired by it; steps of {BATCH:,} tokens, seconds of one core. ± is "
        "a standard error over seeds. The arms but the last have equal tokens; the last has equal seconds with "
        f'"{TESTED}". All seeds are asked the same {questions} questions: by these alone an exact match is uncertain '
        f"by {100 * math.sqrt(share * (1 - share) / questions):.1f} points, which ± leaves out.",
        report.table(["student", "steps", "s", "exact match, %", "next token, %", "exact match over the text"], lines),
        "Next tokens on policy less those from the text, at equal tokens: "
        f"{half:+.2f} ± {half_error:.2f} points in half of the decay, {whole:+.2f} ± {whole_error:.2f} in all of it.",
    ]


if __name__ == "__main__":
    main()

"""Are cut FFNs better repaired by training each block alone than by least squares, and does the gain last?

    python -m benchmarks.engine.heal [--teacher sums|smollm2] [--ffn 0.75] [--seeds 2] [--steps 60] [--time 20m]

A cut block gets the input of its teacher's block. All of its weights are trained with AdamW to give that block's
output. The blocks are trained one after another. It is compared with the repair that AutoDistill uses: the last matrix
of each FFN is fitted by least squares on the same text. KL from the teacher on held-out text shows the value of each
repair without training. Then students are distilled, all in the same way. The seconds that the repair took are
subtracted from the steps. Seconds are CPU seconds on one core. Measurements are kept, and the same command continues
them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import cut_student
from autodistill.distillation.teacher.importance import PartImportance, measure_importance
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.trainer import Trainer
from autodistill.inference.blocks import embedded, one_block, through_block
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import decoder_layers, load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common import program, report
from benchmarks.common.plans import straight_plan
from benchmarks.engine import on_policy

# By teacher: tokens of a sequence, sequences of a distillation step, its rate, and rates of a block's training.
SETTINGS: Mapping[str, tuple[int, int, float, tuple[float, ...]]] = {
    "sums": (on_policy.LENGTH, 64, 1e-3, (3e-4, 1e-3, 3e-3)),
    "smollm2": (256, 1, 1e-4, (1e-4, 3e-4)),
}
PLAIN, FITTED = "as cut", "least squares"


class Bench:
    """A teacher, its text, and its cut students.

    Args:
        folder: The teacher's folder.
        train, test: Texts.
        sequences: Training sequences on which blocks are repaired.
        held_out: Test sequences on which students are judged.
    """

    def __init__(self, folder: Path, train: TokenSet, test: TokenSet, sequences: int, held_out: int) -> None:
        self.folder, self.train = folder, train
        self.teacher = load_model(folder, torch.float32)
        self.spec = spec_from_config(self.teacher.config.to_dict())
        self.importance = replace_text(measure_importance(self.teacher, train), train, sequences)
        self._test, self._answers = (
            test.tokens[:held_out],
            None if test.scored is None else test.scored[:held_out, 1:].copy(),
        )
        self._log_p = [self._scores(self.teacher, row) for row in self._test]

    def student(self, ffn: float, *, repair: bool) -> Any:
        """Return a student with a share of each FFN, repaired by least squares or as it was cut."""
        return cut_student(self.teacher, Init(depth=1.0, ffn=ffn, repair=repair), self.importance)[0]

    def kl(self, student: Any) -> float:
        """Return the KL from the teacher, in nats per held-out token."""
        found = []
        for place, (row, log_p) in enumerate(zip(self._test, self._log_p, strict=True)):
            each = (log_p.exp() * (log_p - self._scores(student, row))).sum(-1)
            found.append(each if self._answers is None else each[torch.from_numpy(self._answers[place])])
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def _scores(self, model: Any, row: Any) -> Tensor:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        return torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)


def replace_text(importance: PartImportance, train: TokenSet, sequences: int) -> PartImportance:
    """Return the importances with the first sequences of a text, on which students are repaired."""
    return replace(importance, text=torch.from_numpy(train.tokens[:sequences].copy()))


def heal(bench: Bench, student: Any, rate: float, steps: int, batch: int) -> None:
    """Train each block of a student alone to give its teacher block's output.

    Args:
        bench: Has the teacher and the text.
        student: A student with as many layers as the teacher; it is changed in place.
        rate: Rate of AdamW; it falls linearly to 0.
        steps: Steps for each block.
        batch: Sequences of a step.
    """
    states = embedded(bench.teacher, bench.importance.text.numpy())
    for index in range(bench.spec.layers):
        after = [one.after for one in through_block(bench.teacher, index, states)]
        parameters = list(decoder_layers(student)[index].parameters())
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        # The loss is relative to what the block adds to its input, as only this can be lost.
        size = torch.cat([new - old for new, old in zip(after, states, strict=True)]).square().mean()
        with one_block(student, index) as run:
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
                places = [(step * batch + one) % len(states) for one in range(batch)]
                given, wanted = (torch.cat([some[place] for place in places]) for some in (states, after))
                loss = (run(given) - wanted).square().mean() / size
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        states = after


def distilled(bench: Bench, student: Any, name: str, steps: int, seed: int) -> None:
    """Distil a student, half from labels and half from its teacher."""
    length, sequences, rate, _ = SETTINGS[name]
    batch = sequences * length
    plan = straight_plan(
        steps * batch, sequence_length=length, batch_tokens=batch, micro_batch=sequences, warmup_tokens=2 * batch
    )
    recipe = Distillation(signal="online", signal_tokens=0, learning_rate=rate)
    trainer = Trainer(
        student,
        teaching=Teaching(
            kept_layers=tuple(range(bench.spec.layers)),
            layers=bench.spec.layers,
            width=bench.spec.width,
            live=LiveTeacher(bench.folder),
        ),
        strategy=Strategy(init=Init(depth=1.0), distillation=recipe),
        plan=plan,
        data=bench.train,
        seed=seed,
    )
    for records in (
        trainer.train_stable(branch_point(plan.tokens, plan.decay, batch)),
        trainer.train_decay(plan.tokens),
    ):
        for _ in records:
            pass


def repaired(bench: Bench, how: str, ffn: float, local: Sequence[Any]) -> tuple[Any, float]:
    """Return a student, and the seconds that its repair took in addition to the cut.

    Args:
        bench: Has the teacher.
        how: `PLAIN`, `FITTED`, or the name of an arm whose blocks are trained.
        ffn: Share of each FFN.
        local: That arm's settings: its start (`PLAIN` or `FITTED`), rate, steps and sequences of a step.
    """
    began = time.process_time()
    student = bench.student(ffn, repair=how == FITTED or (bool(local) and local[0] == FITTED))
    if local:
        heal(bench, student, *local[1:])
    return student, time.process_time() - began


def measured(bench: Bench, name: str, how: str, ffn: float, local: Sequence[Any], steps: int, seeds: int) -> Any:
    """Return the KL untrained, and for each seed after a distillation.

    The caller chooses `steps` so that repair and distillation together take as long in all arms.
    """
    student, seconds = repaired(bench, how, ffn, local)
    found = {"seconds": seconds, "untrained": bench.kl(student), "steps": steps, "distilled": []}
    weights = {key: value.clone() for key, value in student.state_dict().items()}
    for seed in range(seeds if steps else 0):
        student.load_state_dict(weights)
        began = time.process_time()
        distilled(bench, student, name, steps, seed)
        found["step_seconds"] = (time.process_time() - began) / steps
        found["distilled"].append(bench.kl(student))
    return found


def main() -> None:
    """Measure what is missing, and write the report."""
    parser = program.parser_of(__doc__, seeds=2, time=True)
    parser.add_argument("--teacher", choices=tuple(SETTINGS), default="sums")
    parser.add_argument("--ffn", type=float, default=0.75, help="share of each FFN that is kept")
    parser.add_argument("--steps", type=int, default=60, help="of a student's distillation; 0 for none")
    parser.add_argument("--local", default="8,32", help="steps for each block")
    parser.add_argument("--sequences", type=int, help="of the text that blocks are repaired on")
    parser.add_argument("--data", default="pydoc", help="text of smollm2")
    parser.add_argument("--teacher-steps", type=int, default=600, help="of the teacher of sums")
    arguments = program.parse(parser, seeds=1, steps=4, local="2", sequences=8, teacher_steps=4)
    torch.set_num_threads(1)
    keep_freed_memory()
    name, ffn = arguments.teacher, arguments.ffn
    length, _, _, rates = SETTINGS[name]
    size = arguments.sequences or (256 if name == "sums" else 8)
    bench = _bench(name, arguments, size, length)
    source = content_hash([bench.folder.name, name, ffn, size, arguments.data])
    kept = report.Kept("heal", source, arguments.time)
    arms: dict[str, tuple[Any, ...]] = {PLAIN: (), FITTED: ()}
    batch = min(16, size) if name == "sums" else 1
    for start in (PLAIN, FITTED):
        for steps in map(int, arguments.local.split(",")):
            for rate in rates:
                arms[f"trained from {start}, {steps} steps at {rate:g}"] = (start, rate, steps, batch)
    found: dict[str, Any] = {}
    for arm, local in arms.items():
        found[arm] = kept.get(f"{arm}, untrained", partial(measured, bench, name, arm, ffn, local, 0, 0))
        print(f"{arm}: {found[arm]['untrained']:.4f} nats, {found[arm]['seconds']:.1f} s", file=sys.stderr, flush=True)
    # Least squares, the plain cut and the best trained arm are distilled, all in the same seconds.
    trained = [arm for arm, local in arms.items() if local]
    best = min(trained, key=lambda arm: found[arm]["untrained"])
    longer: dict[str, Any] = {}
    if arguments.steps:
        for arm in (FITTED, PLAIN, best):
            steps = arguments.steps
            if arm != FITTED:
                over = found[arm]["seconds"] - found[FITTED]["seconds"]
                steps = max(5, steps - round(over / longer[FITTED]["step_seconds"]))
            key = f"{arm}, {arguments.steps} steps, {arguments.seeds} seeds"
            make = partial(measured, bench, name, arm, ffn, arms[arm], steps, arguments.seeds)
            longer[arm] = kept.get(key, make)
            print(f"{arm}: {longer[arm]}", file=sys.stderr, flush=True)
    title = "Cut FFNs: repaired by least squares, or by training each block"
    print(report.write(f"heal-{name}-{100 * ffn:g}", title, _sections(name, arguments, size, length, found, longer)))


def _bench(name: str, arguments: Any, size: int, length: int) -> Bench:
    if name == "sums":
        made = on_policy.teacher_of(arguments.teacher_steps, 2000 if arguments.smoke else on_policy.SIZE)
        return Bench(made.folder, made.train, made.test, size, 200)
    teacher = materialize(resolve_teacher(name), cache_folder())
    source = resolve_data(arguments.data)
    prepared = prepare(source, teacher.folder, tokenizer_fingerprint(teacher.folder), length, cache_folder())
    train, test = (load_split(prepared.folder, split) for split in ("train", "test"))
    return Bench(teacher.folder, train, test, size, 3)


def _sections(
    name: str, arguments: Any, size: int, length: int, found: Mapping[str, Any], longer: Mapping[str, Any]
) -> list[str]:
    lines = []
    for arm, one in found.items():
        after = longer.get(arm)
        told = "" if after is None else f"{np.mean(after['distilled']):.4f}"
        steps = "" if after is None else str(after["steps"])
        line = [arm, f"{one['seconds']:.1f}", f"{one['untrained']:.4f}", steps, told]
        lines.append(line[: 5 if longer else 3])
    return [
        f"Teacher: {name}; {100 * arguments.ffn:g}% of each FFN; repaired on {size * length:,} tokens of training "
        "text. KL from the teacher in nats a held-out token, and seconds of one core."
        + (
            f" After a distillation that takes with the repair as many seconds as {arguments.steps} steps after least "
            f"squares: the mean of {arguments.seeds} seeds."
            if longer
            else ""
        ),
        report.table(["repair", "s", "KL untrained", "steps", "KL distilled"][: 5 if longer else 3], lines),
    ]


if __name__ == "__main__":
    main()

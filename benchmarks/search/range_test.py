"""Which learning rate do a few steps choose for a longer training, and what is lost against the best rate at its end?

    python -m benchmarks.search.range_test [--seeds 2] [--cases NAME ...] [--time 10m]

Students of small teachers of three families and three widths, and of SmolLM2 with --cases, are trained for some steps,
and for many more, at rates from far too low to far too high. Rules that know the short trainings alone then
choose a rate. The students of sums are those that `math_table` recorded. What is measured is kept, and the same command
goes on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.student.check import probe_deployment, student_spec
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import TrialFailedError
from autodistill.hardware.budget import Budget
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.runs.run_folder import default_cache
from autodistill.search.prior.range_test import (
    FACTOR,
    STEPS,
    HeldOut,
    TriedRate,
    choose,
    next_rate,
    paired,
    train_briefly,
)
from autodistill.search.request.request import SearchRequest
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialTask
from autodistill.search.worker.trial import initial_student, trainer_of
from autodistill.strategy.space import load_space
from autodistill.strategy.strategy import Distillation, Finishing, Init, Strategy
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.hashing import content_hash
from benchmarks.common import report, trials
from benchmarks.common.plans import straight_plan
from benchmarks.common.program import parse, parser_of

FAMILIES, WIDTHS = ("llama", "qwen3", "gemma3_text"), (32, 64, 128)
# The layers and the vocabulary of a small teacher, and how it is trained.
LAYERS, VOCABULARY, LENGTH, BATCH = 4, 300, 64, 512
TEACHER_STEPS, TEACHER_RATE = 300, 3e-3
SHORT, LONG = (8, 16), 64
Q4_0 = Finishing(format="gguf-q4_0", bits=4, group_size=32)
SHAPES = {"whole": Init(depth=1.0), "narrow": Init(depth=1.0, ffn=0.5)}
RECIPE = Distillation(divergence_weight=0.25)
# Rates are the prior's times powers of `FACTOR`.
POWERS = (-4, -3, -2, -1, 0, 1)
SMOLLM2_POWERS = (-3, -2, -1, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One student of one teacher.

    Attributes:
        name: What it is called.
        first: The rate that a test begins with.
        powers: Of `FACTOR`, the rates that are trained.
        short, steps: Of the short trainings, and of the long one.
        shape: Of the student.
        teacher: Family and width of a small teacher; None for SmolLM2.
        seed: Of data order, and of a small teacher.
    """

    name: str
    first: float
    powers: tuple[int, ...]
    short: tuple[int, ...]
    steps: int
    shape: str
    teacher: tuple[str, int] | None = None
    seed: int = 0


def cases(seeds: int, long: int) -> list[Case]:
    """The small students; rates begin with the rule 2e-4 x 576 / width."""
    return [
        Case(
            name=f"{family}-{width} {shape}, seed {seed}",
            first=2e-4 * 576 / width,
            powers=POWERS,
            short=SHORT,
            steps=long,
            shape=shape,
            teacher=(family, width),
            seed=seed,
        )
        for seed in range(seeds)
        for width in WIDTHS
        for family in FAMILIES
        for shape in SHAPES
    ]


def smollm2_cases() -> list[Case]:
    """SmolLM2 as it is on a grid, and with half of its FFN neurons."""
    return [
        Case(name=f"smollm2 {shape}", first=2e-4, powers=SMOLLM2_POWERS, short=(STEPS,), steps=LONG, shape=shape)
        for shape in SHAPES
    ]


def small_teacher(family: str, width: int, seed: int, steps: int) -> tuple[Path, Path]:
    """A small model trained on a small text, and the folder of another text, on which its students are trained."""
    cache = default_cache() / "benchmarks" / "range-test"
    text, other = (tiny_text(cache / f"text-{kind}", documents=240, sentences=10, seed=kind) for kind in (1, 2))
    key = content_hash([family, width, seed, steps, LAYERS, VOCABULARY, TEACHER_RATE])
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
        ffn=2 * width,
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
        kept=kept,
        teacher_layers=LAYERS,
        teacher_width=width,
        strategy=strategy,
        plan=straight_plan(
            steps * BATCH,
            sequence_length=LENGTH,
            batch_tokens=BATCH,
            micro_batch=BATCH // LENGTH,
            warmup_tokens=10 * BATCH,
        ),
        data=load_split(data.folder, "train"),
        cache=None,
        seed=seed,
    )
    for _ in trainer.train_stable(steps * BATCH * 4 // 5):
        pass
    for _ in trainer.train_decay(steps * BATCH):
        pass
    save_student(model, start, folder)
    return folder, other


class Student:
    """A student before training, in memory, that is trained from there again and again.

    Args:
        bench: With the teacher, its outputs and the text.
        case: Which.
        tokens: Of validation that are read.
    """

    def __init__(self, bench: Workbench, case: Case, tokens: int) -> None:
        setting = bench.setting
        self._plan, self._first = setting.plan, case.first
        self._strategy = Strategy(init=SHAPES[case.shape], distillation=RECIPE, finishing=Q4_0)
        self._spec = student_spec(self._strategy, setting.teacher_spec)
        deployment = probe_deployment(self._strategy, load_space("default").deployments)
        task = TrialTask(id="x", strategy=self._strategy, seed=case.seed, deployments=(deployment,), probe=deployment)
        model, kept = initial_student(setting, self._strategy.init, case.seed)
        self._weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        self._make = partial(trainer_of, bench, task, model, kept)
        self._held = HeldOut(model, self._spec, bench.held_out(tokens)[0], deployment, "cpu")

    def before(self) -> dict[str, Any]:
        """Tokens and nats of each held-out document before training."""
        return {"counts": self._held.counts, "sums": self._held.sums(None)}

    def after(self, power: int, steps: int) -> list[float] | None:
        """Nats of each held-out document after training; None where these are not finite."""
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
    """A case's student, ready to be trained."""
    batch, length, teacher, data = 256, 256, "smollm2", "pydoc"
    if case.teacher is not None:
        folder, text = small_teacher(*case.teacher, case.seed, teacher_steps)
        batch, length, teacher, data = BATCH, LENGTH, str(folder), str(text)
    strategy = Strategy(init=SHAPES[case.shape], distillation=RECIPE, finishing=Q4_0)
    request = SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=length),
        teacher=teacher,
        data=data,
        trials=1,
        tokens=case.steps * batch,
        step_tokens=batch,
        sequence_length=length,
        runner="inline",
        name="trials",
    )
    with trials.ready(request, {"x": strategy}, 2, eval_tokens) as (setting, _):
        # All sequences of a step at once, which small models are trained faster with.
        plan = replace(setting.plan, micro_batch=batch // length, threads=1)
        yield Student(Workbench(replace(setting, plan=plan)), case, eval_tokens)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a case's trainings came to.

    Attributes:
        case: Which.
        counts, before: Tokens and nats of each held-out document, before training.
        after: Nats of each document by steps and power; None where they are not finite.
    """

    case: Case
    counts: list[int]
    before: list[float]
    after: Mapping[tuple[int, int], list[float] | None]

    def tried(self, steps: int) -> list[TriedRate]:
        """The trainings of so many steps as a range test has them."""
        found = []
        for power in self.case.powers:
            sums = self.after[steps, power]
            gain, stderr = paired(self.counts, self.before, sums) if sums else (None, None)
            rate = self.case.first * FACTOR**power
            found.append(TriedRate(rate=rate, gain=gain, stderr=stderr, sums=tuple(sums or ()), seconds=0.0))
        return found

    def gain(self, rate: float) -> float:
        """Nats per token that the long training wins at a rate; between two rates on a line over its logarithm."""
        known = [(math.log(one.rate), one.gain) for one in self.tried(self.case.steps) if one.gain is not None]
        rates, gains = zip(*known, strict=True)
        return float(np.interp(math.log(rate), rates, gains)) if math.log(rate) <= rates[-1] + 1e-9 else -math.inf

    @property
    def most(self) -> float:
        """The gain of the best rate."""
        return max(one.gain for one in self.tried(self.case.steps) if one.gain is not None)


def measured(case: Case, kept: report.Kept, teacher_steps: int, eval_tokens: int) -> Found:
    """What a case's trainings come to; what is known is not measured again."""
    students: list[Student] = []
    with ExitStack() as stack:

        def get(key: str, make: Callable[[Student], Any]) -> Any:
            def made() -> Any:
                if not students:
                    students.append(stack.enter_context(opened(case, teacher_steps, eval_tokens)))
                print(f"{case.name}: {key}", file=sys.stderr, flush=True)
                return make(students[0])

            return kept.get(f"{case.name}: {key}", made)

        before = get("before", lambda student: student.before())
        wanted = [(steps, power) for steps in (*case.short, case.steps) for power in case.powers]
        after = {
            (steps, power): get(f"{steps} steps, power {power}", lambda student, p=power, s=steps: student.after(p, s))
            for steps, power in wanted
        }
    return Found(case=case, counts=before["counts"], before=before["sums"], after=after)


Rule = Callable[[Sequence[TriedRate], Sequence[int], float], float]


def _best(tried: Sequence[TriedRate]) -> int:
    return max(range(len(tried)), key=lambda place: -math.inf if tried[place].gain is None else tried[place].gain)


def below(tried: Sequence[TriedRate], factor: float) -> float:
    """The rate of the lowest NLL, divided by a factor, no less than the smallest."""
    return max(tried[0].rate, tried[_best(tried)].rate / factor)


def not_clearly_worse(tried: Sequence[TriedRate], counts: Sequence[int], pick: Callable[..., float]) -> float:
    """Of the rates that are within a standard error of the lowest NLL, the smallest or the largest."""
    best = tried[_best(tried)]

    def near(one: TriedRate) -> bool:
        if not one.sums:
            return False
        gap, error = paired(counts, one.sums, best.sums)
        return gap <= (error or 0.0)

    return pick(one.rate for one in tried if near(one))


def top(tried: Sequence[TriedRate], longer: float, power: float) -> float:
    """The top of the parabola, moved by a power of the length."""
    return choose(tried, longer, power)


RULES: dict[str, Rule] = {
    "lowest NLL": lambda tried, counts, longer: below(tried, 1.0),
    "half a step below": lambda tried, counts, longer: below(tried, FACTOR**0.5),
    "one step below": lambda tried, counts, longer: below(tried, FACTOR),
    "two steps below": lambda tried, counts, longer: below(tried, FACTOR**2),
    "largest not clearly worse": lambda tried, counts, longer: not_clearly_worse(tried, counts, max),
    "smallest not clearly worse": lambda tried, counts, longer: not_clearly_worse(tried, counts, min),
    "top of the parabola": lambda tried, counts, longer: top(tried, longer, 0.0),
    "top, by length to -0.2": lambda tried, counts, longer: top(tried, longer, -0.2),
    "top, by length to -0.4": lambda tried, counts, longer: top(tried, longer, -0.4),
    "top, by length to -0.6": lambda tried, counts, longer: top(tried, longer, -0.6),
}


def adaptive(found: Found, steps: int) -> list[TriedRate]:
    """The rates that the product's range test would try, of those that were trained."""
    known = {round(math.log(one.rate / found.case.first, FACTOR)): one for one in found.tried(steps)}
    tried: list[TriedRate] = []
    while (rate := next_rate(found.case.first, tried, found.counts)) is not None:
        power = round(math.log(rate / found.case.first, FACTOR))
        if power not in known:
            break
        tried.append(known[power])
    return tried


def main() -> None:
    """Measures what is not known yet, and writes the report."""
    parser = parser_of(__doc__, seeds=1, time=True)
    parser.add_argument("--smollm2", action="store_true", help="students of SmolLM2 too: some 20 minutes of a core")
    parser.add_argument("--steps", type=int, default=LONG, help="of a long training of a small student")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="of a small teacher's training")
    parser.add_argument("--eval-tokens", type=int, default=4096, help="held-out tokens that are read")
    arguments = parse(parser, steps=16, teacher_steps=4, eval_tokens=256)
    torch.set_num_threads(1)
    keep_freed_memory()
    wanted = cases(arguments.seeds, arguments.steps)
    if arguments.smoke:
        wanted = [replace(wanted[0], powers=(-1, 0, 1), short=(4,))]
    wanted += smollm2_cases() if arguments.smollm2 else []
    source = content_hash(
        [RECIPE.to_json(), Q4_0.to_json(), BATCH, LENGTH, arguments.teacher_steps, arguments.eval_tokens]
    )
    kept = report.Kept("range-test", source, arguments.time)
    found = [measured(case, kept, arguments.teacher_steps, arguments.eval_tokens) for case in wanted]
    for one in found:
        n = sum(one.counts)
        print(
            one.case.name,
            sum(one.before) / n,
            {k: (None if v is None else round((sum(one.before) - sum(v)) / n, 4)) for k, v in one.after.items()},
        )


if __name__ == "__main__":
    main()

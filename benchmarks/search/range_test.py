"""Which learning rate do a few steps choose for a longer training, and what is lost against the best rate at its end?

    python -m benchmarks.search.range_test [--seeds 1] [--smollm2 whole narrow] [--small-lm] [--time 10m]

Students are trained for some steps, and for many more, at rates from far too low to far too high. Their teachers are
small ones of three families and three widths, SmolLM2 with --smollm2, and the small language model with --small-lm.
Rules that only see the short trainings then choose a rate. The students of sums are those that `math_table` recorded.
Measurements are kept, and the same command continues them.
"""

from __future__ import annotations

import itertools
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
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import TrialFailedError
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.search.construction.recipe import first_prior
from autodistill.search.prior.range_test import STEPS, HeldOut, train_briefly
from autodistill.search.prior.tried_rates import (
    FACTOR,
    HORIZON,
    HORIZON_OF_SCALES,
    TriedRate,
    choose,
    next_rate,
    paired,
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
from benchmarks.common import debian_texts, math_table, report, trials
from benchmarks.common.math_search import STEP
from benchmarks.common.math_table import Line
from benchmarks.common.plans import straight_plan
from benchmarks.common.program import parse, parser_of, token_count
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


@dataclass(frozen=True, kw_only=True)
class Found:
    """The results of a student's trainings.

    Attributes:
        kind: The group in which rules are compared.
        name: The student's name.
        first: The rate that a test begins with.
        steps: Steps of the long training.
        counts: Tokens of each held-out document; empty if they were not kept.
        tried: By steps, the rates as in a range test, ascending.
        power: Power of the training's length by which the range test assumes that the best rate falls.
    """

    kind: str
    name: str
    first: float
    steps: int
    counts: Sequence[int]
    tried: Mapping[int, Sequence[TriedRate]]
    power: float = HORIZON

    @property
    def ends(self) -> list[TriedRate]:
        """The rates that were trained to the end and did not diverge."""
        return [one for one in self.tried[self.steps] if one.gain is not None]

    def gain(self, rate: float) -> float:
        """Return the nats per token that the long training gains at a rate.

        Between two rates the gain is interpolated linearly over the rate's logarithm.
        """
        rates, gains = zip(*((math.log(one.rate), one.gain) for one in self.ends), strict=True)
        return float(np.interp(math.log(rate), rates, gains))

    @property
    def most(self) -> float:
        """The gain at the best rate."""
        return max(one.gain or 0.0 for one in self.ends)

    def lost(self, rate: float) -> float:
        """Return the nats per token that a rate loses against the best."""
        return self.most - self.gain(rate)

    def below(self, rate: float) -> float:
        """Return how many standard errors the long training at a rate ends below the untrained student.

        It is 0 if the training ends above it.
        """
        near = min(self.ends, key=lambda one: abs(math.log(one.rate / rate)))
        return max(0.0, -self.gain(rate)) / (near.stderr or math.inf)


def measured(case: Case, kept: report.Kept, teacher_steps: int, eval_tokens: int) -> Found:
    """Return the results of a case's trainings. Known results are not measured again."""
    students: list[Student] = []
    with ExitStack() as stack:

        def get(key: str, make: Callable[[Student], Any]) -> Any:
            """Return what is kept under a key, or make it now with the one student of this case."""

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
    tried = {}
    for steps in (*case.short, case.steps):
        tried[steps] = [_tried(case.first * FACTOR**power, before, after[steps, power]) for power in case.powers]
    return Found(
        kind=case.kind,
        name=case.name,
        first=case.first,
        steps=case.steps,
        counts=before["counts"],
        tried=tried,
        power=HORIZON_OF_SCALES if case.strategy.scales_alone else HORIZON,
    )


def _tried(rate: float, before: Mapping[str, Any], sums: list[float] | None) -> TriedRate:
    gain, stderr = paired(before["counts"], before["sums"], sums) if sums else (None, None)
    return TriedRate(rate=rate, gain=gain, stderr=stderr, sums=tuple(sums or ()), seconds=0.0)


def of_sums() -> list[Found]:
    """Return the recorded students of sums that have all four rates. The logarithm of accuracy replaces nats."""
    groups: dict[Any, list[Line]] = {}
    for line in math_table.read():
        strategy = Strategy.from_json(line.strategy)
        same = replace(strategy, distillation=replace(strategy.distillation, learning_rate=1e-3))
        groups.setdefault((same.describe().replace(", lr 0.001", ""), line.seed), []).append(line)
    found = []
    for (name, seed), lines in groups.items():
        if len(lines) < len(math_table.RATES):
            continue
        tried: dict[int, list[TriedRate]] = {}
        for line in sorted(lines, key=_rate):
            for tokens, accuracy in zip(line.tokens, line.decayed, strict=True):
                gain = math.log(accuracy / line.initial)
                told = TriedRate(rate=_rate(line), gain=gain, stderr=None, sums=(), seconds=0.0)
                tried.setdefault(tokens // STEP, []).append(told)
        found.append(
            Found(kind="sums", name=f"{name}, seed {seed}", first=2e-3, steps=max(tried), counts=(), tried=tried)
        )
    return found


def _rate(line: Line) -> float:
    return Strategy.from_json(line.strategy).distillation.learning_rate


Rule = Callable[[Sequence[TriedRate], Sequence[int], float], float]


def _best(tried: Sequence[TriedRate]) -> int:
    return max(range(len(tried)), key=lambda place: -math.inf if tried[place].gain is None else tried[place].gain)


def lower(tried: Sequence[TriedRate], factor: float) -> float:
    """Return the rate of the lowest NLL, divided by a factor, but not below the smallest rate."""
    return max(tried[0].rate, tried[_best(tried)].rate / factor)


def not_clearly_worse(tried: Sequence[TriedRate], counts: Sequence[int], pick: Callable[..., float]) -> float:
    """Return the smallest or the largest of the rates that are within a standard error of the lowest NLL."""
    best = tried[_best(tried)]

    def near(one: TriedRate) -> bool:
        if one is best or not one.sums:
            return one is best
        gap, error = paired(counts, one.sums, best.sums)
        return gap <= (error or 0.0)

    return pick(one.rate for one in tried if near(one))


POWERS_OF_LENGTH = (0.0, -0.2, -0.35, -0.5)
RULES: dict[str, Rule] = {
    "lowest NLL": lambda tried, counts, longer: lower(tried, 1.0),
    "half a step below the lowest": lambda tried, counts, longer: lower(tried, FACTOR**0.5),
    "one step below the lowest": lambda tried, counts, longer: lower(tried, FACTOR),
    "two steps below the lowest": lambda tried, counts, longer: lower(tried, FACTOR**2),
    "largest that is not clearly worse": lambda tried, counts, longer: not_clearly_worse(tried, counts, max),
    "smallest that is not clearly worse": lambda tried, counts, longer: not_clearly_worse(tried, counts, min),
    **{
        f"top of the parabola, times length to the power of {power:g}": (
            lambda tried, counts, longer, power=power: choose(tried, longer, power)
        )
        for power in POWERS_OF_LENGTH
    },
}


def adaptive(found: Found, steps: int) -> list[TriedRate]:
    """Return the rates that the range test would try, among those that were trained."""
    known = {round(math.log(one.rate / found.first, FACTOR)): one for one in found.tried[steps]}
    tried: list[TriedRate] = []
    while (rate := next_rate(found.first, tried, found.counts)) is not None:
        power = round(math.log(rate / found.first, FACTOR))
        if power not in known:
            break
        tried.append(known[power])
    return tried


def _kinds(found: Sequence[Found]) -> dict[str, list[Found]]:
    kinds: dict[str, list[Found]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    return kinds


def _shorter(found: Found) -> list[int]:
    """Return the lengths of short trainings that are at most a quarter of the long one."""
    return [steps for steps in found.tried if 4 * steps <= found.steps]


def rules_table(found: Sequence[Found]) -> str:
    """Return the table of each rule's loss at the end of the long training."""
    kinds = _kinds(found)
    lines = []
    for name, rule in RULES.items():
        cells = [name]
        for members in kinds.values():
            if "clearly" in name and not members[0].counts:
                cells.append("")
                continue
            picked = [
                (one, rule(one.tried[steps], one.counts, one.steps / steps))
                for one in members
                for steps in _shorter(one)
            ]
            cells.append(_losses(picked))
        lines.append(cells)
    cells = ["the rate that the test begins with, untested"]
    cells += [_losses([(one, one.first) for one in members]) for members in kinds.values()]
    lines.append(cells)
    cells = ["the range test as it is, which tries few rates"]
    for members in kinds.values():
        picked = [
            (one, choose(adaptive(one, steps), one.steps / steps, one.power))
            for one in members
            if one.counts
            for steps in _shorter(one)
        ]
        cells.append(_losses(picked) if picked else "")
    lines.append(cells)
    return report.table(["rule", *(f"{kind} ({len(members)})" for kind, members in kinds.items())], lines)


def _losses(picked: Sequence[tuple[Found, float]]) -> str:
    lost = [1000 * one.lost(rate) for one, rate in picked]
    ruined = sum(one.below(rate) > 2 for one, rate in picked)
    return f"{np.mean(lost):.1f}, {max(lost):.1f}" + (f", {ruined} below" if ruined else "")


def best_table(found: Sequence[Found]) -> str:
    """Return the table of the best rates by length of training."""
    lines = []
    for one in found:
        tops = []
        for steps in one.tried:
            top = choose(one.tried[steps], 1.0, 0.0)
            tops.append(f"{steps}: {top:.1e}")
        gains = f"{one.most:.4f}"
        chosen = [
            f"{choose(adaptive(one, steps), one.steps / steps, one.power):.1e} after {len(adaptive(one, steps))} rates"
            for steps in _shorter(one)
            if one.counts
        ]
        lines.append([one.name, f"{one.first:.1e}", ", ".join(tops), ", ".join(chosen), gains])
    titles = ["student", "first", "best rate by steps", "chosen by the range test", "nats won at best"]
    return report.table(titles, lines)


def main() -> None:
    """Test and train the students that are not stored yet, and write the report of the rates chosen."""
    parser = parser_of(__doc__, seeds=1, time=True)
    parser.add_argument("--students", type=int, default=None, help="how many small ones, of all by default")
    parser.add_argument("--report", action="store_true", help="only the report of the students that are there")
    shapes = tuple(SHAPES)
    parser.add_argument(
        "--smollm2",
        nargs="+",
        choices=shapes,
        default=(),
        help="students of SmolLM2 too: some 10 minutes of a core each",
    )
    parser.add_argument("--small-lm", action="store_true", help="the small language model too: 5 minutes of a core")
    parser.add_argument("--steps", type=int, default=LONG, help="of a long training of a small student")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="of a small teacher's training")
    parser.add_argument("--eval-tokens", type=token_count, default=4096, help="held-out tokens that are read")
    arguments = parse(parser, steps=32, teacher_steps=4, eval_tokens=256)
    torch.set_num_threads(1)
    keep_freed_memory()
    wanted = cases(arguments.seeds, arguments.steps)[: arguments.students]
    if arguments.smoke:
        wanted = [replace(wanted[0], powers=(-1, 0, 1), short=(4,))]
    wanted += [case for case in smollm2_cases() if case.shape in arguments.smollm2]
    wanted += [small_lm_case()] if arguments.small_lm else []
    source = content_hash(
        [FFN, RECIPE.to_json(), Q4_0.to_json(), BATCH, LENGTH, arguments.teacher_steps, arguments.eval_tokens]
    )
    kept = report.Kept("range-test", source, -1.0 if arguments.report else arguments.time)
    found = []
    for case in wanted:
        try:
            found.append(measured(case, kept, arguments.teacher_steps, arguments.eval_tokens))
        except SystemExit:
            if not arguments.report:
                raise
    alone = wanted and all(case.folder for case in wanted)
    found += [] if alone else of_sums()
    title = "Which learning rate do a few steps choose for a longer training?"
    print(report.write("range-test-small-lm" if alone else "range-test", title, sections(found)))


def sections(found: Sequence[Found]) -> list[str]:
    """Return the parts of the report."""
    small = next(one for one in found if one.counts)
    families, widths = ", ".join(FAMILIES), ", ".join(map(str, WIDTHS))
    return [
        f"Students of small teachers ({families}; widths {widths}), whole or with half of their FFN neurons, learn a "
        f"text of the kind that the teacher was trained on, in steps of {BATCH} tokens; those of SmolLM2 learn the "
        "default text, in steps of 256, and the small language model PostgreSQL's manual, by the scales of its codes. "
        f"The decay is on Q4_0, and in Q4_0 they are judged, on {sum(small.counts):,} held-out tokens of "
        f"{len(small.counts)} documents. Rates lie {FACTOR:.3g} times apart. The students of sums "
        "are those of `math_table`: 100 steps, rates twice apart, and the logarithm of accuracy stands for nats.",
        "## Rules\n\nEach rule knows trainings of a quarter of the steps or fewer, at all rates. Thousandths of a nat "
        "per held-out token that it loses at the end of the long training against the best rate there: the mean, the "
        "most, and how many students end more than two standard errors below what they were untrained. In brackets "
        "the number of students.\n\n" + rules_table(found),
        "## Students\n\nThe best rates are tops of parabolas through the gains, within the rates that were tried.\n\n"
        + best_table(found),
    ]


if __name__ == "__main__":
    main()

"""The memory that a trial has where it runs, and whether a strategy's own training fits it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autodistill.distillation.student.check import check_strategy, student_spec
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.estimates.fit import Miss
from autodistill.estimates.training_fit import Training, TrainingFit, fit_training, training_fits
from autodistill.estimates.training_memory import beside_bytes
from autodistill.models.spec import ModelSpec
from autodistill.strategy.dimension import Point
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.units import format_bytes
from autodistill.utils.plain_dataclass import ToJson
from autodistill.utils.typed_data import check_typed

# Number of strategies that stand for a whole space. They are enough to show where between its ends training stops
# fitting.
_EXAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class TrainingNeed(ToJson):
    """The memory that training a strategy needs under a plan's settings, and what a process of a trial may take.

    Attributes:
        need_bytes: The least bytes needed: the larger of training and evaluation, plus what is loaded of the teacher.
        limit_bytes: Bytes that it may take.
        micro_batch: Sequences of one pass with which it fits, at most the plan's.
        remedy: What would help if it does not fit.
    """

    need_bytes: int
    limit_bytes: int
    micro_batch: int
    remedy: str = ""

    @property
    def slack(self) -> float:
        """log(need / limit); it fits at 0 and below."""
        return math.log(self.need_bytes / max(1, self.limit_bytes))

    @property
    def miss(self) -> Miss | None:
        """Why it does not fit, or None."""
        if self.slack <= 0:
            return None
        over = self.need_bytes - self.limit_bytes
        said = (
            f"training it takes {format_bytes(self.need_bytes)} of memory at least, {format_bytes(over)} over the "
            f"{format_bytes(self.limit_bytes)} that a trial has here; {self.remedy}"
        )
        return Miss(limit="training memory", slack=self.slack, text=said)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> TrainingNeed | None:
        """Read what `to_json` wrote; None for a trial without an estimate."""
        if data is None:
            return None
        check_typed(data, cls, "training")
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class TrialMemory:
    """The memory that each process of a trial has.

    Attributes:
        limit_bytes: Bytes of the smallest device that trials run on: a machine, or a trial's part of a GPU.
        share_bytes: The part of these bytes for each process, if several run side by side on a machine's cores.
        device: "cpu", or an accelerator.
        threads: Threads of a process.
        processes: Processes of a trial.
        bf16: Whether products are computed in bfloat16.
        teacher: The teacher's shape.
        held_bytes: Bytes of the teacher's weights when a trial runs it, in float32 or in the type in which they are
            held.
    """

    limit_bytes: int
    share_bytes: int
    device: str
    threads: int
    processes: int
    bf16: bool
    teacher: ModelSpec
    held_bytes: int

    def beside_bytes(self, recipes: Iterable[Distillation]) -> int:
        """Return the bytes of the teacher that a trial holds next to the student: all of it, its head, or nothing."""
        return beside_bytes(recipes, self.teacher, bf16=self.bf16, held_bytes=self.held_bytes)

    def fit(self, strategy: Strategy, spec: ModelSpec, sequence_length: int, sequences: int) -> TrainingFit:
        """Return the fastest way to train one strategy alone, in steps of so many sequences.

        Raises:
            InputError: No way fits, as in `fit_training`.
        """
        training = self.training(strategy, spec, sequence_length, sequences)
        return fit_training(training, self.limit_bytes - self.beside_bytes([strategy.distillation]))

    def need(self, strategy: Strategy, spec: ModelSpec, plan: Plan) -> TrainingNeed:
        """Return the memory that a strategy's training needs, and the micro-batch with which it fits.

        Checkpointing and optimiser states are the plan's. As when a plan is made, a reserve is kept for what was
        measured beyond predictions. If no way fits with it, the smallest way is taken by its prediction alone.

        Args:
            strategy: The strategy to train.
            spec: Its student.
            plan: Has the steps and the means.
        """
        teacher_bytes = self.beside_bytes([strategy.distillation])
        training = self.training(strategy, spec, plan.sequence_length, plan.batch_tokens // plan.sequence_length)
        setups = [(plan.checkpointing, plan.optimizer_state)]
        ways = list(training_fits(training, setups=setups, at_once=plan.micro_batch))
        least = ways[-1]
        held = [way for way in ways if way.total_bytes + teacher_bytes <= self.share_bytes]
        safe = (way for way in held if way.safe_bytes(self.device) + teacher_bytes <= self.limit_bytes)
        need = least.total_bytes + teacher_bytes
        return TrainingNeed(
            need_bytes=need,
            limit_bytes=self.share_bytes,
            micro_batch=next(safe, least).micro_batch,
            remedy="" if held else self._remedy(strategy, least, need - self.share_bytes, plan),
        )

    def _remedy(self, strategy: Strategy, way: TrainingFit, over: int, plan: Plan) -> str:
        """Return what would help a strategy that needs so many bytes too much."""
        by_length = way.estimate.activations_bytes + way.estimate.logits_bytes
        states = way.estimate.gradients_bytes + way.estimate.optimizer_bytes
        parts = []
        if way.total_bytes == way.estimate.total_bytes:
            if over < by_length:
                parts.append(f"a --sequence-length below {plan.sequence_length}")
            if over < states and strategy.distillation.lora is None:
                parts.append("low-rank changes (distillation.lora)")
        if self.device != "cpu":
            parts.append("a larger --gpus-per-trial, or GPUs with more memory")
        elif self.share_bytes + over <= self.limit_bytes:
            parts.append("a larger --cpus-per-trial, so that fewer trials run at the same time")
        else:
            parts.append("a machine with more memory")
        return f"{', or '.join(parts)} would help"

    def training(self, strategy: Strategy, spec: ModelSpec, sequence_length: int, sequences: int) -> Training:
        """Return the training of one strategy's student where trials run, in steps of so many sequences."""
        recipe = strategy.distillation
        return Training(
            spec=spec,
            sequence_length=sequence_length,
            sequences=sequences,
            teacher=self.teacher,
            alignments=[(recipe.alignment, recipe.attention)],
            lora=recipe.lora,
            train_embeddings=recipe.train_embeddings,
            processes=self.processes,
            bf16=self.bf16,
            on_grid=strategy.finishing is not None,
            scales_of=strategy.finishing if strategy.scales_alone else None,
            writes=recipe.on_policy is not None,
            device=self.device,
            threads=self.threads,
        )


def most_demanding(
    space: Space, memory: TrialMemory, sequence_length: int, sequences: int
) -> tuple[Strategy, ModelSpec, int]:
    """Return the trainable strategy that needs most memory, its student, and the most weights of any student.

    The strategy that needs most may have fewer weights than another one that trains only low-rank changes.

    Args:
        space: Its ends, baselines and starts are tried, and strategies drawn from all over it.
        memory: Memory of a trial.
        sequence_length: Tokens of a sequence.
        sequences: Sequences of an optimiser step.

    Raises:
        InputError: Nothing can be trained; the message names the strategy that needs least, and how much.
    """
    found: list[tuple[int, Strategy, ModelSpec]] = []
    least: tuple[int, Strategy, InputError] | None = None
    for strategy, student in _examples(space, memory.teacher):
        ways = training_fits(memory.training(strategy, student, sequence_length, sequences))
        need = min(way.total_bytes for way in ways) + memory.beside_bytes([strategy.distillation])
        try:
            memory.fit(strategy, student, sequence_length, sequences)
            found.append((need, strategy, student))
        except InputError as error:
            least = min(least or (need, strategy, error), (need, strategy, error), key=lambda one: one[0])
    if found:
        _, strategy, student = max(found, key=lambda one: one[0])
        return strategy, student, max(one.parameters for _, _, one in found)
    assert least is not None
    raise InputError(
        f"nothing of the space {space.name} can be trained here, not even the student that takes least "
        f"({least[1].init.describe()}): {least[2]}"
    ) from least[2]


def _examples(space: Space, teacher: ModelSpec) -> Iterator[tuple[Strategy, ModelSpec]]:
    """Yield strategies from all over a space that this teacher can be distilled by, with their students."""
    source = random.Random(0)
    drawn = (_drawn(space, source) for _ in range(_EXAMPLES if space.dimensions else 0))
    strategies = (*space.extremes(), *space.starts.values(), *(space.strategy(point) for point in drawn))
    for strategy in dict.fromkeys(strategies):
        try:
            check_strategy(strategy, teacher, space.deployments)
        except InputError:
            continue
        yield strategy, student_spec(strategy, teacher)


def _drawn(space: Space, source: random.Random) -> Point:
    point: Point = {}
    for dimension in space.dimensions:
        if dimension.active(point):
            point[dimension.path] = dimension.domain.at(source.random())
    return point

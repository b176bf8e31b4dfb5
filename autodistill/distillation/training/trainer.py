"""Trains one student on a teacher's outputs. Training yields a record per step, and can stop and continue anywhere."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from autodistill.data.dataset import TokenSet
from autodistill.distillation.losses.schedules import Interpolation, along, progress, snap, temperature_at
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.checkpoint import gathered, restore, write_checkpoint
from autodistill.distillation.training.fake_quantize import FakeQuantized, one_step, quantized_training
from autodistill.distillation.training.fsdp import Sharding, clip_sharded
from autodistill.distillation.training.gradients import Gradients
from autodistill.distillation.training.learning_rate import Decay, stable_rate
from autodistill.distillation.training.lora import Adapters
from autodistill.distillation.training.on_policy import SEVERAL_PROCESSES, Written, write_on
from autodistill.distillation.training.optimizers.adamw import MOST_NORM, adamw, clip
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_loss import RECORDED, StepLoss, Weighing
from autodistill.distillation.training.step_record import StepRecord
from autodistill.distillation.training.trained_scales import RATE, TrainedScales
from autodistill.errors import InputError, TrialFailedError
from autodistill.models.config import spec_from_config
from autodistill.models.loading import token_tables
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Grid, Scales
from autodistill.strategy.divergence import get_divergence
from autodistill.strategy.strategy import Strategy

# A step whose loss is not finite is skipped. This many such steps in a row end the trial, even across checkpoints.
_PATIENCE = 3


class Trainer:
    """Trains a student: holds the model, its optimiser and its place in the schedule.

    The schedule is a function of absolute tokens. Warm-up and stable rate are the same for every token target. A decay
    that branches off the stable part leads to each target. A checkpoint taken at the branch point lets training
    continue from there.

    Args:
        model: The student, in float32 on `device`. With `sharding` it is on the CPU, and each process takes its shards.
        teaching: Its teacher. The stored outputs are those for `data`, in its order.
        strategy: What to train, and how.
        plan: Batch size, warm-up, horizon and precision.
        data: Training sequences. If they mark answers, only answer tokens are learned and get
            logits, unless the strategy takes all positions. If the student reads its own rendering of the text, the
            teacher's outputs are for the teacher's rendering. They are then learned only at tokens that both renderings
            share. Other tokens count as 0 in the divergence and in the alignment of states.
        seed: Seed of the data order, the projections and the tokens that the student samples.
        device: Where the student is trained.
        sharding: The processes that train this student together. Each of them makes a trainer. None for a single
            process.
        beginning: Initial scales by name of the weight, if only scales are trained. By default they are fitted to the
            weights.
        side_by_side: Number of processes (this one and its forks) that share the sequences of each step. Above 1 only
            if scales alone are trained, on a CPU.
        rate_factor: Factor of the strategy's learning rate, for batches larger than the rate was chosen for.

    Attributes:
        model: The student. If only scales are trained, it gets its weights back in `finish`.
        tokens: Tokens trained on so far.
        optimizer: The optimiser. Trainers of the same parameters may share it to save memory.
        scales: Scales that were learned, by name of the weight. Empty before they are learned, or if scales follow from
            the weights.
    """

    def __init__(
        self,
        model: Any,
        *,
        teaching: Teaching,
        strategy: Strategy,
        plan: Plan,
        data: TokenSet,
        seed: int,
        device: str = "cpu",
        sharding: Sharding | None = None,
        beginning: Mapping[str, Scales] | None = None,
        side_by_side: int = 1,
        rate_factor: float = 1.0,
    ) -> None:
        self.model = model
        self._sharding = sharding
        self.tokens = 0
        self._strategy = strategy
        self._recipe = strategy.distillation
        self._rate = rate_factor * self._recipe.learning_rate
        self._plan = plan
        self._data = data
        moving = get_divergence(self._recipe.divergence).moving_target
        self._interpolation = Interpolation(share=self._recipe.mixture) if moving else None
        self._seed = seed
        self._device = device
        self._failures = 0
        self.scales: dict[str, Scales] = {}
        self._learned: list[nn.Parameter] = []
        self._on_policy_from: Callable[[], int] | None = None
        if sharding is not None and self._recipe.on_policy is not None:
            raise InputError(SEVERAL_PROCESSES)
        lora = self._recipe.lora
        spec = spec_from_config(model.config.to_dict())
        self._adapters = Adapters(model, spec, lora, seed).to(device) if lora else None
        for table in token_tables(model):
            table.requires_grad_(self._recipe.train_embeddings)
        self._scaled: TrainedScales | None = None
        if strategy.scales_alone:
            # Scales are so few that each process holds all of them.
            model.to(device)
            assert strategy.finishing is not None
            self._scaled = TrainedScales(model, strategy.finishing.grids_of(spec.tensors).get, beginning)
        elif sharding is not None:
            sharding.shard(model)
        self._loss = StepLoss(
            model,
            self._recipe,
            teaching=teaching,
            data=data,
            seed=seed,
            device=device,
            bf16=plan.bf16,
            sharded=sharding is not None,
        )
        self._projections = self._loss.projections
        self.optimizer = adamw(self._groups(), plan.optimizer_state)
        self._gradients = Gradients(
            self._loss,
            self._recipe,
            plan,
            parameters=self._optimized_parameters,
            whole=self._held_whole,
            sharding=sharding,
            side_by_side=side_by_side,
        )
        if plan.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups, each with a factor of its learning rate."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained += [] if self._adapters is None else list(self._adapters.parameters())
        groups: list[dict[str, Any]] = [{"params": trained, "factor": 1.0}]
        if self._scaled is not None:
            groups.append({"params": [p for _, p in self._scaled.named_parameters()], "factor": RATE})
        alignment, projected = self._recipe.alignment, list(self._projections.parameters())
        if alignment and projected:
            groups.append({"params": projected, "factor": alignment.projection_rate})
        return groups

    @property
    def moved(self) -> int:
        """The number of values that a step updates: in trained weights, LoRA changes, scales and projections."""
        return sum(one.numel() for one in self._optimized_parameters())

    @property
    def step_tokens(self) -> int:
        """Tokens per optimiser step."""
        return self._plan.batch_tokens

    def train_stable(self, until: int) -> Iterator[StepRecord]:
        """Train at the warm-up or stable rate up to `until` tokens, a whole number of steps."""
        self._on_policy_from = None
        yield from self._train(lambda: until, self._stable_rate, None)

    def train_decay(
        self,
        until: int,
        storage_of: Callable[[str], Grid | None] | None = None,
        *,
        on_grid_after: float = 0.0,
        learned: bool = False,
        sooner: Callable[[StepRecord, int], int] | None = None,
    ) -> Iterator[StepRecord]:
        """Train while the rate falls to zero at `until`, on the finishing grid if there is one.

        At the end, low-rank changes are merged into the model's weights.

        Args:
            until: Tokens at the end, a whole number of steps.
            storage_of: Returns the grid of each weight by name. None for a plain decay.
            on_grid_after: Share of the decay's steps, from 0 to below 1, after which the weights go on the grid. At
                least one step is trained on the grid.
            learned: Whether the scales of trained weights are learned. `scales` holds them afterwards.
            sooner: Called after each step with its record and the planned end in tokens. It returns that end, or an
                earlier one.
        """
        batch, decay = self._plan.batch_tokens, Decay(self.tokens, until)

        def rate(tokens: int) -> float:
            return self._stable_rate(tokens) * decay.factor(tokens)

        def watched(records: Iterator[StepRecord]) -> Iterator[StepRecord]:
            """Yield steps. End the decay earlier if `sooner` asks for it after a step."""
            for record in records:
                yield record
                # At least one step must remain, because the steps before a grid leave one for it.
                if sooner is not None and self.tokens + batch < decay.end:
                    end = max(sooner(record, decay.end), self.tokens + batch)
                    if end < decay.end:
                        decay.shorten(self.tokens, end)

        steps = (until - self.tokens) // batch
        if phase := self._recipe.on_policy:
            first = until - max(1, round(steps * phase.share)) * batch
            self._on_policy_from = lambda: min(first, decay.end - batch)
        if storage_of is None:
            yield from watched(self._train(lambda: decay.end, rate, None))
            self._merge()
            return
        before = self.tokens + min(round(steps * on_grid_after), steps - 1) * batch
        yield from watched(self._train(lambda: min(before, decay.end - batch), rate, None))
        changes = {name: adapter.merged for name, adapter in self._adapters.by_name.items()} if self._adapters else {}
        with (
            quantized_training(self.model, storage_of, learned=learned, changes=changes) as shown,
            self._learning(shown),
        ):
            yield from watched(self._train(lambda: decay.end, rate, storage_of, shown))
        self.scales = {name: scales for name, weight in shown.items() if (scales := weight.stored()) is not None}
        self._merge()

    def finish(
        self, until: int, spec: ModelSpec, sooner: Callable[[StepRecord, int], int] | None = None
    ) -> Iterator[StepRecord]:
        """Train the decay as the strategy says: on the grid of its finishing stage, or without a grid.

        Args:
            until: Tokens at the end, a whole number of steps.
            spec: The student's shape.
            sooner: As for `train_decay`.
        """
        finishing = self._strategy.finishing
        if finishing is None or self._scaled is not None:
            yield from self.train_decay(until, sooner=sooner)
        else:
            learned = finishing.scales == "learned"
            grids, start = finishing.grids_of(spec.tensors), finishing.start
            yield from self.train_decay(until, grids.get, on_grid_after=start, learned=learned, sooner=sooner)
        self.settle()

    def settle(self) -> None:
        """End the training. If only scales are trained, give the model its weights back, with the scales so far.

        `finish` calls this. Call it yourself only to train the same model again without `finish`, such as after a
        failure.
        """
        self.close()
        if self._scaled is not None:
            self.scales = self._scaled.settle()

    def _merge(self) -> None:
        if self._adapters is not None:
            self._adapters.merge(self.model)

    @contextmanager
    def _learning(self, shown: Mapping[str, FakeQuantized]) -> Iterator[None]:
        """Let the optimiser update the learned scales, which belong to this decay alone and are in no checkpoint.

        LSQ scales gradients so that a step changes scales and weights by equal shares of their values. AdamW removes
        the size of a gradient again, so the learning rate must do this instead. A scale is about 1 / Q_P of its largest
        weight.
        """
        by_levels: dict[int, list[nn.Parameter]] = {}
        for weight in shown.values():
            if weight.scale is not None:
                by_levels.setdefault(weight.grid.levels, []).append(weight.scale)
        groups = self.optimizer.param_groups
        count = len(groups)
        for levels, scales in by_levels.items():
            self.optimizer.add_param_group({"params": scales, "factor": 1 / levels})
        self._learned = [scale for scales in by_levels.values() for scale in scales]
        try:
            yield
        finally:
            self._learned = []
            for group in groups[count:]:
                for scale in group["params"]:
                    self.optimizer.state.pop(scale, None)
            del groups[count:]

    def _stable_rate(self, tokens: int) -> float:
        after = tokens + self._plan.batch_tokens
        return stable_rate(self._rate, after, self._plan.warmup_tokens)

    def _train(
        self,
        until: Callable[[], int],
        rate: Callable[[int], float],
        storage_of: Callable[[str], Grid | None] | None,
        on_grid: Mapping[str, FakeQuantized] | None = None,
    ) -> Iterator[StepRecord]:
        """Train up to `until` tokens. Weights in `on_grid` already include their low-rank changes."""
        self.model.train()
        self._gradients.on_grid = on_grid or {}
        if self._scaled is None:
            self._loss.hold_head(storage_of)
        with self._adapters.added(self.model, self._gradients.on_grid) if self._adapters else nullcontext():
            while self.tokens < until():
                yield self._step(rate(self.tokens), min(self._plan.batch_tokens, until() - self.tokens))

    def _sequences(self, tokens: int) -> list[int]:
        """Return the indices of the next `tokens` tokens' sequences. Each epoch has its own order, from the seed."""
        total = len(self._data.tokens)
        first = self.tokens // self._plan.sequence_length
        count = tokens // self._plan.sequence_length
        orders: dict[int, Any] = {}
        indices = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, total)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(total)
            indices.append(int(orders[epoch][offset]))
        return indices

    def _step(self, rate: float, tokens: int) -> StepRecord:
        began = time.perf_counter()
        recipe = self._recipe
        # Schedules are read at the middle of the step. For a linear one that is the mean over the step's tokens,
        # whatever its size.
        middle = self.tokens + tokens / 2
        temperature = snap(temperature_at(recipe.temperature, middle, self._plan.tokens))
        passed = progress(middle, self._plan.tokens)
        weight = along(recipe.divergence_weight, recipe.final_divergence_weight, passed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        mixture = self._interpolation.share if self._interpolation else recipe.mixture
        indices = self._sequences(tokens)
        written = self._student_written(indices)
        if written is not None:
            indices = list(range(len(indices)))
        with self._loss.reading(written):
            step = self._loss.sizes(indices)
            terms = self._gradients.of_step(indices, Weighing(temperature, weight, mixture), step, written)
        parameters = self._optimized_parameters()
        norm = clip(parameters) if self._sharding is None else clip_sharded(self._sharding, parameters, MOST_NORM)
        if not (math.isfinite(norm) and math.isfinite(terms["loss"])):
            self._failures += 1
        elif (
            step.learnt + step.own > 0
        ):  # a step without counted tokens shows nothing, so it must not reset the count of failures
            self.optimizer.step()
            self._failures = 0
            self._gradients.balance_by(terms)
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += tokens
        if self._failures >= _PATIENCE:
            raise TrialFailedError("nan", f"loss or gradient was not finite in {_PATIENCE} steps in a row")
        share = 1.0
        if self._interpolation is not None:
            share = self._interpolation.share
            reached = progress(self.tokens, self._plan.tokens)
            # The mean over only the tokens with teacher outputs: their number does not show how well the student
            # learns.
            heard = terms["divergence"] / terms["heard"] if terms["heard"] > 0 else None
            self._interpolation = self._interpolation.after(heard, recipe.mixture, reached)
        return StepRecord(
            tokens=self.tokens,
            divergence_weight=weight,
            teacher_share=share,
            temperature=temperature,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=tokens / (time.perf_counter() - began),
            micro_batch=self._gradients.micro_batch,
            **{name: terms[name] for name in RECORDED},
        )

    def _student_written(self, indices: list[int]) -> Written | None:
        """Return a step's sequences with ends that the student writes, or None outside the on-policy phase."""
        phase = self._recipe.on_policy
        if phase is None or self._on_policy_from is None or self.tokens < self._on_policy_from():
            return None
        # `one_step` quantises each weight once for all tokens that are written.
        with self._loss.autocast(), one_step(self._gradients.on_grid.values()):
            return write_on(
                self.model,
                self._data,
                indices,
                phase,
                seed=int(np.random.SeedSequence((self._seed, self.tokens)).generate_state(1, np.uint64)[0]),
                batch=self._gradients.micro_batch,
                device=self._device,
            )

    def writing_seconds(self) -> float:
        """Measure the seconds to write a step's tokens in the on-policy phase. Return 0 without that phase."""
        if self._recipe.on_policy is None:
            return 0.0
        before, self._on_policy_from = self._on_policy_from, lambda: 0
        began = time.perf_counter()
        try:
            self._student_written(self._sequences(self._plan.batch_tokens))
        finally:
            self._on_policy_from = before
        return time.perf_counter() - began

    def close(self) -> None:
        """End the forks that share this process's steps."""
        self._gradients.close()

    def save(self, path: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint, completely or not at all (see `checkpoint`). All processes wait until it is written."""
        write = self.checkpoint(notes)
        try:
            if write is not None:
                write(path)
        finally:
            if self._sharding is not None:
                self._sharding.wait()

    def checkpoint(self, notes: Mapping[str, str] | None = None) -> Callable[[Path], None] | None:
        """Gather weights, optimiser and place in the schedule, and return a function that writes them to a path.

        Call that function before the next step. `notes` are stored as extra metadata, which the trainer never reads.

        Frozen weights are left out: they are the teacher's, and the student is built from the teacher before `load`.
        With several processes, each gives its shards, and only the first gets a function to call. The others get None.
        Any number of processes can continue from the checkpoint.
        """
        first = self._sharding is None or self._sharding.rank == 0
        tensors = gathered(self._trained(), self.optimizer, keep=first)
        if not first:
            return None
        extra = {} if self._interpolation is None else {"interpolation": json.dumps(asdict(self._interpolation))}
        balance = self._gradients.balance
        extra |= {} if balance is None else {"balance": json.dumps(balance)}
        extra |= {"failures": str(self._failures)} if self._failures else {}
        extra["optimizer_state"] = self._plan.optimizer_state
        extra["processes"] = "1" if self._sharding is None else str(self._sharding.count)
        metadata = {**(notes or {}), **self._identity(), "tokens": str(self.tokens), **extra}
        return partial(write_checkpoint, tensors=tensors, metadata=metadata)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote. On the CPU the continued training is bit for bit the uninterrupted one.

        Raises:
            TrialFailedError: The checkpoint comes from other stages or another seed, or has other optimiser states.
        """
        self.close()  # the forks hold the old parameters
        state = self._plan.optimizer_state
        metadata = restore(path, self._trained(), self.optimizer, self._identity(), optimizer_state=state)
        self.tokens = int(metadata["tokens"])
        if self._interpolation is not None:
            self._interpolation = Interpolation(**json.loads(metadata["interpolation"]))
        self._gradients.balance = tuple(json.loads(metadata["balance"])) if "balance" in metadata else None
        self._failures = int(metadata.get("failures", 0))

    def _optimized_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _held_whole(self) -> list[nn.Parameter]:
        """Return the parameters that every process holds whole. FSDP does not average their gradients."""
        if self._scaled is not None:
            return [parameter for _, parameter in self._trained()]
        changes = [] if self._adapters is None else self._adapters.parameters()
        return [*self._projections.parameters(), *changes, *self._learned]

    def _identity(self) -> dict[str, str]:
        return {"strategy": self._strategy.stable_id, "seed": str(self._seed)}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = [(f"student.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self._adapters is not None:
            named += [(f"adapter.{name}", p) for name, p in self._adapters.named()]
        if self._scaled is not None:
            named += [(f"scales.{name}", p) for name, p in self._scaled.named_parameters()]
        return named + [(f"projection.{name}", p) for name, p in self._projections.named_parameters()]

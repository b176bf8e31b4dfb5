"""One trial on one worker: how a strategy is trained along its stage, and evaluated under deployments."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autodistill.distillation.losses.attention import teacher_layer
from autodistill.distillation.student.build import save_student
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.fake_quantize import rounding_seconds
from autodistill.distillation.training.fsdp import agreed, whole_model
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.side_by_side import MOST, usable
from autodistill.distillation.training.step_record import StepRecord
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import TrialFailedError
from autodistill.evaluation.evaluate import Evaluation
from autodistill.inference.torch_memory import give_back_memory, is_out_of_memory
from autodistill.models.loading import load_model
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales, write_scales
from autodistill.runs.students import send_student, student_folder, trained_student
from autodistill.search.prior.prior import many_tokens
from autodistill.search.worker.begin import codes_file, on_codes, scales_as, student_of
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.interpolated import interpolated
from autodistill.search.worker.messages import RungReport, TrialTask
from autodistill.search.worker.stage import TrialStage
from autodistill.search.worker.timed_training import TimedTraining
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.checksums import write_list
from autodistill.utils.clock import Moment
from autodistill.utils.durable import make_folder, put

# With n times as many sequences a step, the learning rate grows by n to this power. There are also n times fewer steps.
# The power covers both effects, as the prior has them (`search/prior/knowledge.yaml`: 0.46 and 0.30). If weights are
# trained with many tokens for each, their rate does not depend on the number of steps.
_RATE_OF_WIDER, _RATE_OF_WIDER_FOR_MANY = 0.75, 0.46

# Most seconds of training that a kill can cost.
_SAVED_EVERY = 600.0


@dataclass(kw_only=True)
class _Segment:
    """One segment of a trial, as far as it is trained.

    Attributes:
        start: Tokens that it continues from.
        target: Tokens at the end of its decay, which may become fewer.
        shared: Tokens of it that other trials had trained.
        steps: Steps so far.
        between: Tokens of its latest checkpoint if no decay branches off there, else None.
        saving: Seconds spent on checkpoints.
        unsaved: Why a checkpoint could not be written, for the last one that failed.
    """

    start: int
    target: int
    shared: int
    steps: list[StepRecord] = field(default_factory=list)
    between: int | None = None
    saving: float = 0.0
    unsaved: str | None = None


class Trial:
    """One trial on one worker, taken from rung to rung.

    Args:
        bench: The worker's bench.
        task: The trial.
        on_step: Called after each optimiser step; may raise to end the trial.
        threads: CPU threads for it while nothing else runs; 0 for the usual number.
        in_time: Called while its codes are computed, which may take longer than a segment; may raise to end the trial.
    """

    def __init__(
        self,
        bench: Workbench,
        task: TrialTask,
        on_step: Callable[[StepRecord], None] = lambda _: None,
        threads: int = 0,
        in_time: Callable[[], None] = lambda: None,
    ) -> None:
        self._threads = threads
        self._in_time = in_time
        self._bench = bench
        self._task = task
        self._on_step = on_step
        setting = bench.setting
        pretrained = setting.pretrained.get(task.strategy.init.model)
        self._spec = student_spec(task.strategy, setting.teacher_spec, pretrained)
        self._folder = setting.checkpoints / task.id
        self._stage = TrialStage(setting, task, bench.sharding)

    def run(self, rung: int, *, keep: bool = False, until: Moment | None = None) -> RungReport | None:
        """Train to a rung and evaluate there, from the furthest checkpoint of its stage, whichever trial left it.

        If several processes train, only the first one evaluates and reports.

        Args:
            rung: Index of the rung.
            keep: Whether to keep its student, as at the last rung. At a rung that was reached before, the decay is
                trained once more, to the same bits.
            until: When the student must be ready, with fewer tokens than planned if necessary. Its decay then begins
                earlier, and the end of the time budget does not interrupt it.

        Raises:
            TrialFailedError: NaN, out of memory, or another error of this trial alone.
            StepOutOfMemory: Several processes must restart with a smaller micro-batch.
        """
        try:
            return self._run(rung, keep, until)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()
            raise TrialFailedError("out-of-memory", said[0] if said else "the machine's memory is full") from error

    def _run(self, rung: int, keep: bool, until: Moment | None) -> RungReport | None:
        plan, sharding = self._bench.setting.plan, self._bench.sharding
        last = rung == len(plan.rungs) - 1
        if self._task.strategy.codes:
            # They are computed once in a run, so their time says nothing about that of other work.
            codes_file(self._bench.setting, self._task.strategy, in_time=self._in_time)
        began = time.perf_counter()
        trainer = self._trainer()
        shared, resumed = self._stage.restore(trainer, rung)
        segment = _Segment(start=trainer.tokens, target=self._stage.targets(rung)[-1], shared=shared)
        ready = time.perf_counter()
        try:
            self._train(trainer, rung, segment, until)
        finally:
            trainer.close()
        trained = time.perf_counter()
        model, scales = trainer.model, trainer.scales
        # Free the optimiser, and any shards, to make room for the evaluation.
        del trainer
        if sharding is not None:
            model = whole_model(sharding, model)
            # A sharded module is part of reference cycles, which would keep its shards into the next trial.
            give_back_memory()
        if model is None:
            return None
        model.to(self._bench.setting.device)
        student = self._save_student(model, scales, None if last else segment.target) if last or keep else None
        kept = time.perf_counter()
        probe, finishing = self._task.probe, self._task.strategy.finishing
        evaluation = self._evaluate(
            model,
            probe,
            plan.eval_tokens if last else plan.rung_eval_tokens,
            scales if finishing and probe.scheme == finishing.scheme else None,
        )
        ended = time.perf_counter()
        stride = -(-len(segment.steps) // 20)
        return RungReport(
            rung=rung,
            tokens=segment.target,
            evaluation=evaluation,
            params=self._spec.parameters,
            seconds={
                "train": trained - ready - segment.saving,
                "evaluate": ended - kept,
                "other": (ready - began) + segment.saving + (kept - trained),
            },
            steps=tuple(segment.steps[::-1][::stride][::-1]),
            trained=segment.target - segment.start,
            shared=shared,
            unsaved=segment.unsaved,
            resumed=resumed,
            damaged=self._stage.damaged,
            student=student,
        )

    def _train(self, trainer: Trainer, rung: int, segment: _Segment, until: Moment | None) -> None:
        """Train a segment, including its decay, and leave checkpoints where they are useful."""
        saved = time.perf_counter()
        if self._stage.is_between(segment.start):
            segment.between = segment.start
        make_folder(self._folder)
        plan, branch, sharding = self._bench.setting.plan, self._stage.branches(rung)[-1], self._bench.sharding
        timed = None
        if until is not None:
            # Converted to the tokens of a plan's step: the steps of a trial that runs alone are wider.
            share = plan.batch_tokens / trainer.step_tokens
            on_grid = self._rounding_seconds(trainer.model)
            timed = TimedTraining(
                until,
                plan,
                self._task.strategy,
                self._stage.decay,
                writing=share * trainer.writing_seconds(),
                on_grid=None if on_grid is None else share * on_grid,
                sharding=sharding,
            )
        for point in self._stage.points(rung, segment.start):
            for record in trainer.train_stable(point):
                segment.steps.append(record)
                self._on_step(record)
                if timed is not None and timed.must_decay(segment.steps):
                    segment.target = self._stage.end_of(trainer.tokens)
                    break
                if agreed(sharding, time.perf_counter() - saved > _SAVED_EVERY) and trainer.tokens < point:
                    self._leave(trainer, segment, on_the_way=True)
                    saved = time.perf_counter()
            # Only this trial continues a stage of its own, and it does not continue after the last rung.
            if self._task.stage or not (rung == len(plan.rungs) - 1 and point == branch):
                self._leave(trainer, segment, on_the_way=False)
                saved = time.perf_counter()
            if trainer.tokens < point:
                break
        decay: list[StepRecord] = []

        def sooner(record: StepRecord, end: int) -> int:
            decay.append(record)
            return end if timed is None else timed.end(decay, end)

        for record in trainer.finish(segment.target, self._spec, sooner):
            segment.steps.append(record)
            if until is None:
                self._on_step(record)
        segment.target = trainer.tokens

    def _rounding_seconds(self, model: Any) -> float | None:
        """Return how much longer a step on the finishing's grid takes than one before it; None if unknown.

        It is 0 for a student without a grid, and for one whose scales alone are trained, since it is always on the
        grid.
        """
        setting, finishing = self._bench.setting, self._task.strategy.finishing
        if finishing is None or self._task.strategy.scales_alone:
            return 0.0
        if setting.device != "cpu" or self._bench.sharding is not None:
            return None
        dtype = torch.bfloat16 if setting.plan.bf16 else torch.float32
        grids = finishing.grids_of(self._spec.tensors)
        return rounding_seconds(model, grids, learned=finishing.scales == "learned", dtype=dtype)

    def _leave(self, trainer: Trainer, segment: _Segment, *, on_the_way: bool) -> None:
        """Leave a checkpoint. It replaces the previous one if no decay branches off there."""
        began = time.perf_counter()
        failed = self._stage.save(trainer, segment.shared, in_place_of=segment.between)
        segment.unsaved = failed or segment.unsaved
        if not on_the_way:
            segment.between = None
        elif not failed:
            segment.between = trainer.tokens
        segment.saving += time.perf_counter() - began

    def evaluate(self, deployment: Deployment) -> RungReport:
        """Evaluate the trained student, as kept at the last rung, under one more deployment."""
        setting, plan = self._bench.setting, self._bench.setting.plan
        began = time.perf_counter()
        folder = trained_student(self._folder, setting.storage)
        model = load_model(folder, torch.float32, setting.device)
        ready = time.perf_counter()
        evaluation = self._evaluate(model, deployment, plan.eval_tokens, read_scales(folder, deployment))
        return RungReport(
            rung=len(plan.rungs) - 1,
            tokens=plan.tokens_of(self._task.length),
            evaluation=evaluation,
            params=self._spec.parameters,
            seconds={"train": 0.0, "evaluate": time.perf_counter() - ready, "other": ready - began},
            steps=(),
        )

    def evaluate_part_way(self, share: float, deployment: Deployment, tokens: int | None) -> Evaluation:
        """Evaluate the student part of the way from its beginning to the end of its training.

        Args:
            share: Share of the way, above 0 and below 1.
            deployment: How it is packed.
            tokens: As in `student_folder`.
        """
        setting, task = self._bench.setting, self._task
        folder = trained_student(self._folder, setting.storage, tokens)
        model, scales = interpolated(setting, task.strategy, task.seed, folder, share)
        held = scales_as(scales, task.strategy, self._spec, deployment)
        return self._evaluate(model, deployment, setting.plan.eval_tokens, held)

    def _evaluate(
        self, model: Any, deployment: Deployment, tokens: int, scales: Mapping[str, Scales] | None
    ) -> Evaluation:
        setting = self._bench.setting
        init = self._task.strategy.init
        data, reference = self._bench.held_out(tokens, init)
        share = setting.plan.example_share * tokens / setting.plan.eval_tokens
        return setting.evaluate(model, self._spec, deployment, data, reference, init, scales=scales, share=share)

    def _trainer(self) -> Trainer:
        model, kept = student_of(self._bench.setting, self._task.strategy, self._task.seed)
        self._bench.check(self._task.strategy, kept)
        model = model.to(self._bench.setting.device) if self._bench.sharding is None else model
        plan, processes = self._bench.setting.plan, self._processes()
        if not self._threads:
            return trainer_of(self._bench, self._task, model, kept, side_by_side=processes)
        # When a trial is alone on a machine, steps with more sequences hardly take longer, divided over processes or
        # read in one pass. Such steps are fewer and less noisy. A whole model keeps its rate: at a larger one it
        # forgets general text.
        wider = self._planned_side_by_side() if self._task.strategy.scales_alone else plan.at_once
        wide = replace(plan, batch_tokens=wider * plan.batch_tokens, micro_batch=wider // processes * plan.micro_batch)
        init = self._task.strategy.init
        many = many_tokens(plan.tokens_of(plan.expected), self._spec.parameters)
        power = _RATE_OF_WIDER_FOR_MANY if many and not self._task.strategy.scales_alone else _RATE_OF_WIDER
        factor = 1.0 if init.whole or init.source == "pretrained" else wider**power
        return trainer_of(self._bench, self._task, model, kept, plan=wide, side_by_side=processes, rate_factor=factor)

    def _processes(self) -> int:
        """Return how many processes divide a step's sequences, if only scales are trained, which are few.

        A trial alone on a machine uses at most as many as the trials that were to run there at the same time.
        """
        bench, plan = self._bench, self._bench.setting.plan
        if not self._task.strategy.scales_alone or bench.sharding is not None or not usable(bench.setting.device):
            return 1
        if self._threads and plan.workers > 1:
            return self._planned_side_by_side()
        return min(plan.threads, plan.batch_tokens // plan.sequence_length, MOST)

    def _planned_side_by_side(self) -> int:
        """Return how many trials this machine was to run at the same time, each with one sequence a step.

        This trial counts too.
        """
        if self._bench.sharding is not None or not usable(self._bench.setting.device):
            return 1
        return min(self._threads, self._bench.setting.plan.workers, MOST)

    def _save_student(self, model: Any, scales: Mapping[str, Scales], tokens: int | None) -> str:
        """Write the trained master weights as a folder that transformers loads, completely or not at all.

        Learned scales are written next to them, because rounded weights would not give these scales back. Without
        `tokens`, the student has full fidelity and replaces any students that the trial kept before.

        Returns:
            The hash of the list of its files' checksums.
        """
        temporary, folder = self._folder / ".student.partial", student_folder(self._folder, tokens)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            save_student(model, self._bench.setting.text(self._task.strategy.init), temporary)
            if self._task.strategy.finishing is not None:
                write_scales(temporary, self._task.strategy.finishing, scales)
            written = write_list(temporary)
            for before in (folder, *(self._folder.glob("student-*") if tokens is None else ())):
                shutil.rmtree(before, ignore_errors=True)
            put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if (storage := self._bench.setting.storage) is not None:
            send_student(self._folder, storage, tokens)
        return written


def trainer_of(
    bench: Workbench,
    task: TrialTask,
    model: Any,
    kept_layers: tuple[int, ...],
    strategy: Strategy | None = None,
    plan: Plan | None = None,
    side_by_side: int = 1,
    rate_factor: float = 1.0,
) -> Trainer:
    """Return a trainer for a student, with the worker's data, cache and teacher.

    Args:
        bench: The worker's bench.
        task: The trial.
        model: Its student, on the trials' device; on the CPU if several processes train it.
        kept_layers: The teacher layer that each of its layers corresponds to.
        strategy, plan: Used instead of the task's strategy and the search's plan, for a training that differs this
            once.
        side_by_side: Number of processes that divide the sequences of each step.
        rate_factor: Factor for the strategy's learning rate.
    """
    setting, strategy, plan = bench.setting, strategy or task.strategy, plan or bench.setting.plan
    attention, layers = strategy.distillation.attention, setting.teacher_spec.layers
    return Trainer(
        model,
        teaching=Teaching(
            kept_layers=kept_layers,
            layers=layers,
            width=setting.teacher_spec.width,
            cache=bench.cache,
            block=bench.teacher_block(teacher_layer(attention, layers)) if attention else None,
            live=bench.teacher,
        ),
        strategy=strategy,
        plan=replace(plan, micro_batch=min(plan.micro_batch, task.micro_batch or plan.micro_batch)),
        data=bench.read("train", strategy.init).head(setting.plan.most_tokens),
        seed=task.seed,
        device=setting.device,
        sharding=bench.sharding,
        beginning=on_codes(setting, strategy, model),
        side_by_side=side_by_side,
        rate_factor=rate_factor,
    )

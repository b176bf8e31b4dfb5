"""A strategy becomes stages, deployments and measurements: what one worker does for one trial."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from safetensors import SafetensorError

from autodistill.distillation.losses.attention import teacher_layer
from autodistill.distillation.student.build import save_student
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.checkpoint import read_metadata
from autodistill.distillation.training.fsdp import whole_model
from autodistill.distillation.training.learning_rate import branch_point, end_of
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.side_by_side import MOST, usable
from autodistill.distillation.training.trainer import StepRecord, Trainer
from autodistill.errors import DamagedError, TrialFailedError
from autodistill.evaluation.evaluate import Evaluation, evaluate
from autodistill.inference.torch_memory import give_back_memory, is_out_of_memory
from autodistill.models.loading import load_model
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales, write_scales
from autodistill.runs.checkpoints import Checkpoint, open_stages
from autodistill.runs.students import send_student, student_folder, trained_student
from autodistill.search.worker.begin import codes_file, on_codes, student_of
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import RungReport, TrialTask
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.checksums import check_seal, write_list
from autodistill.utils.clock import Moment
from autodistill.utils.durable import make_folder, put

# How much longer than the steps before a decay may take: for noise, and for its steps on a grid, which are slower.
_SPARE, _ON_GRID = 1.1, 1.25

# Steps by which the time of those to come is told, the first of a worker aside, which is slow.
_FEW_STEPS, _MANY_STEPS = 3, 100

# The power of a step's sequences by which its rate grows where they are more, and steps as many fewer: what the prior
# holds of both together (`search/prior/knowledge.yaml`: 0.46 and 0.30).
_RATE_OF_WIDER = 0.75

# Seconds of training that a kill costs at most.
_SAVED_EVERY = 600.0


@dataclass(kw_only=True)
class _Stretch:
    """One stretch of a trial, as far as it is trained.

    Attributes:
        start: Tokens that it goes on from.
        target: Tokens at the end of its decay, which may come to be fewer.
        shared: Tokens of it that others had trained.
        steps: Made so far.
        between: Tokens of its checkpoint that lies between two from which others go on, or None.
        saving: Seconds that checkpoints took.
        unsaved: Why the last one that could not be written was not.
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
        bench: The worker's.
        task: Which trial.
        on_step: Called after each optimiser step; may raise to end the trial.
        threads: CPU threads that it has where nothing else runs; 0 for as many as ever.
    """

    def __init__(
        self,
        bench: Workbench,
        task: TrialTask,
        on_step: Callable[[StepRecord], None] = lambda _: None,
        threads: int = 0,
    ) -> None:
        self._threads = threads
        self._bench = bench
        self._task = task
        self._on_step = on_step
        setting = bench.setting
        pretrained = setting.pretrained.get(task.strategy.init.model)
        self._spec = student_spec(task.strategy, setting.teacher_spec, pretrained)
        self._folder = setting.checkpoints / task.id
        self._stages = open_stages(setting.checkpoints, setting.storage)
        self._stage = task.stage or task.id
        self._decay = setting.plan.decay if task.decay is None else task.decay
        self._damaged: str | None = None
        # Seconds in which the student writes a step's own tokens, where a phase lets it.
        self._writing = 0.0

    def run(self, rung: int, *, keep: bool = False, until: Moment | None = None) -> RungReport | None:
        """Trains to a rung and evaluates there, from the furthest checkpoint of its stage, whoever trained it.

        Of several processes the first one alone evaluates and reports.

        Args:
            rung: Index of the rung.
            keep: Whether its student is kept, as that of the last rung is. At a rung that was reached before, its decay
                is trained once more, to the same bits.
            until: When the student is to be trained, with fewer tokens than it would have where need
                be: its decay then begins sooner, and is not given back for the end of the box.

        Raises:
            TrialFailedError: NaN, out of memory, or another error of this trial alone.
            TooManyAtOnce: Of several processes, which are to begin again with fewer sequences at once.
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
            # Once in a run: what they take says nothing of what other work will take.
            codes_file(self._bench.setting, self._task.strategy)
        began = time.perf_counter()
        trainer = self._trainer()
        shared, resumed = self._restore(trainer, rung)
        stretch = _Stretch(start=trainer.tokens, target=self._targets(rung)[-1], shared=shared)
        ready = time.perf_counter()
        try:
            self._train(trainer, rung, stretch, until)
        finally:
            trainer.close()
        trained = time.perf_counter()
        model, scales = trainer.model, trainer.scales
        # The optimiser makes room for the evaluation, and so do shards.
        del trainer
        if sharding is not None:
            model = whole_model(sharding, model)
            # A sharded module is part of cycles, which would keep its shards into the next trial.
            give_back_memory()
        if model is None:
            return None
        model.to(self._bench.setting.device)
        student = self._save_student(model, scales, None if last else stretch.target) if last or keep else None
        kept = time.perf_counter()
        probe, finishing = self._task.probe, self._task.strategy.finishing
        evaluation = self._evaluate(
            model,
            probe,
            plan.eval_tokens if last else plan.rung_eval_tokens,
            scales if finishing and probe.scheme == finishing.scheme else None,
        )
        ended = time.perf_counter()
        stride = -(-len(stretch.steps) // 20)
        return RungReport(
            rung=rung,
            tokens=stretch.target,
            evaluation=evaluation,
            params=self._spec.parameters,
            seconds={
                "train": trained - ready - stretch.saving,
                "evaluate": ended - kept,
                "other": (ready - began) + stretch.saving + (kept - trained),
            },
            steps=tuple(stretch.steps[::-1][::stride][::-1]),
            trained=stretch.target - stretch.start,
            shared=shared,
            unsaved=stretch.unsaved,
            resumed=resumed,
            damaged=self._damaged,
            student=student,
        )

    def _train(self, trainer: Trainer, rung: int, stretch: _Stretch, until: Moment | None) -> None:
        """Trains a stretch, its decay included, and leaves a checkpoint where one is of use."""
        saved = time.perf_counter()
        if self._is_between(stretch.start):
            stretch.between = stretch.start
        make_folder(self._folder)
        plan, branch = self._bench.setting.plan, self._branches(rung)[-1]
        self._writing = trainer.writing_seconds() if until is not None else 0.0
        for point in self._points(rung, stretch.start):
            for record in trainer.train_stable(point):
                stretch.steps.append(record)
                self._on_step(record)
                if until is not None and self._is_time(until, stretch.steps):
                    stretch.target = end_of(trainer.tokens, self._decay, plan.batch_tokens)
                    break
                if self._agreed(time.perf_counter() - saved > _SAVED_EVERY) and trainer.tokens < point:
                    self._leave(trainer, stretch, on_the_way=True)
                    saved = time.perf_counter()
            # Nobody but this trial continues a stage of its own, and after the last rung it does not go on.
            if self._task.stage or not (rung == len(plan.rungs) - 1 and point == branch):
                self._leave(trainer, stretch, on_the_way=False)
                saved = time.perf_counter()
            if trainer.tokens < point:
                break
        decay: list[StepRecord] = []

        def sooner(record: StepRecord, end: int) -> int:
            decay.append(record)
            return end if until is None else self._sooner(until, decay, end)

        for record in trainer.finish(stretch.target, self._spec, sooner):
            stretch.steps.append(record)
            if until is None:
                self._on_step(record)
        stretch.target = trainer.tokens

    def _leave(self, trainer: Trainer, stretch: _Stretch, *, on_the_way: bool) -> None:
        """Leaves a checkpoint in the place of the one before, where that is between two that others go on from."""
        began = time.perf_counter()
        failed = self._save(trainer, stretch.shared, in_place_of=stretch.between)
        stretch.unsaved = failed or stretch.unsaved
        if not on_the_way:
            stretch.between = None
        elif not failed:
            stretch.between = trainer.tokens
        stretch.saving += time.perf_counter() - began

    def _is_time(self, until: Moment, steps: Sequence[StepRecord]) -> bool:
        """Whether the decay must begin to end in time, by what the steps so far took; of several processes the first's.

        Never before the student has more tokens than the plan's.

        Args:
            until: When it is to end.
            steps: Of this stretch, all of them so far.
        """
        plan, tokens = self._bench.setting.plan, steps[-1].tokens
        if len(steps) <= _FEW_STEPS or end_of(tokens, self._decay, plan.batch_tokens) <= plan.tokens:
            return False
        each = _each(steps, plan.batch_tokens)
        left = (end_of(tokens + plan.batch_tokens, self._decay, plan.batch_tokens) - tokens) // plan.batch_tokens
        slower = _ON_GRID if self._task.strategy.finishing and not self._task.strategy.scales_alone else 1.0
        phase = self._task.strategy.distillation.on_policy
        writing = phase.share * self._writing if phase else 0.0
        return self._agreed(_SPARE * left * (slower * each + writing) > until.left)

    def _sooner(self, until: Moment, steps: Sequence[StepRecord], end: int) -> int:
        """Tokens at which a decay under way is to end, fewer than before where the machine has become slower.

        Never fewer than the plan's; of several processes the first's.

        Args:
            until: When it is to end.
            steps: Of the decay so far.
            end: Tokens at its end, as was thought before.
        """
        batch = self._bench.setting.plan.batch_tokens
        own = [step for step in steps if step.on_policy]
        # In the last phase a step takes as long as those of it; before, as if all that are left were of it.
        each = _each(own, batch) if own else _each(steps, batch) + self._writing
        left = 0 if len(steps) < _FEW_STEPS else (end - steps[-1].tokens) // batch
        held = max(0, int(until.left / each))
        least = self._bench.setting.plan.tokens + batch
        found = min(end, max(steps[-1].tokens + held * batch, least)) if left > _SPARE * held else end
        sharding = self._bench.sharding
        return int(sharding.first(found)) if sharding is not None else found

    def _agreed(self, own: bool) -> bool:
        """What the first of several processes finds, in each."""
        sharding = self._bench.sharding
        return bool(sharding.first(int(own))) if sharding is not None else own

    def _points(self, rung: int, start: int) -> list[int]:
        """Tokens beyond `start` at which decays branch off, up to that of a rung.

        A trial that passes rungs without stopping leaves a checkpoint at each, from which others, or it itself where
        its time ends, are judged there.
        """
        passes = self._task.stage or (self._task.straight and self._task.length == 1)
        branches = self._branches(rung)
        return [point for point in (branches if passes else branches[-1:]) if point > start]

    def _is_between(self, tokens: int) -> bool:
        """Whether a checkpoint at so many tokens is none from which a decay branches off."""
        plan = self._bench.setting.plan
        targets = (*plan.rungs, *(plan.tokens_of(length) for length in plan.lengths))
        branches = [branch_point(target, plan.decay, plan.batch_tokens) for target in targets]
        return tokens not in (0, *branches, self._branches(len(plan.rungs) - 1)[-1])

    def _targets(self, rung: int) -> tuple[int, ...]:
        """Tokens of the rungs up to one; a longer trial ends beyond the last."""
        plan, length = self._bench.setting.plan, self._task.length
        return (*plan.rungs[: rung + 1], *((plan.tokens_of(length),) if length > 1 else ()))

    def _branches(self, rung: int) -> list[int]:
        """Tokens at which the decays of these branch off; that of a longer trial may be of another share."""
        plan, targets = self._bench.setting.plan, self._targets(rung)
        decays = [plan.decay] * (len(targets) - 1) + [self._decay]
        return [branch_point(tokens, decay, plan.batch_tokens) for tokens, decay in zip(targets, decays, strict=True)]

    def _restore(self, trainer: Trainer, rung: int) -> tuple[int, int]:
        """Continues from the furthest checkpoint up to a rung's branch.

        Gives the tokens of this stretch that others had trained, and those that this trial had, which was interrupted.

        A checkpoint that cannot be read, or is not as it was written, is removed, and the one before it is taken; of a
        storage this machine's copy is fetched once more before.
        """
        tokens, sharding = self._branches(rung), self._bench.sharding
        fetched: set[Checkpoint] = set()
        while (found := self._furthest(tokens[-1])) is not None:
            path, checkpoint = found
            try:
                # Before a weight is changed: without a checkpoint the trial begins with those it was made with.
                check_seal(path)
                trainer.load(path)
            except FileNotFoundError:
                if sharding is not None:
                    raise  # the other processes wait in theirs: all end, and are tried again
                continue  # collected meanwhile
            except (DamagedError, SafetensorError, OSError) as error:
                if checkpoint in fetched or sharding is not None or not self._stages.drop_copy(checkpoint):
                    self._damaged = f"the checkpoint at {checkpoint.tokens:,} tokens is lost: {error}"
                    self._stages.remove(checkpoint)
                fetched.add(checkpoint)
                if sharding is not None:
                    raise
                continue
            before = tokens[-2] if rung > 0 and not self._task.straight else 0
            if checkpoint.tokens <= before:
                return 0, 0
            notes, reached = read_metadata(path), checkpoint.tokens - before
            if notes["trial"] != self._task.id:
                return reached, 0
            # Its own, of this very stretch: the worker was killed between the checkpoint and the report.
            shared = int(notes["shared"])
            return shared, max(0, reached - shared)
        return 0, 0

    def _furthest(self, tokens: int) -> tuple[Path, Checkpoint] | None:
        """The furthest checkpoint of the stage up to so many tokens; of several processes the first one's choice."""
        found, sharding = self._stages.find(self._stage, tokens), self._bench.sharding
        if sharding is None:
            return found
        chosen = int(sharding.first(found[1].tokens if found else -1))
        if chosen < 0 or (found is not None and found[1].tokens == chosen):
            return found if chosen >= 0 else None
        found = self._stages.find(self._stage, chosen)
        if found is None or found[1].tokens != chosen:
            raise FileNotFoundError(f"this node has no checkpoint of {self._stage} at {chosen} tokens")
        return found

    def _save(self, trainer: Trainer, shared: int, in_place_of: int | None) -> str | None:
        """Keeps the stable part for whoever goes on from it; gives the reason where that is impossible.

        Without it the trial goes on all the same, and a later stretch trains again what was lost.

        Args:
            trainer: At the point that is kept.
            shared: Tokens of this stretch that others had trained.
            in_place_of: Tokens of the checkpoint that is of no use any more then, or None.
        """
        sharding = self._bench.sharding
        held = self._stages.holds(self._stage, trainer.tokens)
        if sharding.first(held) if sharding else held:
            return None
        # Before anything can fail in the first process alone: each gives its shards.
        write = trainer.checkpoint({"trial": self._task.id, "shared": str(shared)})
        if write is None:
            return None
        try:
            self._stages.save(self._stage, trainer.tokens, write)
        except (OSError, SafetensorError) as error:
            return f"the checkpoint at {trainer.tokens:,} tokens could not be written: {error}"
        for checkpoint in self._stages.checkpoints() if in_place_of else ():
            if (checkpoint.stage, checkpoint.tokens) == (self._stage, in_place_of):
                self._stages.remove(checkpoint)
        return None

    def evaluate(self, deployment: Deployment) -> RungReport:
        """Evaluates the trained student, as it was kept at the last rung, under one more deployment."""
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

    def _evaluate(
        self, model: Any, deployment: Deployment, tokens: int, scales: Mapping[str, Scales] | None
    ) -> Evaluation:
        setting = self._bench.setting
        init = self._task.strategy.init
        data, reference = self._bench.held_out(tokens, init)
        return evaluate(
            model,
            self._spec,
            deployment,
            data,
            reference,
            budget=setting.budget,
            evaluators=setting.evaluators,
            metric=setting.metric,
            device=setting.device,
            scales=scales,
            share=setting.plan.example_share * tokens / setting.plan.eval_tokens,
            tokenizer=setting.text(init),
            teacher=setting.teacher_spec,
        )[0]

    def _trainer(self) -> Trainer:
        model, kept = student_of(self._bench.setting, self._task.strategy, self._task.seed)
        self._bench.check(self._task.strategy, kept)
        model = model.to(self._bench.setting.device) if self._bench.sharding is None else model
        plan, processes = self._bench.setting.plan, self._processes()
        if not self._threads:
            return trainer_of(self._bench, self._task, model, kept, side_by_side=processes)
        # Alone on a machine, steps of as many more sequences take no longer. They are fewer, and less noisy. The whole
        # teacher keeps its rate: from a larger one it forgets general text.
        wide = replace(plan, batch_tokens=plan.batch_tokens * processes)
        factor = 1.0 if self._task.strategy.init.whole else processes**_RATE_OF_WIDER
        return trainer_of(self._bench, self._task, model, kept, plan=wide, side_by_side=processes, rate_factor=factor)

    def _processes(self) -> int:
        """How many processes divide a step's sequences, where scales alone are trained, which are few.

        Alone on a machine no more than trials that it was to hold side by side.
        """
        bench, plan = self._bench, self._bench.setting.plan
        if not self._task.strategy.scales_alone or bench.sharding is not None or not usable(bench.setting.device):
            return 1
        if self._threads:
            return min(self._threads, plan.workers, MOST)
        return min(plan.threads, plan.batch_tokens // plan.sequence_length, MOST)

    def _save_student(self, model: Any, scales: Mapping[str, Scales], tokens: int | None) -> str:
        """Writes the trained master weights as a folder that transformers loads, whole or not at all.

        What scales were learned lie beside them: rounded weights would not give these scales back. A student of full
        fidelity, that of no `tokens`, takes the place of what was kept of the trial before.

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


def _each(steps: Sequence[StepRecord], batch_tokens: int) -> float:
    """Seconds that a step takes, by those that were made; the machine may have become slower of late."""
    took = [batch_tokens / step.tokens_per_second for step in steps[-_MANY_STEPS:]]
    return max(fmean(took[1:] or took), median(took[-_FEW_STEPS:]))


def trainer_of(
    bench: Workbench,
    task: TrialTask,
    model: Any,
    kept: tuple[int, ...],
    strategy: Strategy | None = None,
    plan: Plan | None = None,
    side_by_side: int = 1,
    rate_factor: float = 1.0,
) -> Trainer:
    """What trains a student, on the worker's data, cache and teacher.

    Args:
        bench: The worker's.
        task: Which trial.
        model: Its student, on the trials' device, or of several processes on the CPU.
        kept: Teacher layer that each of its layers stands for.
        strategy, plan: Others than the task's and the search's, where it is trained otherwise for once.
        side_by_side: Processes that divide the sequences of each step among them.
        rate_factor: By which the strategy's learning rate is multiplied.
    """
    setting, strategy, plan = bench.setting, strategy or task.strategy, plan or bench.setting.plan
    attention, layers = strategy.distillation.attention, setting.teacher_spec.layers
    return Trainer(
        model,
        kept=kept,
        teacher_layers=layers,
        teacher_width=setting.teacher_spec.width,
        strategy=strategy,
        plan=replace(plan, micro_batch=min(plan.micro_batch, task.micro_batch or plan.micro_batch)),
        data=bench.read("train", strategy.init).head(setting.plan.most_tokens),
        cache=bench.cache,
        teacher_block=bench.teacher_block(teacher_layer(attention, layers)) if attention else None,
        seed=task.seed,
        device=setting.device,
        teacher=bench.teacher,
        sharding=bench.sharding,
        beginning=on_codes(setting, strategy, model),
        side_by_side=side_by_side,
        rate_factor=rate_factor,
    )

"""A strategy becomes stages, deployments and measurements: what one worker does for one trial."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from autodistill.contracts import (
    Answers,
    Direction,
    Evaluator,
    HeldType,
    Measurement,
    ModelSpec,
    Needs,
    Plan,
    Subject,
    TeacherReference,
    TokenScores,
)
from autodistill.data import TokenSet, load_split
from autodistill.distillation.alignment import aligned_layers, check_projection, layer_map
from autodistill.distillation.attention import TeacherBlock, check_attention, teacher_layer
from autodistill.distillation.calibration import Calibration
from autodistill.distillation.checkpoint import read_metadata
from autodistill.distillation.generation import answer
from autodistill.distillation.grid_scales import read_scales, write_scales
from autodistill.distillation.held import held_as_deployed, is_held, load_held
from autodistill.distillation.lora import check_lora
from autodistill.distillation.memory import is_out_of_memory, keep_freed_memory
from autodistill.distillation.quantization import deploy_tensor
from autodistill.distillation.schedule import branch_point
from autodistill.distillation.scoring import score
from autodistill.distillation.sharding import Sharding, whole_model
from autodistill.distillation.signals import LiveTeacher, check_told
from autodistill.distillation.simulated import PackedStudent
from autodistill.distillation.student import build_student, init_spec
from autodistill.distillation.teacher import load_model
from autodistill.distillation.teacher_cache import CacheSettings, TeacherCache
from autodistill.distillation.trainer import StepRecord, Trainer
from autodistill.errors import InputError, TrialFailedError
from autodistill.estimate import check_holds
from autodistill.formats import Grid, Scales
from autodistill.plugins import load
from autodistill.stages import Checkpoint, open_stages
from autodistill.statistics import per_document
from autodistill.storage import Storage
from autodistill.strategy import Deployment, Init, Strategy, serving
from autodistill.units import Budget

ASKING_DATA = "give --data with a prompt and an answer in each record, or reasoning-gym:TASK"
# Tokens that an evaluator's own prompts may have; a model of a long context would otherwise set no limit.
_MOST_CONTEXT = 4096
# What a student takes from its teacher's folder: by suffix, but for the files that describe the teacher's own weights.
_TEXT_FILES = (".json", ".jinja", ".model", ".txt")
_OWN_FILES = ("config.json", "model.safetensors.index.json", "teacher.json")


@dataclass(frozen=True, kw_only=True)
class TrialSetting:
    """All that the trials of a search have in common; plain data, sent to every worker once.

    Attributes:
        teacher, data: Folders of the teacher and of the prepared data.
        cache: Folder of the teacher's cached outputs; None where no strategy of the search reads any.
        teacher_spec: The teacher's shape.
        teacher_reference: File of what is kept of the teacher on the validation sequences.
        teacher_accuracy: The teacher's accuracy on validation, for the retention.
        checkpoints: Folder that holds a folder for each trial.
        budget, plan: Of the search.
        evaluators: Those that run on simulated students: names of installed ones, and what a request made.
        metric, direction: What a rung is judged by.
        device: Where trials train.
        calibration: File of the teacher's calibration, where a strategy chooses by it.
        pretrained: Folders of the models that strategies start from, by their references.
        held: What the teacher's matrices are held in.
        storage: The run's, where trials keep what another node may go on from; None for `checkpoints` alone.
    """

    teacher: Path
    teacher_spec: ModelSpec
    teacher_reference: Path
    teacher_accuracy: float
    data: Path
    cache: Path | None
    checkpoints: Path
    budget: Budget
    plan: Plan
    evaluators: tuple[str | Evaluator, ...]
    metric: str
    direction: Direction
    device: str
    calibration: Path | None = None
    pretrained: Mapping[str, Path] = field(default_factory=dict)
    held: HeldType = "float32"
    storage: Storage | None = None


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """One trial, as sent to a worker.

    Attributes:
        id: Name of the trial in its run, like "t004".
        strategy: What to train.
        seed: Of data order and projections.
        deployments: Those that the budget allows, under which the trained student may be evaluated.
        probe: The one of them that rungs are judged on.
        straight: Whether the trial runs to the plan's tokens without stopping at rungs.
        length: How many times the plan's tokens it is trained for; above 1 the trial is straight.
        stage: Address of its stable part, whose checkpoints trials share; empty where its checkpoints are its own.
    """

    id: str
    strategy: Strategy
    seed: int
    deployments: tuple[Deployment, ...]
    probe: Deployment
    straight: bool = False
    length: float = 1.0
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One deployment of a student, evaluated.

    Attributes:
        deployment: How it is packed.
        measurements: By name.
        documents: Ids, counts and sums of each document, for paired comparisons: of the metric that ranks, whose name
            is under "metric", and under "others" those of the other measurements that are means, by name.
    """

    deployment: Deployment
    measurements: dict[str, Measurement]
    documents: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RungReport:
    """What a trial tells after a rung.

    Attributes:
        rung: Index of the rung.
        tokens: Trained on at the rung.
        evaluation: Of the probe, or of the deployment asked for.
        params: Weights of the student.
        seconds: "train", "evaluate" and "other".
        steps: Step records of this stretch, thinned to at most 20.
        trained: Tokens that this stretch trained on, its decay included.
        shared: Tokens of this stretch that were not trained on, since another trial had trained the stage so far.
        unsaved: Why a checkpoint could not be written; None where all were.
    """

    rung: int
    tokens: int
    evaluation: Evaluation
    params: int
    seconds: dict[str, float]
    steps: tuple[StepRecord, ...]
    trained: int = 0
    shared: int = 0
    unsaved: str | None = None


def probe_deployment(strategy: Strategy, deployments: tuple[Deployment, ...]) -> Deployment:
    """The deployment a rung is judged on: the finishing stage's own grid where it is allowed, else the widest one."""
    finishing = strategy.finishing
    for deployment in deployments:
        if finishing and deployment.packing == finishing.packing:
            return deployment
    return max(deployments, key=_width)


def _width(deployment: Deployment) -> tuple[int, bool, float, str]:
    return deployment.bits, bool(deployment.keep), -(deployment.group_size or math.inf), deployment.name


def with_own(strategy: Strategy, deployments: tuple[Deployment, ...]) -> tuple[Deployment, ...]:
    """The deployments, and that of the strategy's finishing grid where it is none of them."""
    finishing = strategy.finishing
    if finishing is None or any(deployment.packing == finishing.packing for deployment in deployments):
        return deployments
    packing = finishing.packing
    return (*deployments, Deployment(runtime=serving(packing)[0], **asdict(packing)))


def student_spec(strategy: Strategy, teacher: ModelSpec) -> ModelSpec:
    """Shape of the student that a strategy makes of a teacher.

    Raises:
        InputError: The teacher has no student of these proportions.
    """
    return init_spec(strategy.init, teacher)


def initial_student(setting: TrialSetting, init: Init, seed: int) -> tuple[Any, tuple[int, ...]]:
    """The student before training, in float32 on the CPU, and the teacher layer that each of its layers stands for."""
    return build_student(
        setting.teacher,
        init,
        seed=seed,
        calibration=Calibration.load(setting.calibration) if setting.calibration and init.selective else None,
        pretrained=setting.pretrained.get(init.model),
    )


def check_strategy(strategy: Strategy, teacher: ModelSpec) -> None:
    """Refuses a strategy that this teacher cannot be distilled by, before anything is loaded.

    Raises:
        InputError: A shape that this teacher cannot be cut to, more aligned layers than the student has, widths that
            the projection does not allow, attention that cannot be compared, or a finishing grid that cannot hold the
            student.
    """
    spec = student_spec(strategy, teacher)
    alignment = strategy.distillation.alignment
    if alignment is not None:
        aligned_layers(alignment, spec.layers)
        check_projection(alignment, spec.width, teacher.width)
    if strategy.distillation.attention is not None:
        check_attention(strategy.distillation.attention, spec, teacher)
    if strategy.distillation.lora is not None:
        check_lora(strategy.distillation.lora, spec)
    if strategy.finishing is not None:
        check_holds(spec, strategy.finishing)


@contextmanager
def deployed_weights(
    model: Any, spec: ModelSpec, deployment: Deployment, scales: Mapping[str, Scales] | None = None
) -> Iterator[None]:
    """Puts the values that the runtime will see into the model, and the master weights back at the end.

    Args:
        model: In float32, or held in 16 bits, where scales are not for it.
        spec: Its shape.
        deployment: How it is packed.
        scales: Those that were learned for this packing, by name of the weight.
    """
    if is_held(model):
        with held_as_deployed(model, {tensor.name: deployment.storage(tensor) for tensor in spec.tensors}):
            yield
        return
    parameters = dict(model.named_parameters())
    masters = {}
    try:
        for tensor in spec.tensors:
            parameter = parameters[tensor.name]
            masters[tensor.name] = parameter.data
            learned = (scales or {}).get(tensor.name)
            parameter.data = deploy_tensor(parameter.data, deployment.storage(tensor), learned)
        yield
    finally:
        for name, master in masters.items():
            parameters[name].data = master


@dataclass(frozen=True, kw_only=True)
class _Simulation:
    """A packed model and what it is read on: all that a part of a subject is made from."""

    model: Any
    data: TokenSet
    reference: TeacherReference | None
    device: str
    student: PackedStudent | None

    def scores(self, asking: str) -> TokenScores:
        return score(self.model, self.data, self.reference, device=self.device)[0]

    def answers(self, asking: str) -> Answers:
        if self.data.questions is None:
            raise InputError(f"{asking} needs questions with answers: {ASKING_DATA}")
        return answer(self.model, self.data.questions, device=self.device)

    def asked(self, asking: str) -> PackedStudent:
        if self.student is None:
            raise ValueError(f"{asking} asks the student in text, and no tokenizer was given")
        return self.student


# What makes the part of a subject that an evaluator needs, given the name of the evaluator for error messages.
_PROVIDERS: Mapping[Needs, Callable[[_Simulation, str], Any]] = {
    "scores": _Simulation.scores,
    "answers": _Simulation.answers,
    "student": _Simulation.asked,
}


def evaluate(
    model: Any,
    spec: ModelSpec,
    deployment: Deployment,
    data: TokenSet,
    reference: TeacherReference | None,
    *,
    budget: Budget,
    evaluators: Sequence[str | Evaluator],
    metric: str = "accuracy",
    device: str = "cpu",
    scales: Mapping[str, Scales] | None = None,
    split: str = "validation",
    share: float = 1.0,
    tokenizer: Path | None = None,
) -> tuple[Evaluation, TokenScores]:
    """Makes once what the evaluators need of the packed model, and lets every one of them read it.

    Args:
        model: In float32 on `device`; unchanged afterwards.
        spec: Its shape.
        deployment: How it is packed.
        data: Held-out sequences.
        reference: The teacher's for them, or None for the teacher itself.
        budget: Context and batch for the memory estimate.
        evaluators: Names, or evaluators themselves.
        metric: That ranks, whose documents are compared.
        device: Where the model lies.
        scales: As for `deployed_weights`.
        split: That the data are of.
        share: Of the evaluators' own examples, how much is read.
        tokenizer: Folder of the teacher, whose files describe its text; None where no evaluator asks in text.

    Raises:
        InputError: An evaluator needs answers, and the data have no questions.
    """
    found = (load("evaluators", item) if isinstance(item, str) else item for item in evaluators)
    chosen = [item for item in found if item.needs != "artefact" and item.supports(deployment)]
    with deployed_weights(model, spec, deployment, scales):
        student = tokenizer and PackedStudent(
            model=model,
            device=device,
            tokenizer=tokenizer,
            split=split,
            share=share,
            context=min(spec.max_context, _MOST_CONTEXT),
            data=data,
            saver=partial(_save_packed, model, tokenizer),
        )
        simulation = _Simulation(model=model, data=data, reference=reference, device=device, student=student or None)
        asking = {item.needs: item.name for item in reversed(chosen) if item.needs in _PROVIDERS}
        parts = {need: _PROVIDERS[need](simulation, name) for need, name in asking.items()}
        scores = parts.get("scores") or simulation.scores("accuracy")
        if not np.isfinite(scores.nll).all():
            raise TrialFailedError("nan", "the student's likelihoods are not finite")
        subject = Subject(spec=spec, deployment=deployment, budget=budget, split=split, **{**parts, "scores": scores})
        measurements = {item.name: item for evaluator in chosen for item in evaluator.evaluate(subject)}
    paired = {name: dict(item.documents) for name, item in measurements.items() if item.documents}
    own = paired.pop(metric, None) or per_document(scores.correct, scores.documents)
    documents = {**own, "metric": metric if metric in measurements else "accuracy", "others": paired}
    return Evaluation(deployment=deployment, measurements=measurements, documents=documents), scores


def _save_packed(model: Any, teacher: Path, folder: Path) -> None:
    if is_held(model):
        raise InputError(
            "a teacher that memory does not hold in float32 cannot be written out for a command: use a smaller one"
        )
    save_student(model, teacher, folder)


@dataclass
class Workbench:
    """What a warm worker keeps from trial to trial: data and cache, mapped into memory, what validation is held to, and
    what of the teacher its trials have needed: it, or layers of it. `sharding` is of the processes
    that train one trial together, each at a bench of its own.
    """

    setting: TrialSetting
    sharding: Sharding | None = None
    train: TokenSet = field(init=False)
    validation: TokenSet = field(init=False)
    cache: TeacherCache | None = field(init=False)
    teacher: LiveTeacher = field(init=False)
    reference: TeacherReference = field(init=False)
    _blocks: dict[int, TeacherBlock] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.setting.plan.threads)
        if self.setting.device == "cuda" and self.setting.plan.gpus < 1:
            # Of workers that share a GPU each keeps to its share.
            torch.cuda.set_per_process_memory_fraction(self.setting.plan.gpus)
        keep_freed_memory()
        self.cache = TeacherCache(self.setting.cache) if self.setting.cache else None
        setting = self.setting
        self.teacher = LiveTeacher(setting.teacher, setting.device, setting.plan.bf16, setting.held)
        # A cache over more sequences may be shared; this search trains on what its own plan needs.
        self.train = load_split(self.setting.data, "train").head(self.setting.plan.most_tokens)
        self.validation = load_split(self.setting.data, "validation")
        self.reference = TeacherReference.load(self.setting.teacher_reference)

    def teacher_block(self, layer: int) -> TeacherBlock:
        """One layer of the teacher, in float32 on the trials' device."""
        if layer not in self._blocks:
            model = load_held(self.setting.teacher, self.setting.held)
            self._blocks[layer] = TeacherBlock(model, layer, self.setting.device)
        return self._blocks[layer]

    def check(self, strategy: Strategy, kept: tuple[int, ...]) -> None:
        """Refuses a strategy that needs what the cache, or the data, lack.

        Args:
            strategy: What is to be trained.
            kept: Teacher layer that each layer of its student is, or stands for.

        Raises:
            InputError: Says what is lacking.
        """
        recipe, layers = strategy.distillation, self.setting.teacher_spec.layers
        check_told([recipe], self.train.told is not None)
        pairs = layer_map(recipe.alignment, kept, layers) if recipe.alignment else ()
        states = {pair.teacher_state for pair in pairs}
        if recipe.attention:
            states.add(teacher_layer(recipe.attention, layers) - 1)
        needed = CacheSettings.for_recipes([recipe], states, self.setting.plan.bf16)
        held = self.cache.settings if self.cache else CacheSettings(top_k=0, temperatures=())
        lacking = held.lacks(needed)
        if lacking:
            raise InputError(
                f"the teacher cache lacks {', '.join(lacking)}, which the strategy reads: make the cache of a space "
                "that holds this strategy"
            )

    def held_out(self, tokens: int) -> tuple[TokenSet, TeacherReference]:
        """The first validation sequences that hold `tokens` tokens, and what is kept of the teacher for them."""
        data = self.validation.head(tokens)
        return data, self.reference.head(data.predicted)


class Trial:
    """One trial on one worker, taken from rung to rung.

    Args:
        bench: The worker's.
        task: Which trial.
        on_step: Called after each optimiser step; may raise to end the trial.
    """

    def __init__(
        self, bench: Workbench, task: TrialTask, on_step: Callable[[StepRecord], None] = lambda _: None
    ) -> None:
        self._bench = bench
        self._task = task
        self._on_step = on_step
        self._spec = student_spec(task.strategy, bench.setting.teacher_spec)
        self._folder = bench.setting.checkpoints / task.id
        self._stages = open_stages(bench.setting.checkpoints, bench.setting.storage)
        self._stage = task.stage or task.id

    def run(self, rung: int) -> RungReport | None:
        """Trains to a rung and evaluates there, from the furthest checkpoint of its stage, whoever trained it.

        Of several processes the first one alone evaluates and reports.

        Raises:
            TrialFailedError: NaN, out of memory, or another error of this trial alone.
        """
        try:
            return self._run(rung)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()
            raise TrialFailedError("out-of-memory", said[0] if said else "the machine's memory is full") from error

    def _run(self, rung: int) -> RungReport | None:
        plan = self._bench.setting.plan
        sharding = self._bench.sharding
        began = time.perf_counter()
        trainer = self._trainer()
        target, last = self._targets(rung)[-1], rung == len(plan.rungs) - 1
        shared = self._restore(trainer, rung)
        start = trainer.tokens
        ready = time.perf_counter()
        steps: list[StepRecord] = []
        saving, unsaved = 0.0, None
        self._folder.mkdir(parents=True, exist_ok=True)
        for point in self._points(rung, start):
            for record in trainer.train_stable(point):
                steps.append(record)
                self._on_step(record)
            # Nobody but this trial continues a stage of its own, and after the last rung it does not go on.
            if self._task.stage or not last:
                stable = time.perf_counter()
                unsaved = self._save(trainer, shared) or unsaved
                saving += time.perf_counter() - stable
        for record in self._decay(trainer, target):
            steps.append(record)
            self._on_step(record)
        trained = time.perf_counter()
        model, scales = trainer.model, trainer.scales
        if sharding is not None:
            model = whole_model(sharding, model)
            # Shards and optimiser make room for the whole model.
            del trainer
        if model is None:
            return None
        model.to(self._bench.setting.device)
        if last:
            self._save_student(model, scales)
        kept = time.perf_counter()
        probe, finishing = self._task.probe, self._task.strategy.finishing
        evaluation = self._evaluate(
            model,
            probe,
            plan.eval_tokens if last else plan.rung_eval_tokens,
            scales if finishing and probe.packing == finishing.packing else None,
        )
        ended = time.perf_counter()
        stride = -(-len(steps) // 20)
        return RungReport(
            rung=rung,
            tokens=target,
            evaluation=evaluation,
            params=self._spec.parameters,
            seconds={
                "train": trained - ready - saving,
                "evaluate": ended - kept,
                "other": (ready - began) + saving + (kept - trained),
            },
            steps=tuple(steps[::-1][::stride][::-1]),
            trained=target - start,
            shared=shared,
            unsaved=unsaved,
        )

    def _points(self, rung: int, start: int) -> list[int]:
        """Tokens beyond `start` at which decays branch off, up to that of a rung.

        A trial that passes rungs without stopping leaves a checkpoint at each, from which others are judged there.
        """
        branches = self._branches(rung)
        return [point for point in (branches if self._task.stage else branches[-1:]) if point > start]

    def _targets(self, rung: int) -> tuple[int, ...]:
        """Tokens of the rungs up to one; a longer trial ends beyond the last."""
        plan, length = self._bench.setting.plan, self._task.length
        return (*plan.rungs[: rung + 1], *((plan.tokens_of(length),) if length > 1 else ()))

    def _branches(self, rung: int) -> list[int]:
        """Tokens at which the decays of these branch off."""
        plan = self._bench.setting.plan
        return [branch_point(tokens, plan.decay, plan.batch_tokens) for tokens in self._targets(rung)]

    def _restore(self, trainer: Trainer, rung: int) -> int:
        """Continues from the furthest checkpoint up to a rung's branch; gives the tokens that others had trained of it.

        A checkpoint that cannot be read, as after a power failure, is removed, and the one before it is taken.
        """
        tokens = self._branches(rung)
        while (found := self._furthest(tokens[-1])) is not None:
            path, checkpoint = found
            try:
                trainer.load(path)
            except FileNotFoundError:
                if self._bench.sharding is not None:
                    raise  # the other processes wait in theirs: all end, and are tried again
                continue  # collected meanwhile
            except (SafetensorError, OSError):
                self._stages.remove(checkpoint)
                if self._bench.sharding is not None:
                    raise
                continue
            before = tokens[-2] if rung > 0 and not self._task.straight else 0
            if checkpoint.tokens <= before:
                return 0
            notes = read_metadata(path)
            # Its own, of this very stretch: the worker was killed between the checkpoint and the report.
            return int(notes["shared"]) if notes["trial"] == self._task.id else checkpoint.tokens - before
        return 0

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

    def _save(self, trainer: Trainer, shared: int) -> str | None:
        """Keeps the stable part for whoever goes on from it; gives the reason where that is impossible.

        Without it the trial goes on all the same, and a later stretch trains again what was lost.
        """
        sharding = self._bench.sharding
        held = self._stages.holds(self._stage, trainer.tokens)
        if sharding.first(held) if sharding else held:
            return None
        notes = {"trial": self._task.id, "shared": str(shared)}
        if sharding is not None and sharding.rank > 0:
            trainer.save(self._folder / "unwritten", notes)  # gives its shards
            return None
        try:
            self._stages.save(self._stage, trainer.tokens, lambda path: trainer.save(path, notes))
        except (OSError, SafetensorError) as error:
            return f"the checkpoint at {trainer.tokens:,} tokens could not be written: {error}"
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
        data, reference = self._bench.held_out(tokens)
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
            tokenizer=setting.teacher,
        )[0]

    def _trainer(self) -> Trainer:
        setting, task = self._bench.setting, self._task
        model, kept = initial_student(setting, task.strategy.init, task.seed)
        self._bench.check(task.strategy, kept)
        attention = task.strategy.distillation.attention
        layers = setting.teacher_spec.layers
        return Trainer(
            model.to(setting.device),
            kept=kept,
            teacher_layers=layers,
            teacher_width=setting.teacher_spec.width,
            strategy=task.strategy,
            plan=setting.plan,
            data=self._bench.train,
            cache=self._bench.cache,
            teacher_block=self._bench.teacher_block(teacher_layer(attention, layers)) if attention else None,
            seed=task.seed,
            device=setting.device,
            teacher=self._bench.teacher,
            sharding=self._bench.sharding,
        )

    def _decay(self, trainer: Trainer, target: int) -> Iterator[StepRecord]:
        """The decay, on the finishing stage's grid where there is one."""
        finishing = self._task.strategy.finishing
        if finishing is None:
            return trainer.train_decay(target)
        storages = {tensor.name: finishing.storage(tensor) for tensor in self._spec.tensors}
        grids = {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}
        return trainer.train_decay(
            target, grids.get, on_grid_after=finishing.start, learned=finishing.scales == "learned"
        )

    def _save_student(self, model: Any, scales: Mapping[str, Scales]) -> None:
        """Writes the trained master weights as a folder that transformers loads, whole or not at all.

        What scales were learned lie beside them: rounded weights would not give these scales back.
        """
        temporary, folder = self._folder / ".student.partial", student_folder(self._folder)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            save_student(model, self._bench.setting.teacher, temporary)
            if self._task.strategy.finishing is not None:
                write_scales(temporary, self._task.strategy.finishing, scales)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if (storage := self._bench.setting.storage) is not None:
            storage.send_folder(folder, _student_key(self._folder))


def student_folder(trial: Path) -> Path:
    """Where a trial at full fidelity keeps its float32 student."""
    return trial / "student"


def _student_key(trial: Path) -> str:
    return f"students/{trial.name}"


def trained_student(trial: Path, storage: Storage | None) -> Path:
    """The folder of a student at full fidelity, fetched where another node trained it; it may not be there."""
    folder = student_folder(trial)
    if storage is not None and not folder.is_dir() and has_student(trial, storage):
        storage.fetch_folder(_student_key(trial), folder)
    return folder


def has_student(trial: Path, storage: Storage | None) -> bool:
    """Whether a trial's student was kept, here or on the storage."""
    return student_folder(trial).is_dir() or (storage is not None and storage.has_folder(_student_key(trial)))


def save_student(model: Any, teacher: Path, folder: Path) -> None:
    """Writes a model as a transformers folder, with the tokenizer and all else that describes the teacher's text."""
    model.save_pretrained(folder)
    for path in teacher.iterdir():
        if path.is_file() and path.suffix in _TEXT_FILES and path.name not in _OWN_FILES:
            shutil.copyfile(path, folder / path.name)

"""A strategy becomes stages, deployments and measurements: what one worker does for one trial."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodistill.contracts import Direction, Measurement, ModelSpec, Plan, Subject, TokenScores
from autodistill.data import TokenSet, load_split
from autodistill.distillation.alignment import aligned_layers, check_rank
from autodistill.distillation.generation import answer
from autodistill.distillation.memory import keep_freed_memory
from autodistill.distillation.quantization import deploy_tensor
from autodistill.distillation.scoring import score
from autodistill.distillation.student import build_student, student_depth
from autodistill.distillation.teacher_cache import TeacherCache
from autodistill.distillation.trainer import StepRecord, Trainer, branch_point, read_tokens
from autodistill.errors import InputError, TrialFailedError
from autodistill.estimate import with_layers
from autodistill.formats import Grid, get_format
from autodistill.plugins import load
from autodistill.strategy import Deployment, Strategy
from autodistill.units import Budget

ASKING_DATA = "give --data with a prompt and an answer in each record, or reasoning-gym:TASK"
_STABLE = "stable.safetensors"
# What a student takes from its teacher's folder: by suffix, but for the files that describe the teacher's own weights.
_TEXT_FILES = (".json", ".jinja", ".model", ".txt")
_OWN_FILES = ("config.json", "model.safetensors.index.json", "teacher.json")


@dataclass(frozen=True, kw_only=True)
class TrialSetting:
    """All that the trials of a search have in common; plain data, sent to every worker once.

    Attributes:
        teacher, data, cache: Folders of the teacher, the prepared data and the teacher's cached outputs.
        teacher_spec: The teacher's shape.
        teacher_top1: File of the teacher's most likely tokens on the validation sequences, int32.
        teacher_accuracy: The teacher's accuracy on validation, for the retention.
        checkpoints: Folder that holds a folder for each trial.
        budget, plan: Of the search.
        evaluators: Names of those that run on simulated students.
        metric, direction: What a rung is judged by.
        device: Where trials train.
    """

    teacher: Path
    teacher_spec: ModelSpec
    teacher_top1: Path
    teacher_accuracy: float
    data: Path
    cache: Path
    checkpoints: Path
    budget: Budget
    plan: Plan
    evaluators: tuple[str, ...]
    metric: str
    direction: Direction
    device: str


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """One trial, as sent to a worker.

    Attributes:
        id: Name of the trial in its run, like "t004".
        strategy: What to train.
        seed: Of data order and projections.
        deployments: Those that the budget allows, evaluated at full fidelity.
        probe: The one that rungs are judged on.
        straight: Whether the trial runs to the plan's tokens without stopping at rungs.
    """

    id: str
    strategy: Strategy
    seed: int
    deployments: tuple[Deployment, ...]
    probe: Deployment
    straight: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One deployment of a student, evaluated.

    Attributes:
        deployment: How it is packed.
        measurements: By name.
        documents: Ids, counts and correct ones of each document, for paired comparisons: of tokens, or where the
            student answered in writing of answers, and then under "metric" the name of their figure.
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
        evaluations: One for the probe, or one for each deployment at the last rung.
        params: Weights of the student.
        seconds: "train", "evaluate" and "other".
        steps: Step records of this stretch, thinned to at most 20.
    """

    rung: int
    tokens: int
    evaluations: tuple[Evaluation, ...]
    params: int
    seconds: dict[str, float]
    steps: tuple[StepRecord, ...]


def probe_deployment(strategy: Strategy, deployments: tuple[Deployment, ...]) -> Deployment:
    """The deployment a rung is judged on: the finishing stage's own grid where it is allowed, else the widest one."""
    finishing = strategy.finishing
    for deployment in deployments:
        if finishing and (deployment.format, deployment.bits, deployment.group_size) == (
            finishing.format,
            finishing.bits,
            finishing.group_size,
        ):
            return deployment
    return max(deployments, key=lambda deployment: (deployment.bits, -deployment.group_size, deployment.name))


def student_spec(strategy: Strategy, teacher: ModelSpec) -> ModelSpec:
    """Shape of the student that a strategy makes of a teacher."""
    return with_layers(teacher, student_depth(strategy.init, teacher.layers))


def check_strategy(strategy: Strategy, teacher: ModelSpec) -> None:
    """Refuses a strategy that this teacher cannot be distilled by, before anything is loaded.

    Raises:
        InputError: More aligned layers than the student has, a low-rank projection that is no reduction, or a finishing
            group that does not divide a row of weights.
    """
    spec = student_spec(strategy, teacher)
    alignment = strategy.distillation.alignment
    if alignment is not None:
        aligned_layers(alignment, spec.layers)
        check_rank(alignment, spec.width, teacher.width)
    if strategy.finishing is not None:
        check_deployment(spec, strategy.finishing.format, strategy.finishing.bits, strategy.finishing.group_size)


def check_deployment(spec: ModelSpec, format_name: str, bits: int, group_size: int) -> None:
    """Refuses a packing that a tensor of the model does not divide into.

    Raises:
        InputError: Names the tensor, its row and the group.
    """
    packing = get_format(format_name)
    for tensor in spec.tensors:
        packing.storage(tensor, bits, group_size)


@contextmanager
def deployed_weights(model: Any, spec: ModelSpec, deployment: Deployment) -> Iterator[None]:
    """Puts the values that the runtime will see into the model, and the master weights back at the end."""
    packing = get_format(deployment.format)
    parameters = dict(model.named_parameters())
    masters = {}
    try:
        for tensor in spec.tensors:
            parameter = parameters[tensor.name]
            masters[tensor.name] = parameter.data
            storage = packing.storage(tensor, deployment.bits, deployment.group_size)
            parameter.data = deploy_tensor(parameter.data, storage)
        yield
    finally:
        for name, master in masters.items():
            parameters[name].data = master


def evaluate(
    model: Any,
    spec: ModelSpec,
    deployment: Deployment,
    data: TokenSet,
    teacher_top1: np.ndarray[Any, Any] | None,
    *,
    budget: Budget,
    evaluators: tuple[str, ...],
    device: str = "cpu",
) -> tuple[Evaluation, TokenScores]:
    """Scores the packed model once, lets it answer once where that is asked for, and lets every evaluator read both.

    Args:
        model: In float32 on `device`; unchanged afterwards.
        spec: Its shape.
        deployment: How it is packed.
        data: Held-out sequences.
        teacher_top1: int32, the teacher's most likely tokens for them, or None for the teacher itself.
        budget: Context and batch for the memory estimate.
        evaluators: Names.
        device: Where the model lies.

    Raises:
        InputError: An evaluator needs answers, and the data have no questions.
    """
    chosen = [
        evaluator
        for evaluator in (load("evaluators", name) for name in evaluators)
        if evaluator.needs != "artefact" and evaluator.supports(deployment)
    ]
    asking = next((evaluator.name for evaluator in chosen if evaluator.needs == "answers"), None)
    answers = None
    with deployed_weights(model, spec, deployment):
        scores, _ = score(model, data, teacher_top1, device=device)
        if asking is not None:
            if data.questions is None:
                raise InputError(f"{asking} needs questions with answers: {ASKING_DATA}")
            answers = answer(model, data.questions, device=device)
    subject = Subject(spec=spec, deployment=deployment, budget=budget, scores=scores, answers=answers)
    measurements = {
        measurement.name: measurement for evaluator in chosen for measurement in evaluator.evaluate(subject)
    }
    documents: dict[str, Any] = per_document(scores.correct, scores.documents)
    if answers is not None:
        # What is answered in writing is what a search ranks by, so its ties are of these.
        documents = per_document(answers.marks >= 1, answers.documents) | {"metric": "exact_match"}
    return Evaluation(deployment=deployment, measurements=measurements, documents=documents), scores


def per_document(correct: npt.NDArray[np.bool_], documents: npt.NDArray[np.int32]) -> dict[str, list[int]]:
    """Counts, and how many of them are correct, of each document, from arrays [n]."""
    ids, inverse = np.unique(documents, return_inverse=True)
    return {
        "ids": ids.tolist(),
        "count": np.bincount(inverse).tolist(),
        "sum": np.bincount(inverse, weights=correct).astype(int).tolist(),
    }


@dataclass
class Workbench:
    """What a warm worker keeps from trial to trial: data, cache and the teacher's choices, mapped into memory."""

    setting: TrialSetting
    train: TokenSet = field(init=False)
    validation: TokenSet = field(init=False)
    cache: TeacherCache = field(init=False)
    teacher_top1: np.ndarray[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.setting.plan.threads)
        keep_freed_memory()
        self.cache = TeacherCache(self.setting.cache)
        # A cache over more sequences may be shared; this search trains on its own plan's tokens.
        self.train = load_split(self.setting.data, "train").head(self.setting.plan.tokens)
        self.validation = load_split(self.setting.data, "validation")
        self.teacher_top1 = np.load(self.setting.teacher_top1)

    def held_out(self, tokens: int) -> tuple[TokenSet, np.ndarray[Any, Any]]:
        """The first validation sequences that hold `tokens` tokens, and the teacher's choices for them."""
        data = self.validation.head(tokens)
        return data, self.teacher_top1[: data.predicted]


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

    def run(self, rung: int) -> RungReport:
        """Trains from the last checkpoint, or from the start, to a rung, and evaluates there.

        Raises:
            TrialFailedError: NaN, out of memory, or another error of this trial alone.
        """
        try:
            return self._run(rung)
        except torch.OutOfMemoryError as error:
            raise TrialFailedError("out-of-memory", str(error).splitlines()[0]) from error
        except MemoryError as error:
            raise TrialFailedError("out-of-memory", "the machine's memory is full") from error
        except RuntimeError as error:
            if "alloc" in str(error) and "memory" in str(error):
                raise TrialFailedError("out-of-memory", str(error).splitlines()[0]) from error
            raise

    def _run(self, rung: int) -> RungReport:
        setting, plan = self._bench.setting, self._bench.setting.plan
        began = time.perf_counter()
        trainer = self._trainer()
        ready = time.perf_counter()
        steps: list[StepRecord] = []
        target, last = plan.rungs[rung], rung == len(plan.rungs) - 1
        self._folder.mkdir(parents=True, exist_ok=True)
        for record in trainer.train_stable(branch_point(target, plan.decay, plan.batch_tokens)):
            steps.append(record)
            self._on_step(record)
        stable = time.perf_counter()
        if not last:
            trainer.save(self._folder / _STABLE)
        saved = time.perf_counter()
        for record in trainer.train_decay(target, self._finishing_grid()):
            steps.append(record)
            self._on_step(record)
        trained = time.perf_counter()
        if last:
            self._save_student(trainer.model)
        kept = time.perf_counter()
        data, top1 = self._bench.held_out(plan.eval_tokens if last else plan.rung_eval_tokens)
        evaluations = tuple(
            evaluate(
                trainer.model,
                self._spec,
                deployment,
                data,
                top1,
                budget=setting.budget,
                evaluators=setting.evaluators,
                device=setting.device,
            )[0]
            for deployment in (self._task.deployments if last else (self._task.probe,))
        )
        ended = time.perf_counter()
        stride = -(-len(steps) // 20)
        return RungReport(
            rung=rung,
            tokens=target,
            evaluations=evaluations,
            params=self._spec.parameters,
            seconds={
                "train": (stable - ready) + (trained - saved),
                "evaluate": ended - kept,
                "other": (ready - began) + (saved - stable) + (kept - trained),
            },
            steps=tuple(steps[::-1][::stride][::-1]),
        )

    def _trainer(self) -> Trainer:
        setting, task = self._bench.setting, self._task
        model, kept = build_student(setting.teacher, task.strategy.init)
        trainer = Trainer(
            model.to(setting.device),
            kept=kept,
            teacher_layers=setting.teacher_spec.layers,
            teacher_width=setting.teacher_spec.width,
            strategy=task.strategy,
            plan=setting.plan,
            data=self._bench.train,
            cache=self._bench.cache,
            seed=task.seed,
            device=setting.device,
        )
        checkpoint = self._folder / _STABLE
        if checkpoint.exists():
            trainer.load(checkpoint)
        return trainer

    def _finishing_grid(self) -> Callable[[str], Grid | None] | None:
        finishing = self._task.strategy.finishing
        if finishing is None:
            return None
        packing = get_format(finishing.format)
        storages = {
            tensor.name: packing.storage(tensor, finishing.bits, finishing.group_size) for tensor in self._spec.tensors
        }
        grids = {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}
        return grids.get

    def _save_student(self, model: Any) -> None:
        """Writes the trained master weights as a folder that transformers loads, whole or not at all."""
        temporary, folder = self._folder / ".student.partial", student_folder(self._folder)
        shutil.rmtree(temporary, ignore_errors=True)
        save_student(model, self._bench.setting.teacher, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def student_folder(trial: Path) -> Path:
    """Where a trial at full fidelity keeps its float32 student."""
    return trial / "student"


def save_student(model: Any, teacher: Path, folder: Path) -> None:
    """Writes a model as a transformers folder, with the tokenizer and all else that describes the teacher's text."""
    model.save_pretrained(folder)
    for path in teacher.iterdir():
        if path.is_file() and path.suffix in _TEXT_FILES and path.name not in _OWN_FILES:
            shutil.copyfile(path, folder / path.name)


def checkpoint_tokens(trial: Path) -> int:
    """Tokens of a trial's stable checkpoint, 0 where there is none."""
    path = trial / _STABLE
    return read_tokens(path) if path.exists() else 0


def remove_checkpoint(trial: Path) -> None:
    """Removes what only continued training would need."""
    (trial / _STABLE).unlink(missing_ok=True)

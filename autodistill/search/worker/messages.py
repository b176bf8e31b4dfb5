"""What a trial is given and what it reports: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autodistill.data.dataset import TokenSet, rendering_folder
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.evaluation.base import Direction, Evaluator, Scoring, Subject
from autodistill.evaluation.evaluate import Evaluation, evaluate
from autodistill.hardware.budget import Budget
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.models.model_folder import HeldType
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.divergence import Divergence
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.storage import Storage


@dataclass(frozen=True, kw_only=True)
class TrialSetting:
    """What all trials of a search have in common, sent to every worker once.

    It is plain data, and objects from a Python session, which Ray's own serialiser carries and no disk keeps.

    Attributes:
        teacher, data: Folders of the teacher and of the prepared data.
        cache: Folder of the teacher's cached outputs; None if no strategy of the search needs any.
        teacher_spec: The teacher's shape.
        teacher_reference: File of the teacher's results on the validation sequences.
        teacher_accuracy: The teacher's accuracy on the validation split, for the retention.
        checkpoints: Folder that holds a folder for each trial.
        budget, plan: Those of the search.
        evaluators: Those that run on simulated students: names of installed ones, and objects from a request.
        metric, direction: What judges trials at a rung.
        device: Where trials train.
        calibration: File of the teacher's calibration, if a strategy chooses parts by it.
        codes: Folder of the codes, as far as they are known, of students whose scales alone are trained.
        pretrained: Folders of the models that strategies start from, by their references.
        renderings: For each of these models with a chat template of its own, the template's name in the prepared data.
        held_type: Type in which the teacher's matrices are held.
        divided: Number of processes that the teacher is divided over when it runs outside trials.
        storage: The run's storage, where trials keep what another node may continue from; None to use only
            `checkpoints`.
        scoring: Precision of products when models are scored, including the teacher.
        divergences: Divergences that the driver's session registered and strategies may use. A worker registers them
            too.
        copies_limit_bytes: Disk space that a node's copies of files in storage may take; None for no limit.
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
    codes: Path | None = None
    pretrained: Mapping[str, Path] = field(default_factory=dict)
    held_type: HeldType = "float32"
    divided: int = 1
    storage: Storage | None = None
    copies_limit_bytes: int | None = None
    renderings: Mapping[str, str] = field(default_factory=dict)
    divergences: tuple[Divergence, ...] = ()
    scoring: Scoring = "float32"

    def rendering(self, init: Init | None) -> str:
        """Return the name of the rendering that a student reads, for `dataset.load_split`; empty for the teacher's."""
        return self.renderings.get(init.model, "") if init else ""

    def text(self, init: Init | None) -> Path:
        """Return the folder that describes a student's text: tokenizer, chat template, and end-of-answer tokens."""
        name = self.rendering(init)
        return rendering_folder(self.data, name) if name else self.teacher

    def evaluate(
        self,
        model: Any,
        spec: ModelSpec,
        deployment: Deployment,
        data: TokenSet,
        reference: TeacherReference,
        init: Init | None,
        *,
        scales: Mapping[str, Scales] | None,
        split: str = "validation",
        share: float | None = None,
        unpacked: TokenScores | None = None,
    ) -> Evaluation:
        """Return the evaluation of a packed model by the search's evaluators; arguments are as `evaluate` takes them.

        `init` belongs to the student, and is None for the teacher. `share` is the plan's by default.
        """
        return evaluate(
            model,
            Subject(spec=spec, deployment=deployment, budget=self.budget, split=split, teacher=self.teacher_spec),
            data,
            reference,
            evaluators=self.evaluators,
            metric=self.metric,
            device=self.device,
            scales=scales,
            share=self.plan.example_share if share is None else share,
            tokenizer=self.text(init),
            unpacked=unpacked,
            scoring=self.scoring,
        )[0]


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """One trial, as sent to a worker.

    Attributes:
        id: Name of the trial in its run, like "t004".
        strategy: What to train.
        seed: Seed of data order and projections.
        deployments: Deployments within the budget, under which the trained student may be evaluated.
        probe: The deployment that judges rungs.
        straight: Whether the trial runs to the plan's tokens without stopping at rungs.
        length: Multiple of the plan's tokens that it is trained for. Above 1, the trial is straight.
        stage: Address of its stable part, whose checkpoints trials share; empty if its checkpoints are its own.
        decay: Share of its tokens over which the rate falls at its end; None for the plan's share.
        micro_batch: Most sequences in one pass, if memory did not hold the plan's micro-batch; None for the plan's.
    """

    id: str
    strategy: Strategy
    seed: int
    deployments: tuple[Deployment, ...]
    probe: Deployment
    straight: bool = False
    length: float = 1.0
    stage: str = ""
    decay: float | None = None
    micro_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class RungReport:
    """What a worker reports about a trial after a rung.

    Attributes:
        rung: Index of the rung.
        tokens: Tokens trained on at the rung.
        evaluation: Evaluation under the probe, or under the deployment that was asked for.
        params: Number of the student's weights.
        seconds: Seconds by phase: "train", "evaluate" and "other".
        steps: Step records of this segment, thinned to at most 20.
        trained: Tokens that this segment trained on, including its decay.
        shared: Tokens of this segment that were not trained, because another trial had trained the stage that far.
        unsaved: Why a checkpoint could not be written; None if all were.
        resumed: Tokens of this segment from earlier attempts of this trial, which were interrupted.
        damaged: Which checkpoint was damaged, so that its part was trained again; None if all were intact.
        student: Hash of the list of its student's files, if it was kept; see `checksums.write_list`.
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
    resumed: int = 0
    damaged: str | None = None
    student: str | None = None

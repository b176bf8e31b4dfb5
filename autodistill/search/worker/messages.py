"""What a trial is given and what it tells: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autodistill.data.dataset import TokenSet, rendering_folder
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.evaluation.base import Direction, Evaluator, Scoring
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
    """What all trials of a search have in common, sent to every worker once: plain data, and what a Python session
    gave, which Ray's own serialiser carries and no disk keeps.

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
        codes: Folder of the codes that students keep whose scales alone are trained, as far as they are known.
        pretrained: Folders of the models that strategies start from, by their references.
        renderings: Of those of them that have a chat template of their own, its name in the prepared data.
        held: What the teacher's matrices are held in.
        divided: Over how many processes it is divided where it runs outside of trials.
        storage: The run's, where trials keep what another node may go on from; None for `checkpoints` alone.
        scoring: What products are computed in where models are scored, the teacher among them.
        divergences: Those that strategies may have and that the driver's session registered; a worker registers them.
        copies_limit_bytes: Disk that a node's copies of what storages have may take; None for no limit.
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
    held: HeldType = "float32"
    divided: int = 1
    storage: Storage | None = None
    copies_limit_bytes: int | None = None
    renderings: Mapping[str, str] = field(default_factory=dict)
    divergences: tuple[Divergence, ...] = ()
    scoring: Scoring = "float32"

    def rendering(self, init: Init | None) -> str:
        """Name of the rendering that a student reads, as `dataset.load_split` takes it; empty for the teacher's."""
        return self.renderings.get(init.model, "") if init else ""

    def text(self, init: Init | None) -> Path:
        """Folder that describes a student's text: tokenizer, chat template, and what ends an answer."""
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
        """Return what a packed model is by the evaluators of the search; arguments are as `evaluate` takes them.

        `init` is the student's, None of the teacher; `share` is the plan's by default.
        """
        return evaluate(
            model,
            spec,
            deployment,
            data,
            reference,
            budget=self.budget,
            evaluators=self.evaluators,
            metric=self.metric,
            device=self.device,
            scales=scales,
            split=split,
            share=self.plan.example_share if share is None else share,
            tokenizer=self.text(init),
            teacher=self.teacher_spec,
            unpacked=unpacked,
            scoring=self.scoring,
        )[0]


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
        decay: Share of its tokens over which the rate falls at its end; None for the plan's.
        micro_batch: Sequences of one pass at most, where memory did not hold as many as the plan's; None for those.
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
    """What a trial tells after a rung.

    Attributes:
        rung: Index of the rung.
        tokens: Trained on at the rung.
        evaluation: Of the probe, or of the deployment asked for.
        params: Weights of the student.
        seconds: "train", "evaluate" and "other".
        steps: Step records of this segment, thinned to at most 20.
        trained: Tokens that this segment trained on, its decay included.
        shared: Tokens of this segment that were not trained on, since another trial had trained the stage so far.
        unsaved: Why a checkpoint could not be written; None where all were.
        resumed: Tokens of this segment that earlier attempts of this trial had trained on, which were interrupted.
        damaged: Which checkpoint was not as it was written, so that what it had was trained again; None where all were.
        student: Hash of the list of its student's files, where it was kept; see `checksums.write_list`.
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

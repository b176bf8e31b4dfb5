"""Students of a teacher in their initial shape and storage, scored untrained and after a short training; no search."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.importance import PartImportance, measure_importance
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.trainer import Trainer
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.inference.scoring import score, score_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import TensorSpec
from autodistill.options import cache_folder
from autodistill.quantization.grids import Grid
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.utils.json_files import read_json
from benchmarks.common.plans import straight_plan

SEQUENCE, DECAY = 256, 0.2
# The known rule of rates by width. A quarter of the loss is the teacher's, which runs with the student.
_RATE, _WIDTH = 2e-4, 576


@dataclass(frozen=True, kw_only=True)
class Construction:
    """How a student begins and is stored.

    Attributes:
        name: Name in a table.
        family: The kind of construction.
        init: The student's shape.
        deployment: Its storage.
    """

    name: str
    family: str
    init: Init
    deployment: Deployment


class Lab:
    """A teacher, a text, and students of both.

    Args:
        teacher: The teacher's folder.
        data: Reference of the text.
        held_out: Validation tokens on which students are scored.
        sequence: Tokens of a sequence.
        step: Tokens of an optimiser step.
        bf16: Whether products are made in bfloat16.
    """

    def __init__(
        self,
        teacher: Path,
        data: str,
        *,
        held_out: int,
        sequence: int = SEQUENCE,
        step: int = SEQUENCE,
        bf16: bool = False,
    ) -> None:
        self.teacher, self._sequence, self._step, self._bf16 = teacher, sequence, step, bf16
        self.spec: ModelSpec = spec_from_config(read_json(teacher / "config.json"))
        source = resolve_data(data)
        prepared = prepare(source, teacher, tokenizer_fingerprint(teacher), sequence, cache_folder())
        self.fingerprint = prepared.fingerprint
        self._train = load_split(prepared.folder, "train")
        self._held_out: TokenSet = load_split(prepared.folder, "validation").head(held_out)
        self._live = LiveTeacher(teacher)

    @cached_property
    def reference(self) -> TeacherReference:
        """The teacher's outputs for the held-out text."""
        return self._scored_teacher[1]

    @cached_property
    def _scored_teacher(self) -> tuple[TokenScores, TeacherReference]:
        return score_teacher(load_model(self.teacher, torch.float32).eval(), self._held_out)

    @cached_property
    def _importance(self) -> PartImportance:
        return measure_importance(load_model(self.teacher, torch.float32), self._train)

    def teacher_itself(self) -> dict[str, Any]:
        """Return the figures of the teacher."""
        return figures(self._scored_teacher[0])

    def begun(self, init: Init) -> tuple[Any, tuple[int, ...]]:
        """Return an untrained student, and the teacher's layer for each of its layers."""
        return build_student(self.teacher, init, calibration=self._importance if init.selective else None)

    def untrained(self, one: Construction) -> dict[str, Any]:
        """Return the figures of a student as it begins, in its storage."""
        model, _ = self.begun(one.init)
        return self._read(model, one.deployment)

    def trained(self, one: Construction, tokens: int, seed: int) -> dict[str, Any]:
        """Return the figures after a training of this many tokens. The last fifth is on the grid of its storage."""
        return self.trained_along(one, (tokens,), seed)[tokens]

    def trained_along(self, one: Construction, lengths: Sequence[int], seed: int) -> dict[int, dict[str, Any]]:
        """Return the figures after each number of tokens: branches of one trunk, of which each has its own decay."""
        found, grid = {}, finishing(one.deployment)
        with tempfile.TemporaryDirectory(prefix="trunk-") as folder:
            trunk = Path(folder) / "trunk.safetensors"
            for tokens in sorted(lengths):
                trainer, model = self._trainer(one, lengths, seed)
                if trunk.exists():
                    trainer.load(trunk)
                for _ in trainer.train_stable(branch_point(tokens, DECAY, self._step)):
                    pass
                trainer.save(trunk)
                tensors = {tensor.name: tensor for tensor in spec_from_config(model.config.to_dict()).tensors}
                for _ in trainer.train_decay(tokens, None if grid is None else partial(_grid_of, grid, tensors)):
                    pass
                found[tokens] = self._read(model, one.deployment)
        return found

    def _trainer(self, one: Construction, lengths: Sequence[int], seed: int) -> tuple[Trainer, Any]:
        """Return a student that has read nothing yet, and its trainer."""
        model, kept = self.begun(one.init)
        rate = float(f"{_RATE * _WIDTH / self.spec.width:.2g}")
        recipe = Distillation(
            signal="online", signal_tokens=0, divergence_weight=0.25, learning_rate=rate, train_embeddings=True
        )
        fields = {"warmup_tokens": max(self._step, min(lengths) // 20 // self._step * self._step)}
        plan = straight_plan(max(lengths), sequence_length=self._sequence, batch_tokens=self._step, **fields)
        plan = replace(plan, micro_batch=self._step // self._sequence, bf16=self._bf16)
        trainer = Trainer(
            model,
            teaching=Teaching(kept_layers=kept, layers=self.spec.layers, width=self.spec.width, live=self._live),
            strategy=Strategy(init=one.init, distillation=recipe, finishing=finishing(one.deployment)),
            plan=plan,
            data=self._train,
            seed=seed,
        )
        model.train()
        return trainer, model

    def _read(self, model: Any, deployment: Deployment) -> dict[str, Any]:
        spec = spec_from_config(model.config.to_dict())
        model.eval()
        with torch.no_grad(), deployed_weights(model, spec, deployment):
            scores, _ = score(model, self._held_out, self.reference)
        return figures(scores)


def figures(scores: TokenScores) -> dict[str, Any]:
    """Return NLL, accuracy and KL to the teacher, as means and as sums by document."""
    found: dict[str, Any] = {"count": per_document(scores.nll, scores.documents)["count"]}
    for name, values in (("nll", scores.nll), ("accuracy", scores.correct), ("kl", scores.divergence)):
        if values is not None:
            found[name] = clustered_mean(values, scores.documents)[0]
            found[f"{name}_sums"] = per_document(values, scores.documents)["sum"]
    return found


def finishing(deployment: Deployment) -> Finishing | None:
    """Return the finishing on a deployment's grid, or None if it has 16 bits."""
    scheme = deployment.scheme
    return None if scheme.bits == 16 and not scheme.types else Finishing(**asdict(scheme))


def _grid_of(scheme: Finishing, tensors: Mapping[str, TensorSpec], name: str) -> Grid | None:
    storage = scheme.storage(tensors[name])
    return storage if isinstance(storage, Grid) else None

"""What a teacher is to one student in training: which layers correspond, its outputs, and the model if it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from autodistill.distillation.losses.attention import TeacherBlock
from autodistill.distillation.teacher.output_cache import TeacherCache
from autodistill.distillation.teacher.target_sources import LiveTeacher


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The teacher of one student in training.

    Attributes:
        kept_layers: For each student layer, the teacher layer that it was copied from or stands for.
        layers, width: The teacher's number of layers and its hidden width.
        cache: The teacher's outputs for the training sequences, or None if the strategy needs none.
        block: The teacher layer whose attention the student imitates, or None if the strategy uses no attention loss.
        live: The loaded teacher, for the signals "states" and "online".
    """

    kept_layers: tuple[int, ...]
    layers: int
    width: int
    cache: TeacherCache | None = None
    block: TeacherBlock | None = None
    live: LiveTeacher | None = None

"""What training the student takes that a strategy makes of a described teacher, by parts; loads nothing."""

from __future__ import annotations

from typing import Any

from autodistill.applied import check_strategy, student_spec
from autodistill.appraisal import check_trainable, training_parts
from autodistill.contracts import SEQUENCE_LENGTH
from autodistill.described import Described, describe
from autodistill.strategy import Strategy
from autodistill.training_memory import beside_bytes

TOKENS = 4 * SEQUENCE_LENGTH
"""Of a forward and backward pass where nobody says how many."""


def student_of(teacher: Described, strategy: Strategy, name: str) -> Described:
    """The student that a strategy makes of a teacher, described.

    Args:
        teacher: Of which nothing but its shape is read.
        strategy: That makes it.
        name: Of the strategy, for a person.

    Raises:
        InputError: A teacher or a pretrained student that cannot be trained here, or as `applied.check_strategy`.
    """
    check_trainable(teacher)
    if strategy.init.source == "pretrained":
        check_trainable(describe(strategy.init.model))
    check_strategy(strategy, teacher.spec)
    return Described(name=f"student of {teacher.name} by {name}", spec=student_spec(strategy, teacher.spec))


def strategy_training(
    teacher: Described, student: Described, strategy: Strategy, *, tokens: int = TOKENS
) -> dict[str, Any]:
    """Parts of the memory of training a student by a strategy, in bytes, by the means that make it fit.

    Products are computed in bfloat16, as on a GPU.

    Args:
        teacher, student: As `student_of` takes and gives them.
        strategy: Whose losses, low-rank changes and finishing count.
        tokens: Of a forward and backward pass.

    Returns:
        Plain data, as `appraisal.training_parts`, and of each way as `teacher_bytes` what lies of the teacher beside
        the student; and what is trained, in words.

    Raises:
        InputError: Less than one token.
    """
    recipe = strategy.distillation
    beside = beside_bytes([recipe], teacher.spec, bf16=True, held_bytes=2 * teacher.spec.parameters)
    ways = training_parts(
        student.spec,
        tokens,
        teacher=teacher.spec,
        alignment=recipe.alignment,
        attention=recipe.attention,
        lora=recipe.lora,
        train_embeddings=recipe.train_embeddings,
        on_grid=strategy.finishing is not None,
    )
    with_teacher = {
        way: {**parts, "teacher_bytes": beside, "total_bytes": parts["total_bytes"] + beside}
        for way, parts in ways.items()
    }
    return {"teacher": teacher.name, "trained": _trained(strategy), "tokens": tokens, **with_teacher}


def _trained(strategy: Strategy) -> str:
    recipe = strategy.distillation
    if recipe.lora is None:
        what = "all weights" if recipe.train_embeddings else "all weights but the embedding table"
    else:
        what = f"low-rank changes of rank {recipe.lora.rank}"
        what += " and the embedding table" if recipe.train_embeddings else ""
    return (
        what if strategy.finishing is None else f"{what}, at the end on the grid of {strategy.finishing.packing.name}"
    )

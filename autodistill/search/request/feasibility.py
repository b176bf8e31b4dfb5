"""Checks against a teacher: sequence length, context, and a budget that at least one student of the space meets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autodistill.distillation.student.check import check_strategy, student_spec
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits, holdable, nearest_miss
from autodistill.hardware.budget import Budget, DeviceBudget, served
from autodistill.models.families import WHOLE_FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.search.construction.plain import nothing_fits
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy


def check_teacher(spec: ModelSpec, space: Space, budget: Budget, sequence_length: int) -> None:
    """Refuse sequences or a context that are too long for the teacher, and a budget that no student meets.

    Args:
        spec: The teacher's shape.
        space: The space of students.
        budget: The budget of a student.
        sequence_length: Tokens of a training or evaluation sequence.

    Raises:
        InputError: Sequences or context are too long, or no deployment of the space can hold any student.
        NothingFitsError: Not even the student that needs the least memory fits the budget.
    """
    if sequence_length > spec.max_context:
        raise InputError(
            f"the teacher reads at most {spec.max_context} tokens at once, and sequences have "
            f"{sequence_length}: give --sequence-length {spec.max_context} or less"
        )
    _check_context(spec, space, budget.context)
    _check_budget(spec, space, budget)


def on_its_device(space: Space, budget: Budget) -> Space:
    """Return the space without the deployments whose runtime the budget's device does not have.

    Raises:
        InputError: No deployment is left.
    """
    left = served(space.deployments, budget)
    if not left and isinstance(budget, DeviceBudget):
        runtime = space.deployments[0].runtime
        raise InputError(
            f"no deployment of the space {space.name} is for this device: {budget.device.lacks(runtime)}; name another "
            "--device, or give a --space with other deployments"
        )
    return space if left == space.deployments else replace(space, deployments=left)


def shortest_context(spec: ModelSpec, space: Space) -> tuple[int, str]:
    """Return the shortest context among the teacher and the pretrained models of a space, and the name of its model."""
    begun = [strategy for strategy in space.extremes() if strategy.init.model]
    models = {strategy.init.model: student for strategy, student in _suiting(begun, space, spec)[0]}
    named = [(spec.max_context, "the teacher")]
    named += [(student.max_context, f"the pretrained {model}") for model, student in models.items()]
    return min(named, key=lambda one: one[0])


def _check_context(spec: ModelSpec, space: Space, context: int) -> None:
    """Refuse a budget with a longer context than some student supports."""
    read, which = shortest_context(spec, space)
    if context > read:
        raise InputError(
            f"{which} has a context of {read} tokens, and the budget is stated at {context}: give --context {read} or "
            "less, or leave it out"
        )


def _check_budget(spec: ModelSpec, space: Space, budget: Budget) -> None:
    """Refuse a budget that not even the student with the least memory meets."""
    students = by_size(space, spec)
    fitting = {strategy: fits(student, holdable(student, space.deployments), budget) for strategy, student in students}
    held = {strategy: found for strategy, found in fitting.items() if found}
    if not held:
        cause = cannot_hold(students[0][1], space.deployments[0])
        raise InputError(f"no deployment of the space {space.name} can hold the smallest student: {cause}")
    # Fewer weights do not always mean less memory, because the KV cache depends on the layers.
    least = min(held, key=lambda strategy: min(fit.slack for fit in held[strategy]))
    miss = nearest_miss(held[least], budget)
    if miss is not None:
        in_gguf = any(one.container == "gguf" for one in space.deployments)
        left_out = (spec.not_in_gguf or spec.text_not_in_gguf) if in_gguf else ""
        raise nothing_fits(least.init, miss, budget, left_out=left_out)


def by_size(space: Space, teacher: ModelSpec) -> list[tuple[Strategy, ModelSpec]]:
    """Return the extreme strategies of the space that suit this teacher, with their shapes, the smallest student first.

    Raises:
        InputError: No strategy suits the teacher. Or one does not, and the teacher's family is trained whole: a search
            of the space would propose more of these. The message is that of the first one.
    """
    found, refused = _suiting(space.extremes(), space, teacher)
    if refused is not None and (not found or teacher.architecture in WHOLE_FAMILIES):
        raise refused
    return sorted(found, key=lambda item: item[1].parameters)


def _suiting(
    strategies: Iterable[Strategy], space: Space, teacher: ModelSpec
) -> tuple[list[tuple[Strategy, ModelSpec]], InputError | None]:
    """Return the strategies that suit a teacher, with their students' shapes, and why the first other one does not."""
    found, refused = [], None
    for strategy in strategies:
        try:
            check_strategy(strategy, teacher, space.deployments)
            found.append((strategy, student_spec(strategy, teacher)))
        except InputError as error:
            refused = refused or error
    return found, refused

"""Chooses how the trials of a space are trained on their machines: one choice for all, made for the largest student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from autodistill.errors import InputError
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.estimates.teacher_fit import TeacherFit
from autodistill.estimates.training_fit import Training, TrainingFit, fit_training
from autodistill.estimates.training_memory import adapted_tensors
from autodistill.inference.torch_memory import share_bytes
from autodistill.models.spec import ModelSpec
from autodistill.search.planning.placement import Place, check_share, train_in_bf16
from autodistill.search.planning.representatives import cases, signal_cases
from autodistill.search.planning.trial_memory import TrialMemory, most_demanding
from autodistill.search.request.feasibility import by_size
from autodistill.search.request.resolve import SearchConfig
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Finishing, Strategy


def over_more_gpus(config: SearchConfig, place: Place) -> Iterator[Place]:
    """Yield places that give each trial more GPUs than the user asked for, the fewest first.

    They are for students that one GPU cannot train: FSDP2 divides their training. There are none if the user gave a
    number, if one process runs all trials, or if students write text themselves, which only one process does.

    Args:
        config: The checked request.
        place: The machines, with one GPU for each trial.
    """
    if config.gpus_per_trial is not None or config.runner == "inline":
        return
    if any(one.on_policy for one in signal_cases(config.space)):
        return
    for gpus in range(2, sum(len(machine.gpus) for machine in place.machines) + 1):
        try:
            share = check_share(place.machines, gpus, config.cpus_per_trial, config.runner)
        except InputError:
            continue  # cores are too few for so many processes
        yield replace(place, share=share)


def memory_of_trials(place: Place, spec: ModelSpec, teacher_fit: TeacherFit) -> TrialMemory:
    """Return the memory of a trial's process if no other process runs on the machine's cores."""
    limit = _limit_bytes(place)
    return TrialMemory(
        limit_bytes=limit,
        share_bytes=limit,
        device="cuda" if any(machine.gpus for machine in place.machines) else "cpu",
        threads=place.share.threads or 1,
        processes=place.share.processes,
        bf16=train_in_bf16(place.machines),
        teacher=spec,
        held_bytes=teacher_fit.held_bytes,
    )


def _limit_bytes(place: Place) -> int:
    """Return the free bytes that a trial's process may take: those of a machine, or its share of a GPU."""
    gpus = [(gpu.memory_bytes, gpu.usable_bytes) for machine in place.machines for gpu in machine.gpus]
    if not gpus:
        return min(machine.usable_bytes for machine in place.machines)
    return min(share_bytes(total, place.share.gpus, free) for total, free in gpus)


def tokens_of_step(config: SearchConfig, place: Place) -> int:
    """Return the tokens of an optimiser step.

    It is the stored number or the requested one, or else one sequence for each process, which is the least possible.

    Raises:
        InputError: The tokens do not divide over the processes of a trial.
    """
    length, processes = config.sequence_length, place.share.processes
    tokens = config.step_tokens or processes * length
    if config.stored:
        tokens = config.stored["plan"]["batch_tokens"]
    if tokens % (processes * length):
        raise InputError(
            f"a step of {tokens} tokens does not divide over the {processes} processes of a trial: give --step-tokens "
            f"a multiple of {processes * length}"
        )
    return tokens


def planned_for(
    config: SearchConfig, memory: TrialMemory, step_tokens: int
) -> tuple[tuple[Strategy, ModelSpec], int, Callable[[int], TrainingFit], str]:
    """Choose the student that a plan is made for.

    It is the largest one, with every means of training that a trial may use. If that fits no machine here, it is the
    most demanding strategy that fits; other strategies are then checked when they are proposed.

    Returns:
        The strategy and its student; the most weights of any student that is trained; a function from the tokens of a
        step to how it is trained; and why other students are not trained, or "".

    Raises:
        InputError: Nothing of the space can be trained.
    """
    length, largest = config.sequence_length, by_size(config.space, memory.teacher)[-1]
    every = partial(_training, config, memory, largest[1])
    try:
        every(step_tokens)
    except InputError as error:
        strategy, student, most = most_demanding(config.space, memory, length, step_tokens // length)

        def one(tokens: int) -> TrainingFit:
            return memory.fit(strategy, student, length, tokens // length)

        return (strategy, student), most, one, f"what cannot be trained here is rejected when it is proposed: {error}"
    return largest, largest[1].parameters, every, ""


def main_memory(space: Space, memory: TrialMemory, most: int, teacher_fit: TeacherFit, fit: TrainingFit) -> int:
    """Return the bytes of main memory of a trial's process.

    On a CPU they hold the training and the teacher. With a GPU they hold the weights of the teacher and of a student,
    which has at most `most` weights.
    """
    if memory.device == "cpu":
        return fit.total_bytes + memory.beside_bytes(signal_cases(space))
    stored = (4 if teacher_fit.stored == "float32" else 2) * memory.teacher.parameters
    return stored + 4 * most + TRAINING_PROCESS_BYTES


def _training(config: SearchConfig, memory: TrialMemory, largest: ModelSpec, step_tokens: int) -> TrainingFit:
    """Return how the largest student of the space is trained, in steps of `step_tokens` tokens."""
    space, spec, length = config.space, memory.teacher, config.sequence_length
    training = Training(
        spec=largest,
        sequence_length=length,
        sequences=step_tokens // length,
        teacher=spec,
        alignments=_alignments(space, spec),
        lora=_lora(space, spec, largest),
        train_embeddings=any(recipe.train_embeddings for recipe in _recipes(space, spec, "train_embeddings")),
        processes=memory.processes,
        bf16=memory.bf16,
        on_grid=_on_grid(space, spec),
        scales_of=_scales_of(space, spec),
        writes=any(recipe.on_policy for recipe in _recipes(space, spec, "on_policy")),
        device=memory.device,
        threads=memory.threads,
    )
    return fit_training(training, memory.limit_bytes - memory.beside_bytes(signal_cases(space)))


def _recipes(space: Space, spec: ModelSpec, *fields: str) -> Iterator[Distillation]:
    """Yield recipes of the space with all possible values of these fields."""
    paths = {"distillation", *(f"distillation.{name}" for name in fields)}
    return (strategy.distillation for strategy in cases(space, paths, spec.layers))


def _on_grid(space: Space, spec: ModelSpec) -> bool:
    return any(strategy.finishing is not None for strategy in cases(space, {"finishing"}, spec.layers))


def _scales_of(space: Space, spec: ModelSpec) -> Finishing | None:
    """Return the grids whose scales alone are trained, or None unless every trial of the space does so."""
    found = {strategy.finishing for strategy in cases(space, {"finishing", "finishing.scales"}, spec.layers)}
    if any(one is None or one.scales != "alone" for one in found):
        return None
    # The finishing with the most scales per weight.
    return min((one for one in found if one is not None), key=lambda one: one.group_size)


def _lora(space: Space, spec: ModelSpec, student: ModelSpec) -> Lora | None:
    """Return the low-rank changes that take most memory, or None if some trial trains the weights themselves."""
    found = {recipe.lora for recipe in _recipes(space, spec, "lora", "lora.rank", "lora.layers")}
    changes = [lora for lora in found if lora is not None]
    if len(changes) < len(found):
        return None
    return max(changes, key=lambda lora: lora.rank * sum(sum(item.shape) for item in adapted_tensors(student, lora)))


def _alignments(space: Space, spec: ModelSpec) -> set[tuple[Alignment | None, Attention | None]]:
    """Return all alignments that trials of the space may have, as far as memory depends on them."""
    fields = ("", ".layers", ".count", ".projection", ".rank", ".kind")
    recipes = _recipes(space, spec, *(f"{part}{name}" for part in ("alignment", "attention") for name in fields))
    return {(recipe.alignment, recipe.attention) for recipe in recipes}

"""Memory and predicted speed of a described model under one deployment, on one device or on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from autodistill.advisor.cards import running_parts
from autodistill.advisor.describe import Described, describe
from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold
from autodistill.estimates.serving_memory import MemoryEstimate, basis_of, memory
from autodistill.estimates.speed import SpeedEstimate, speed
from autodistill.estimates.training_fit import MEANS, sharded
from autodistill.estimates.training_memory import beside_bytes, training_memory
from autodistill.hardware.budget import CONTEXT, check_streams
from autodistill.hardware.device import Device
from autodistill.models.families import FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.memory_correction import Overhead, Place, overhead_of
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy

WAYS = ("all_kept", "checkpointing", "sixteen_bit_states", "eight_bit_states")
"""What the means of `training_fit.MEANS` are called."""

_NO_SPEED: Mapping[str, None] = dict.fromkeys(field.name for field in fields(SpeedEstimate))


def appraise(
    model: Described,
    deployment: Deployment,
    *,
    context: int | None = None,
    batch: int = 1,
    kv_type: str = "f16",
    runtime: str | None = None,
    prompt: int | None = None,
    devices: Sequence[Device] = (),
    overheads: Mapping[Place, Overhead] | None = None,
    training: int | None = None,
    gpus: int | None = None,
) -> dict[str, Any]:
    """Return memory by parts, and for each device whether the model fits and how fast it would be.

    Args:
        model: What is served.
        deployment: How; a GGUF file's own tensors count where the model has them.
        context: Tokens of each sequence; 2048 by default, or the model's if that is less.
        batch, kv_type, prompt: As `memory` and `speed` take them.
        runtime: Another engine that serves the deployment; the deployment's own by default.
        devices: One, whose speed and overhead are then the document's own, or several.
        overheads: By what predicted memory is changed, by class of devices and runtime.
        training: Tokens of a forward and backward pass; the memory of training the model with them is told too.
        gpus: Over which the model is run, and trained, together; what each of them holds is told.

    Returns:
        Plain data: why the format's container cannot hold the model (`cannot_hold`, None where it can; it then fits
        nowhere), the parts of the memory, what measured students change (`memory_overhead`) and the sum, runtime,
        context, batch, `tokens_per_second` and `time_to_first_token_ms` (None without a device or a predicted speed),
        the devices, under `training` the parts of its memory as `training_parts` has them and `undivided_bytes`, and
        under `gpus` what `running_parts` has (None each where it is not asked for). The parts are those of a discrete
        GPU where that is the one device, and else of a process (`on_gpu`); each device has the sum on it, and what that
        rests on (`memory_basis`).

    Raises:
        InputError: As `memory` and `check_streams`, a runtime that does not serve the deployment, a context beyond the
            model's, or a model that cannot be trained here.
    """
    made = None if training is None else _training(model, training, gpus or 1)
    check_streams(batch, "--batch")
    if runtime is not None:
        deployment = replace(deployment, runtime=runtime)
    read = _context(model, context, prompt)
    served = _Served(model=model, deployment=deployment, context=read, batch=batch, kv_type=kv_type, prompt=prompt)
    needs = {on_gpu: served.need(on_gpu) for on_gpu in {False, *(device.discrete for device in devices)}}
    # Of several devices the document's own parts are those of a process.
    alone = devices[0] if len(devices) == 1 else None
    need = needs[alone is not None and alone.discrete]
    not_held = _not_held(model, deployment)
    own = [overhead_of(overheads or {}, deployment.runtime, device.kind.name) for device in devices]
    found = [
        served.on(device, needs[device.discrete].total_bytes + change.total_bytes, not_held)
        for device, change in zip(devices, own, strict=True)
    ]
    # Nor is there one overhead of several.
    change = own[0] if alone else Overhead() if devices else overhead_of(overheads or {}, deployment.runtime)
    return {
        "model": model.name,
        "parameters": model.spec.parameters,
        "cannot_hold": not_held or None,
        "deployment": "as stored" if model.weights_bytes is not None else deployment.name,
        **asdict(need),
        "memory_overhead": asdict(change),
        "total_bytes": need.total_bytes + change.total_bytes,
        "kv_type": kv_type,
        "basis": basis_of(need.runtime, on_gpu=need.on_gpu),
        "source": "predicted",
        "tokens_per_second": found[0]["tokens_per_second"] if alone else None,
        "time_to_first_token_ms": found[0]["time_to_first_token_ms"] if alone else None,
        "devices": found,
        "training": made,
        "gpus": None if gpus is None else running_parts(model.spec, gpus, context=served.context, batch=batch),
    }


@dataclass(frozen=True, kw_only=True)
class _Served:
    """A served model, its deployment, and its load."""

    model: Described
    deployment: Deployment
    context: int
    batch: int
    kv_type: str
    prompt: int | None

    def need(self, on_gpu: bool) -> MemoryEstimate:
        """Return what a process that serves the model takes, with its weights on a GPU or in main memory."""
        return memory(
            self.model.spec,
            self.deployment,
            context=self.context,
            batch=self.batch,
            kv_type=self.kv_type,
            weights=self.model.weights_bytes,
            on_gpu=on_gpu,
        )

    def on(self, device: Device, total_bytes: int, not_held: str) -> dict[str, Any]:
        """Return whether it fits a device and how fast it would be there, as plain data.

        Args:
            device: Where.
            total_bytes: What it takes there.
            not_held: Why it could not be stored so, or nothing.
        """
        lacks = device.lacks(self.deployment.runtime)
        return {
            "device": device.name,
            "fits": total_bytes <= device.usable_bytes and not lacks and not not_held,
            "reason": lacks or not_held or None,
            "usable_bytes": device.usable_bytes,
            "total_bytes": total_bytes,
            "memory_basis": basis_of(self.deployment.runtime, on_gpu=device.discrete),
            **(_NO_SPEED if lacks else self._speed(device).to_json()),
        }

    def _speed(self, device: Device) -> SpeedEstimate:
        return speed(
            self.model.spec,
            self.deployment,
            device,
            context=self.context,
            batch=self.batch,
            prompt=self.prompt,
            kv_type=self.kv_type,
            weights=self.model.weights_bytes,
        )


def _context(model: Described, asked: int | None, prompt: int | None) -> int:
    """Return the served context: the requested one, or the default limited to what the model has."""
    most = model.spec.max_context
    context = min(CONTEXT, most) if asked is None else asked
    if context > most:
        raise InputError(f"{model.name} has a context of {most} tokens: give --context {most} or less, or leave it out")
    if prompt is not None and not 1 <= prompt <= context:
        raise InputError(f"--prompt must be 1 to the context of {context}, not {prompt}")
    return context


def _not_held(model: Described, deployment: Deployment) -> str:
    """Return why the model cannot be stored in this way, or ""; weights as they are always can.

    Models with latent attention are estimated alone, and nothing is known of their graphs.
    """
    return (
        ""
        if model.weights_bytes is not None or model.spec.architecture not in FAMILIES
        else cannot_hold(model.spec, deployment)
    )


def check_trainable(model: Described) -> None:
    """Refuse models that can be estimated but not trained, such as mixtures of experts.

    Raises:
        InputError: Names the families that can be.
    """
    if model.spec.experts or model.spec.architecture not in FAMILIES:
        raise InputError(f"{model.name} cannot be trained here: these families can: {', '.join(FAMILIES)}")


def _training(model: Described, tokens: int, gpus: int) -> dict[str, Any]:
    check_trainable(model)
    ways, least = training_parts(model.spec, tokens, gpus), undivided_bytes(model.spec, tokens)
    return {"tokens": tokens, "gpus": gpus, "undivided_bytes": least, **ways}


def training_parts(spec: ModelSpec, tokens: int, gpus: int = 1, **of: Any) -> dict[str, dict[str, int]]:
    """Return the memory of training by AdamW in float32 by parts, in bytes, for each way to make it fit.

    Products are computed in bfloat16, as on a GPU.

    Args:
        spec: What is trained.
        tokens: Of a step's one forward and backward pass.
        gpus: Over which weights, gradients and states are divided (FSDP2), each with a pass of its own; the memory is
            that of each.
        of: What else `training_memory` is to know; without it all weights are trained, on no grid, and nothing is
            aligned.

    Returns:
        By way, each but the first with checkpointing: all activations kept, that alone, and optimiser states of 16 and
        of 8 bits.

    Raises:
        InputError: Less than one token.
    """
    if tokens < 1:
        raise InputError(f"--training must be at least 1 token, not {tokens}")
    found = {}
    for way, (checkpointing, state) in zip(WAYS, MEANS, strict=True):
        made = training_memory(spec, tokens=tokens, checkpointing=checkpointing, optimizer_state=state, bf16=True, **of)
        # Each GPU holds all codes where scales alone are trained.
        made = sharded(made, spec, 1 if of.get("scales_of") else gpus)
        found[way] = {**made.parts, "total_bytes": made.total_bytes}
    return found


def undivided_bytes(spec: ModelSpec, tokens: int, **of: Any) -> int:
    """Return what training takes of each GPU, however many share it, in the smallest of all ways.

    Whole on each are the tables, the layers at work and what its own pass keeps; what FSDP2 divides comes to nothing.

    Args:
        spec, tokens, of: As of `training_parts`.
    """
    return min(parts["total_bytes"] for parts in training_parts(spec, tokens, _ANY_NUMBER, **of).values())


_ANY_NUMBER = 10**12  # of GPUs, more than a model has weights


TOKENS = 4 * SEQUENCE_LENGTH
"""Of a forward and backward pass where nobody says how many."""


def student_of(teacher: Described, strategy: Strategy, name: str) -> Described:
    """Describe the student that a strategy makes from a teacher.

    Args:
        teacher: Of which nothing but its shape is read.
        strategy: That makes it.
        name: Of the strategy, for a person.

    Raises:
        InputError: A teacher or a pretrained student that cannot be trained here, or as `applied.check_strategy`.
    """
    # Imports torch, for which a model that is only estimated does not wait.
    from autodistill.distillation.student.check import check_strategy, student_spec

    check_trainable(teacher)
    if strategy.init.source == "pretrained":
        check_trainable(describe(strategy.init.model))
    check_strategy(strategy, teacher.spec)
    return Described(name=f"student of {teacher.name} by {name}", spec=student_spec(strategy, teacher.spec))


def strategy_training(
    teacher: Described, student: Described, strategy: Strategy, *, tokens: int = TOKENS, gpus: int = 1
) -> dict[str, Any]:
    """Return the memory of training a student with a strategy by parts, in bytes, for each way to make it fit.

    Products are computed in bfloat16, as on a GPU.

    Args:
        teacher, student: As `student_of` takes and gives them.
        strategy: Whose losses, low-rank changes and finishing count.
        tokens: Of a forward and backward pass.
        gpus: As of `training_parts`.

    Returns:
        Plain data, as `appraisal.training_parts`, and of each way as `teacher_bytes` what lies of the teacher beside
        the student; and what is trained, in words.

    Raises:
        InputError: Less than one token.
    """
    recipe = strategy.distillation
    beside = beside_bytes([recipe], teacher.spec, bf16=True, held_bytes=2 * teacher.spec.parameters)
    of: dict[str, Any] = {
        "teacher": teacher.spec,
        "alignment": recipe.alignment,
        "attention": recipe.attention,
        "lora": recipe.lora,
        "train_embeddings": recipe.train_embeddings,
        "on_grid": strategy.finishing is not None,
        "scales_of": strategy.finishing if strategy.scales_alone else None,
        "written": -(-tokens // SEQUENCE_LENGTH) if recipe.on_policy else 0,
    }
    ways = training_parts(student.spec, tokens, gpus, **of)
    load = {"tokens": tokens, "gpus": gpus, "undivided_bytes": undivided_bytes(student.spec, tokens, **of) + beside}
    with_teacher = {
        way: {**parts, "teacher_bytes": beside, "total_bytes": parts["total_bytes"] + beside}
        for way, parts in ways.items()
    }
    return {"teacher": teacher.name, "trained": _trained(strategy), **load, **with_teacher}


def _trained(strategy: Strategy) -> str:
    recipe = strategy.distillation
    if strategy.scales_alone and strategy.finishing is not None:
        return f"the scales of {strategy.finishing.scheme.name} alone"
    if recipe.lora is None:
        what = "all weights" if recipe.train_embeddings else "all weights but the embedding table"
    else:
        what = f"low-rank changes of rank {recipe.lora.rank}"
        what += " and the embedding table" if recipe.train_embeddings else ""
    return what if strategy.finishing is None else f"{what}, at the end on the grid of {strategy.finishing.scheme.name}"

"""Memory and predicted speed of a described model under one deployment, on one device or on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from autodistill.advisor.describe import Described, describe
from autodistill.advisor.gpu_parts import running_parts
from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold
from autodistill.estimates.serving_memory import MemoryEstimate, basis_of, memory
from autodistill.estimates.speed import SpeedEstimate, speed
from autodistill.estimates.training_fit import TRAINING_SETUPS, sharded
from autodistill.estimates.training_memory import beside_bytes, training_memory
from autodistill.hardware.budget import CONTEXT, check_streams
from autodistill.hardware.device import Device
from autodistill.models.families import TRAINED, WHOLE_FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.memory_correction import Overhead, Place, overhead_of
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy

WAYS = ("all_kept", "checkpointing", "sixteen_bit_states", "eight_bit_states")
"""The names of the means in `training_fit.TRAINING_SETUPS`, in the same order."""

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
    """Estimate memory by part, and for each device whether the model fits and how fast it would be.

    Args:
        model: The model that is served.
        deployment: How it is served. If the model has a GGUF file's own tensors, their bytes count.
        context: Tokens of each sequence. By default 2048, or the model's context if that is less.
        batch, kv_type, prompt: As in `memory` and `speed`.
        runtime: Another runtime that serves the deployment. By default, the deployment's own.
        devices: The devices. If there is one, its speed and overhead are also the document's own.
        overheads: Changes to predicted memory, by class of devices and runtime.
        training: Tokens of a forward and backward pass. If given, the memory of training the model is returned too.
        gpus: Number of GPUs that run and train the model together. If given, the memory of each is returned.

    Returns:
        Plain data. `cannot_hold` says why the format's container cannot hold the model, so that it fits nowhere; None
        if it can. Then the parts of the memory, what measured students change (`memory_overhead`) and the sum, runtime,
        context, batch, `tokens_per_second` and `time_to_first_token_ms` (None without a device or a predicted speed),
        and the devices. `training` has the parts of `training_parts` and `undivided_bytes`, and `gpus` has the result
        of `running_parts`; each is None if it was not asked for. The parts are those on a discrete GPU if that is the
        only device, and else those of a process (`on_gpu`). Each device has its own sum, and what the sum rests on
        (`memory_basis`).

    Raises:
        InputError: For the same reasons as `memory` and `check_streams`; or the runtime does not serve the deployment,
            the context exceeds the model's, or the model cannot be trained here.
    """
    made = None if training is None else _training(model, training, gpus or 1)
    check_streams(batch, "--batch")
    if runtime is not None:
        deployment = replace(deployment, runtime=runtime)
    read = _context(model, context, prompt)
    served = _Served(model=model, deployment=deployment, context=read, batch=batch, kv_type=kv_type, prompt=prompt)
    needs = {on_gpu: served.need(on_gpu) for on_gpu in {False, *(device.discrete for device in devices)}}
    # With several devices, the document's own parts are those of a process.
    alone = devices[0] if len(devices) == 1 else None
    need = needs[alone is not None and alone.discrete]
    not_held = _not_held(model, deployment)
    own = [overhead_of(overheads or {}, deployment.runtime, device.kind.name) for device in devices]
    found = [
        served.on(device, needs[device.discrete].total_bytes + change.total_bytes, not_held)
        for device, change in zip(devices, own, strict=True)
    ]
    # Several devices have no common overhead either.
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
        """Return the memory of a process that serves the model, with its weights on a GPU or in main memory."""
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
            device: The device.
            total_bytes: The memory that it takes there.
            not_held: Why it cannot be stored in this way, or "".
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
    """Return the served context: the requested one, or the default, limited to the model's context."""
    most = model.spec.max_context
    context = min(CONTEXT, most) if asked is None else asked
    if context > most:
        raise InputError(f"{model.name} has a context of {most} tokens: give --context {most} or less, or leave it out")
    if prompt is not None and not 1 <= prompt <= context:
        raise InputError(f"--prompt must be 1 to the context of {context}, not {prompt}")
    return context


def _not_held(model: Described, deployment: Deployment) -> str:
    """Return why the model cannot be stored in this way, or "" if it can. A model's own stored weights always can.

    Models outside the families, such as those with latent attention, can only be estimated. Nothing is known of their
    graphs, so this returns "".
    """
    return (
        ""
        if model.weights_bytes is not None or model.spec.architecture not in TRAINED
        else cannot_hold(model.spec, deployment)
    )


def check_trainable(model: Described) -> None:
    """Refuse models that can be estimated but not trained, such as a Mixtral.

    Raises:
        InputError: The model cannot be trained. The message lists the families that can.
    """
    name = model.spec.architecture
    if name not in TRAINED or (model.spec.experts and name not in WHOLE_FAMILIES):
        raise InputError(f"{model.name} cannot be trained here: these families can: {', '.join(TRAINED)}")


def _training(model: Described, tokens: int, gpus: int) -> dict[str, Any]:
    check_trainable(model)
    ways, least = training_parts(model.spec, tokens, gpus), undivided_bytes(model.spec, tokens)
    return {"tokens": tokens, "gpus": gpus, "undivided_bytes": least, **ways}


def training_parts(spec: ModelSpec, tokens: int, gpus: int = 1, **of: Any) -> dict[str, dict[str, int]]:
    """Return the memory of training with AdamW in float32, in bytes by part, for each way to make it fit.

    Products are computed in bfloat16, as on a GPU.

    Args:
        spec: The model that is trained.
        tokens: Tokens of a step's one forward and backward pass.
        gpus: Number of GPUs over which weights, gradients and states are divided (FSDP2). Each has its own pass. The
            memory is that of each GPU.
        of: Further arguments of `training_memory`. Without them, all weights are trained, without a grid or alignment.

    Returns:
        The parts by way: all activations kept; checkpointing; checkpointing with 16-bit optimiser states; checkpointing
        with 8-bit optimiser states.

    Raises:
        InputError: There is less than one token.
    """
    if tokens < 1:
        raise InputError(f"--training must be at least 1 token, not {tokens}")
    found = {}
    for way, (checkpointing, state) in zip(WAYS, TRAINING_SETUPS, strict=True):
        made = training_memory(spec, tokens=tokens, checkpointing=checkpointing, optimizer_state=state, bf16=True, **of)
        # If only scales are trained, each GPU holds all codes.
        made = sharded(made, spec, 1 if of.get("scales_of") else gpus)
        found[way] = {**made.parts, "total_bytes": made.total_bytes}
    return found


def undivided_bytes(spec: ModelSpec, tokens: int, **of: Any) -> int:
    """Return the memory that training needs on each GPU in the smallest way, however many GPUs share it.

    Each GPU holds the tables, the layers at work and what its own pass keeps. What FSDP2 divides shrinks to nothing.

    Args:
        spec, tokens, of: As in `training_parts`.
    """
    return min(parts["total_bytes"] for parts in training_parts(spec, tokens, _MANY_GPUS, **of).values())


_MANY_GPUS = 10**12  # of GPUs: more than any model has weights


TOKENS = 4 * SEQUENCE_LENGTH
"""Default tokens of a forward and backward pass."""


def student_of(teacher: Described, strategy: Strategy, name: str) -> Described:
    """Describe the student that a strategy makes from a teacher.

    Args:
        teacher: The teacher. Only its shape is read.
        strategy: The strategy that makes the student.
        name: Name of the strategy, for a person.

    Raises:
        InputError: The teacher or a pretrained student cannot be trained here, or `check_strategy` refuses the
            strategy.
    """
    # Import here, since it imports torch, which other estimates do not need.
    from autodistill.distillation.student.check import check_strategy, student_spec

    check_trainable(teacher)
    if strategy.init.source == "pretrained":
        check_trainable(describe(strategy.init.model))
    check_strategy(strategy, teacher.spec)
    return Described(name=f"student of {teacher.name} by {name}", spec=student_spec(strategy, teacher.spec))


def strategy_training(
    teacher: Described, student: Described, strategy: Strategy, *, tokens: int = TOKENS, gpus: int = 1
) -> dict[str, Any]:
    """Return the memory of training a student with a strategy, in bytes by part, for each way to make it fit.

    Products are computed in bfloat16, as on a GPU.

    Args:
        teacher, student: The argument and the result of `student_of`.
        strategy: The strategy. Its losses, low-rank changes and finishing count.
        tokens: Tokens of a forward and backward pass.
        gpus: As in `training_parts`.

    Returns:
        Plain data as from `training_parts`. Each way also has `teacher_bytes`, the teacher's memory next to the
        student. `trained` says in words what is trained.

    Raises:
        InputError: There is less than one token.
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
        what = "all weights" if recipe.train_embeddings else "all weights except the embedding table"
    else:
        what = f"low-rank changes of rank {recipe.lora.rank}"
        what += " and the embedding table" if recipe.train_embeddings else ""
    return what if strategy.finishing is None else f"{what}, at the end on the grid of {strategy.finishing.scheme.name}"

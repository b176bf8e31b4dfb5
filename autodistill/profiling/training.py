"""Trace a training step of a strategy: its student and teacher run on random tokens of the requested sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.losses.attention import TeacherBlock, teacher_layer
from autodistill.distillation.losses.hidden_states import layer_map
from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import InputError
from autodistill.hardware.device import Device
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
from autodistill.profiling.advice import training_advice
from autodistill.profiling.floor import step_floor
from autodistill.profiling.trace import ATTENTION, OPTIMIZER, PRODUCTS, Trace, check_folder, record
from autodistill.strategy.strategy import Strategy
from autodistill.units import count_of

_CACHE_BYTES = 2 * 10**9
_STEP = "training step"


def profile_training(
    strategy: Strategy,
    teacher: str,
    *,
    cache: Path,
    out: Path,
    step_tokens: int,
    sequence_length: int,
    steps: int,
    device: str,
    bf16: bool,
    here: Callable[[], Device],
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trace training steps of a strategy, and compare them with their floor.

    The stable part of the training is traced, or the training of scales if only scales are trained. A student's speed
    does not depend on which layers and neurons of the teacher it keeps, so they are chosen evenly.

    Args:
        strategy: The strategy that is trained.
        teacher: Reference of the teacher.
        cache: Folder of teachers.
        out: Folder for the trace.
        step_tokens, sequence_length: Tokens of an optimiser step, and of its sequences.
        steps: Number of traced steps. As many run before without a trace.
        device: Device on which they compute.
        bf16: Whether products are computed in bfloat16.
        here: Returns the device with its bandwidth and rates.
        notify: Called with a line about what happens.

    Returns:
        Plain data: seconds by kind of operation with the floor, counts, and advice about the largest part.

    Raises:
        InputError: A folder cannot be written, the sizes do not fit each other, or random tokens cannot have the
            strategy's signal.
    """
    check_folder(out)
    if step_tokens % sequence_length:
        raise InputError(f"--step-tokens {step_tokens} must be a multiple of --sequence-length {sequence_length}")
    if strategy.distillation.weighs_teacher and strategy.distillation.signal == "written":
        raise InputError('the signal "written" is of a teacher\'s own answers, which random tokens are not')
    notify("loading teacher and student")
    folder = materialize(resolve_teacher(teacher), cache).folder
    whole = spec_from_config(read_config(folder))
    if sequence_length > whole.max_context:
        raise InputError(f"--sequence-length {sequence_length} is beyond the teacher's context of {whole.max_context}")
    model, kept = _student(strategy, folder, cache)
    spec = spec_from_config(model.config.to_dict())
    plan = _plan(step_tokens, sequence_length, steps, bf16)
    data = _tokens(step_tokens // sequence_length, sequence_length, whole.vocabulary)
    with ExitStack() as stack:
        outputs = stack.enter_context(tempfile.TemporaryDirectory(prefix="autodistill-"))
        trainer = _trainer(strategy, plan, data, folder, whole, model, kept, Path(outputs), device)
        stack.callback(trainer.close)
        notify(f"tracing {count_of(steps, 'step')} of {step_tokens:,} tokens")
        records = trainer.train_stable(plan.tokens)
        trace = record(lambda: _next(records), out / "trace.json", steps=steps, device=device, name=_STEP)
        trained = trainer.moved
    live = strategy.distillation.signal == "online" and strategy.distillation.weighs_teacher
    sequences = step_tokens // sequence_length
    beside = whole if live else None
    floor = step_floor(
        spec, here(), sequences=sequences, length=sequence_length, bf16=bf16, trained=trained, teacher=beside
    )
    floors = {PRODUCTS: floor.products + floor.teacher, ATTENTION: floor.attention, OPTIMIZER: floor.optimizer}
    document = _document(trace, floors, floor.total, here(), device)
    return document | {
        "what": "training",
        "strategy": strategy.id,
        "student_parameters": spec.parameters,
        "step_tokens": step_tokens,
        "tokens_per_second": step_tokens / trace.seconds,
        "floor_tokens_per_second": step_tokens / floor.total,
        "advice": training_advice(document, step_tokens=step_tokens, sequence_length=sequence_length, bf16=bf16),
    }


def _document(trace: Trace, floors: dict[str, float], total: float, device: Device, kind: str) -> dict[str, Any]:
    parts = [
        {"part": name, "ms": 1e3 * seconds, "share": seconds / trace.traced_seconds, "floor_ms": _ms(floors.get(name))}
        for name, seconds in trace.kinds.items()
    ]
    counts = {name: value / trace.steps for name, value in asdict(trace.counts).items()}
    return {
        "trace": str(trace.path),
        "machine": device.name,
        "computes_on": kind,
        "steps": trace.steps,
        "step_ms": 1e3 * trace.seconds,
        "traced_step_ms": 1e3 * trace.traced_seconds,
        "floor_ms": 1e3 * total,
        "parts": parts,
        "each_step": counts,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _next(records: Iterator[StepRecord]) -> StepRecord:
    return next(records)


def _student(strategy: Strategy, teacher: Path, cache: Path) -> tuple[Any, tuple[int, ...]]:
    init = strategy.init
    if init.source == "pretrained":
        pretrained = materialize(resolve_teacher(init.model), cache).folder
        return build_student(teacher, init, pretrained=pretrained)
    if init.source == "teacher" and init.selective:
        from autodistill.distillation.student.build import cut_student

        return cut_student(load_model(teacher, torch.float32), replace(init, layers="even"), None)
    return build_student(teacher, init)


def _plan(step_tokens: int, sequence_length: int, steps: int, bf16: bool) -> Plan:
    """Return a plan for the steps that are run. Its learning rate and length do not change their speed."""
    tokens = step_tokens * (2 * steps + 1)
    return Plan(
        trials=1,
        tokens=tokens,
        rungs=(tokens,),
        keep=(),
        sequence_length=sequence_length,
        batch_tokens=step_tokens,
        warmup_tokens=tokens,
        micro_batch=step_tokens // sequence_length,
        decay=0.2,
        rung_eval_tokens=sequence_length,
        eval_tokens=sequence_length,
        test_tokens=sequence_length,
        workers=1,
        threads=torch.get_num_threads(),
        bf16=bf16,
        seed=0,
        box_seconds=None,
        seconds={},
    )


def _tokens(sequences: int, length: int, vocabulary: int) -> TokenSet:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (sequences, length)).astype(np.int32)
    return TokenSet(tokens=tokens, documents=np.zeros_like(tokens))


def _trainer(
    strategy: Strategy,
    plan: Plan,
    data: TokenSet,
    teacher: Path,
    whole: ModelSpec,
    model: Any,
    kept: tuple[int, ...],
    folder: Path,
    device: str,
) -> Trainer:
    """Return a trial's trainer, with a cache of the teacher's outputs for these tokens if the strategy needs one."""
    recipe, held = strategy.distillation, None
    online = recipe.signal == "online"
    pairs = layer_map(recipe.alignment, kept, whole.layers) if recipe.alignment and not online else ()
    states = {pair.teacher_state for pair in pairs}
    if recipe.attention and not online:
        states.add(teacher_layer(recipe.attention, whole.layers) - 1)
    settings = CacheSettings.for_recipes([recipe], states, plan.bf16)
    if not settings.empty:
        held = TeacherCache(
            ensure_cache(
                lambda: load_model(teacher, torch.float32),
                teacher_fingerprint="profile",
                data_fingerprint="profile",
                data=data,
                vocabulary=whole.vocabulary,
                width=whole.width,
                settings=settings,
                root=folder,
                limit_bytes=_CACHE_BYTES,
                device=device,
            )
        )
    block = None
    if recipe.attention:
        block = TeacherBlock(load_model(teacher, torch.float32), teacher_layer(recipe.attention, whole.layers), device)
    return Trainer(
        model.to(device),
        teaching=Teaching(
            kept_layers=kept,
            layers=whole.layers,
            width=whole.width,
            cache=held,
            block=block,
            live=LiveTeacher(teacher, device, plan.bf16),
        ),
        strategy=strategy,
        plan=plan,
        data=data,
        seed=0,
        device=device,
    )

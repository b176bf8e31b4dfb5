"""Distillation steps to be timed in comparison: the kinds of teacher signals here, and the steps of other trainers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.models.loading import decoder_layers, load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.quantization.formats import get_format
from autodistill.strategy.recipe import Alignment, Distillation
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common.plans import straight_plan

DRAWS = 50
BASE = "cross-entropy"
QAT = "top-64, on the grid of Q8_0"
PLAIN = "transformers' cross-entropy"
EXPERIMENTAL = "TRL's experimental GKD, JSD of all logits, teacher live"
STABLE = "TRL's DistillationTrainer, JSD by chunks, teacher live"
COMPARED = {BASE: "cross-entropy", PLAIN: "transformers' own", EXPERIMENTAL: "TRL's GKD", STABLE: "TRL's chunked"}
FULL = {"signal": "states", "signal_tokens": 0}
ARMS = {
    BASE: Distillation(divergence_weight=0.0),
    "top-64": Distillation(),
    f"sampled, {DRAWS} draws": Distillation(signal="sampled", signal_tokens=DRAWS),
    "states": Distillation(**FULL),
    "states, JSD": Distillation(divergence="jsd", mixture=0.5, **FULL),
    "online": Distillation(signal="online", signal_tokens=0),
    "top-64, the uncertain fifth": Distillation(positions="uncertain", uncertain_share=0.2),
    "top-64, 4 layers aligned": Distillation(alignment=Alignment(layers="even", count=4, projection="linear")),
    QAT: Distillation(),
}


def plain_step(student: Any, optimizer: Any, ids: Tensor) -> None:
    """Do one step of plain fine-tuning."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(input_ids=ids, labels=ids, use_cache=False).loss
    descend(student, optimizer, loss)


def experimental_step(student: Any, teacher: Any, optimizer: Any, ids: Tensor, beta: float = 0.5) -> None:
    """Do a training step on the generalised JSD of arXiv 2306.13649 as TRL's experimental GKD computes it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
    descend(student, optimizer, experimental_loss(logits, wanted, beta))


def stable_step(student: Any, teacher: Any, optimizer: Any, ids: Tensor, beta: float = 0.5) -> None:
    """Do a training step on the same divergence as TRL's DistillationTrainer computes it: by chunks of logits."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        states = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        with torch.no_grad():
            wanted = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = stable_loss(states, student.lm_head.weight, wanted, teacher.lm_head.weight, beta)
    descend(student, optimizer, loss)


def descend(student: Any, optimizer: Any, loss: Tensor) -> None:
    """Do the rest of a step, as any trainer does."""
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def experimental_loss(logits: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Return the experimental GKD's loss on float32 logits, as in that trainer: a mean over tokens."""
    from trl.experimental.gkd import GKDTrainer

    tokens = logits[..., 0].numel()
    loss: Tensor = GKDTrainer.generalized_jsd_loss(logits.float(), wanted.float(), beta=beta, num_items_in_batch=tokens)
    return loss


def stable_loss(states: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor, beta: float) -> Tensor:
    """Return the DistillationTrainer's loss on last states and heads: a mean over tokens.

    Its kernel computes in the states' type, to which the trainer casts the heads.
    """
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    everywhere = torch.ones(states.shape[:-1], dtype=torch.int64, device=states.device)
    loss: Tensor = _chunked_divergence_loss(
        states, wanted.to(states.dtype), head.to(states.dtype), wanted_head.to(states.dtype), everywhere, beta
    )[0]
    return loss


class Taken(NamedTuple):
    """Wall-clock and processor seconds of one step."""

    wall: float
    processor: float


def seconds(work: Callable[[], Any]) -> Taken:
    """Return the wall-clock and processor seconds of some work."""
    began = Taken(time.perf_counter(), time.process_time())
    work()
    return Taken(time.perf_counter() - began.wall, time.process_time() - began.processor)


def q8_0(model: Any) -> Callable[[str], Any]:
    """Return the grid of each linear layer and of the embedding table."""
    packing = get_format("gguf-q8_0")
    grids = {name: packing.linears[0] for name, p in model.named_parameters() if name.endswith("proj.weight")}
    return (grids | {"model.embed_tokens.weight": packing.tables}).get


def quantized_seconds(trainer: Trainer, grids: Callable[[str], Any], tokens: int) -> Taken:
    """Return the seconds of one step on a grid. A step before it prepares the head, once per segment as in a search."""
    steps = trainer.train_decay(trainer.tokens + 2 * tokens, grids)
    next(steps)
    taken = seconds(lambda: next(steps))
    steps.close()
    return taken


@dataclass(frozen=True)
class Workshop:
    """The teacher, student, data and cache that all arms share.

    Attributes:
        teacher: The teacher on disk.
        layers, kept: Number of the teacher's layers, and those that the student keeps.
        model: The student; all arms train this one.
        data, cache, folder: Sequences, the teacher's outputs for them, and the folder of these outputs.
    """

    teacher: Teacher
    layers: int
    kept: tuple[int, ...]
    model: Any
    data: TokenSet
    cache: TeacherCache
    folder: Path


def workshop(reference: str, root: Path, length: int, tokens: int, folder: Path) -> Workshop:
    """Build the student, and cache everything that any arm reads."""
    teacher = materialize(resolve_teacher(reference), root)
    source, fingerprint = resolve_data("pydoc"), tokenizer_fingerprint(teacher.folder)
    prepared = prepare(source, teacher.folder, fingerprint, length, root)
    data = load_split(prepared.folder, "train").head(2 * tokens)
    model, kept = build_student(teacher.folder, Init(depth=0.5))
    layers = len(decoder_layers(load_model(teacher.folder, torch.float32)))
    cached = ensure_cache(
        lambda: load_model(teacher.folder, torch.float32),
        teacher_fingerprint=teacher.fingerprint,
        data_fingerprint="distill-step",
        data=data,
        vocabulary=model.config.vocab_size,
        width=model.config.hidden_size,
        settings=CacheSettings(draws=(DRAWS,), temperatures=(1.0,), final=True, states=tuple(range(layers)), bf16=True),
        root=folder,
        limit_bytes=10**9,
    )
    return Workshop(teacher, layers, kept, model, data, TeacherCache(cached), cached)


def arms(
    shop: Workshop, length: int, tokens: int, threads: int, wanted: Sequence[str]
) -> dict[str, Callable[[], Taken]]:
    """Return the steps that are compared, by name. Each does one step and returns its seconds."""
    plan = straight_plan(10**9, sequence_length=length, batch_tokens=tokens, decay=0.25, threads=threads, bf16=True)
    teaching = Teaching(
        kept_layers=shop.kept,
        layers=shop.layers,
        width=shop.model.config.hidden_size,
        cache=shop.cache,
        live=LiveTeacher(shop.teacher.folder, bf16=True),
    )
    trainers = {
        name: Trainer(
            shop.model, teaching=teaching, strategy=Strategy(init=Init(depth=0.5), distillation=recipe), plan=plan,
            data=shop.data, seed=0,
        )
        for name, recipe in ARMS.items()
        if name == BASE or name in wanted
    }  # fmt: skip
    # One AdamW state is shared by all arms that train the same parameters. This keeps the memory of ten arms small.
    optimizer = trainers[BASE].optimizer
    for name, trainer in trainers.items():
        if ARMS[name].alignment is None:
            trainer.optimizer = optimizer
    steps = {name: trainer.train_stable(10**9) for name, trainer in trainers.items()}
    grids = q8_0(shop.model)
    wanted = load_model(shop.teacher.folder, torch.bfloat16)
    ids = torch.from_numpy(np.array(shop.data.tokens[: tokens // length], dtype=np.int64))
    runs: dict[str, Callable[[], Taken]] = {
        name: lambda own=own: seconds(lambda: next(own)) for name, own in steps.items() if name != QAT
    }
    if QAT in trainers:
        runs[QAT] = lambda: quantized_seconds(trainers[QAT], grids, tokens)
    runs[PLAIN] = lambda: seconds(lambda: plain_step(shop.model, optimizer, ids))
    runs[EXPERIMENTAL] = lambda: seconds(lambda: experimental_step(shop.model, wanted, optimizer, ids))
    runs[STABLE] = lambda: seconds(lambda: stable_step(shop.model, wanted, optimizer, ids))
    return runs

"""Measurements of `on_gpu` that each need a process: memory, a step of another trainer, an arm of `versus`.

Each function takes plain data and returns plain data, and runs on a GPU or, in a rehearsal, on the CPU.
"""

from __future__ import annotations

import importlib.util
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autodistill.options import cache_folder

_ROUNDS = 5  # steps that are timed, after two that are not
_TEST_TOKENS, _GENERAL_TOKENS = 16384, 1024
_HELD_OUT = 8  # every eighth document of a text is read by no arm


def _folder_of(teacher: str) -> Path:
    from autodistill.distillation.teacher.resolve import materialize, resolve_teacher

    return materialize(resolve_teacher(teacher), cache_folder()).folder


def _peak_bytes(device: str) -> int:
    """Return the most memory that this process has had: on a GPU what torch allocated, else its resident memory."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weights(device: str, *, teacher: str) -> dict[str, Any]:
    """Return the bytes that loading a model in 16 bits takes, and the prediction."""
    import psutil

    from autodistill.models.config import spec_from_config
    from autodistill.models.loading import load_model
    from autodistill.models.model_folder import read_config

    folder = _folder_of(teacher)
    spec = spec_from_config(read_config(folder))

    def held() -> int:
        if device == "cuda":
            torch.cuda.synchronize()
            return int(torch.cuda.memory_allocated())
        return int(psutil.Process().memory_info().rss)

    # Memory that libraries take at their first use does not belong to the model.
    load_model(folder, torch.bfloat16, device)
    before = held()
    model = load_model(folder, torch.bfloat16, device)
    return {"predicted": 2 * spec.parameters, "held": held() - before, "weights": len(list(model.parameters()))}


def library(device: str, *, teacher: str, data: str, budget: int, context: int, tokens: int) -> dict[str, Any]:
    """Solve for a teacher about which nothing is known, and return the memory that this took and its plan's."""
    from autodistill.hardware.budget import Budget
    from autodistill.search.solve import SolveRequest, plan_solve, solve

    with tempfile.TemporaryDirectory() as folder:
        request = SolveRequest(
            budgets=(Budget(memory_bytes=budget, context=context),),
            cache=Path(folder),
            teacher=teacher,
            data=data,
            tokens=tokens,
            sequence_length=min(256, context // 2),
        )
        planned = plan_solve(request)["plan"]
        before, began = _peak_bytes(device), time.perf_counter()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = int(torch.cuda.memory_allocated())
        found = solve(request, lambda line: None)
        return {
            "predicted": planned["memory_bytes"],
            "held": _peak_bytes(device) - before,
            "planned_seconds": planned["seconds"],
            "seconds": time.perf_counter() - began,
            "kl": found["solutions"][0]["solution"]["kl"],
        }


def trainers(device: str, *, teacher: str, length: int, tokens: int) -> dict[str, Any]:
    """Return the tokens per second of a step here and of TRL's stable trainer, with the same student and divergence.

    Both run the teacher in each step and have the generalised JSD. Ours is timed first.
    """
    import numpy as np

    from autodistill.data.dataset import TokenSet
    from autodistill.distillation.student.build import build_student
    from autodistill.distillation.teacher.target_sources import LiveTeacher
    from autodistill.distillation.teacher.teaching import Teaching
    from autodistill.distillation.training.trainer import Trainer
    from autodistill.models.config import spec_from_config
    from autodistill.models.loading import load_model
    from autodistill.models.model_folder import read_config
    from autodistill.strategy.recipe import Distillation
    from autodistill.strategy.strategy import Init, Strategy
    from benchmarks.common.plans import straight_plan
    from benchmarks.engine.distill_arms import stable_step

    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install 'trl==1.16.*'")
    folder, init = _folder_of(teacher), Init(depth=0.5)
    spec = spec_from_config(read_config(folder))
    ids = np.random.default_rng(0).integers(0, spec.vocabulary, (tokens // length, length)).astype(np.int32)
    data = TokenSet(tokens=np.tile(ids, (_ROUNDS + 2, 1)), documents=np.zeros((len(ids) * (_ROUNDS + 2), length), int))

    def timed(step: Callable[[], Any]) -> float:
        """Return the median seconds of a step, with all that the device was given done."""
        taken = []
        for _ in range(_ROUNDS + 2):
            began = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[2:])

    student, kept = build_student(folder, init)
    recipe = Distillation(signal="online", signal_tokens=0, divergence="jsd", mixture=0.5)
    trainer = Trainer(
        student.to(device),
        teaching=Teaching(
            kept_layers=kept, layers=spec.layers, width=spec.width, live=LiveTeacher(folder, device, bf16=True)
        ),
        strategy=Strategy(init=init, distillation=recipe),
        plan=straight_plan(10**9, sequence_length=length, batch_tokens=tokens, decay=0.25, bf16=True),
        data=data,
        seed=0,
        device=device,
    )
    steps = trainer.train_stable(10**9)
    ours = timed(lambda: next(steps))
    steps.close()
    student, _ = build_student(folder, init)
    student = student.to(device)
    student.get_input_embeddings().requires_grad_(False)  # as ours is by default
    optimizer = torch.optim.AdamW([one for one in student.parameters() if one.requires_grad], lr=1e-5, fused=True)
    live = load_model(folder, torch.bfloat16, device)
    there = torch.from_numpy(ids.astype(np.int64)).to(device)
    theirs = timed(lambda: stable_step(student, live, optimizer, there))
    return {"ours": tokens / ours, "theirs": tokens / theirs, "step_tokens": tokens}


def arm(
    device: str, *, name: str, teacher: str, data: str, share: float, context: int, box: float, tokens: int | None
) -> dict[str, Any]:
    """Run an arm of `versus` on this device, and score what it exports on documents that it did not see.

    Args:
        device: Where it trains, as the machine has it.
        name: Of the arm.
        teacher: A reference.
        data: "pydoc" or a folder, of which every eighth document is held out.
        share: The budget in bytes, or as a share of the teacher's (`budget_of`).
        context, box, tokens: As the arm takes them.
    """
    from autodistill.data.documents import resolve_data
    from autodistill.export.process_memory import measured_process_bytes
    from autodistill.models.config import spec_from_config
    from autodistill.models.model_folder import read_config
    from benchmarks.search.versus.arms import ARMS, Task, budget_of
    from benchmarks.search.versus.judge import Judge

    folder, length = _folder_of(teacher), min(256, context // 2)
    spec = spec_from_config(read_config(folder))
    process = measured_process_bytes(folder, spec.vocabulary, cache_folder())
    with tempfile.TemporaryDirectory() as place:
        texts = {kind: Path(place) / kind for kind in ("own", "test")}
        for text in texts.values():
            text.mkdir()
        for index, document in enumerate(resolve_data(data).documents):
            kind = "own" if index % _HELD_OUT else "test"
            (texts[kind] / f"{index:05d}.txt").write_text(str(document), encoding="utf-8")
        budget = budget_of(replace(spec, process_bytes=process), share, context)
        out = cache_folder() / "benchmarks" / "on-gpu-runs" / str(time.time_ns())
        made = ARMS[name](
            Task(
                teacher=teacher,
                data=str(texts["own"]),
                budget=budget,
                sequence=length,
                seed=0,
                ends=time.time() + box,
                cache=cache_folder(),
                out=out,
                tokens=tokens,
            )
        )
        judge = Judge(
            teacher=folder,
            test=texts["test"],
            general=texts["test"],
            sequence=length,
            test_tokens=_TEST_TOKENS,
            general_tokens=_GENERAL_TOKENS,
            cache=Path(place) / "judge",
        )
        test = judge.judge(made.file, made.deployment, budget)["test"]
    found = {"what": made.name, "tokens": made.tokens, "file": str(made.file), "budget": budget.memory_bytes}
    return found | {"nll": test["nll"], "accuracy": test["accuracy"], "device": device}


MEASURES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "weights": weights,
    "library": library,
    "trainers": trainers,
    "arm": arm,
}

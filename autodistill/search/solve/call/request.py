"""What a request to solve comes to for a model, and what no storage can meet refused, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autodistill.distillation.student.shapes import cut_spec
from autodistill.distillation.teacher.any_model import holds_cache, is_known
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.block_times import BlockTimes, kept_times
from autodistill.estimates.fit import too_late
from autodistill.estimates.solving import SolvingWork, solving_work
from autodistill.export.graphs.onnx import OnnxExporter
from autodistill.export.graphs.onnx_decoder import unsupported
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget
from autodistill.hardware.machine import memory_bytes
from autodistill.models.families import FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.search.solve.bench import compute_device
from autodistill.search.solve.cuts import named, smallest
from autodistill.search.solve.options import Options
from autodistill.search.solve_request import SolveRequest
from autodistill.strategy.strategy import WHOLE, Init
from autodistill.units import format_bytes


def options_of(request: SolveRequest, spec: ModelSpec, config: Mapping[str, Any]) -> list[Options]:
    """Return what may be chosen for each budget.

    Cuts need the whole model in memory.

    Args:
        request: What is asked for, within the model's context.
        spec: The model's shape.
        config: Its `config.json`.

    Raises:
        InputError: Solving takes more memory than it may, or candidates more than there is; or a runtime for which
            nothing is written of such a model; or times of its blocks are damaged.
    """
    if request.runtime != "llama.cpp" and not is_known(config):
        folders = "onnx" if request.runtime == "onnxruntime" else "compressed-tensors"
        raise InputError(f"folders of {folders} are written of {', '.join(FAMILIES)} alone: leave --runtime out")
    if request.runtime == "onnxruntime":
        if reason := unsupported(config):
            raise InputError(f"a graph of ONNX cannot hold {request.teacher}: {reason}; leave --runtime out")
        if request.export:
            OnnxExporter().check_installed()
    cache_type = None if holds_cache(config) else "f16"
    first = Options(
        spec=spec,
        budget=request.budgets[0],
        cache_type=cache_type,
        file_bytes=request.file_bytes,
        runtime=request.runtime,
    )
    streamed = _is_streamed(request, first, config)
    return [
        replace(first, budget=budget, cuts=not streamed, times=_times(request, budget, spec))
        for budget in request.budgets
    ]


def _times(request: SolveRequest, budget: Budget, spec: ModelSpec) -> BlockTimes | None:
    """The times of the model's blocks on the budget's device, where latency is limited and they were measured."""
    if request.runtime != "llama.cpp" or not isinstance(budget, DeviceBudget) or not budget.latency:
        return None
    return kept_times(request.cache, budget.device.name, spec, budget.context)


def work_of(options: Options, tokens: int, *, streamed: bool) -> SolvingWork:
    """Return what solving takes, with the teacher whole in memory, or one block of it at a time.

    Args:
        options: What may be chosen.
        tokens: Of the calibration text.
        streamed: Which of the two.
    """
    kinds = {name: options.kinds(tensor) for name, tensor in (options.matrices | options.tables).items()}
    caches = sum(len({pair[half] for pair in options.caches} - {"f16"}) for half in (0, 1))
    threads = torch.get_num_threads() if compute_device() == "cpu" else 1
    return solving_work(options.spec, kinds, caches, tokens, streamed=streamed, threads=threads)


def room_of(request: SolveRequest) -> int:
    """Return the bytes that solving may take."""
    if request.memory_bytes is not None:
        return request.memory_bytes
    return torch.cuda.mem_get_info()[1] if compute_device() == "cuda" else memory_bytes()


def _is_streamed(request: SolveRequest, options: Options, config: Mapping[str, Any]) -> bool:
    """Return whether one block of the teacher is to be in memory at a time, since all of it is more than there is."""
    room, whole = room_of(request), work_of(options, request.tokens, streamed=False).memory_bytes
    if whole <= room:
        return False
    least = work_of(options, request.tokens, streamed=True).memory_bytes if is_known(config) else whole
    if request.memory_bytes is not None and least > room:
        how = "even with one layer in memory at a time" if is_known(config) else "since its layers are not read apart"
        raise InputError(
            f"solving {request.teacher} takes {format_bytes(least)}, {how}: give a --memory of "
            f"{math.ceil(least / 1e6)}MB, or fewer --tokens"
        )
    if is_known(config) and request.candidates:
        raise InputError(
            f"a candidate is compared with the whole teacher in memory, which takes {format_bytes(whole)} of "
            f"{format_bytes(room)}: leave --candidate out, or give more --memory"
        )
    return is_known(config)


def within_context(request: SolveRequest, spec: ModelSpec) -> SolveRequest:
    """The request with the model's context where nobody asked for one.

    Raises:
        InputError: A context, or sequences, beyond the model's.
    """
    most = spec.max_context
    if request.context_by_default and most < CONTEXT:
        request = replace(request, budgets=tuple(replace(one, context=most) for one in request.budgets))
    if request.budgets[0].context > most:
        raise InputError(f"{request.teacher} has a context of {most} tokens: give --context {most} or less")
    if request.sequence_length > most:
        raise InputError(f"{request.teacher} reads {most} tokens: give --sequence-length {most} or less")
    return request


def check_fits(options: Sequence[Options]) -> None:
    """Refuse budgets of which none holds even the smallest storage.

    Raises:
        InputError: The model is nothing that llama.cpp holds.
        NothingFitsError: Names the smallest storage and what would hold it.
    """
    first = options[0]
    first.check()
    init, deployment, need = smallest(first)
    largest = max(one.budget.memory_bytes for one in options)
    _, least = replace(first, spec=shape_of(init, first.spec)).smallest()
    if not first.fits_file(least.weights_bytes):
        raise NothingFitsError(
            f"nothing fits a file of {format_bytes(first.file_bytes or 0)}: the smallest that is solved for, "
            f"{named(init, deployment)}, has {format_bytes(least.weights_bytes)} of weights; give a --file-size of "
            f"{math.ceil(least.weights_bytes / 1e6)}MB"
        )
    cut = replace(first, spec=shape_of(init, first.spec))
    for limit in cut.latencies(deployment) if need <= largest else ():
        fastest = cut.fastest(limit)
        if late := too_late({limit: cut.latencies(fastest)[limit]}, "predicted"):
            raise NothingFitsError(
                f"nothing keeps to the latency: of the fastest that is solved for, {named(init, fastest)}, {late[0]}; "
                "raise --latency, or name a faster --device"
            )
    if need > largest:
        raise NothingFitsError(
            f"nothing fits {format_bytes(largest)}: the smallest that is solved for, {named(init, deployment)}, needs "
            f"{format_bytes(need)} at context {first.budget.context}, {format_bytes(need - largest)} more; give a "
            f"--budget of {math.ceil(need / 1e6)}MB, or a shorter --context"
        )


def shape_of(init: Init, spec: ModelSpec) -> ModelSpec:
    """The shape of a student; of a model that is in no family its own."""
    return spec if init == WHOLE else cut_spec(init, spec)

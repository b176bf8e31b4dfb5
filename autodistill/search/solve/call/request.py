"""Applies a request to a model, and refuses what no storage can meet, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autodistill.distillation.student.shapes import cut_spec
from autodistill.distillation.teacher.any_model import holds_cache, is_known
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.block_times import times_within
from autodistill.estimates.fit import too_late
from autodistill.estimates.solving import SolvingWork, solving_work
from autodistill.export.graphs.onnx import OnnxExporter
from autodistill.export.graphs.onnx_decoder import unsupported
from autodistill.hardware.budget import CONTEXT
from autodistill.hardware.device import Device
from autodistill.hardware.machine import memory_bytes
from autodistill.models.families import FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.search.solve.bench import compute_device
from autodistill.search.solve.cuts import named, smallest
from autodistill.search.solve.options import Options
from autodistill.search.solve_request import SolveRequest
from autodistill.strategy.strategy import WHOLE, Init
from autodistill.units import format_bytes


def options_of(
    request: SolveRequest, spec: ModelSpec, config: Mapping[str, Any], elsewhere: Device | None = None
) -> list[Options]:
    """Return the options of each budget.

    Cuts are only allowed if the whole model is in memory.

    Args:
        request: The request, within the model's context.
        spec: The model's shape.
        config: Its `config.json`.
        elsewhere: A GPU that is not here, if solving is planned for it.

    Raises:
        InputError: Solving needs more memory than it may take, or candidates need more than there is. Or such a model
            cannot be written for the runtime, or the times of its blocks are damaged.
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
    streamed = _is_streamed(request, first, config, elsewhere)
    timed = request.runtime == "llama.cpp"  # blocks are timed in it
    return [
        replace(
            first,
            budget=budget,
            cuts=not streamed,
            times=times_within(request.cache, budget, spec) if timed else None,
        )
        for budget in request.budgets
    ]


def work_of(options: Options, request: SolveRequest, *, streamed: bool, elsewhere: Device | None = None) -> SolvingWork:
    """Return the operations and the memory that solving takes.

    Args:
        options: What may be chosen.
        request: The request.
        streamed: Whether one block of the teacher is in memory at a time, instead of all.
        elsewhere: As for `options_of`.
    """
    return work_on(options, request.read_tokens, streamed=streamed, thorough=request.thorough, here=elsewhere is None)


def work_on(
    options: Options, tokens: int, *, streamed: bool, thorough: bool, held_out: bool = True, here: bool = True
) -> SolvingWork:
    """Return the operations and the memory that solving takes with so many tokens of calibration text.

    Args:
        options: What may be chosen.
        tokens: Tokens of the calibration text.
        streamed, thorough, held_out: As for `solving_work`.
        here: Whether this machine solves, or else a GPU that is not here.
    """
    kinds = {name: options.kinds(tensor) for name, tensor in (options.matrices | options.tables).items()}
    caches = sum(len({pair[half] for pair in options.caches} - {"f16"}) for half in (0, 1))
    on_cpu = here and compute_device() == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    return solving_work(
        options.spec,
        kinds,
        caches,
        tokens,
        streamed=streamed,
        thorough=thorough,
        held_out=held_out,
        threads=threads,
        together=not on_cpu,
    )


def room_of(request: SolveRequest, elsewhere: Device | None = None) -> int:
    """Return the bytes that solving may take."""
    if request.memory_bytes is not None:
        return request.memory_bytes
    if elsewhere is not None:
        return elsewhere.usable_bytes
    return torch.cuda.mem_get_info()[1] if compute_device() == "cuda" else memory_bytes()


def _is_streamed(request: SolveRequest, options: Options, config: Mapping[str, Any], elsewhere: Device | None) -> bool:
    """Return whether the whole teacher needs too much memory, so that one block at a time is loaded."""
    room = room_of(request, elsewhere)
    whole = work_of(options, request, streamed=False, elsewhere=elsewhere).memory_bytes
    if whole <= room:
        return False
    apart = work_of(options, request, streamed=True, elsewhere=elsewhere)
    least = apart.memory_bytes if is_known(config) else whole
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
    """Return the request. If its context is the default and the model's is shorter, it gets the model's.

    Raises:
        InputError: The context, or sequences, are longer than the model's context.
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
    """Refuse budgets if none of them holds even the smallest storage.

    Raises:
        InputError: llama.cpp cannot hold the model.
        NothingFitsError: Nothing fits. The message names the smallest storage and a sufficient budget.
    """
    first = options[0]
    first.check()
    init, deployment, need = smallest(first)
    largest = max(one.budget.memory_bytes for one in options)
    _, least = replace(first, spec=shape_of(init, first.spec)).smallest()
    if not first.fits_file(least.weights_bytes):
        raise NothingFitsError(
            f"nothing fits a file of {format_bytes(first.file_bytes or 0)}: the smallest model that solve can choose, "
            f"{named(init, deployment)}, has {format_bytes(least.weights_bytes)} of weights; give a --file-size of "
            f"{math.ceil(least.weights_bytes / 1e6)}MB"
        )
    cut = replace(first, spec=shape_of(init, first.spec))
    for limit in cut.latencies(deployment) if need <= largest else ():
        fastest = cut.fastest(limit)
        if late := too_late({limit: cut.latencies(fastest)[limit]}, "predicted"):
            raise NothingFitsError(
                f"nothing keeps to the latency: for the fastest model that solve can choose, {named(init, fastest)}, "
                f"{late[0]}; raise --latency, or name a faster --device"
            )
    if need > largest:
        raise NothingFitsError(
            f"nothing fits {format_bytes(largest)}: the smallest model that solve can choose, "
            f"{named(init, deployment)}, needs {format_bytes(need)} at context {first.budget.context}, "
            f"{format_bytes(need - largest)} more; give a --budget of {math.ceil(need / 1e6)}MB, or a shorter --context"
        )


def shape_of(init: Init, spec: ModelSpec) -> ModelSpec:
    """Return the shape of a student. A whole model of any architecture keeps its own."""
    return spec if init == WHOLE else cut_spec(init, spec)

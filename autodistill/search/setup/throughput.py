"""Measures how fast this machine runs a teacher and trains its largest student, in steps of one or several sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.distillation.training.optimizers.adamw import adamw
from autodistill.estimates.training_memory import OptimizerState
from autodistill.evaluation.base import Scoring
from autodistill.evaluation.precision import scored_in
from autodistill.inference.batching import by_length, logit_rows, map_batches, pass_tokens
from autodistill.inference.torch_memory import give_back_memory, is_out_of_memory
from autodistill.models.loading import decoder_layers, token_tables
from autodistill.models.spec import ModelSpec
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Workers
from autodistill.search.planning.plan import WORTH

# If a step takes less than `_SHORT` seconds, `_TIMED` steps are timed and the fastest counts. On an accelerator a step
# takes some hundredths of a second.
_TIMED, _SHORT = 3, 0.5
# Weights that an optimiser is timed with: more than a core's cache holds. They take 50 MB.
_MOVED = 2**22


def measure_speed(
    teacher: Any,
    spec: ModelSpec,
    largest: Callable[[Any], Any],
    workers: Workers,
    threads: int,
    *,
    device: str,
    sequence_length: int = SEQUENCE_LENGTH,
    checkpointing: bool = False,
    sizes: Sequence[int] = (1,),
    alone: Callable[[float], int] | None = None,
    caches: bool = True,
    scoring: Scoring = "float32",
) -> tuple[Speed, dict[int, float]]:
    """Time the teacher's forward pass and training steps of the largest student, on random tokens.

    Args:
        teacher: The teacher, computing in float32. It is left in main memory, and the student may share its weights.
        spec: The teacher's shape.
        largest: Makes the largest student of the space from the teacher.
        workers: Threads and precision of a worker.
        threads: All threads of the machine.
        device: Device of this machine to measure on.
        sequence_length: Tokens of a sequence.
        checkpointing: Whether a step computes activations twice.
        sizes: Numbers of sequences that each process trains on in a step, in one pass; ascending.
        alone: A worker may also train while no others run, which is timed too. This function returns the sequences of
            such a worker's pass, given its tokens a second with a single sequence. None if no worker trains so.
        caches: Whether outputs of the teacher are cached. If not, caching is reported to be as fast as scoring.
        scoring: Precision of products when models are scored.

    Returns:
        The speed with steps of the first size, and training tokens per second by size. The sizes end with the first
        that is not worth it, or before the first that memory does not hold.
    """
    tokens = pass_tokens(teacher.to(device), device)
    on_cpu = device == "cpu"
    together = max(1, tokens // sequence_length)
    ids = np.random.default_rng(0).integers(0, spec.vocabulary, (together, sequence_length))
    passes = _Passes(teacher, torch.from_numpy(ids).to(device), tokens, device, workers, scoring)
    torch.set_num_threads(threads)
    sequences = together * threads if on_cpu else together
    full = passes.score_rate(sequences)
    as_scored = scoring == "float32" and not workers.bf16
    cache = passes.rate(sequences, workers.bf16) if caches and not as_scored else full
    # The student is cut in main memory and is then alone on the device, which need not hold both models at once.
    student = largest(teacher.to("cpu"))
    give_back_memory()
    passes.take(student)
    for table in token_tables(student):
        table.requires_grad_(False)
    # All workers that share the memory bandwidth are timed at once, as they will run.
    processes = workers.processes_sharing
    if on_cpu and processes * workers.threads == threads and student.num_parameters() == spec.parameters:
        # This is the whole teacher on all threads, which was timed before.
        worker_score = full / processes
    else:
        torch.set_num_threads(processes * workers.threads)
        worker_score = passes.score_rate(together * processes * workers.threads if on_cpu else together) / processes
    if checkpointing:
        student.train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.set_num_threads(workers.threads)
    rates = _growing(passes.train_rate, sizes)
    speed = Speed(cache=cache, score=full, worker_train=rates[sizes[0]], worker_score=worker_score)
    if alone and workers.alone:
        torch.set_num_threads(workers.alone)
        rate = passes.train_rate(1, processes=1)
        at_once = alone(rate)
        speed = replace(speed, alone=rate if at_once == 1 else passes.train_rate(at_once, processes=1), at_once=at_once)
    torch.set_num_threads(threads)
    return speed, rates


def moving_seconds(state: OptimizerState, device: str, threads: int) -> float:
    """Return the seconds per weight that an optimiser's step takes in addition to those in `expected.TRAINING`.

    This is 0 for float32. States of 16 and 8 bits are rounded in each step, which on a CPU takes many times as long as
    a step in float32.

    Args:
        state: Precision of the moments.
        device: Device of this machine to measure on.
        threads: Threads of a worker's process.
    """
    if state == "float32":
        return 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = nn.Parameter(torch.zeros(_MOVED, device=device))
        weight.grad = torch.ones_like(weight)
        optimizer = adamw([{"params": [weight]}], state)

        def seconds() -> float:
            began = time.perf_counter()
            optimizer.step()
            _wait(device)
            return time.perf_counter() - began

        seconds()  # allocates the states
        return min(seconds() for _ in range(_TIMED)) / _MOVED
    finally:
        torch.set_num_threads(before)


class _Passes:
    """Times passes of a model over the same random tokens, after an untimed first pass.

    Args:
        model: The model on `device`.
        ids: Token ids [sequences, length], enough sequences for every pass.
        tokens: Largest number of tokens in a forward pass, which has at least one sequence.
        device: Device of model and tokens.
        workers: Threads and precision of a worker.
        scoring: Precision of products when models are scored.
    """

    def __init__(
        self, model: Any, ids: Tensor, tokens: int, device: str, workers: Workers, scoring: Scoring = "float32"
    ) -> None:
        self.model = model
        self._ids = ids
        self._tokens = tokens
        self._device = device
        self._workers = workers
        self._scoring = scoring
        self._left_out = 0

    def take(self, student: Any) -> None:
        """Replace the model by a student. If several processes share it, only the layers of one process are kept.

        Memory may not hold more of it. On an accelerator gradients are dropped at once, since memory need not hold them
        all: a trial with several processes or low-rank changes does not have all of them.
        """
        layers = decoder_layers(student)
        student.base_model.layers = layers[: -(-len(layers) // self._workers.processes)]
        self._left_out = len(layers) - len(student.base_model.layers)
        self.model = student.to(self._device)
        if self._device != "cpu":
            for parameter in student.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def of_all_layers(self, seconds: Callable[[], float]) -> float:
        """Return the seconds of some work with all layers. A missing layer counts as much as one that is present."""
        some = seconds()
        if not self._left_out:
            return some
        body = self.model.base_model
        layers, body.layers = body.layers, nn.ModuleList()
        try:
            none = seconds()
        finally:
            body.layers = layers
        return some + self._left_out / len(layers) * max(0.0, some - none)

    def score_rate(self, sequences: int) -> float:
        """Return `rate` in the precision of scoring."""
        with scored_in(self.model, self._scoring, self._device):
            return self.rate(sequences, False)

    def rate(self, sequences: int, bf16: bool) -> float:
        """Return the tokens per second of the forward pass and the head, without gradients."""
        length = self._ids.shape[1]

        def work(batch: range) -> int:
            """Read a batch of sequences, and return their number."""
            with torch.no_grad(), torch.autocast(self._device, dtype=torch.bfloat16, enabled=bf16):
                ids = self._ids[: len(batch)]
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                head = self.model.get_output_embeddings()
                for rows in hidden.split(logit_rows(head.out_features)):
                    head(rows)
            return len(batch)

        def seconds(tokens: int) -> tuple[float, int]:
            began = time.perf_counter()
            largest = max(map_batches(work, sequences, by_length([length] * sequences), tokens, self._device))
            _wait(self._device)
            return time.perf_counter() - began, largest

        # The first run finds how many sequences memory holds at once.
        _, largest = seconds(self._tokens)
        return sequences * length / self.of_all_layers(lambda: seconds(largest * length)[0])

    def train_rate(self, size: int, processes: int | None = None) -> float:
        """Return the tokens per second of forward and backward passes over `size` sequences, by all workers at once."""
        processes = self._workers.processes_sharing if processes is None else processes

        def step(index: int) -> None:
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._workers.bf16):
                # Repeating one sequence takes as long as different sequences.
                ids = self._ids[:1].expand(size, -1)
                logits = self.model(input_ids=ids, use_cache=False).logits
            logits.float().square().mean().backward()

        def seconds() -> float:
            began = time.perf_counter()
            list(pool.map(step, range(processes)))
            _wait(self._device)
            return time.perf_counter() - began

        def fastest() -> float:
            first = seconds()
            return min((first, *(seconds() for _ in range(_TIMED - 1 if first < _SHORT else 0))))

        with ThreadPoolExecutor(processes) as pool:
            seconds()
            taken = self.of_all_layers(fastest)
        # Each process of a trial trains on its own sequences.
        return self._workers.processes * size * self._ids.shape[1] / taken


def _growing(rate: Callable[[int], float], sizes: Sequence[int]) -> dict[int, float]:
    """Return the rate of each size, up to the first that is not worth it, or until memory is too small."""
    found: dict[int, float] = {}
    for size in sizes:
        try:
            found[size] = rate(size)
        except RuntimeError as error:
            if not found or not is_out_of_memory(error):
                raise
        if size not in found:
            # This is outside of the handler, whose traceback keeps the tensors of the failed step alive.
            give_back_memory()
            return found
        before, last = (0.0, *found.values())[-2:]
        if last < WORTH * before:
            return found
    return found


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

"""How fast this machine runs a teacher, and trains its largest student in steps of one size or several."""

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
from autodistill.models.loading import decoder_layers
from autodistill.models.spec import ModelSpec
from autodistill.search.planning.durations import Speed
from autodistill.search.planning.placement import Workers
from autodistill.search.planning.plan import WORTH

# Steps that are timed, of which the fastest counts, where one takes so few seconds: some hundredths on an accelerator.
_TIMED, _SHORT = 3, 0.5
# Weights that an optimiser is timed with: more than a core's cache holds, in 50 MB.
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
    """Times the teacher's forward and training steps of the largest student, on random tokens.

    Args:
        teacher: The teacher, computing in float32; it is left in main memory, whose weights the student may share.
        spec: The teacher's shape.
        largest: Makes the largest student in the space of the teacher.
        workers: Threads and precision of a worker.
        threads: All of the machine's threads.
        device: Where to measure: on this machine.
        sequence_length: Tokens of a sequence.
        checkpointing: Whether a step computes activations twice.
        sizes: Sequences that each process trains on in a step, in one pass; ascending.
        alone: Gives the sequences of a pass of a worker that trains with nothing beside it, which is timed too, by the
            tokens a second of one with a single sequence; None where none trains so.
        caches: Whether outputs of the teacher are cached; where none are, that is said to be as fast as scoring.
        scoring: What products are computed in where models are scored.

    Returns:
        The speed, with steps of the first size; and training tokens per second by size, up to the first that is not
        worth it or that memory does not hold.
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
    # Cut in main memory, and alone on the device: one that holds either need not hold both.
    student = largest(teacher.to("cpu"))
    give_back_memory()
    passes.take(student)
    student.get_input_embeddings().weight.requires_grad_(False)
    # All workers that share its memory's bandwidth at once, as they will be.
    beside = workers.beside
    if on_cpu and beside * workers.threads == threads and student.num_parameters() == spec.parameters:
        # The whole teacher, read by all threads as it was before.
        worker_score = full / beside
    else:
        torch.set_num_threads(beside * workers.threads)
        worker_score = passes.score_rate(together * beside * workers.threads if on_cpu else together) / beside
    if checkpointing:
        student.train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.set_num_threads(workers.threads)
    rates = _growing(passes.train_rate, sizes)
    speed = Speed(cache=cache, score=full, worker_train=rates[sizes[0]], worker_score=worker_score)
    if alone and workers.alone:
        torch.set_num_threads(workers.alone)
        rate = passes.train_rate(1, beside=1)
        at_once = alone(rate)
        speed = replace(speed, alone=rate if at_once == 1 else passes.train_rate(at_once, beside=1), at_once=at_once)
    torch.set_num_threads(threads)
    return speed, rates


def moving_seconds(state: OptimizerState, device: str, threads: int) -> float:
    """Return the seconds that an optimiser's step takes for each weight beyond what `expected.TRAINING` has of it.

    Nothing in float32. States of 16 and 8 bits are rounded in each step, on a CPU for many times what float32 takes.

    Args:
        state: What the moments are held in.
        device: Where to measure: on this machine.
        threads: Of a worker's process.
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

        seconds()  # makes the states
        return min(seconds() for _ in range(_TIMED)) / _MOVED
    finally:
        torch.set_num_threads(before)


class _Passes:
    """Passes of a model over the same random tokens, timed after a first time that does not count.

    Args:
        model: On `device`.
        ids: [sequences, length], as many as any pass reads.
        tokens: Of a forward pass, at the most; one sequence at least.
        device: Where model and tokens lie.
        workers: Threads and precision of a worker.
        scoring: What products are computed in where models are scored.
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
        """Puts a student in the model's place; of one that several processes share, as many layers as lie in each.

        It may be that memory holds no more of it. Nor need an accelerator hold the gradients: a trial of several
        processes, or of low-rank changes, has not all of them.
        """
        layers = decoder_layers(student)
        student.base_model.layers = layers[: -(-len(layers) // self._workers.processes)]
        self._left_out = len(layers) - len(student.base_model.layers)
        self.model = student.to(self._device)
        if self._device != "cpu":
            for parameter in student.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def of_all_layers(self, seconds: Callable[[], float]) -> float:
        """Return what something takes with all layers, where one that is left out takes as long as one that is
        there.
        """
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
        """Return `rate` as models are scored."""
        with scored_in(self.model, self._scoring, self._device):
            return self.rate(sequences, False)

    def rate(self, sequences: int, bf16: bool) -> float:
        """Return the tokens per second of the forward pass and the head, without gradients."""
        length = self._ids.shape[1]

        def work(batch: range) -> int:
            """Reads so many sequences, and says how many."""
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

        # How many sequences memory holds at once is known after the first time.
        _, largest = seconds(self._tokens)
        return sequences * length / self.of_all_layers(lambda: seconds(largest * length)[0])

    def train_rate(self, size: int, beside: int | None = None) -> float:
        """Return the tokens per second of forward and backward passes over `size` sequences, by all workers beside each
        other.
        """
        beside = self._workers.beside if beside is None else beside

        def step(index: int) -> None:
            with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._workers.bf16):
                # One sequence several times takes as long as several.
                ids = self._ids[:1].expand(size, -1)
                logits = self.model(input_ids=ids, use_cache=False).logits
            logits.float().square().mean().backward()

        def seconds() -> float:
            began = time.perf_counter()
            list(pool.map(step, range(beside)))
            _wait(self._device)
            return time.perf_counter() - began

        def fastest() -> float:
            first = seconds()
            return min((first, *(seconds() for _ in range(_TIMED - 1 if first < _SHORT else 0))))

        with ThreadPoolExecutor(beside) as pool:
            seconds()
            taken = self.of_all_layers(fastest)
        # Each process of a trial trains on sequences of its own.
        return self._workers.processes * size * self._ids.shape[1] / taken


def _growing(rate: Callable[[int], float], sizes: Sequence[int]) -> dict[int, float]:
    """The rate of each size, up to the first that is not worth it, or before one that memory does not hold."""
    found: dict[int, float] = {}
    for size in sizes:
        try:
            found[size] = rate(size)
        except RuntimeError as error:
            if not found or not is_out_of_memory(error):
                raise
        if size not in found:
            # Outside of the handler, whose traceback holds on to the tensors of the failed step.
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

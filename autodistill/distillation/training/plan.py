"""The plan of a search as its trials receive it: tokens, rungs, workers, seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autodistill.estimates.training_memory import OptimizerState
from autodistill.utils.plain_dataclass import ToJson


@dataclass(frozen=True, kw_only=True)
class Plan(ToJson):
    """What a search will spend, fixed before the first trial.

    Attributes:
        trials: Strategies to propose, without baselines.
        tokens: Training tokens of a trial at full fidelity.
        rungs: Tokens after which a trial is judged, ascending; the last is `tokens`.
        keep: How many trials pass each rung, for all rungs except the last.
        sequence_length: Tokens per training sequence.
        batch_tokens: Tokens per optimiser step, a multiple of `sequence_length`.
        warmup_tokens: Tokens over which the learning rate rises.
        micro_batch: Sequences per forward and backward pass; their gradients add up to the step's.
        checkpointing: Whether the backward pass computes each layer's activations again instead of keeping them.
        optimizer_state: Type of AdamW's two moments.
        lengths: Multiples of `tokens` to which trials may be trained, 1 first.
        expected: Multiple of `tokens` to which the best trials are expected to be trained in the time left.
        by_labels: The same for a trial that learns from the labels alone, if it gets further because the teacher reads
            none of its tokens. 0 if the plan expects no such difference.
        longest: Largest allowed multiple of `tokens`, however much time is left. 1 without extended training.
        alone: CPU threads of a worker that trains while no other worker runs. 0 if that never happens.
        at_once: Factor of the sequences per step and per micro-batch when a worker trains weights, not only scales,
            alone.
        data_tokens: Tokens of the text that all trials draw from, in one or more epochs. 0 for the tokens of the
            largest of `lengths`.
        decay: Share of a rung's tokens that the final decay takes. The finishing stage is part of the decay.
        rung_eval_tokens, eval_tokens, test_tokens: Tokens that an evaluation reads at a rung, at full fidelity, and on
            the test split.
        workers: Trials that train at the same time.
        threads: CPU threads of each process of a worker.
        processes: Processes that train one trial together.
        gpus: GPUs of each process, a fraction if several processes share one.
        bf16: Whether training computes in bfloat16 where that is safe.
        seed: Seed of data order, projections and proposals.
        box_seconds: The time budget, or None.
        seconds: Expected seconds by phase.
        notes: What did not fit the time budget, in sentences.
        example_share: Share of the tasks' examples that an evaluation reads at full fidelity. A rung reads fewer, in
            proportion to its evaluation tokens.
    """

    trials: int
    tokens: int
    rungs: tuple[int, ...]
    keep: tuple[int, ...]
    sequence_length: int
    batch_tokens: int
    warmup_tokens: int
    decay: float
    rung_eval_tokens: int
    eval_tokens: int
    test_tokens: int
    workers: int
    threads: int
    bf16: bool
    seed: int
    box_seconds: float | None
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    micro_batch: int = 1
    checkpointing: bool = False
    optimizer_state: OptimizerState = "float32"
    processes: int = 1
    gpus: float = 1.0
    example_share: float = 1.0
    lengths: tuple[float, ...] = (1.0,)
    expected: float = 1.0
    by_labels: float = 0.0
    longest: float = 1.0
    alone: int = 0
    at_once: int = 1
    data_tokens: int = 0

    def tokens_of(self, length: float) -> int:
        """Return the training tokens of a trial that is `length` times as long as the plan's, in whole steps."""
        return round(self.tokens * length / self.batch_tokens) * self.batch_tokens if length > 1 else self.tokens

    @property
    def most_tokens(self) -> int:
        """Tokens of the training text that every trial draws from."""
        return self.data_tokens or self.tokens_of(max(self.lengths))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote."""
        lists = ("rungs", "keep", "notes", *(("lengths",) if "lengths" in data else ()))
        # Older plans lack these two fields.
        known: dict[str, Any] = {"expected": max(1.0, data.get("longest", 1.0) / 2)}
        known |= {"at_once": max(1, min(data.get("alone", 0), data["workers"]))} | dict(data)
        return cls(**(known | {name: tuple(data[name]) for name in lists}))

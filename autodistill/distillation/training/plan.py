"""The plan of a search as its trials get it: tokens, rungs, workers, seed."""

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
        trials: Strategies proposed, baselines not counted.
        tokens: Training tokens of a trial at full fidelity.
        rungs: Tokens after which a trial is judged, ascending; the last is `tokens`.
        keep: How many of the trials go past each rung but the last.
        sequence_length: Tokens of a training sequence.
        batch_tokens: Tokens of an optimiser step, a multiple of `sequence_length`.
        warmup_tokens: Tokens over which the learning rate rises.
        micro_batch: Sequences of one forward and backward pass; their gradients add up to the step's.
        checkpointing: Whether the backward pass computes each layer's activations again instead of keeping them.
        optimizer_state: What AdamW's two moments are held in.
        lengths: Multiples of `tokens` that trials may be trained on to, 1 first.
        expected: Multiple of the tokens to which the best are expected to be trained in the time that is left.
        by_labels: The same of one that learns from the labels alone, where that is more: the teacher reads none of its
            tokens. 0 where nothing was reckoned with a teacher beside.
        longest: Largest such multiple, whatever time is left; 1 where nothing is trained on.
        alone: CPU threads of a worker that trains with nothing beside it; 0 where that is never done.
        at_once: Times as many sequences as others' a step has, and a pass, of weights that are trained so.
        data_tokens: Of the text that all trials draw from, in passes; 0 for as many as the longest of `lengths` has.
        decay: Share of a rung's tokens that the final decay takes; finishing happens in it.
        rung_eval_tokens, eval_tokens, test_tokens: Tokens an evaluation reads: at a rung, at full fidelity, on test.
        workers: Trials that train at once.
        threads: CPU threads of each process of a worker.
        processes: That train one trial together.
        gpus: Of each process: a fraction where several share one.
        bf16: Whether training computes in bfloat16 where that is safe.
        seed: Of data order, projections and proposals.
        box_seconds: The time budget, or None.
        seconds: Expected seconds by phase.
        notes: What the time budget could not hold, in sentences.
        example_share: Of the examples of tasks, how much an evaluation reads at full fidelity; less at a rung, as of
            the tokens.
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
        """Return the training tokens of a trial with so many times the plan's tokens, in whole steps."""
        return round(self.tokens * length / self.batch_tokens) * self.batch_tokens if length > 1 else self.tokens

    @property
    def most_tokens(self) -> int:
        """Training tokens of the text that every trial draws from."""
        return self.data_tokens or self.tokens_of(max(self.lengths))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote."""
        lists = ("rungs", "keep", "notes", *(("lengths",) if "lengths" in data else ()))
        # Plans of before this was written down.
        known: dict[str, Any] = {"expected": max(1.0, data.get("longest", 1.0) / 2)}
        known |= {"at_once": max(1, min(data.get("alone", 0), data["workers"]))} | dict(data)
        return cls(**(known | {name: tuple(data[name]) for name in lists}))

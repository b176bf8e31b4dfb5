"""The record of one optimiser step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        tokens: Trained on so far, this step included.
        loss, divergence, cross_entropy, alignment, attention: Means over the step's predicted tokens; for the logit
            terms, only those of the chosen positions. `loss` is the minimised loss. The others are its terms without
            their weights.
        divergence_weight: Share of the divergence in the logit loss, at the middle of the step's tokens.
        teacher_share: Share of the teacher in the target. It is below 1 for a moving target ("taid"), and is the share
            that the previous step led to.
        temperature: Temperature of the divergence at the middle of the step's tokens, snapped to the grid of
            temperatures.
        learning_rate: The student's learning rate.
        gradient_norm: Joint norm of the gradients before clipping.
        tokens_per_second: Training speed of this step.
        micro_batch: Sequences of one forward and backward pass.
        on_policy: Mean divergence at the tokens that the student wrote itself, or 0 if it wrote none.
    """

    tokens: int
    loss: float
    divergence: float
    cross_entropy: float
    alignment: float
    attention: float
    divergence_weight: float
    teacher_share: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    micro_batch: int
    on_policy: float = 0.0

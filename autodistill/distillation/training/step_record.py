"""What is recorded of one optimiser step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        tokens: Trained on so far, this step included.
        loss, divergence, cross_entropy, alignment, attention: Means over the step's predicted tokens, the logit terms
            over those of the chosen positions; `loss` is what was descended, the others are its terms without their
            weights.
        divergence_weight: Share of the divergence in the logit loss, of the middle of the step's tokens.
        teacher_share: Of the teacher in the target; below 1 for a moving target ("taid"), as the step before left it.
        temperature: Of the divergence in the middle of the step's tokens, as snapped.
        learning_rate: Of the student.
        gradient_norm: Before clipping.
        tokens_per_second: Of this step.
        micro_batch: Sequences of one forward and backward pass.
        on_policy: Mean divergence at the tokens that the student wrote itself; 0 where it wrote none.
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

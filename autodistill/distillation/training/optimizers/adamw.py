"""Chooses AdamW by the type of its moments, and clips gradients before its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autodistill.distillation.training.optimizers.adamw_8bit import eight_bit_adamw
from autodistill.distillation.training.optimizers.adamw_bf16 import RoundedAdamW
from autodistill.estimates.training_memory import OptimizerState

MOST_NORM = 1.0

_BETAS = (0.9, 0.95)


def adamw(groups: list[dict[str, Any]], state: OptimizerState) -> Any:
    """Return AdamW over groups of parameters, with moments of the type `state`. Each step sets the learning rate."""
    if state == "int8":
        return eight_bit_adamw(groups, lr=0.0, betas=_BETAS, weight_decay=0.0)
    if state == "bfloat16":
        return RoundedAdamW(groups, lr=0.0, betas=_BETAS)
    return torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0, fused=True)


def clip(parameters: list[nn.Parameter]) -> float:
    """Scale the gradients to a joint norm of at most `MOST_NORM`, and return the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(norm)
    if value > MOST_NORM:
        torch.nn.utils.clip_grads_with_norm_(parameters, MOST_NORM, norm)
    return value

"""How the experts of a mixture are computed: one after another, each on the tokens that its router sends to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "experts_in_turn"
"""Name under which transformers knows this computation; it is in no folder that is written."""

MATRICES = ("gate_up_proj", "down_proj")
"""Names of the parameters of a module of experts, [experts, out, in]."""


def experts_in_turn(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Compute experts with products that autocast knows, and with one gradient for all experts of a layer.

    transformers' own loop makes a gradient of all experts for each of them. Its grouped product ignores autocast.

    Args:
        module: A module of experts with `MATRICES`. It may have `matrix_of`, a function that returns the matrix of one
            expert, given the parameter's name and the expert.
        states: [tokens, width].
        chosen: int64 [tokens, k], the experts of each token.
        weights: [tokens, k], their weights.

    Returns:
        [tokens, width], the weighted sum over each token's experts.
    """
    by_expert = chosen.flatten().argsort(stable=True)
    counts = [len(by_expert)]  # without memory for values, it does not matter which expert computes
    if not states.is_meta:
        counts = chosen.flatten().bincount(minlength=module.num_experts).tolist()
    rows = states[by_expert // chosen.shape[1]].split(counts)
    ups, downs = (_each(module, name) for name in MATRICES)
    made = [
        functional.linear(module._apply_gate(functional.linear(own, ups(expert))), downs(expert))
        for expert, own in enumerate(rows)
        if len(own)
    ]
    weighted = torch.cat(made) * weights.flatten()[by_expert, None]
    back = torch.empty_like(by_expert)
    back[by_expert] = torch.arange(len(by_expert), device=back.device)
    return weighted[back].view(*chosen.shape, -1).sum(1).to(states.dtype)


def _each(module: Any, name: str) -> Callable[[int], Tensor]:
    """Return a function for the matrix of each expert in the parameter `name`."""
    if (matrix_of := getattr(module, "matrix_of", None)) is not None:
        return lambda expert: matrix_of(name, expert)
    matrices: Sequence[Tensor] = getattr(module, name).unbind()
    return lambda expert: matrices[expert]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_in_turn)

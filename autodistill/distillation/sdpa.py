"""Attention of models: transformers' SDPA, but that no float32 pass on a GPU falls back to whole matrices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_of_equal_heads"
"""The implementation's name to transformers; no folder that is written has it."""


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """transformers' SDPA, with a head of keys for each of queries where a GPU computes in float32.

    Where keys have fewer heads, only kernels of 16-bit types take them as they are on CUDA: in float32 torch would
    compute [heads, tokens, tokens], at a third of the speed of the kernel that takes equal heads
    (pytorch/pytorch#181528).
    """
    groups, kind = query.shape[1] // key.shape[1], query.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if groups > 1 and query.shape[2] > 1 and computed == torch.float32 and kind != "cpu":
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        # Without the number of groups, by which it would repeat them again.
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    found: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return found


def register(name: str, function: Any) -> None:
    """Makes a function known to transformers as an attention that takes SDPA's masks."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


register(ATTENTION, attention_forward)

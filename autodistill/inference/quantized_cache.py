"""A model that attends to keys and values as llama.cpp reads them from a cache of few bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from autodistill.models.families import graph_named
from autodistill.models.loading import attention_forward, register
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid
from autodistill.quantization.rounding import fitted_values

_ROTATED = 64  # numbers of a head that llama.cpp rotates at once, or twice as many, four times and so on of keys


@contextmanager
def quantized_cache(model: Any, cache_types: tuple[str, str]) -> Iterator[None]:
    """Within the context keys and values are rounded as llama.cpp's cache holds them; one of float16 is left as it is.

    They are so after the positions were put into them, each by itself, so that it does not matter whether a pass reads
    a whole text or a token. Where 64 divides the head, llama.cpp turns keys and values by a Hadamard matrix before it
    rounds them (ggml-org/llama.cpp pull 21038), and queries and results likewise, which is the same as turning back
    what was rounded. Its own rounding of queries to 8 bits, as of all activations on a CPU, is not simulated.

    Args:
        model: Of transformers, loaded or made by `models.loading`.
        cache_types: Of keys and of values, of `CACHE_BYTES`.
    """
    if cache_types == ("f16", "f16"):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(_implementation(*cache_types, graph_named(model.config.model_type) == "llama"))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@cache
def _implementation(keys: str, values: str, paired: bool) -> str:
    """The name under which transformers knows the attention to such a cache."""
    name = f"cache_of_{keys}_and_{values}" + ("_in_pairs" if paired else "")
    register(name, partial(_attention, keys, values, paired))
    return name


def _attention(
    keys: str,
    values: str,
    paired: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    head = key.shape[-1]
    turned = _ROTATED
    while head % (2 * turned) == 0:
        turned *= 2
    if paired:
        # What is rotated together lies side by side in llama.cpp's "llama", as `row_order` has the weights.
        key = key.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    key = as_cached(key, keys, turned)
    if paired:
        key = key.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    value = as_cached(value, values, _ROTATED)
    return attention_forward(module, query, key, value, attention_mask, **options)


def as_cached(rows: Tensor, kind: str, turned: int) -> Tensor:
    """Keys or values as they are read from a cache.

    Args:
        rows: [..., head].
        kind: Type of the cache.
        turned: Numbers that are rotated at once, where they divide the head.
    """
    grid = TYPES[kind]
    if not isinstance(grid, Grid):
        return rows
    found = rows.detach().float()
    turns = found.shape[-1] % turned == 0
    if turns:
        matrix = _hadamard(turned).to(found.device)
        found = (found.unflatten(-1, (-1, turned)) @ matrix).flatten(-2)
    found = fitted_values(found.flatten(0, -2).contiguous(), grid).view(found.shape)
    if turns:
        found = (found.unflatten(-1, (-1, turned)) @ matrix).flatten(-2)
    return found.to(rows.dtype)


@cache
def _hadamard(size: int) -> Tensor:
    """The symmetric orthogonal Hadamard matrix of Sylvester, float32 [size, size]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5

"""Simulates attention to keys and values as llama.cpp reads them from a quantised cache."""

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

_ROTATED = 64  # numbers of a head that llama.cpp rotates together; for keys, doubled while it divides the head


@contextmanager
def quantized_cache(model: Any, cache_types: tuple[str, str]) -> Iterator[None]:
    """Round keys and values as llama.cpp's cache stores them, within the context; float16 caches are left as they are.

    Each key and value is rounded on its own, after positions were encoded, so that passes over whole texts and single
    tokens agree. If 64 divides the head dim, llama.cpp rotates keys and values by a Hadamard matrix before it rounds
    them (ggml-org/llama.cpp pull 21038). It rotates queries and results too. This simulation rotates the rounded values
    back instead, which is equivalent. On a CPU, llama.cpp also rounds queries to 8 bits, as it does all activations;
    this is not simulated.

    Args:
        model: A transformers model, loaded or made by `models.loading`.
        cache_types: Types of keys and of values, from `CACHE_BYTES`.
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
    """Return the name under which transformers knows the attention to such a cache, after registering it."""
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
        # llama.cpp's "llama" graph stores jointly rotated numbers next to each other; see `row_order` for the weights.
        key = key.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    key = as_cached(key, keys, turned)
    if paired:
        key = key.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    value = as_cached(value, values, _ROTATED)
    return attention_forward(module, query, key, value, attention_mask, **options)


def as_cached(rows: Tensor, kind: str, turned: int) -> Tensor:
    """Return keys or values as they are read from a cache.

    Args:
        rows: [..., head].
        kind: Type of the cache.
        turned: Numbers of a head that are rotated together; if they do not divide the head, nothing is rotated.
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
    """Return Sylvester's symmetric orthogonal Hadamard matrix, float32 [size, size]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5

"""The shape of a decoder-only transformer: everything that memory and speed depend on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from autodistill.models.tensors import Role, TensorSpec, is_expert, kinds_of

MOST_LAYERS = 10_000
"""Highest number of layers; a config with more is a slip or an attack."""

MOST_OF_A_SIZE = 2**31 - 1
"""Highest value of any other size, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder-only transformer, without weights: everything that memory and speed depend on.

    Attributes:
        architecture: transformers' `model_type`, like "llama".
        layers, width, heads, kv_heads, head_dim, vocabulary, max_context: Sizes.
        ffn_width: Neurons of an FFN; the widest one's if layers differ.
        ffn_widths: Neurons of each layer's FFN if layers differ, else ().
        tied: Whether the head is the embedding table.
        tensors: Every stored tensor once, under transformers' name, without a tied head. In each layer of a mixture,
            the gates of all experts form one matrix, and so do their ups and their downs.
        window, windowed: Tokens that a sliding window sees (0 if there is none), and the layers that have one.
        experts, active_experts: Number of experts of a mixture, each of `ffn_width`, and number that each token uses; 0
            without a mixture.
        shared_experts: Number of further experts that every token uses.
        kv_widths: Numbers that each layer caches for a token's keys; as many are cached for its values. 0 if a layer
            has no keys and values of its own. () if all layers have what their heads imply.
        recurrent: 32-bit numbers that layers without keys and values keep for each sequence, summed over the layers.
        latent: Values that latent attention caches for a token and layer, shared by all heads; 0 if keys and values are
            cached.
        fields: Further fields of the config on which the shape depends, with their sizes, for families that have them.
        not_in_gguf: What the config requires but llama.cpp's graph of the architecture does not compute, in words.
        text_not_in_gguf: Why llama.cpp would not split text as the model's tokenizer does, if that is known, in words.
        process_bytes: Memory of llama.cpp's process outside its buffers, with the model's tokenizer, if it was measured
            on the serving machine; 0 if it is predicted.
    """

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocabulary: int
    max_context: int
    tied: bool
    tensors: Sequence[TensorSpec]
    window: int = 0
    windowed: tuple[int, ...] = ()
    experts: int = 0
    active_experts: int = 0
    shared_experts: int = 0
    kv_widths: tuple[int, ...] = ()
    recurrent: int = 0
    latent: int = 0
    fields: tuple[tuple[str, int], ...] = ()
    not_in_gguf: str = ""
    text_not_in_gguf: str = ""
    process_bytes: int = 0
    ffn_widths: tuple[int, ...] = ()

    @property
    def ffn_by_layer(self) -> tuple[int, ...]:
        """Neurons of each layer's FFN, whether they differ or not."""
        return self.ffn_widths or (self.ffn_width,) * self.layers

    @property
    def windowed_layers(self) -> int:
        """Number of layers with a sliding window."""
        return len(self.windowed)

    @cached_property
    def parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        return sum(count * math.prod(tensor.shape) for tensor, count in self.kinds)

    @cached_property
    def kinds(self) -> tuple[tuple[TensorSpec, int], ...]:
        """Return one tensor of each group that differs only in names, with the size of the group.

        Experts' tensors are never grouped with others.
        """
        counts: Counter[tuple[Role, tuple[int, ...], bool, int, bool]] = Counter()
        first: dict[tuple[Role, tuple[int, ...], bool, int, bool], TensorSpec] = {}
        for tensor, count in kinds_of(self.tensors):
            key = (tensor.role, tensor.shape, tensor.more_bits, tensor.run, is_expert(tensor.name))
            counts[key] += count
            first.setdefault(key, tensor)
        return tuple((first[key], count) for key, count in counts.items())

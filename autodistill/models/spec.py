"""The shape of a decoder-only transformer: everything that memory and speed depend on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from autodistill.models.tensors import Role, TensorSpec, is_expert, kinds_of

MOST_LAYERS = 10_000
"""Beyond it a config is a slip or an attack, and not a model."""

MOST_OF_A_SIZE = 2**31 - 1
"""The same of any other size."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder-only transformer, without weights: everything that memory and speed depend on.

    Attributes:
        architecture: transformers' `model_type`, like "llama".
        layers, width, heads, kv_heads, head_dim, vocabulary, max_context: Sizes.
        ffn_width: Neurons of an FFN; where layers differ, of the widest.
        ffn_widths: Of each layer, where they differ; else ().
        tied: Whether the head is the embedding table.
        tensors: Every stored tensor once, under transformers' name; a tied head is not among them. The experts' share
            of a mixture is one matrix each of gates, ups and downs in a layer.
        window, windowed: Tokens that a sliding window sees, 0 where there is none, and the layers that have one.
        experts, active_experts: Of a mixture of experts, each of `ffn_width`, and those that a token takes; 0 where
            there is one FFN.
        shared_experts: Those beside them that every token takes.
        kv_widths: Numbers of keys, and as many of values, that each layer caches of a token, 0 where it has none of its
            own; () where all have as many as their heads say.
        recurrent: Numbers in 32 bits that layers without keys and values keep of each sequence, all layers together.
        latent: Values of a token and layer that latent attention caches for all heads; 0 where keys and values are.
        not_in_gguf: What the config asks for that llama.cpp's graph of the architecture does not compute, in words.
        text_not_in_gguf: Why llama.cpp would not cut text as the model's tokenizer does, where that is known, in words.
        process_bytes: What llama.cpp's process takes beside its buffers with the model's tokenizer, where that was
            measured on the machine that serves it; 0 where it is predicted.
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
        """Number of weights, a tied embedding counted once."""
        return sum(count * math.prod(tensor.shape) for tensor, count in self.kinds)

    @cached_property
    def kinds(self) -> tuple[tuple[TensorSpec, int], ...]:
        """Return one tensor of each group that differs only in the names, with the size of the group.

        Experts' are apart from others.
        """
        counts: Counter[tuple[Role, tuple[int, ...], bool, bool]] = Counter()
        first: dict[tuple[Role, tuple[int, ...], bool, bool], TensorSpec] = {}
        for tensor, count in kinds_of(self.tensors):
            key = (tensor.role, tensor.shape, tensor.more_bits, is_expert(tensor.name))
            counts[key] += count
            first.setdefault(key, tensor)
        return tuple((first[key], count) for key, count in counts.items())

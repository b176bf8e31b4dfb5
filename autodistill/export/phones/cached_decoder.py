"""A student as a torch module that reads tokens after those in a KV cache, for runtimes with fixed shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodistill.export.graphs.onnx_decoder import activation_of
from autodistill.models.families import get_family
from autodistill.models.llama_cpp_graphs import FULL, SLIDING
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.grids import Floats

Update: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes a cache [1, heads, context, head dim], its new part [1, heads, tokens, head dim] and the position of the
first new token, an int [1]. Returns the cache with the new part."""

_UNSEEN = -1e30  # added to the scores of tokens that are not visible


class _Read(NamedTuple):
    """Inputs shared by all layers: the position of the first token, and masks and rotations by kind of layer.

    Attributes:
        start: int [1].
        masks: Values added to scores, [tokens, context].
        turns: Cosine and sine of every position, [tokens, rotated channels / 2].
    """

    start: Tensor
    masks: Mapping[str, Tensor]
    turns: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def zero(self) -> Tensor:
        """A zero that no converter recognises as a constant: the first token sees the first position."""
        return self.masks[FULL][0, 0]


class CachedDecoder(nn.Module):
    """Reads the next tokens, and returns their logits and the extended cache.

    Query heads that share keys are stacked as rows of one product with these keys. litert-torch 0.10 wrongly converts
    keys that are repeated for each head and then transposed.

    Args:
        weights: float32 values of every stored tensor of the model, by transformers' name.
        spec: Shape of the model.
        config: transformers' config.
        rotary: By kind of layer, the frequencies, float32 [rotated channels / 2], and the factor of sine and cosine.
        context: Number of tokens that the cache can hold.
        update: Writes into the cache.

    Attributes:
        weights, context: The arguments.
    """

    def __init__(
        self,
        weights: Mapping[str, Floats],
        spec: ModelSpec,
        config: Mapping[str, Any],
        rotary: Mapping[str, tuple[Floats, float]],
        context: int,
        update: Update,
    ) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self._spec, self._config, self.context, self._update = spec, config, context, update
        self.weights, self._family = weights, get_family(spec.architecture)
        for name, values in weights.items():
            self.register_parameter(_mangled(name), nn.Parameter(torch.from_numpy(values), requires_grad=False))
        for kind, (frequencies, _) in rotary.items():
            self.register_buffer(f"rotary_{kind}", torch.from_numpy(frequencies), persistent=False)
        self._factors = {kind: factor for kind, (_, factor) in rotary.items()}
        self._rotated = 2 * len(next(iter(rotary.values()))[0])
        self._activated = ACT2FN[activation_of(config)]
        self._eps = float(
            config.get("layer_norm_eps", 1e-5) if self._family.norm_bias else config.get("rms_norm_eps", 1e-6)
        )
        scalar = config.get("query_pre_attn_scalar", 256) if spec.architecture == "gemma3_text" else spec.head_dim
        self._scale = float(scalar) ** -0.5

    @property
    def empty(self) -> list[Tensor]:
        """An empty cache: each layer's keys, then its values, float32 [1, heads, context, head dim]."""
        shape = (1, self._spec.kv_heads, self.context, self._spec.head_dim)
        return [torch.zeros(shape) for _ in range(2 * self._spec.layers)]

    def forward(self, tokens: Tensor, start: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Read the tokens that follow those in the cache.

        Args:
            tokens: int [1, tokens].
            start: int [1], number of tokens in the cache. Later positions of the cache are ignored.
            cache: In the form of `empty`.

        Returns:
            Logits [1, tokens, vocabulary], and the cache extended with these tokens.
        """
        spec, body = self._spec, self._family.body
        places = start + torch.arange(tokens.shape[1], dtype=start.dtype)
        numbers = torch.arange(self.context, dtype=start.dtype)[None]
        seen = numbers <= places[:, None]
        masks = {FULL: torch.where(seen, 0.0, _UNSEEN)}
        if spec.window:
            masks[SLIDING] = torch.where(seen & (numbers > places[:, None] - spec.window), 0.0, _UNSEEN)
        read = _Read(start, masks, {kind: self._turn(kind, places) for kind in self._factors})
        hidden = functional.embedding(tokens, self._weight(f"{body}.{self._family.embedding}.weight"))
        if self._family.scaled_embeddings:
            hidden = hidden * math.sqrt(spec.width)
        longer: list[Tensor] = []
        for layer in range(spec.layers):
            hidden, *own = self._block(layer, hidden, cache[2 * layer], cache[2 * layer + 1], read)
            longer += own
        hidden = self._norm(f"{body}.{self._family.final_norm}", hidden, read)
        head = f"{body}.{self._family.embedding}.weight" if spec.tied else "lm_head.weight"
        return functional.linear(hidden, self._weight(head)), longer

    def _block(
        self, layer: int, hidden: Tensor, keys: Tensor, values: Tensor, read: _Read
    ) -> tuple[Tensor, Tensor, Tensor]:
        prefix = f"{self._family.body}.layers.{layer}"

        def norm(name: str, inputs: Tensor) -> Tensor:
            return self._norm(f"{prefix}.{name}", inputs, read)

        attended, keys, values = self._attention(layer, norm("input_layernorm", hidden), keys, values, read)
        if self._family.fused and self._config.get("use_parallel_residual", True):
            beside = self._ffn(prefix, norm("post_attention_layernorm", hidden))
            return beside + attended + hidden, keys, values
        if "pre_feedforward_layernorm" in self._family.norms:
            hidden = hidden + norm("post_attention_layernorm", attended)
            inner = self._ffn(prefix, norm("pre_feedforward_layernorm", hidden))
            return hidden + norm("post_feedforward_layernorm", inner), keys, values
        hidden = hidden + attended
        return hidden + self._ffn(prefix, norm("post_attention_layernorm", hidden)), keys, values

    def _attention(
        self, layer: int, inputs: Tensor, keys: Tensor, values: Tensor, read: _Read
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec, length, prefix = self._spec, inputs.shape[1], f"{self._family.body}.layers.{layer}"
        kind = SLIDING if layer in spec.windowed else FULL
        turn = read.turns.get(kind, read.turns[FULL])
        if self._family.fused:
            mixed = self._linear(f"{prefix}.attention.query_key_value", inputs)
            apart = mixed.reshape(1, length, spec.heads, 3 * spec.head_dim).transpose(1, 2)
            queries, new_keys, new_values = apart.split(spec.head_dim, dim=-1)
            last = f"{prefix}.attention.dense"
        else:
            queries, new_keys, new_values = (
                self._heads(f"{prefix}.self_attn.{part}", inputs, count, read)
                for part, count in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
            )
            last = f"{prefix}.self_attn.o_proj"
        keys = self._update(keys, self._turned(new_keys, turn), read.start)
        values = self._update(values, new_values, read.start)
        groups = spec.heads // spec.kv_heads
        rows = (self._turned(queries, turn) * self._scale).reshape(1, spec.kv_heads, groups * length, spec.head_dim)
        scores = torch.matmul(rows, keys.transpose(2, 3)) + read.masks[kind].repeat(groups, 1)
        # For a reshape in one step, torch.export asks of the number of tokens what it cannot prove for all of them.
        found = torch.matmul(scores.softmax(-1), values).unflatten(2, (groups, length)).flatten(1, 2)
        flat = found.transpose(1, 2).reshape(1, length, spec.heads * spec.head_dim)
        return self._linear(last, flat), keys, values

    def _heads(self, name: str, inputs: Tensor, count: int, read: _Read) -> Tensor:
        """Return queries, keys or values, [1, heads, tokens, head dim]."""
        apart = self._linear(f"{name}_proj", inputs).reshape(1, inputs.shape[1], count, self._spec.head_dim)
        if hasattr(self, _mangled(f"{name}_norm.weight")):
            apart = self._norm(f"{name}_norm", apart, read)
        return apart.transpose(1, 2)

    def _ffn(self, prefix: str, inputs: Tensor) -> Tensor:
        if not self._family.gated:
            inner = self._activated(self._linear(f"{prefix}.mlp.dense_h_to_4h", inputs))
            return self._linear(f"{prefix}.mlp.dense_4h_to_h", inner)
        gate = self._activated(self._linear(f"{prefix}.mlp.gate_proj", inputs))
        return self._linear(f"{prefix}.mlp.down_proj", gate * self._linear(f"{prefix}.mlp.up_proj", inputs))

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))

    def _norm(self, name: str, inputs: Tensor, read: _Read) -> Tensor:
        factors, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        if self._family.norm_bias:
            normed = functional.layer_norm(inputs, factors.shape, eps=self._eps)
            # litert-torch would fold a bias into the matrix behind it, and neither could be read back.
            return normed * factors + (bias + read.zero)
        normed = inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + self._eps)
        # The stored factors are the true ones minus 1.
        return normed * factors + normed if self._family.norm_role is Role.NORM_ABOVE_ONE else normed * factors

    def _turn(self, kind: str, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of every position, [tokens, rotated channels / 2]."""
        angles = places[:, None].to(torch.float32) * getattr(self, f"rotary_{kind}")[None]
        return angles.cos() * self._factors[kind], angles.sin() * self._factors[kind]

    def _turned(self, heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Return heads [1, heads, tokens, head dim] with their first channels rotated by their position."""
        cosine, sine = turn
        half, rotated = self._rotated // 2, self._rotated
        first, second = heads[..., :half], heads[..., half:rotated]
        parts = [first * cosine - second * sine, second * cosine + first * sine]
        return torch.cat([*parts, heads[..., rotated:]] if rotated < heads.shape[-1] else parts, dim=-1)

    def _weight(self, name: str) -> Any:
        """Return a stored tensor, or None if the model does not have it."""
        return getattr(self, _mangled(name), None)


def _mangled(name: str) -> str:
    """Return a tensor's name in a form that torch allows for a parameter."""
    return name.replace(".", "__")

"""The supported model families: the names and axes of their tensors, and the special rules of each.

transformers' modules are the reference for names and shapes. Estimates, pruning and exports all read this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

from autodistill.errors import InputError
from autodistill.models.tensors import Role, is_expert, takes_more_bits


class Axis(StrEnum):
    """What a dimension of a tensor counts."""

    VOCABULARY = "vocabulary"
    WIDTH = "width"  # channels of the residual stream
    FFN = "ffn"  # neurons
    QUERIES = "queries"  # heads x head dim
    KEYS = "keys"  # key-value heads x head dim
    FUSED = "fused"  # heads x (query, key, value) x head dim
    HEAD = "head"  # head dim


Condition: TypeAlias = bool | tuple[str, bool]
"""Whether a tensor exists: always, never, or if a field of the config is true (its name, and its default)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer in a block: its name, the meaning of its outputs and inputs, and whether it has a bias."""

    name: str
    outputs: Axis
    inputs: Axis
    bias: Condition = False


Place: TypeAlias = tuple[Role, tuple[Axis, ...]]


@dataclass(frozen=True, kw_only=True)
class Names:
    """What must be known of any family that is trained: names.

    Attributes:
        body: Name of the model below the head; its blocks are `layers`.
        embedding, final_norm: Names in the body.
        stored_head: Name of an untied head in files; transformers' modules call it lm_head in every family.
        gguf: llama.cpp's name of the graph that computes this family.
        blocks_alone: Whether a block computes from the states before it alone. Those of Gemma 4 also take rows of a
            table of tokens, or keys and values of an earlier block.
    """

    body: str = "model"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    stored_head: str = "lm_head"
    gguf: str
    blocks_alone: bool = True

    def layer_part(self, name: str) -> tuple[int, str] | None:
        """Return the block of the tensor `name` and its name within the block, or None if it is in no block."""
        return _layer_part(self.body, name)

    def in_ffn(self, name: str) -> bool:
        """Return whether the matrix `name` belongs to the FFN of a block."""
        found = self.layer_part(name)
        return found is not None and found[1].startswith("mlp.")

    def takes_low_rank(self, name: str) -> bool:
        """Return whether low-rank changes are made of the matrix `name`: whether it is in a block."""
        return self.layer_part(name) is not None


@dataclass(frozen=True, kw_only=True)
class WholeFamily(Names):
    """The description of a family whose models are trained, stored and written, but never cut.

    Attributes:
        fields: Fields of its configs on which the shape depends beyond what all have; all are numbers.
        by_head: The linear layers of a block that have one output for each head. Low-rank changes are not made of them:
            they would be as large.
        vocabularies: Those of `fields` that give the number of tokens of a further table, beside the embedding table.
        why: Why its models are never cut, in words.
    """

    fields: tuple[str, ...]
    by_head: tuple[str, ...] = ()
    vocabularies: tuple[str, ...] = ()
    why: str = "its layers differ in kind"

    def takes_low_rank(self, name: str) -> bool:
        """Return as `Names.takes_low_rank`, but False for `by_head`, and for experts, which are no linear layers."""
        found = self.layer_part(name)
        return found is not None and found[1].removesuffix(".weight") not in self.by_head and not is_expert(name)


@dataclass(frozen=True, kw_only=True)
class Family(Names):
    """The description of a family whose layers are alike, so that models can also be cut.

    Attributes:
        linears: The linear layers of a block.
        norms: The norms of a block over the width.
        head_norms: The norms of a block over each head's queries and keys.
        norm_bias: Whether norms have a bias, as LayerNorm has.
        heads_fill_width: Whether heads x head dim equals the width by definition, so that both shrink together.
        heads_divide_width: Whether transformers requires that the number of heads divides the width.
        head_dim: The head dim if a config gives none; 0 stands for width / heads.
        tied: Whether the head is the embedding table if a config does not say.
        scaled_embeddings: Whether the model multiplies embeddings by the square root of the width.
        norm_role: Whether norms multiply by their weights, or by their weights plus 1.
        windows: Default sliding window in tokens, and default n if every n-th layer has no window.
        late_windows: Whether a config's window counts only if `use_sliding_window` is true. If such a config does not
            give the kind of each layer, layers from `max_window_layers` on have the window.
        gguf_names: GGUF's names of a block's tensors that differ from the usual ones.
        off: Fields of a config that must be false or absent, because what they turn on is not supported.
    """

    linears: tuple[Linear, ...]
    norms: tuple[str, ...]
    head_norms: tuple[str, ...] = ()
    norm_bias: bool = False
    heads_fill_width: bool = False
    heads_divide_width: bool = False
    head_dim: int = 0
    tied: bool = False
    scaled_embeddings: bool = False
    norm_role: Role = Role.NORM
    windows: tuple[int, int] = (0, 0)
    late_windows: bool = False
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    off: tuple[str, ...] = ()

    def tensors(self, config: Mapping[str, Any], layers: int, tied: bool) -> Iterator[tuple[str, Role]]:
        """Yield the name and role of every stored tensor of a model; a tied embedding table appears once."""

        def there(condition: Condition) -> bool:
            return condition if isinstance(condition, bool) else bool(config.get(*condition))

        yield f"{self.body}.{self.embedding}.weight", Role.EMBEDDING
        for index in range(layers):
            block = f"{self.body}.layers.{index}"
            for linear in self.linears:
                yield f"{block}.{linear.name}.weight", Role.LINEAR
                if there(linear.bias):
                    yield f"{block}.{linear.name}.bias", Role.BIAS
            for norm in (*self.head_norms, *self.norms):
                yield from self._norm(f"{block}.{norm}")
        yield from self._norm(f"{self.body}.{self.final_norm}")
        if not tied:
            yield "lm_head.weight", Role.HEAD

    def more_bits(self, name: str, layers: int, tied: bool) -> bool:
        """Return whether llama.cpp's mixtures of types give the tensor `name` more bits than most matrices.

        The head gets more bits, or the table that is tied to it. In some layers, the matrix that makes attention's
        values also gets more, even if it makes queries and keys too. So does the last matrix of the FFN.
        """
        if (found := self.layer_part(name)) is None:
            return name == f"{self.body}.{self.embedding}.weight" if tied else name == "lm_head.weight"
        return found[1] in self._sensitive and takes_more_bits(found[0], layers)

    @cached_property
    def _sensitive(self) -> frozenset[str]:
        return frozenset(f"{part}.weight" for part, theirs in self._gguf_parts.items() if theirs in _SENSITIVE)

    @cached_property
    def conditions(self) -> tuple[tuple[str, bool], ...]:
        """Return the config fields on which `tensors` depends, with their defaults."""
        return tuple(dict.fromkeys(one.bias for one in self.linears if not isinstance(one.bias, bool)))

    def _norm(self, name: str) -> Iterator[tuple[str, Role]]:
        yield f"{name}.weight", self.norm_role
        if self.norm_bias:
            yield f"{name}.bias", Role.BIAS

    def axes(self, name: str) -> tuple[Axis, ...]:
        """Return what each dimension of the tensor `name` counts."""
        found = self.layer_part(name)
        return self._axes[name if found is None else found[1]]

    @cached_property
    def _axes(self) -> dict[str, tuple[Axis, ...]]:
        table = (Axis.VOCABULARY, Axis.WIDTH)
        axes: dict[str, tuple[Axis, ...]] = {f"{self.body}.{self.embedding}.weight": table, "lm_head.weight": table}
        for linear in self.linears:
            axes[f"{linear.name}.weight"] = (linear.outputs, linear.inputs)
            axes[f"{linear.name}.bias"] = (linear.outputs,)
        widths = dict.fromkeys((*self.norms, f"{self.body}.{self.final_norm}"), Axis.WIDTH)
        for name, axis in (widths | dict.fromkeys(self.head_norms, Axis.HEAD)).items():
            axes[f"{name}.weight"] = axes[f"{name}.bias"] = (axis,)
        return axes

    def gguf_name(self, name: str) -> str:
        """Return GGUF's name of the tensor `name`."""
        stem, _, suffix = name.rpartition(".")
        if (found := self.layer_part(name)) is None:
            return f"{self._gguf_tables[stem]}.{suffix}"
        part = found[1].removesuffix(f".{suffix}")
        return f"blk.{found[0]}.{self._gguf_parts[part]}.{suffix}"

    def from_gguf_name(self, name: str) -> str | None:
        """Return the tensor that GGUF calls `name`, or None if this family has none."""
        stem, _, suffix = name.rpartition(".")
        for own, theirs in self._gguf_tables.items():
            if theirs == stem:
                return f"{own}.{suffix}"
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = next((own for own, theirs in self._gguf_parts.items() if found and theirs == found[2]), None)
        return f"{self.body}.layers.{found[1]}.{part}.{suffix}" if found and part else None

    @cached_property
    def _gguf_tables(self) -> dict[str, str]:
        names = (f"{self.body}.{self.embedding}", f"{self.body}.{self.final_norm}", "lm_head")
        return dict(zip(names, ("token_embd", "output_norm", "output"), strict=True))

    @cached_property
    def _gguf_parts(self) -> dict[str, str]:
        names = _GGUF_NAMES | dict(self.gguf_names)
        return {part: names[part] for part in (*(one.name for one in self.linears), *self.norms, *self.head_norms)}

    @cached_property
    def gated(self) -> bool:
        """Whether the FFN multiplies the outputs of two matrices, which both read its inputs."""
        return sum(linear.outputs is Axis.FFN for linear in self.linears) > 1

    @cached_property
    def fused(self) -> bool:
        """Whether one matrix makes queries, keys and values."""
        return any(linear.outputs is Axis.FUSED for linear in self.linears)

    def reading(self, axis: Axis) -> str:
        """Return the name of the linear layer that reads `axis`: the last one of attention, or of the FFN."""
        return next(linear.name for linear in self.linears if linear.inputs is axis)


def _attention(qkv_bias: Condition, output_bias: Condition) -> tuple[Linear, ...]:
    return (
        Linear("self_attn.q_proj", Axis.QUERIES, Axis.WIDTH, qkv_bias),
        Linear("self_attn.k_proj", Axis.KEYS, Axis.WIDTH, qkv_bias),
        Linear("self_attn.v_proj", Axis.KEYS, Axis.WIDTH, qkv_bias),
        Linear("self_attn.o_proj", Axis.WIDTH, Axis.QUERIES, output_bias),
    )


def _gated(bias: Condition) -> tuple[Linear, ...]:
    return (
        Linear("mlp.gate_proj", Axis.FFN, Axis.WIDTH, bias),
        Linear("mlp.up_proj", Axis.FFN, Axis.WIDTH, bias),
        Linear("mlp.down_proj", Axis.WIDTH, Axis.FFN, bias),
    )


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SENSITIVE = ("attn_v", "attn_qkv", "ffn_down")  # GGUF's names, by llama.cpp's rule
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_ATTENTION_BIAS = ("attention_bias", False)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        linears=_attention(_ATTENTION_BIAS, _ATTENTION_BIAS) + _gated(("mlp_bias", False)),
        norms=_PRE_NORMS,
        heads_divide_width=True,
        gguf="llama",
    ),
    # llama.cpp's own converter writes Mistral as "llama": it is the same graph.
    "mistral": Family(linears=_attention(False, False) + _gated(False), norms=_PRE_NORMS, gguf="llama"),
    "qwen2": Family(
        linears=_attention(True, False) + _gated(False),
        norms=_PRE_NORMS,
        windows=(4096, 0),
        late_windows=True,
        gguf="qwen2",
    ),
    "qwen3": Family(
        linears=_attention(_ATTENTION_BIAS, _ATTENTION_BIAS) + _gated(False),
        norms=_PRE_NORMS,
        head_norms=_QK_NORMS,
        head_dim=128,
        windows=(4096, 0),
        late_windows=True,
        gguf="qwen3",
    ),
    "gemma3_text": Family(
        linears=_attention(_ATTENTION_BIAS, _ATTENTION_BIAS) + _gated(False),
        norms=(*_PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        head_norms=_QK_NORMS,
        heads_divide_width=True,
        head_dim=256,
        tied=True,
        scaled_embeddings=True,
        norm_role=Role.NORM_ABOVE_ONE,
        windows=(4096, 6),
        gguf="gemma3",
        gguf_names={
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        off=("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
    ),
    "gpt_neox": Family(
        linears=(
            Linear("attention.query_key_value", Axis.FUSED, Axis.WIDTH, ("attention_bias", True)),
            Linear("attention.dense", Axis.WIDTH, Axis.QUERIES, ("attention_bias", True)),
            Linear("mlp.dense_h_to_4h", Axis.FFN, Axis.WIDTH, True),
            Linear("mlp.dense_4h_to_h", Axis.WIDTH, Axis.FFN, True),
        ),
        norms=_PRE_NORMS,
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        stored_head="embed_out",
        norm_bias=True,
        heads_fill_width=True,
        gguf="gptneox",
        gguf_names={
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
    ),
}
"""Families by transformers' `model_type`."""

WHOLE_FAMILIES: Mapping[str, WholeFamily] = {
    "qwen3_5_text": WholeFamily(
        gguf="qwen35",
        fields=(
            *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
            "linear_conv_kernel_dim",
        ),
        by_head=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    ),
    "gemma4_text": WholeFamily(
        gguf="gemma4",
        fields=(
            *("head_dim", "num_key_value_heads", "global_head_dim", "num_global_key_value_heads", "intermediate_size"),
            *("attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input"),
            "vocab_size_per_layer_input",
        ),
        vocabularies=("vocab_size_per_layer_input",),
        blocks_alone=False,
    ),
    "qwen3_moe": WholeFamily(
        gguf="qwen3moe",
        fields=("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
        why="it is a mixture of experts",
    ),
}
"""Families that are trained whole, by transformers' `model_type`; `models/whole/` describes their models."""

TRAINED: Mapping[str, Names] = {**FAMILIES, **WHOLE_FAMILIES}
"""All families that are trained, by transformers' `model_type`."""

GGUF_BY_LAYER: Mapping[str, str] = {"llama": "deci"}
"""llama.cpp's graphs that allow sizes of each layer's own, by the graph that computes the same with uniform sizes."""

GGUF_MIXTURES: Mapping[str, tuple[str, str]] = {
    "mixtral": ("llama", "llama"),
    "qwen3_moe": ("qwen3", "qwen3moe"),
    "olmoe": ("qwen3", "olmoe"),
}
"""Mixtures of experts that can be written to GGUF: the family that names the tensors without experts, and the graph."""

GGUF_WHOLE: Mapping[str, str] = {
    **{name: family.gguf for name, family in WHOLE_FAMILIES.items()},
}
"""Models that are trained whole, or only written to GGUF, and their graphs; mixtures that are not trained are apart."""

_GRAPHS = {family.gguf: name for name, family in reversed(list(FAMILIES.items()))}

GGUF_FAMILIES: Mapping[str, str] = {
    **dict(reversed(list(_GRAPHS.items()))),
    **{by_layer: _GRAPHS[graph] for graph, by_layer in GGUF_BY_LAYER.items()},
}
"""transformers' `model_type` by the name of llama.cpp's graph; the first family if a graph computes several."""


@lru_cache(2**14)  # called for each tensor of each shape that is considered
def _layer_part(body: str, name: str) -> tuple[int, str] | None:
    found = re.fullmatch(rf"{body}\.layers\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def graph_named(architecture: str) -> str:
    """Return the name of llama.cpp's graph of an architecture whose layers all have the same sizes; "" if unknown."""
    if architecture in GGUF_MIXTURES:
        return GGUF_MIXTURES[architecture][1]
    return FAMILIES[architecture].gguf if architecture in FAMILIES else GGUF_WHOLE.get(architecture, "")


def names_of(architecture: str) -> Names:
    """Return the names of a family that is trained, whether or not its models can be cut.

    Raises:
        InputError: The architecture is not supported; the message lists those that are.
    """
    if architecture not in TRAINED:
        raise InputError(f"the architecture {architecture[:60]!r} is not supported; these are: {', '.join(TRAINED)}")
    return TRAINED[architecture]


def get_family(architecture: str) -> Family:
    """Look up a family whose models can be cut, by transformers' `model_type`.

    Raises:
        InputError: The architecture is not supported, or only whole; the message lists those that are.
    """
    if architecture in WHOLE_FAMILIES:
        raise InputError(f"a {architecture} is trained whole, and this works for {', '.join(FAMILIES)} alone")
    if architecture not in FAMILIES:
        raise InputError(f"the architecture {architecture[:60]!r} is not supported; these are: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]

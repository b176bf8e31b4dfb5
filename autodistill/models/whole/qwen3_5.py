"""The shape of Qwen3.5's text model without experts, from its config; transformers' modules are the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from autodistill.errors import InputError
from autodistill.models.config_fields import FFN, size_of, value_of
from autodistill.models.llama_cpp_graphs import FULL
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, takes_more_bits

RECURRENT = "linear_attention"
"""transformers' name of the layers that keep a recurrent state instead of keys and values."""

_INTERVAL = 4  # transformers' default: every fourth layer has attention
_SIZES = {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128, "kernel": 4}
_FIELDS = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}

_VALUES = ("self_attn.v_proj.weight", "linear_attn.in_proj_qkv.weight")  # the matrices that make values


def describe_qwen3_5(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a model from its config; layers without keys and values are those of width 0 in `kv_widths`.

    Args:
        config: A config with the usual types (`check_config`).

    Raises:
        InputError: A size is missing or is no positive number, heads do not divide each other, or a layer is of no
            known kind.
    """
    state = {name: size_of(config, field, _SIZES[name]) for name, field in _FIELDS.items()}
    kinds, heads = layer_kinds(config), size_of(config, "num_attention_heads", 16)
    keys = size_of(config, "num_key_value_heads", 4)
    for some, others, of in ((heads, keys, ""), (state["value_heads"], state["key_heads"], " of a recurrent state")):
        if some % others:
            raise InputError(f"the model's config has {others} heads of keys{of}, which do not divide {some} heads")
    spec = ModelSpec(
        architecture=str(config["model_type"]),
        layers=len(kinds),
        width=size_of(config, "hidden_size", 4096),
        heads=heads,
        kv_heads=keys,
        head_dim=size_of(config, "head_dim", 256),
        ffn_width=size_of(config, FFN, 12288),
        vocabulary=size_of(config, "vocab_size", 248320),
        max_context=size_of(config, "max_position_embeddings", 32768),
        tied=bool(config.get("tie_word_embeddings", False)),
        tensors=(),
        fields=tuple((field, state[name]) for name, field in _FIELDS.items()),
    )
    if recurrent := kinds.count(RECURRENT):
        widths = tuple(0 if kind == RECURRENT else keys * spec.head_dim for kind in kinds)
        spec = replace(spec, kv_widths=widths, recurrent=recurrent * _state_size(state))
    known = config.get("not_in_gguf")
    spec = replace(spec, not_in_gguf=not_computed(config, state) if known is None else str(known))
    return replace(spec, tensors=tuple(_tensors(spec, kinds, state, bool(config.get("attention_bias")))))


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """Return the kind of each layer, as transformers defines it.

    Raises:
        InputError: The number of layers is missing, another number of kinds is given, or a kind is unknown.
    """
    layers = size_of(config, "num_hidden_layers", 32)
    every = size_of(config, "full_attention_interval", _INTERVAL)
    usual = [RECURRENT if (layer + 1) % every else FULL for layer in range(layers)]
    kinds = list(value_of(config, "layer_types", usual))
    if len(kinds) != layers or not {*kinds} <= {FULL, RECURRENT}:
        raise InputError(
            f"the model's config must give layer_types for each of its {layers} layers, {FULL} or {RECURRENT}: check it"
        )
    return kinds


def not_computed(config: Mapping[str, Any], state: Mapping[str, int]) -> str:
    """Return what a config requires but llama.cpp's graph does not compute, or "".

    Args:
        config: transformers' config.
        state: The sizes of a recurrent state, by the names of `describe_qwen3_5`.
    """
    kinds = layer_kinds(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config.get("attention_bias"):
        return "llama.cpp has no biases for qwen35"
    if (activation := value_of(config, "hidden_act", "silu")) != "silu":
        return f"llama.cpp computes qwen35 with silu, not with {activation!r}"
    if kind != "default":
        return f"the rotary scaling {kind!r} is none that llama.cpp computes for qwen35"
    if not full_interval(kinds):
        return "llama.cpp gives every n-th layer of qwen35 full attention, and all others a recurrent state"
    if state["key_dim"] != state["value_dim"]:
        sizes = f"{state['key_dim']} and {state['value_dim']}"
        return f"llama.cpp has one size of heads for keys and values of a recurrent state, and these have {sizes}"
    return ""


def full_interval(kinds: list[str]) -> int:
    """Return n if every n-th layer has full attention and all others have not, or 0 if there is no such n."""
    places = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    every = places[0] + 1 if places else 0
    return every if places == list(range(every - 1, len(kinds), every or 1)) else 0


def _state_size(state: Mapping[str, int]) -> int:
    """Return the numbers that a layer keeps for a sequence.

    These are products of keys and values of each head, and the inputs that its convolution still needs.
    """
    keys, values = (state[f"{of}_heads"] * state[f"{of}_dim"] for of in ("key", "value"))
    return values * state["key_dim"] + (state["kernel"] - 1) * (2 * keys + values)


def _tensors(spec: ModelSpec, kinds: list[str], state: Mapping[str, int], biases: bool) -> Iterator[TensorSpec]:
    """Yield the tensors in the order of transformers' modules."""
    width, ffn = spec.width, spec.ffn_width
    yield TensorSpec(
        name="model.embed_tokens.weight",
        role=Role.EMBEDDING,
        shape=(spec.vocabulary, width),
        more_bits=spec.tied,
    )
    for layer, kind in enumerate(kinds):
        block = f"model.layers.{layer}"
        parts = _recurrent(width, state) if kind == RECURRENT else _attention(spec, biases)
        for name, role, shape in parts:
            yield TensorSpec(
                name=f"{block}.{name}",
                role=role,
                shape=shape,
                more_bits=name in _VALUES and takes_more_bits(layer, spec.layers),
                run=_run(state) if name == "linear_attn.out_proj.weight" else 0,
            )
        for name, shape in (("gate", (ffn, width)), ("up", (ffn, width)), ("down", (width, ffn))):
            yield TensorSpec(
                name=f"{block}.mlp.{name}_proj.weight",
                role=Role.LINEAR,
                shape=shape,
                more_bits=name == "down" and takes_more_bits(layer, spec.layers),
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(name=f"{block}.{name}.weight", role=Role.NORM, shape=(width,))
    yield TensorSpec(name="model.norm.weight", role=Role.NORM, shape=(width,))
    if not spec.tied:
        yield TensorSpec(name="lm_head.weight", role=Role.HEAD, shape=(spec.vocabulary, width), more_bits=True)


_Part = tuple[str, Role, tuple[int, ...]]


def _recurrent(width: int, state: Mapping[str, int]) -> Iterator[_Part]:
    heads = state["value_heads"]
    values = heads * state["value_dim"]
    mixed = 2 * state["key_heads"] * state["key_dim"] + values
    yield "linear_attn.dt_bias", Role.BIAS, (heads,)
    yield "linear_attn.A_log", Role.NORM, (heads,)
    yield "linear_attn.conv1d.weight", Role.NORM, (mixed, 1, state["kernel"])
    yield "linear_attn.norm.weight", Role.NORM, (state["value_dim"],)
    yield "linear_attn.out_proj.weight", Role.LINEAR, (width, values)
    for name, rows in (("qkv", mixed), ("z", values), ("b", heads), ("a", heads)):
        yield f"linear_attn.in_proj_{name}.weight", Role.LINEAR, (rows, width)


def _attention(spec: ModelSpec, biases: bool) -> Iterator[_Part]:
    """Yield the tensors of attention, in which each head has a gate beside its query."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    matrices = {"q": (2 * queries, spec.width), "k": (keys, spec.width), "v": (keys, spec.width)}
    for name, shape in (*matrices.items(), ("o", (spec.width, queries))):
        yield f"self_attn.{name}_proj.weight", Role.LINEAR, shape
        if biases:
            yield f"self_attn.{name}_proj.bias", Role.BIAS, shape[:1]
    for name in ("q_norm", "k_norm"):
        yield f"self_attn.{name}.weight", Role.NORM, (spec.head_dim,)


def _run(state: Mapping[str, int]) -> int:
    """Return the columns that stay together where llama.cpp holds the heads of values in another order, else 0."""
    return 0 if state["key_heads"] == state["value_heads"] else state["value_dim"]

"""The shape of Gemma 4's text model without experts, from its config; transformers' modules are the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from autodistill.errors import InputError
from autodistill.models.config_fields import FFN, size_of, value_of
from autodistill.models.llama_cpp_graphs import FULL, SLIDING
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, takes_more_bits

_PERIOD = 6  # transformers' default: every sixth layer has full attention
_BY_LAYER = ("head_dim", "num_key_value_heads")  # what transformers lets layers of full attention have of their own
_ROTARY = {FULL: {"rope_type": "proportional"}, SLIDING: {"rope_type": "default"}}


class _Layer(NamedTuple):
    """What differs between layers.

    Attributes:
        head_dim, kv_heads: Sizes of its attention.
        ffn: Neurons of its FFN.
        cached: Whether it has keys and values of its own; otherwise it reads those of an earlier layer.
        valued: Whether a matrix makes its values; otherwise its keys are its values too.
    """

    head_dim: int
    kv_heads: int
    ffn: int
    cached: bool
    valued: bool


def describe_gemma4(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a model from its config.

    A size that differs between layers is the largest one. Layers without keys and values of their own are those of
    width 0 in `kv_widths`.

    Args:
        config: A config with the usual types (`check_config`).

    Raises:
        InputError: A size is missing or is no positive number, heads do not divide each other, layers of one kind
            differ, a layer is of no known kind or has no keys to read, or the model has experts or no order of tokens.
    """
    if config.get("enable_moe_block"):
        raise InputError("a Gemma 4 with experts (enable_moe_block) is not supported")
    if config.get("use_bidirectional_attention") == "all":
        raise InputError(
            "a Gemma 4 whose tokens see those behind them (use_bidirectional_attention: all) predicts no next token: "
            "not supported"
        )
    kinds, heads = _kinds(config), size_of(config, "num_attention_heads", 8)
    width, vocabulary = size_of(config, "hidden_size", 2304), size_of(config, "vocab_size", 262_144)
    fields = _fields(config, kinds, vocabulary)
    layers = _layers(fields, kinds)
    for layer in layers:
        if heads % layer.kv_heads:
            raise InputError(
                f"the model's config has {layer.kv_heads} heads of keys, which do not divide {heads} heads"
            )
    head_dim, kv_heads = max(layer.head_dim for layer in layers), max(layer.kv_heads for layer in layers)
    widths = tuple(layer.kv_heads * layer.head_dim if layer.cached else 0 for layer in layers)
    windowed = tuple(place for place, kind in enumerate(kinds) if kind == SLIDING)
    tied, known = bool(config.get("tie_word_embeddings", True)), config.get("not_in_gguf")
    shapes = _tensors(layers, vocabulary, width, heads, fields, tied=tied, biases=bool(config.get("attention_bias")))
    return ModelSpec(
        architecture=str(config["model_type"]),
        layers=len(layers),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=max(layer.ffn for layer in layers),
        vocabulary=vocabulary,
        max_context=size_of(config, "max_position_embeddings", 131_072),
        tied=tied,
        tensors=tuple(shapes),
        window=size_of(config, "sliding_window", 512) if windowed else 0,
        windowed=windowed,
        kv_widths=() if {*widths} == {kv_heads * head_dim} else widths,
        fields=tuple(fields.items()),
        not_in_gguf=_not_computed(config, kinds, fields, vocabulary) if known is None else str(known),
    )


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """Return the kind of each layer. transformers gives the last one full attention, whatever the config says."""
    layers = size_of(config, "num_hidden_layers", 30)
    usual = [SLIDING if (layer + 1) % _PERIOD else FULL for layer in range(layers)]
    kinds = [*list(value_of(config, "layer_types", usual))[:-1], FULL]
    if len(kinds) != layers or not {*kinds} <= {FULL, SLIDING}:
        raise InputError(
            f"the model's config must give layer_types for each of its {layers} layers, {FULL} or {SLIDING}: check it"
        )
    return kinds


def _fields(config: Mapping[str, Any], kinds: Sequence[str], vocabulary: int) -> dict[str, int]:
    """Return the fields of a config on which the shapes of single layers depend; a switch is 0 or 1.

    A config gives the sizes of full attention in `per_layer_config`, as transformers writes it, or in fields of their
    own, as the makers of the models do.
    """
    head_dim, kv_heads = size_of(config, "head_dim", 256), size_of(config, "num_key_value_heads", 4)
    equal, shared = bool(config.get("attention_k_eq_v")), size_of(config, "num_kv_shared_layers", 0, least=0)
    usual = (head_dim, kv_heads)
    if (given := config.get("per_layer_config")) is None:
        own = size_of(config, "global_head_dim", 512), size_of(config, "num_global_key_value_heads", kv_heads)
        by_kind = {SLIDING: usual, FULL: own if equal else (own[0], kv_heads)}
    else:
        by_kind = {SLIDING: usual, FULL: usual} | _by_kind(given, kinds, usual)
    if by_kind[FULL][1] != by_kind[SLIDING][1] and not equal:
        raise InputError(
            "the model's config gives full attention other heads of keys without attention_k_eq_v: not supported"
        )
    by_layer, first = size_of(config, "hidden_size_per_layer_input", 256, least=0), len(kinds) - shared
    if shared and (first < 1 or {*kinds[:first]} != {*kinds}):
        raise InputError(
            f"the model's config has {shared} layers that read the keys and values of earlier layers "
            f"(num_kv_shared_layers), and no earlier layer of each kind has any: check it"
        )
    return {
        "head_dim": by_kind[SLIDING][0],
        "num_key_value_heads": by_kind[SLIDING][1],
        "global_head_dim": by_kind[FULL][0],
        "num_global_key_value_heads": by_kind[FULL][1],
        FFN: size_of(config, FFN, 9216),
        "attention_k_eq_v": int(equal),
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": int(bool(config.get("use_double_wide_mlp"))),
        "hidden_size_per_layer_input": by_layer,
        "vocab_size_per_layer_input": size_of(config, "vocab_size_per_layer_input", 262_144)
        if by_layer
        else vocabulary,
    }


def _by_kind(
    given: Mapping[str, Mapping[str, int]], kinds: Sequence[str], usual: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    """Return the head dim and the heads of keys of each kind of layer that there is, from `per_layer_config`."""
    own = {int(layer): sizes for layer, sizes in given.items()}
    named = {name for sizes in own.values() for name in sizes}
    if not {*own} <= set(range(len(kinds))) or len(own) < len(given) or not named <= {*_BY_LAYER}:
        raise InputError(
            f"the model's config must give per_layer_config for some of its {len(kinds)} layers, counted from 0 and "
            f"each once, with {' and '.join(_BY_LAYER)} alone: check it"
        )
    found: dict[str, tuple[int, int]] = {}
    for layer, kind in enumerate(kinds):
        head_dim, kv_heads = (
            size_of(own.get(layer, {}), name, size) for name, size in zip(_BY_LAYER, usual, strict=True)
        )
        if found.setdefault(kind, (head_dim, kv_heads)) != (head_dim, kv_heads):
            raise InputError(f"the model's config gives layers of {kind} heads of several sizes: not supported")
    return found


def _layers(fields: Mapping[str, int], kinds: Sequence[str]) -> list[_Layer]:
    found, first = [], len(kinds) - fields["num_kv_shared_layers"]
    for place, kind in enumerate(kinds):
        cached, windowed = place < first, kind == SLIDING
        found.append(
            _Layer(
                head_dim=fields["head_dim" if windowed else "global_head_dim"],
                kv_heads=fields["num_key_value_heads" if windowed else "num_global_key_value_heads"],
                ffn=fields[FFN] * (2 if fields["use_double_wide_mlp"] and not cached else 1),
                cached=cached,
                valued=cached and (windowed or not fields["attention_k_eq_v"]),
            )
        )
    return found


def _not_computed(config: Mapping[str, Any], kinds: Sequence[str], fields: Mapping[str, int], vocabulary: int) -> str:
    """Return what a config requires but llama.cpp's graph does not compute, or ""."""
    activation = value_of(config, "hidden_activation", "gelu_pytorch_tanh")
    if config.get("attention_bias"):
        return "llama.cpp has no biases for gemma4"
    if activation not in ("gelu_pytorch_tanh", "gelu_new"):
        return f"llama.cpp computes gemma4 with gelu_pytorch_tanh, not with {activation!r}"
    if {*kinds} != {FULL, SLIDING}:
        return "llama.cpp computes a gemma4 with layers of full and of sliding attention"
    given = config.get("rope_parameters") or _ROTARY
    for kind, known in ((FULL, ("default", "proportional")), (SLIDING, ("default",))):
        rope = given.get(kind) or {}
        name = rope.get("rope_type", "default")
        if name not in known or rope.get("factor", 1) != 1:
            return f"the rotary embedding {name!r} of {kind} is none that llama.cpp computes for gemma4"
    # The last layers with keys and values of their own. Later layers read those of the last layer of their kind.
    first = len(kinds) - fields["num_kv_shared_layers"]
    if first < len(kinds) and [*kinds[max(0, first - 2) : first]] != [SLIDING, FULL]:
        return "llama.cpp shares the keys and values of two layers, of which the first has a sliding window"
    tokens = fields["vocab_size_per_layer_input"]
    if fields["hidden_size_per_layer_input"] and tokens != vocabulary:
        return (
            f"llama.cpp has as many tokens in the tables by layer as in the other, and these have {tokens} and "
            f"{vocabulary}"
        )
    return ""


def _tensors(
    layers: Sequence[_Layer],
    vocabulary: int,
    width: int,
    heads: int,
    fields: Mapping[str, int],
    *,
    tied: bool,
    biases: bool,
) -> Iterator[TensorSpec]:
    """Yield the parameters in the order of transformers' modules, and then the stored factor of each layer."""
    by_layer = fields["hidden_size_per_layer_input"]
    yield TensorSpec(name="model.embed_tokens.weight", role=Role.EMBEDDING, shape=(vocabulary, width), more_bits=tied)
    valued = [place for place, layer in enumerate(layers) if layer.valued]
    for place, layer in enumerate(layers):
        for name, role, shape in (*_attention(layer, width, heads, biases), *_rest(layer, width, by_layer)):
            more_bits = name == "mlp.down_proj.weight" and takes_more_bits(place, len(layers))
            if name == "self_attn.v_proj.weight":
                # llama.cpp counts the layers that have this matrix.
                more_bits = takes_more_bits(valued.index(place), len(valued))
            yield TensorSpec(name=f"model.layers.{place}.{name}", role=role, shape=shape, more_bits=more_bits)
    yield TensorSpec(name="model.norm.weight", role=Role.NORM, shape=(width,))
    if by_layer:
        rows = len(layers) * by_layer
        table = (fields["vocab_size_per_layer_input"], rows)
        yield TensorSpec(name="model.embed_tokens_per_layer.weight", role=Role.EMBEDDING, shape=table)
        yield TensorSpec(name="model.per_layer_model_projection.weight", role=Role.LINEAR, shape=(rows, width))
        yield TensorSpec(name="model.per_layer_projection_norm.weight", role=Role.NORM, shape=(by_layer,))
    if not tied:
        yield TensorSpec(name="lm_head.weight", role=Role.HEAD, shape=(vocabulary, width), more_bits=True)
    for place in range(len(layers)):
        yield TensorSpec(name=f"model.layers.{place}.layer_scalar", role=Role.NORM, shape=(1,))


_Part = tuple[str, Role, tuple[int, ...]]


def _attention(layer: _Layer, width: int, heads: int, biases: bool) -> Iterator[_Part]:
    queries, keys = heads * layer.head_dim, layer.kv_heads * layer.head_dim

    def linear(name: str, shape: tuple[int, int]) -> Iterator[_Part]:
        yield f"self_attn.{name}.weight", Role.LINEAR, shape
        if biases:
            yield f"self_attn.{name}.bias", Role.BIAS, shape[:1]

    yield from linear("q_proj", (queries, width))
    yield "self_attn.q_norm.weight", Role.NORM, (layer.head_dim,)
    if layer.cached:
        yield "self_attn.k_norm.weight", Role.NORM, (layer.head_dim,)
        yield from linear("k_proj", (keys, width))
    if layer.valued:
        yield from linear("v_proj", (keys, width))
    yield from linear("o_proj", (width, queries))


def _rest(layer: _Layer, width: int, by_layer: int) -> Iterator[_Part]:
    for name, shape in (("gate", (layer.ffn, width)), ("up", (layer.ffn, width)), ("down", (width, layer.ffn))):
        yield f"mlp.{name}_proj.weight", Role.LINEAR, shape
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{name}_layernorm.weight", Role.NORM, (width,)
    if by_layer:
        yield "per_layer_input_gate.weight", Role.LINEAR, (by_layer, width)
        yield "per_layer_projection.weight", Role.LINEAR, (width, by_layer)
        yield "post_per_layer_input_norm.weight", Role.NORM, (width,)

"""The shape of mixtures of experts without shared ones, from their config; transformers' modules are the reference.

transformers holds the gates and ups of all experts of a layer in one parameter, and their downs in another. Folders
hold a matrix of each expert under a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from autodistill.errors import InputError
from autodistill.models.config_fields import size_of, value_of
from autodistill.models.families import GGUF_MIXTURES
from autodistill.models.llama_cpp_graphs import SLIDING
from autodistill.models.llama_cpp_graphs import not_computed as not_computed_without_experts
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, is_expert, takes_more_bits

_NORMALIZED = {"mixtral": True, "qwen3_moe": True, "olmoe": False}
"""Whether llama.cpp's graph normalises the weights of the experts that a token uses to a sum of one."""


def describe_mixture(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a Qwen3-MoE from its config. Its router is no linear layer: every format keeps it as it keeps norms.

    Args:
        config: A config with the usual types (`check_config`).

    Raises:
        InputError: A size is missing or is no positive number, heads do not divide each other or the width, a token
            uses more experts than there are, or layers are no mixtures.
    """
    name = str(config["model_type"])
    if config.get("mlp_only_layers") or value_of(config, "decoder_sparse_step", 1) != 1:
        raise InputError(f"a {name} whose layers are not all mixtures is not supported")
    # transformers 5 writes the number of experts of every family under one name. Released files use the family's own.
    experts = size_of(config, "num_local_experts" if config.get("num_local_experts") else "num_experts", 128)
    active = size_of(config, "num_experts_per_tok", 8)
    if active > experts:
        raise InputError(f"the model's config has {active} experts a token of {experts}: at most as many can be")
    width, heads = size_of(config, "hidden_size", 2048), size_of(config, "num_attention_heads", 32)
    keys = size_of(config, "num_key_value_heads", 4)
    if heads % keys:
        raise InputError(f"the model's config has {keys} heads of keys and values, which do not divide {heads} heads")
    if config.get("head_dim") is None and width % heads:
        raise InputError(f"the model's config has {heads} heads, which do not divide a width of {width}: check it")
    spec = ModelSpec(
        architecture=name,
        layers=size_of(config, "num_hidden_layers", 24),
        width=width,
        heads=heads,
        kv_heads=keys,
        head_dim=size_of(config, "head_dim", width // heads),
        ffn_width=size_of(config, "moe_intermediate_size", 768),
        vocabulary=size_of(config, "vocab_size", 151936),
        max_context=size_of(config, "max_position_embeddings", 32768),
        tied=bool(config.get("tie_word_embeddings", False)),
        tensors=(),
        experts=experts,
        active_experts=active,
    )
    sizes = {"num_local_experts": experts, "num_experts_per_tok": active, "moe_intermediate_size": spec.ffn_width}
    window, windowed = _window(config, spec.layers)
    spec = replace(spec, window=window, windowed=windowed, fields=tuple(sizes.items()))
    spec = replace(spec, tensors=tuple(_tensors(spec, bool(config.get("attention_bias")))))
    known = config.get("not_in_gguf")
    return replace(spec, not_in_gguf=not_computed(spec, config) if known is None else str(known))


def stored_parts(tensor: TensorSpec, spec: ModelSpec) -> dict[str, slice]:
    """Return the tensors of a folder that together are the tensor of all experts, by name, with their rows in it.

    Empty for a tensor that a folder holds under its own name.
    """
    if not is_expert(tensor.name):
        return {}
    block, _, part = tensor.name.rpartition(".")
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    rows = tensor.shape[0] // spec.experts // len(names)
    stored = [f"{block}.{expert}.{name}.weight" for expert in range(spec.experts) for name in names]
    return {name: slice(rows * place, rows * (place + 1)) for place, name in enumerate(stored)}


def not_computed(spec: ModelSpec, config: Mapping[str, Any]) -> str:
    """Return what a mixture's config requires but llama.cpp's graph does not compute, or ""."""
    name = spec.architecture
    if reason := not_computed_without_experts(without_experts(config), spec.head_dim):
        return reason
    if name != "mixtral" and bool(config.get("norm_topk_prob", False)) != _NORMALIZED[name]:
        return f"llama.cpp computes {name} with norm_topk_prob {str(_NORMALIZED[name]).lower()} alone"
    if name == "olmoe" and spec.kv_heads != spec.heads:
        heads = f"{spec.kv_heads} for {spec.heads}"
        return f"llama.cpp computes olmoe with as many heads of keys as of queries, and not {heads}"
    if config.get("clip_qkv") is not None:
        return "llama.cpp clips no queries and keys (clip_qkv)"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return f"a {name} is written whose layers are all mixtures"
    if any(tensor.name.endswith(".bias") for tensor in spec.tensors):
        return f"llama.cpp has no biases for {name}"
    window = config.get("sliding_window") if config.get("use_sliding_window", name == "mixtral") else None
    if window and window < spec.max_context:
        return f"llama.cpp has no sliding window of {window} tokens for {name}"
    return ""


def without_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the family whose names and rotary embedding a mixture uses."""
    return dict(config) | {"model_type": GGUF_MIXTURES[str(config["model_type"])][0]}


def _window(config: Mapping[str, Any], layers: int) -> tuple[int, tuple[int, ...]]:
    """Return the sliding window, and the layers that have it: all or none, or those that a stored shape names."""
    kinds = config.get("layer_types")
    window = config.get("sliding_window", 4096)
    # The config that a row stores gives the kind of each layer, and has no switch.
    if not window or not value_of(config, "use_sliding_window", bool(kinds)):
        return 0, ()
    windowed = tuple(layer for layer in range(layers) if not kinds or kinds[layer : layer + 1] == [SLIDING])
    return (window, windowed) if windowed else (0, ())


def _tensors(spec: ModelSpec, biases: bool) -> Iterator[TensorSpec]:
    """Yield the tensors in the order of transformers' modules."""
    width, ffn, queries, keys = spec.width, spec.ffn_width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    yield TensorSpec(
        name="model.embed_tokens.weight",
        role=Role.EMBEDDING,
        shape=(spec.vocabulary, width),
        more_bits=spec.tied,
    )
    for layer in range(spec.layers):
        block, more = f"model.layers.{layer}", takes_more_bits(layer, spec.layers)
        for name, shape in attention.items():
            matrix = f"{block}.self_attn.{name}_proj"
            yield TensorSpec(name=f"{matrix}.weight", role=Role.LINEAR, shape=shape, more_bits=name == "v" and more)
            if biases:
                yield TensorSpec(name=f"{matrix}.bias", role=Role.BIAS, shape=shape[:1])
        for name in ("q_norm", "k_norm"):
            yield TensorSpec(name=f"{block}.self_attn.{name}.weight", role=Role.NORM, shape=(spec.head_dim,))
        # The gates and ups of an expert lie together, before those of the next expert.
        for name, shape in (("gate_up", (2 * ffn, width)), ("down", (width, ffn))):
            yield TensorSpec(
                name=f"{block}.mlp.experts.{name}_proj",
                role=Role.LINEAR,
                shape=(spec.experts * shape[0], shape[1]),
                more_bits=name == "down" and more,
            )
        yield TensorSpec(name=f"{block}.mlp.gate.weight", role=Role.NORM, shape=(spec.experts, width))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(name=f"{block}.{name}.weight", role=Role.NORM, shape=(width,))
    yield TensorSpec(name="model.norm.weight", role=Role.NORM, shape=(width,))
    if not spec.tied:
        yield TensorSpec(name="lm_head.weight", role=Role.HEAD, shape=(spec.vocabulary, width), more_bits=True)

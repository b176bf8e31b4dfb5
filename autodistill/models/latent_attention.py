"""Description of models with multi-head latent attention (DeepSeek-V2 and V3) from their config, for estimates only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from autodistill.errors import InputError
from autodistill.models.config_fields import check_config
from autodistill.models.spec import MOST_LAYERS, MOST_OF_A_SIZE, ModelSpec
from autodistill.models.tensors import Role, TensorSpec, takes_more_bits

ARCHITECTURES = ("deepseek_v2", "deepseek_v3")
"""transformers' `model_type`s of these models."""

_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)
_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")


def describe_latent(config: Mapping[str, Any]) -> ModelSpec:
    """Describe the shape of a model with latent attention.

    For each token and layer, such a model caches one vector of `kv_lora_rank` and one of `qk_rope_head_dim`, shared by
    all heads. Keys and values are computed from them again (DeepSeek-AI 2024, DeepSeek-V2, section 2.1). Layers before
    `first_k_dense_replace` have one FFN. The others have a mixture of experts, next to shared experts. In this
    description, the gates of all routed experts of a layer form one matrix, and so do their ups and their downs.

    Raises:
        InputError: A size is missing or is no positive number, or a token uses more experts than there are. Also raised
            as by `check_config`.
    """
    check_config(config)
    routed = config.get("n_routed_experts") or 0
    wanted = [*_SIZES, *(_EXPERTS if routed else ())]
    wrong = [name for name in wanted if type(config.get(name)) is not int or config[name] < 1]
    if wrong:
        raise InputError(f"the model's config must give {', '.join(wrong)} as positive whole numbers")
    if config["num_hidden_layers"] > MOST_LAYERS or max(config[name] for name in wanted) > MOST_OF_A_SIZE:
        raise InputError("the model's config gives a size that no model has: check it")
    active, shared = config.get("num_experts_per_tok") or 0, config.get("n_shared_experts") or 0
    if routed and active > routed:
        raise InputError(f"the model's config has {active} experts a token of {routed}: at most as many can be")
    tied = bool(config.get("tie_word_embeddings"))
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return ModelSpec(
        architecture=str(config["model_type"]),
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_attention_heads"],
        head_dim=config["qk_nope_head_dim"] + turned,
        ffn_width=config["moe_intermediate_size"] if routed else config["intermediate_size"],
        vocabulary=config["vocab_size"],
        max_context=config["max_position_embeddings"],
        tied=tied,
        tensors=tuple(
            TensorSpec(
                name=name, role=role, shape=shape, more_bits=_more_bits(name, role, config["num_hidden_layers"], tied)
            )
            for name, role, shape in _tensors(config, routed, shared, tied)
        ),
        experts=routed,
        active_experts=active if routed else 0,
        shared_experts=shared if routed else 0,
        latent=rank + turned,
    )


def _more_bits(name: str, role: Role, layers: int, tied: bool) -> bool:
    """Return `Family.more_bits` of these models: for the head or a tied table, and for some FFNs' last matrices."""
    if role in (Role.EMBEDDING, Role.HEAD):
        return tied or role is Role.HEAD
    found = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(?:\w+\.)?down_proj\.weight", name)
    return found is not None and takes_more_bits(int(found[1]), layers)


def _tensors(
    config: Mapping[str, Any], routed: int, shared: int, tied: bool
) -> Iterator[tuple[str, Role, tuple[int, ...]]]:
    width, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, turned, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries, query_rank = heads * (plain + turned), config.get("q_lora_rank")
    yield "model.embed_tokens.weight", Role.EMBEDDING, (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        if query_rank:
            yield f"{attention}.q_a_proj.weight", Role.LINEAR, (query_rank, width)
            yield f"{attention}.q_a_layernorm.weight", Role.NORM, (query_rank,)
            yield f"{attention}.q_b_proj.weight", Role.LINEAR, (queries, query_rank)
        else:
            yield f"{attention}.q_proj.weight", Role.LINEAR, (queries, width)
        yield f"{attention}.kv_a_proj_with_mqa.weight", Role.LINEAR, (rank + turned, width)
        yield f"{attention}.kv_a_layernorm.weight", Role.NORM, (rank,)
        yield f"{attention}.kv_b_proj.weight", Role.LINEAR, (heads * (plain + value), rank)
        yield f"{attention}.o_proj.weight", Role.LINEAR, (width, heads * value)
        yield f"{block}.input_layernorm.weight", Role.NORM, (width,)
        yield f"{block}.post_attention_layernorm.weight", Role.NORM, (width,)
        if not routed or layer < (config.get("first_k_dense_replace") or 0):
            yield from _gated(f"{block}.mlp", width, config["intermediate_size"], 1)
            continue
        # The router keeps the precision of vectors, which is float32 in GGUF.
        yield f"{block}.mlp.gate.weight", Role.NORM, (routed, width)
        if config["model_type"] == "deepseek_v3":
            yield f"{block}.mlp.gate.e_score_correction_bias", Role.NORM, (routed,)
        yield from _gated(f"{block}.mlp.experts", width, config["moe_intermediate_size"], routed)
        if shared:
            yield from _gated(f"{block}.mlp.shared_experts", width, shared * config["moe_intermediate_size"], 1)
    yield "model.norm.weight", Role.NORM, (width,)
    if not tied:
        yield "lm_head.weight", Role.HEAD, (config["vocab_size"], width)


def _gated(name: str, width: int, ffn: int, count: int) -> Iterator[tuple[str, Role, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", Role.LINEAR, (count * ffn, width)
    yield f"{name}.up_proj.weight", Role.LINEAR, (count * ffn, width)
    yield f"{name}.down_proj.weight", Role.LINEAR, (count * width, ffn)

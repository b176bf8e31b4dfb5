"""Multi-head latent attention: weights and cache of transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from autodistill.advisor.describe import deployment_named, spec_of
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import work
from autodistill.models.latent_attention import ARCHITECTURES


def config(name: str, **changes: Any) -> Any:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "vocab_size": 300,
        "n_group": 2,
        "topk_group": 1,
        "max_position_embeddings": 128,
    }
    return transformers.AutoConfig.for_model(name, **(sizes | changes))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2, "first_k_dense_replace": 0}])
def test_weights_and_cache_are_those_of_transformers(name: str, changes: dict[str, Any]) -> None:
    asked = config(name, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(asked)
    spec = spec_of(asked.to_dict())
    # The module stores the correction of the router's scores as a buffer.
    stored = sum(value.numel() for value in model.state_dict().values())
    assert spec.parameters == stored
    with torch.no_grad():
        cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    held = sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values))
    plain = deployment_named("huggingface")
    assert memory(spec, plain, context=10, batch=1).kv_cache_bytes == 2 * held
    # A decoding step also reads this much.
    reads = [work(spec, plain, tokens=1, sequences=1, behind=behind).bytes for behind in (0, 10)]
    assert reads[1] - reads[0] == 2 * held


@pytest.mark.parametrize("tied", [True, False])
def test_what_ends_ffns_has_more_bits_in_the_layers_of_llama_cpps_mixtures(tied: bool) -> None:
    """As llama.cpp's quantiser did with a model of nine layers whose first layer has one FFN."""
    spec = spec_of(config("deepseek_v2", num_hidden_layers=9, tie_word_embeddings=tied).to_dict())
    expected = {"model.embed_tokens.weight" if tied else "lm_head.weight", "model.layers.0.mlp.down_proj.weight"}
    for layer in (3, 6, 7, 8):
        expected |= {f"model.layers.{layer}.mlp.{kind}.down_proj.weight" for kind in ("experts", "shared_experts")}
    assert {tensor.name for tensor in spec.tensors if tensor.more_bits} == expected


@pytest.mark.parametrize(
    ("published", "total", "active", "sizes"),
    [
        (
            "V3's report: 671 billion weights, 37 of them for a token",
            671e9,
            37e9,
            {
                "num_hidden_layers": 61,
                "hidden_size": 7168,
                "num_attention_heads": 128,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "n_routed_experts": 256,
                "num_experts_per_tok": 8,
                "first_k_dense_replace": 3,
                "q_lora_rank": 1536,
                "vocab_size": 129280,
            },
        ),
        (
            "V2-Lite's report: 15.7 billion weights, 2.4 of them for a token",
            15.7e9,
            2.4e9,
            {
                "num_hidden_layers": 27,
                "hidden_size": 2048,
                "num_attention_heads": 16,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 64,
                "num_experts_per_tok": 6,
                "n_shared_experts": 2,
                "first_k_dense_replace": 1,
                "q_lora_rank": None,
                "vocab_size": 102400,
            },
        ),
    ],
)
def test_a_token_passes_its_routed_experts_and_the_shared_ones_once(
    published: str, total: float, active: float, sizes: dict[str, Any]
) -> None:
    heads = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    spec = spec_of(
        {"model_type": "deepseek_v3", "max_position_embeddings": 4096, "n_shared_experts": 1} | heads | sizes
    )
    assert spec.parameters == pytest.approx(total, rel=0.01), published
    one = work(spec, deployment_named("huggingface"), tokens=1, sequences=1, behind=0)
    assert one.operations / 2 == pytest.approx(active, rel=0.03), published


def test_a_cache_of_latents_is_smaller_than_one_of_heads_in_every_runtime() -> None:
    spec = spec_of(config("deepseek_v3").to_dict())
    for runtime in ("llama.cpp", "vllm", "onnxruntime"):
        found = memory(spec, deployment_named("huggingface"), context=256, batch=2, runtime=runtime).kv_cache_bytes
        size = 4 if runtime == "onnxruntime" else 2
        assert found == 2 * 256 * size * 3 * (32 + 8)


def test_what_is_missing_is_named() -> None:
    whole = config("deepseek_v3").to_dict()
    with pytest.raises(InputError, match="must give kv_lora_rank, v_head_dim as positive"):
        spec_of(whole | {"kv_lora_rank": None, "v_head_dim": -1})
    with pytest.raises(InputError, match="no model has"):
        spec_of(whole | {"num_hidden_layers": 10**9})
    with pytest.raises(InputError, match="9 experts a token of 8"):
        spec_of(whole | {"num_experts_per_tok": 9})

"""Every config.json, whatever its content, is either described or refused with a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autodistill.advisor.describe import deployment_named, describe, spec_of
from autodistill.advisor.estimate import appraise
from autodistill.errors import InputError
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.tensors import Role, tensors_ending, tensors_of

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
PACKED = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "quantization_config": PACKED},
    "mistral": {"sliding_window": 128},
    "qwen2": {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window_pattern": 2,
        "rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
    },
    "gpt_neox": {"rotary_pct": 0.25},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}
DEVICE = find_device("4090", devices())


def config(name: str, **changes: Any) -> dict[str, Any]:
    return SIZES | CONFIGS[name] | {"model_type": name} | changes


@pytest.mark.parametrize("name", CONFIGS)
def test_what_each_is_mutated_from_is_described(name: str) -> None:
    assert spec_of(config(name)).parameters > 0


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"quantization_config": "int4"}, "quantization_config as a mapping, not 'int4'"),
        ("llama", {"quantization_config": {"config_groups": [1]}}, "config_groups as a mapping, not list"),
        ("llama", {"quantization_config": {"config_groups": {"a": 3}}}, "config_groups.a as a mapping, not 3"),
        ("llama", {"quantization_config": {"config_groups": {"a": {"weights": []}}}}, "a.weights as a mapping"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling as a mapping, not 'yarn'"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters as a mapping, not list"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 5}}, "full_attention as a mapping, not 5"),
        ("gpt_neox", {"rotary_pct": "all"}, "rotary_pct as a number above 0, 1 at the most, not 'all'"),
        ("mistral", {"sliding_window": [1]}, "sliding_window as a whole number"),
        *(("mistral", {"sliding_window": value}, "sliding_window as a whole") for value in (-5, 12.7, True, "4096")),
        ("gemma3_text", {"sliding_window_pattern": "LG"}, "sliding_window_pattern as a whole number of layers"),
        ("qwen2", {"max_window_layers": "x"}, "max_window_layers as a whole number of layers, not 'x'"),
        ("llama", {"layer_types": 5}, "layer_types as a list of texts, not 5"),
        ("deepseek_v3", {"n_shared_experts": "2"}, "n_shared_experts as a whole number"),
        ("deepseek_v3", {"n_shared_experts": -1}, "n_shared_experts as a whole number"),
        ("deepseek_v3", {"first_k_dense_replace": "1"}, "first_k_dense_replace as a whole number"),
        *(("deepseek_v3", {"q_lora_rank": value}, "q_lora_rank as a whole") for value in (-24, 2.5, 10**30, "24")),
        ("llama", {"num_key_value_heads": 8}, "8 heads of keys and values, which do not divide 4 heads"),
        ("llama", {"hidden_size": 65}, "4 heads, which do not divide a width of 65"),
        ("mixtral", {"num_local_experts": 10**12}, "num_local_experts as a whole number, 10,000 at the most"),
    ],
)
def test_a_field_of_another_kind_is_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_of(config(name, **changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_found_by_role_and_by_the_end_of_the_name_as_in_a_list(name: str) -> None:
    spec = spec_of(config(name))
    every = list(spec.tensors)
    for role in Role:
        expected = [one for one in every if one.role is role]
        assert tensors_of(spec.tensors, role) == tensors_of(every, role) == expected
    for suffix in {one.name.split(".", 1)[1][-20:] for one in every} | {".weight", "none"}:
        expected = [one for one in every if one.name.endswith(suffix)]
        assert tensors_ending(spec.tensors, suffix) == tensors_ending(every, suffix) == expected


def test_a_field_that_is_null_has_its_default() -> None:
    whole = config("gpt_neox")
    del whole["rotary_pct"]
    assert spec_of(config("gpt_neox", rotary_pct=None)) == spec_of(whole)
    nulls = dict.fromkeys(("rope_scaling", "max_window_layers", "use_sliding_window", "layer_types", "sliding_window"))
    assert spec_of(config("qwen2") | nulls).window == 0


def test_a_config_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match="nested too deep"):
        describe(str(tmp_path))


def test_a_folder_whose_weights_are_of_another_model_is_refused(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"}), encoding="utf-8")
    spec = describe(str(tmp_path)).spec
    numpy.save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError,
        match=r"lacks model\.embed_tokens\.weight, .* and 18 more, and has weight, for which",
    ):
        describe(str(tmp_path))
    tensors = {tensor.name: np.zeros(tensor.shape, np.float16) for tensor in spec.tensors}
    numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert describe(str(tmp_path)).spec == spec


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**12, 10**400, -(10**30), 2**31, 0.5, float("nan"), float("inf"), 1e300])
    | st.sampled_from(["", "x", "4096", "linear", "full_attention", "pack-quantized"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "full_attention", "config_groups", "weights", "a"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)
NAMES = [
    *sorted({name for one in CONFIGS.values() for name in one} | set(SIZES)),
    *("head_dim", "layer_types", "rope_theta", "attention_bias", "tie_word_embeddings", "hidden_act", "num_experts"),
    *("query_pre_attn_scalar", "not_in_gguf", "mlp_only_layers", "decoder_sparse_step", "rotary_emb_base"),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3),
    missing=st.sets(st.sampled_from(NAMES), max_size=1),
)
def test_any_config_is_estimated_or_refused(
    name: str, changes: dict[str, Any], missing: set[str], tmp_path: Path
) -> None:
    found = {key: value for key, value in config(name, **changes).items() if key not in missing}
    try:
        (tmp_path / "config.json").write_text(json.dumps(found), encoding="utf-8")
        model = describe(str(tmp_path))
        document = appraise(model, deployment_named("gguf-q8_0"), devices=[DEVICE])
    except InputError:
        return
    assert 0 < document["weights_bytes"] < document["total_bytes"]
    assert document["tokens_per_second"] > 0

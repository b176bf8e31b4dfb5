"""Models that are trained whole, by their configs, against transformers' modules and against their own stored form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autodistill.advisor.describe import describe
from autodistill.distillation.teacher.any_model import any_spec
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import InputError
from autodistill.models.config import comparable, config_of, resized, spec_from_config
from autodistill.models.loading import check_model, load_model
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Q4_0, Q4_K, Grid
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_config, tiny_tokenizer

STATE = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "linear_conv_kernel_dim": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "more heads of values": {},
    "as many heads": {"linear_num_value_heads": 2, "tie_word_embeddings": False},
    "every second layer": {"layer_types": None, "full_attention_interval": 2},
    "in no order": {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    "attention alone": {"layer_types": ["full_attention"] * 4},
    "with biases": {"attention_bias": True},
}


def config(**changes: Any) -> dict[str, Any]:
    return tiny_config("qwen3_5_text", **STATE | changes)


def check_described(spec: ModelSpec, built: ModelSpec) -> None:
    """Check the shape that a config describes against that of the model which transformers builds from it."""
    described, expected = ([(one.name, one.role, one.shape) for one in of.tensors] for of in (spec, built))
    assert described == expected
    # `not_in_gguf` and `fields` are read from the config alone.
    assert replace(spec, tensors=(), fields=(), not_in_gguf="") == replace(built, tensors=())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_transformers_builds(name: str) -> None:
    given = config(**CONFIGS[name])
    spec, built = spec_from_config(given), any_spec(given)
    check_described(spec, built)
    assert spec.parameters == built.parameters


MIXTURES: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "as the hub has it": {"num_local_experts": None, "num_experts": 6},
    "with biases": {"attention_bias": True},
    "other weights of experts": {"norm_topk_prob": False},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_config_of_a_mixture_says_what_transformers_builds(name: str) -> None:
    given = tiny_config("qwen3_moe") | MIXTURES[name]
    given = {field: value for field, value in given.items() if value is not None}
    spec, built = spec_from_config(given), any_spec(given)
    check_described(spec, built)
    stored = config_of(spec)
    assert spec_from_config(stored) == spec
    assert resized(spec, vocabulary=320) == spec_from_config(given | {"vocab_size": 320})
    more = config_of(spec_from_config(given | {"num_experts_per_tok": 3}))
    assert comparable(stored) != comparable(more)
    assert bool(spec.not_in_gguf) == (name in ("with biases", "other weights of experts"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp_only_layers": [0]}, "a qwen3_moe whose layers are not all mixtures is not supported"),
        ({"decoder_sparse_step": 2}, "a qwen3_moe whose layers are not all mixtures is not supported"),
        ({"num_experts_per_tok": 5}, "has 5 experts a token of 4"),
        ({"num_key_value_heads": 3}, "has 3 heads of keys and values, which do not divide 4 heads"),
        ({"head_dim": None, "num_attention_heads": 6}, "has 6 heads, which do not divide a width of 64"),
        ({"moe_intermediate_size": 0}, "must give moe_intermediate_size as a positive whole number"),
    ],
)
def test_a_mixture_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_from_config(tiny_config("qwen3_moe") | change)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_is_stored_and_read_again(name: str) -> None:
    spec = spec_from_config(config(**CONFIGS[name]))
    stored = config_of(spec)
    assert spec_from_config(stored) == spec
    wider = config_of(spec_from_config(config(**CONFIGS[name], linear_conv_kernel_dim=5)))
    assert comparable(stored) != comparable(wider)
    assert resized(spec, vocabulary=320) == spec_from_config(config(**CONFIGS[name], vocab_size=320))
    odd = replace(spec, text_not_in_gguf="its text is cut in another way", process_bytes=7)
    assert resized(odd, vocabulary=spec.vocabulary) == odd
    with pytest.raises(InputError, match="a qwen3_5_text is trained whole"):
        resized(spec, range(2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types for each of its 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "full_attention or linear_attention"),
        ({"linear_num_value_heads": 3}, "2 heads of keys of a recurrent state, which do not divide 3"),
        ({"num_key_value_heads": 3}, "3 heads of keys, which do not divide 4"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim as a positive whole number"),
    ],
)
def test_sizes_that_make_no_model_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_from_config(config() | change)


def test_super_blocks_end_within_heads_that_a_file_reorders() -> None:
    """llama.cpp takes the heads of values in another order. A block over two heads would hold other weights there."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    stored = Deployment(runtime="llama.cpp", format="gguf-q4_k", bits=4, group_size=32, symmetric=False)
    found = {}
    for heads in (2, 4):
        spec = spec_from_config(config(**sizes, linear_num_value_heads=heads))
        (last,) = [one for one in spec.tensors if one.name == "model.layers.0.linear_attn.out_proj.weight"]
        assert last.shape[1] % 256 == 0
        found[heads] = stored.storage(last)
    assert found[2] == Q4_K
    assert found[4] == Q4_K.fallback
    assert isinstance(Q4_K.fallback, Grid)
    narrow = spec_from_config(config(linear_value_head_dim=48))
    (last,) = [one for one in narrow.tensors if one.name == "model.layers.0.linear_attn.out_proj.weight"]
    with pytest.raises(InputError, match=f"runs in a file of 48 weights, which the groups of 32 of {Q4_0.name}"):
        Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32).storage(last)


def test_the_text_model_of_a_folder_with_images_becomes_a_teacher(tmp_path: Path) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    sizes = {"hidden_size": 96, "intermediate_size": 192, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    text = config(linear_value_head_dim=32, vocab_size=300)
    torch.manual_seed(0)
    both = Qwen3_5Config(text_config=text, vision_config=sizes, tie_word_embeddings=True)
    model = Qwen3_5ForConditionalGeneration(both).float().eval()
    folder = tmp_path / "both"
    model.save_pretrained(folder)
    tiny_tokenizer(300).save_pretrained(folder)
    first = materialize(resolve_teacher(str(folder)), tmp_path / "cache")
    assert first.folder != folder
    check_model(first.folder)
    assert describe(str(folder)).spec == describe(str(first.folder)).spec
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(first.folder, torch.float32)(tokens).logits, model(tokens).logits)
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert materialize(resolve_teacher(str(folder)), tmp_path / "cache") == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_teacher(tmp_path, architecture="qwen3_5_text", layers=4, head_dim=32)
    check_model(folder)
    weights = load_file(folder / "model.safetensors")
    # The released models also hold layers that predict further tokens.
    save_file(weights | {"mtp.fc.weight": torch.ones(4, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    check_model(folder)
    load_model(folder, torch.float32)
    del weights["model.layers.0.linear_attn.A_log"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model.layers.0.linear_attn.A_log"):
        check_model(folder)

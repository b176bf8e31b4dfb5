"""Gemma 4's text model by its config, against the modules that transformers builds and against its own stored form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration

from autodistill.distillation.teacher.any_model import any_spec
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import InputError
from autodistill.models.config import comparable, config_of, resized, spec_from_config
from autodistill.models.loading import check_model, load_model, model_from_weights, save_model
from autodistill.models.model_folder import read_config
from autodistill.testing import save_tiny_teacher, tiny_config, tiny_tokenizer
from tests.models.test_whole import check_described

SLIDING, FULL = "sliding_attention", "full_attention"
OWN: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, SLIDING, FULL] * 2,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 256,
    "sliding_window": 32,
}
EQUAL = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "heads of two sizes": {},
    "shared keys and values, wide FFNs": {"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
    "keys that are values, no further table": {"hidden_size_per_layer_input": 0, **EQUAL},
    "heads of one size": {"global_head_dim": 16},
    "full attention alone": {"layer_types": [FULL] * 6},
    "kinds as usual": {"layer_types": None},
    "biases and a head": {"attention_bias": True, "tie_word_embeddings": False},
}


def config(**changes: Any) -> dict[str, Any]:
    """Return a config as transformers writes it, with the sizes of full attention by layer."""
    return tiny_config("gemma4_text", **OWN | changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_transformers_builds(name: str) -> None:
    given = config(**CONFIGS[name])
    spec, built = spec_from_config(given), any_spec(given)
    check_described(spec, built)
    # The makers' own notation has these sizes as fields.
    del given["per_layer_config"]
    assert spec_from_config(given | OWN | CONFIGS[name]) == spec


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_is_stored_and_read_again(name: str) -> None:
    spec = spec_from_config(config(**CONFIGS[name]))
    stored = config_of(spec)
    assert spec_from_config(stored) == spec
    assert comparable(stored) != comparable(config_of(spec_from_config(config(**CONFIGS[name], intermediate_size=96))))
    tables = {"vocab_size": 320, "vocab_size_per_layer_input": 320}
    assert resized(spec, vocabulary=320) == spec_from_config(config(**CONFIGS[name]) | tables)
    with pytest.raises(InputError, match="a gemma4_text is trained whole"):
        resized(spec, range(2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": [FULL] * 3}, "layer_types for each of its 6 layers"),
        ({"layer_types": ["linear_attention"] * 6}, "full_attention or sliding_attention"),
        ({"num_key_value_heads": 3}, "3 heads of keys, which do not divide 4"),
        ({"num_kv_shared_layers": 6}, "no earlier layer of each kind has any"),
        ({"num_kv_shared_layers": 4}, "no earlier layer of each kind has any"),
        ({"enable_moe_block": True}, "with experts"),
        ({"use_bidirectional_attention": "all"}, "predicts no next token"),
        ({"per_layer_config": {"2": {"head_dim": 32}}}, "layers of full_attention heads of several sizes"),
        ({"per_layer_config": {"2": {"intermediate_size": 32}}}, "head_dim and num_key_value_heads alone"),
        ({"per_layer_config": {"9": {"head_dim": 32}}}, "some of its 6 layers"),
        ({"per_layer_config": {str(one): {"num_key_value_heads": 1} for one in (2, 5)}}, "without attention_k_eq_v"),
    ],
)
def test_what_makes_no_model_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        spec_from_config(config() | change)
    assert "\n" not in str(caught.value)


def test_logits_are_capped_by_the_head_and_once(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "model", architecture="gemma4_text")
    check_model(folder)
    tokens = torch.arange(3, 60)[None]
    stock, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_model(folder, torch.float32)
    with torch.no_grad():
        expected = stock(tokens).logits
        assert torch.equal(ours(tokens).logits, expected)
        states = ours.base_model(tokens).last_hidden_state
        assert torch.equal(ours.get_output_embeddings()(states), expected)
        assert not torch.allclose(ours.lm_head(states), expected, atol=0.1)
        save_model(ours, tmp_path / "again")
        assert read_config(tmp_path / "again")["final_logit_softcapping"] == 4.0
        # The factor of each layer is stored, but is no parameter.
        made = model_from_weights(ours, {}, dict(ours.state_dict()))
        assert torch.equal(made(tokens).logits, expected)


def test_a_folder_that_lacks_the_factor_of_a_layer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path, architecture="gemma4_text")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.layer_scalar"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model.layers.1.layer_scalar"):
        check_model(folder)


def test_the_text_model_of_a_folder_with_images_becomes_a_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = config(vocab_size=300, vocab_size_per_layer_input=300, num_kv_shared_layers=3, final_logit_softcapping=2.0)
    model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text)).float().eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.layer_scalar.uniform_(0.5, 1.5)
    folder = tmp_path / "both"
    model.save_pretrained(folder)
    tiny_tokenizer(300).save_pretrained(folder)
    made = materialize(resolve_teacher(str(folder)), tmp_path / "cache")
    assert made.folder != folder
    check_model(made.folder)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(made.folder, torch.float32)(tokens).logits, model(tokens).logits)

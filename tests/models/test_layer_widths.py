"""Models whose layers differ in FFN width, against transformers' models with zeros in place of what they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from autodistill.errors import InputError
from autodistill.estimates.fit import in_blocks
from autodistill.models.config import ARCHITECTURES, comparable, config_of, resized, spec_from_config, uniform
from autodistill.models.layer_widths import padded
from autodistill.models.loading import check_model, load_model, stock_model
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_config

WIDTHS = (64, 128, 32, 128)
OWN = {"0": {"intermediate_size": 64}, "2": {"intermediate_size": 32}}
TOKENS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def with_zeros(whole: Path) -> Any:
    """Return transformers' own model of a folder, in which the neurons beyond `WIDTHS` do nothing."""
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    for layer, width in zip(model.base_model.layers, WIDTHS, strict=True):
        *_, last = (module for module in layer.mlp.modules() if isinstance(module, torch.nn.Linear))
        last.weight.data[:, width:] = 0
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_is_described_and_loaded_layer_by_layer(tmp_path: Path, architecture: str) -> None:
    whole = save_tiny_teacher(tmp_path / "whole", architecture=architecture, layers=4)
    folder = save_tiny_teacher(tmp_path / "narrow", architecture=architecture, layers=4, ffn=WIDTHS)
    config = read(folder)
    assert (config["per_layer_config"], config["intermediate_size"]) == (OWN, 128)
    spec = spec_from_config(config)
    assert (spec.ffn_width, spec.ffn_widths, spec.ffn_by_layer) == (128, WIDTHS, WIDTHS)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == stored
    assert spec.parameters == sum(np.prod(shape) for shape in stored.values())
    assert sum(np.prod(tensor.shape) * count for tensor, count in spec.kinds) == spec.parameters
    check_model(folder)
    model = load_model(folder, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, with_zeros(whole)(TOKENS).logits)
        written = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 24)
    assert model(TOKENS, labels=TOKENS).loss > 0
    # The same config as before, under the name of transformers' class.
    model.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == config
    assert type(model).__name__ == config["architectures"][0]


def test_transformers_own_class_refuses_it(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path, layers=4, ffn=WIDTHS)
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert [one.intermediate_size for one in AutoConfig.from_pretrained(folder).per_layer_config] == list(WIDTHS)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path, layers=4, ffn=WIDTHS)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(weights | {name: torch.zeros(64, 64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} of \[64, 64\] in place of \[32, 64\]"):
        load_model(folder, torch.float32)
    config = read(folder)
    del config["per_layer_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj\.weight of \[64, 64\] in place of \[128, 64\]"):
        check_model(folder)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"0": {"intermediate_size": 0}}, "intermediate_size as a positive whole number"),
        ({"0": {"intermediate_size": 64.0}}, "intermediate_size as a positive whole number"),
        ({"4": {"intermediate_size": 64}}, "some of its 4 layers, counted from 0, and each once"),
        ({"0": {"intermediate_size": 64}, "00": {"intermediate_size": 32}}, "and each once"),
        ({"0": {"intermediate_size": 64, "num_attention_heads": 2}}, "from layers to their FFN width alone"),
        ({"0": {"skip": ["mlp"]}}, "from layers to their FFN width alone"),
        ({"-1": {"intermediate_size": 64}}, "from layers to their FFN width alone"),
        ({"9" * 5000: {"intermediate_size": 64}}, "from layers to their FFN width alone"),
        ({"0": None}, "from layers to their FFN width alone"),
        ([{"intermediate_size": 64}], "from layers to their FFN width alone"),
    ],
)
def test_what_no_model_has_is_refused(own: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_from_config(tiny_config(num_hidden_layers=4) | {"per_layer_config": own})


def test_layers_that_are_alike_after_all_are_a_plain_model() -> None:
    plain = spec_from_config(tiny_config(num_hidden_layers=2, intermediate_size=64))
    wide = tiny_config(num_hidden_layers=2, intermediate_size=192)
    own = {str(layer): {"intermediate_size": 64} for layer in range(2)}
    assert spec_from_config(wide | {"per_layer_config": own}) == plain
    assert spec_from_config(wide | {"per_layer_config": {}}).ffn_width == 192


def test_a_stored_shape_is_the_same_shape() -> None:
    spec = spec_from_config(tiny_config(num_hidden_layers=12, intermediate_size=192))
    differing = resized(spec, range(11), ffn_widths=(192,) * 9 + (64, 128))
    assert config_of(differing)["per_layer_config"] == {
        "09": {"intermediate_size": 64},
        "10": {"intermediate_size": 128},
    }
    assert spec_from_config(json.loads(json.dumps(config_of(differing)))) == differing
    kept = resized(differing, (0, 9, 10))
    assert kept.ffn_widths == (192, 64, 128)
    assert resized(differing, range(3)) == resized(spec, range(3))
    assert uniform(differing) == resized(spec, range(11))
    assert resized(differing, ffn_width=64) == resized(spec, range(11), ffn_width=64)


def test_models_are_compared_by_size_only_where_their_layers_differ_alike() -> None:
    spec = spec_from_config(tiny_config(num_hidden_layers=3, intermediate_size=512, hidden_size=256))
    one, other = (resized(spec, ffn_widths=widths) for widths in ((512, 256, 512), (256, 512, 512)))
    assert comparable(config_of(one))[0] != comparable(config_of(other))[0]
    assert comparable(config_of(one))[0] == comparable(config_of(resized(one, width=192)))[0]
    assert comparable(config_of(one))[0] != comparable(config_of(spec))[0]
    q4_k = Deployment(runtime="llama.cpp", format="gguf-q4_k", bits=4, group_size=32, symmetric=False)
    odd = resized(spec, ffn_widths=(512, 96, 512))
    assert in_blocks(config_of(odd), q4_k)[1:] == (True, False, False)
    assert in_blocks(config_of(one), q4_k)[1:] == (True, False, True)


def test_a_stock_model_computes_the_same(tmp_path: Path) -> None:
    model = load_model(save_tiny_teacher(tmp_path / "narrow", layers=4, ffn=WIDTHS), torch.float32)
    stock = stock_model(model)
    stock.save_pretrained(tmp_path / "stock")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    assert theirs.model.layers[2].mlp.up_proj.weight.shape == (128, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)
    assert stock_model(stock) is stock


def test_padding_goes_behind() -> None:
    values = np.array([[1, 2]], np.float32)
    np.testing.assert_array_equal(padded(values, (2, 3), fill=7), [[1, 2, 7], [7, 7, 7]])
    assert padded(values, (1, 2)) is values

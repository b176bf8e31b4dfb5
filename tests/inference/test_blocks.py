"""Blocks that run alone, against transformers' own pass, in every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.inference.blocks import embedded, only_blocks, second_moments, through_block, up_to_block
from autodistill.models.families import TRAINED, Axis, get_family, names_of
from autodistill.models.loading import decoder_layers, load_model
from autodistill.testing import save_tiny_teacher


@pytest.mark.parametrize("architecture", [name for name in TRAINED if names_of(name).blocks_alone])
def test_block_after_block_is_the_whole_model(architecture: str, tmp_path: Path) -> None:
    # Deep enough that each family with sliding windows has layers of both kinds.
    model = load_model(save_tiny_teacher(tmp_path, architecture=architecture, layers=7), torch.float32)
    tokens = np.random.default_rng(0).integers(3, 300, (2, 24))
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        whole = model.base_model(ids, output_hidden_states=True, use_cache=False)
    layers = decoder_layers(model)
    # Experts are no modules.
    name = {"gpt_neox": "mlp.dense_4h_to_h", "qwen3_moe": "self_attn.o_proj"}.get(architecture, "mlp.down_proj")

    states = embedded(model, tokens)
    for index in range(7):
        torch.testing.assert_close(torch.cat(states), whole.hidden_states[index])
        passed = list(through_block(model, index, states, (name,)))
        states = [one.after for one in passed]
        seen = passed[0].seen[name]
        assert seen.shape == (24, layers[index].get_submodule(name).weight.shape[1])
    with torch.no_grad():
        ended = model.base_model.get_submodule(names_of(architecture).final_norm)(torch.cat(states))
        torch.testing.assert_close(ended, whole.last_hidden_state)
        # From the middle on, a model needs only its upper blocks, each with its own window.
        with only_blocks(model, range(4, 7)):
            upper = model.base_model(inputs_embeds=whole.hidden_states[4], use_cache=False)
    torch.testing.assert_close(upper.last_hidden_state, whole.last_hidden_state)
    assert decoder_layers(model) is layers


def test_where_no_block_runs_alone_the_text_is_read_up_to_it(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path, architecture="gemma4_text", layers=6)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, tokens = load_model(folder, torch.float32), np.random.default_rng(0).integers(3, 300, (2, 24))
    name, seen = "self_attn.o_proj", {}
    for index, layer in enumerate(stock.model.layers):

        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], index: int = index) -> None:
            seen[index] = inputs[0]

        layer.get_submodule(name).register_forward_pre_hook(see)
    with torch.no_grad():
        whole = stock.model(torch.from_numpy(tokens), output_hidden_states=True, use_cache=False).hidden_states
    for index in range(5):
        passed = list(up_to_block(model, index, tokens, (name,)))
        torch.testing.assert_close(torch.cat([one.after for one in passed]), whole[index + 1])
        torch.testing.assert_close(torch.stack([one.seen[name] for one in passed]), seen[index])


def test_a_block_in_bfloat16_gives_nearly_the_same_and_keeps_its_states_in_float32(tmp_path: Path) -> None:
    model = load_model(save_tiny_teacher(tmp_path), torch.float32)
    states = embedded(model, np.random.default_rng(0).integers(3, 300, (2, 24)))
    name = get_family("llama").reading(Axis.FFN)
    (exact, _), (brief, _) = (list(through_block(model, 1, states, (name,), bf16=bf16)) for bf16 in (False, True))
    for found, aim in ((brief.after, exact.after), (brief.seen[name], exact.seen[name])):
        assert found.dtype == torch.float32
        assert not found.equal(aim)
        # Rounding to eight bits per number, over a few sums.
        torch.testing.assert_close(found, aim, rtol=0.05, atol=0.02 * float(aim.abs().max()))


def test_second_moments_are_the_mean_products_of_columns():
    dice = np.random.default_rng(0)
    for columns in (1, 3, 37):
        rows = [dice.normal(size=(length, columns)).astype(np.float32) for length in (5, 9)]
        found = second_moments([torch.from_numpy(one) for one in rows])
        joined = np.concatenate(rows).astype(np.float64)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), joined.T @ joined / len(joined), rtol=1e-5, atol=1e-6)
        assert torch.equal(found, found.T)

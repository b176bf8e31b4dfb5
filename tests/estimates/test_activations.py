"""What a token takes in a layer, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autodistill.advisor.describe import shape
from autodistill.estimates.activations import (
    activation_rows,
    active_ffn,
    all_activation_rows,
    cached_bytes,
    fused_rows,
    gated,
    is_further_table,
    kv_bytes,
    latent_attention,
    recurrent_rows,
    rows_by_layer,
    window_in,
)
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec

SIZES = {"layers": 4, "width": 96, "heads": 6, "kv_heads": 3, "ffn": 200, "vocab": 1000}  # heads of 16
PLAIN = shape(SIZES).spec
F16 = ("f16", "f16")


def linear(name: str, rows: int, columns: int = 96) -> TensorSpec:
    return TensorSpec(name=f"model.layers.0.{name}.weight", role=Role.LINEAR, shape=(rows, columns))


def having(spec: ModelSpec, *tensors: TensorSpec, **changes: Any) -> ModelSpec:
    return replace(spec, tensors=(*spec.tensors, *tensors), **changes)


def test_keys_and_values_are_in_blocks_of_their_types_and_latents_are_cached_once() -> None:
    row = 3 * 16
    assert kv_bytes(PLAIN, 2, 10, F16) == 2 * 10 * row * (2 + 2)
    assert kv_bytes(PLAIN, 2, 32, ("q8_0", "q4_0")) == 2 * 32 * row * (34 + 18) // 32
    assert kv_bytes(replace(PLAIN, latent=64), 2, 10, ("q8_0", "q4_0")) == 2 * 10 * 64 * 34 // 32


def test_layers_with_a_window_hold_its_tokens_and_layers_without_keys_hold_none() -> None:
    spec = replace(PLAIN, window=7, windowed=(1, 3))
    row = 3 * 16 * 4
    assert cached_bytes(spec, "vllm", 100, 7, F16) == 2 * 100 * row + 2 * 7 * row
    assert cached_bytes(spec, "onnxruntime", 100, 7, F16) == 4 * 100 * row, "it knows no windows"
    apart = replace(spec, kv_widths=(10, 20, 0, 40))
    assert cached_bytes(apart, "vllm", 100, 7, F16) == 4 * (100 * (10 + 0) + 7 * (20 + 40))
    assert cached_bytes(apart, "onnxruntime", 100, 7, F16) == 4 * 100 * 70


def test_a_runtime_has_the_windows_of_the_families_that_it_knows() -> None:
    cases = {
        ("mistral", "transformers"): (7, 2),
        ("mistral", "vllm"): (7, 2),
        ("mistral", "onnxruntime"): (0, 0),
        ("mistral", "llama.cpp"): (0, 0),
        ("gemma3_text", "llama.cpp"): (7, 2),
        ("gemma3_text", "onnxruntime"): (0, 0),
    }
    for (family, runtime), expected in cases.items():
        spec = replace(PLAIN, architecture=family, window=7, windowed=(1, 3))
        assert window_in(spec, runtime) == expected, (family, runtime)
        assert window_in(replace(spec, window=0, windowed=()), runtime) == (0, 0)


def test_a_token_passes_through_its_experts_and_the_shared_ones() -> None:
    assert active_ffn(PLAIN) == 200
    assert active_ffn(replace(PLAIN, experts=8, active_experts=2)) == 2 * 200
    assert active_ffn(replace(PLAIN, experts=8, active_experts=2, shared_experts=1)) == 3 * 200
    # Of models with latent attention and experts, the first layers have one wider FFN.
    wide = having(PLAIN, linear("mlp.gate_proj", 900), experts=8, active_experts=2)
    assert active_ffn(replace(wide, latent=40)) == 900
    assert active_ffn(replace(wide, latent=40, active_experts=5)) == 5 * 200
    assert active_ffn(wide) == 2 * 200


def test_rows_of_a_layer_are_four_of_the_width_and_three_or_two_of_the_ffn() -> None:
    neox = shape(SIZES | {"kv_heads": 6}, family="gpt_neox").spec
    assert (gated(PLAIN), gated(neox), gated(replace(PLAIN, architecture="unknown"))) == (True, False, True)
    assert (activation_rows(PLAIN), activation_rows(neox)) == (4 * 96 + 3 * 200, 4 * 96 + 2 * 200)
    assert (fused_rows(PLAIN), fused_rows(neox)) == ((), (3 * 96,))
    assert fused_rows(replace(PLAIN, architecture="unknown")) == ()
    assert all_activation_rows(PLAIN) == 4 * (4 * 96 + 3 * 200)
    widths = (200, 50, 100, 200)
    for spec, each in ((PLAIN, 3), (neox, 2)):
        assert all_activation_rows(replace(spec, ffn_widths=widths)) == 4 * 4 * 96 + each * sum(widths)


def test_latent_attention_has_queries_as_long_as_the_latents_and_outputs() -> None:
    norms = (
        TensorSpec(name=f"model.layers.{layer}.self_attn.kv_a_layernorm.weight", role=Role.NORM, shape=(size,))
        for layer, size in enumerate((30, 32))
    )
    assert latent_attention(having(PLAIN, *norms, latent=40)) == 6 * (16 + 40 + 32)


@pytest.mark.parametrize(
    ("made", "values", "gates", "rows"),
    [(100, 50, 60, 200), (100, 90, 60, 270), (100, 50, 160, 320), (100, None, None, 200), (None, 90, 160, 0)],
)
def test_recurrent_layers_have_twice_what_is_made_or_three_times_the_values_or_twice_the_gates(
    made: int | None, values: int | None, gates: int | None, rows: int
) -> None:
    sizes = {"linear_attn.in_proj_qkv": made, "linear_attn.in_proj_z": values, "self_attn.q_proj": gates}
    without = replace(PLAIN, tensors=[one for one in PLAIN.tensors if "q_proj" not in one.name])
    spec = having(without, *(linear(name, size) for name, size in sizes.items() if size is not None))
    assert recurrent_rows(spec) == rows


def test_further_tables_are_those_of_another_shape_than_the_embeddings() -> None:
    tables = [
        TensorSpec(name=f"model.more.{size}.weight", role=Role.EMBEDDING, shape=(1000, size)) for size in (64, 32)
    ]
    spec = having(PLAIN, *tables)
    assert rows_by_layer(spec) == 64 + 32
    assert rows_by_layer(PLAIN) == 0
    assert [is_further_table(one, spec) for one in (*tables, spec.tensors[0], linear("mlp.up_proj", 5))] == [
        True,
        True,
        False,
        False,
    ]

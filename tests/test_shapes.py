"""Fractions become sizes by the stated rules, and sizes that cannot be are refused with the rule."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.estimate import spec_from_config
from autodistill.shapes import cut_spec
from autodistill.strategy import Init

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
NEOX = LLAMA | {"model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8, "tie_word_embeddings": False}


def sizes(init: Init, config: dict[str, object] = LLAMA) -> tuple[int, ...]:
    spec = cut_spec(init, spec_from_config(config))
    return spec.layers, spec.width, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn_width


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ({}, (24, 576, 9, 3, 64, 1536)),
        ({"ffn": 0.7}, (24, 576, 9, 3, 64, 1088)),  # 1075.2: 16.8 times 64
        ({"heads": 0.7}, (24, 576, 6, 2, 64, 1536)),  # 2.1 groups of 3
        ({"heads": 0.01}, (24, 576, 3, 1, 64, 1536)),
        ({"width": 0.67, "heads": 0.7}, (24, 384, 6, 2, 64, 1536)),
        ({"ffn": 0.99, "width": 0.99}, (24, 576, 9, 3, 64, 1536)),
    ],
)
def test_sizes_by_hand(fractions: dict[str, float], expected: tuple[int, ...]) -> None:
    assert sizes(Init(**fractions)) == expected  # type: ignore[arg-type]


def test_neox_heads_fill_the_width() -> None:
    assert sizes(Init(heads=0.5, width=0.5), NEOX) == (24, 256, 4, 4, 64, 1536)
    for fractions in ({"heads": 0.5}, {"width": 0.5}, {"heads": 0.5, "width": 0.75}):
        with pytest.raises(InputError, match="the heads fill the width, so give both the same fraction"):
            sizes(Init(**fractions), NEOX)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"ffn": 0.02}, "init.ffn 0.02 of 1536 neurons rounds to none: they are kept in multiples of 64"),
        ({"width": 0.05}, "init.width 0.05 of 576 channels rounds to none"),
        ({"width": 0.67}, "9 heads, which do not divide the width of 384"),
    ],
)
def test_impossible_sizes_are_refused_with_their_rule(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sizes(Init(**fractions))  # type: ignore[arg-type]


fractions = st.floats(0.05, 1)


@given(fractions, fractions, fractions)
def test_a_shape_is_that_of_transformers_for_its_sizes(depth: float, ffn: float, heads: float) -> None:
    spec = cut_spec(Init(depth=depth, ffn=ffn, heads=heads), spec_from_config(LLAMA))
    changes = {
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": 64,
        "intermediate_size": spec.ffn_width,
    }
    assert spec == spec_from_config(json.loads(json.dumps(LLAMA | changes)))
    assert spec.ffn_width % 64 == 0
    assert spec.heads % spec.kv_heads == 0

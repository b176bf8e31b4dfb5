"""Fractions become sizes by the stated rules, and impossible sizes are refused with the rule."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.distillation.student.shapes import cut_spec, layer_choices, student_depth
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold
from autodistill.models.config import spec_from_config
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init

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
        ({"ffn": 0.7}, (24, 576, 9, 3, 64, 1088)),  # 1075.2 is 16.8 times 64
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


def test_widths_are_of_the_kept_layers() -> None:
    layers = LLAMA["num_hidden_layers"]
    widths = tuple(64 * (1 + layer % 5) for layer in range(layers // 2))
    for way in ("even", "influence"):
        spec = cut_spec(Init(depth=0.5, layers=way, ffn_widths=widths), spec_from_config(LLAMA))
        assert (spec.ffn_widths, spec.ffn_width) == (widths, 320)
        assert [t.shape[0] for t in spec.tensors if t.name.endswith("up_proj.weight")] == list(widths)
    assert Init(depth=0.5, ffn_widths=widths).selective
    with pytest.raises(InputError, match=rf"has {layers} numbers, and {layers // 2} of the teacher's {layers} layers"):
        cut_spec(Init(depth=0.5, ffn_widths=(64,) * layers), spec_from_config(LLAMA))
    with pytest.raises(InputError, match=r"keeps 1537 FFN neurons of the teacher's layer 0 .* which has 1536"):
        cut_spec(Init(depth=0.5, ffn_widths=(1537,) * (layers // 2)), spec_from_config(LLAMA))


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


def test_examples_of_layers_that_a_calibration_chooses_leave_out_some_early_and_the_others_late() -> None:
    """Three of seven layers are left out. Just after the first layer, none, one, two or three of them are."""
    choices = layer_choices(Init(depth=4 / 7, layers="block-influence"), 7)
    assert choices == ((0, 1, 2, 6), (0, 2, 3, 6), (0, 3, 4, 6), (0, 4, 5, 6))


CHOICES = {
    "even": (Init(depth=0.5), ((0, 2, 5, 7),)),
    "all": (Init(depth=1.0), (tuple(range(8)),)),
    "one": (Init(depth=0.13, layers="influence"), ((7,),)),
    "none": (Init(depth=0.01), ((7,),)),
    "two": (Init(depth=0.25), ((0, 7),)),
    "contiguous": (Init(depth=0.5, layers="contiguous"), ((0, 1, 2, 7),)),
    "influence": (Init(depth=0.5, layers="influence"), ((0, 5, 6, 7), (0, 1, 6, 7), (0, 1, 2, 7))),
    "all but one": (Init(depth=7 / 8, layers="contiguous"), ((0, 1, 2, 3, 4, 5, 7),)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_layers_that_eight_leave_by_hand(name: str) -> None:
    init, expected = CHOICES[name]
    assert layer_choices(init, 8) == expected
    assert {len(kept) for kept in expected} == {student_depth(init, 8)}


def test_whole_numbers_of_layers_are_not_rounded_away() -> None:
    for layers in range(1, 60):
        assert [student_depth(Init(depth=kept / layers), layers) for kept in range(1, layers + 1)] == list(
            range(1, layers + 1)
        )
    assert student_depth(Init(depth=0.7), 30) == 21
    assert student_depth(Init(depth=0.6999), 30) == 20


GEMMA = NEOX | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 18,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 16,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("init", "holds"),
    [
        (Init(depth=1.0), True),
        (Init(depth=1.0, ffn=0.5, width=0.5, heads=0.5), True),
        (Init(depth=2 / 3, layers="contiguous"), True),  # six fewer layers, from one full attention to the next
        (Init(depth=2 / 3, layers="influence"), True),  # wherever the six are left out
        (Init(depth=13 / 18, layers="contiguous"), False),
        (Init(depth=13 / 18, layers="influence"), False),  # at least in some places
        (Init(depth=2 / 3, layers="block-influence"), False),  # six layers that need not be neighbours
        (Init(depth=2 / 3), True),  # then every fourth
        (Init(depth=13 / 18), False),
        (Init(depth=5 / 18), True),  # 1, 5, 10, 14 and 18: only the last has full attention
        (Init(depth=13 / 18, source="scratch"), True),
    ],
    ids=str,
)
def test_a_cut_that_breaks_the_pattern_of_windows_is_known_before_training(init: Init, holds: bool) -> None:
    deployment = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
    assert (cannot_hold(cut_spec(init, spec_from_config(GEMMA)), deployment) == "") == holds


def test_windows_are_those_of_the_layers_that_are_kept() -> None:
    teacher = spec_from_config(GEMMA)
    assert [layer for layer in range(18) if layer not in teacher.windowed] == [5, 11, 17]
    student = cut_spec(Init(depth=2 / 3), teacher)
    kept = layer_choices(Init(depth=2 / 3), 18)[0]
    assert student.windowed == tuple(new for new, old in enumerate(kept) if (old + 1) % 6)


def test_named_layers_are_left_out_and_all_others_kept() -> None:
    assert layer_choices(Init(depth=1.0, dropped=(2, 3)), 8) == ((0, 1, 5, 6, 7),)
    assert layer_choices(Init(depth=1.0, dropped=(1, 6)), 8) == ((0, 7),)
    assert [student_depth(Init(depth=1.0, dropped=dropped), 8) for dropped in ((2, 3), (1, 6))] == [5, 2]
    with pytest.raises(InputError, match="leaves out layers 2 to 7, and the last layer that can be left out"):
        layer_choices(Init(depth=1.0, dropped=(2, 6)), 8)
    assert layer_choices(Init(depth=1.0, dropped=(6, 1)), 8) == ((0, 1, 2, 3, 4, 5, 7),)
    with pytest.raises(InputError, match=r"layers 7 to 7, and the last layer .* of the teacher's 8 is 6$"):
        layer_choices(Init(depth=1.0, dropped=(7, 1)), 8)

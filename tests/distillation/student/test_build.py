"""Which layers are kept, against values by hand, and that the cut model is a plain transformers model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autodistill.distillation.losses.hidden_states import Pair, layer_map
from autodistill.distillation.student.build import build_student, kept_layers, same_depth
from autodistill.distillation.student.shapes import student_depth
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.errors import InputError
from autodistill.models.loading import decoder_layers
from autodistill.strategy.recipe import Alignment
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [(0.8, 30, 24), (0.7, 30, 21), (0.55, 20, 11), (0.5, 5, 2), (0.29, 100, 29), (0.01, 6, 1), (1.0, 6, 6)],
)
def test_depth_is_rounded_down_but_not_below_one(depth, layers, expected):
    assert student_depth(Init(depth=depth), layers) == expected


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [
        (0.5, 6, (0, 2, 5)),  # 0, 2.5, 5: halves go to the even neighbour
        (0.8, 6, (0, 2, 3, 5)),  # 0, 1.67, 3.33, 5
        (0.7, 10, (0, 2, 3, 4, 6, 8, 9)),  # multiples of 1.5, halves to the even neighbour
        (1.0, 4, (0, 1, 2, 3)),
        (0.1, 10, (9,)),
        (0.2, 10, (0, 9)),
    ],
)
def test_even_layers(depth, layers, expected):
    assert kept_layers(Init(depth=depth, layers="even"), layers) == expected


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [(0.5, 6, (0, 1, 5)), (0.8, 10, (0, 1, 2, 3, 4, 5, 6, 9)), (1.0, 4, (0, 1, 2, 3)), (0.1, 10, (9,))],
)
def test_contiguous_layers(depth, layers, expected):
    assert kept_layers(Init(depth=depth, layers="contiguous"), layers) == expected


def _calibration(similarity):
    empty = torch.zeros(0, dtype=torch.float64)
    return PartImportance(similarity=similarity, neurons=empty, groups=empty, channels=empty)


def test_influence_drops_the_block_that_turns_the_state_least():
    # These are the angles, in one plane, of the inputs of layers 0 to 5 and of the last output.
    angles = torch.tensor([0.0, 0.9, 1.0, 1.3, 1.2, 2.0, 2.05], dtype=torch.float64)
    calibration = _calibration((angles[:, None] - angles).cos())

    def kept(depth):
        return kept_layers(Init(depth=depth, layers="influence"), 6, calibration)

    assert kept(0.84) == (0, 2, 3, 4, 5)  # layer 1 turns by 0.1; the last turns by less, but is always kept
    assert kept(0.67) == (0, 1, 4, 5)  # layers 2 and 3 turn by 0.2 together
    assert kept(0.5) == (0, 4, 5)  # layers 1 to 3 turn by 0.3, layers 2 to 4 by 1.0
    assert kept(0.34) == (0, 5)
    assert kept(0.1) == (5,)
    assert kept(1.0) == (0, 1, 2, 3, 4, 5)


def test_block_influence_drops_the_layers_that_each_turn_the_state_least():
    """Influence is one minus the cosine between a layer's input and output.

    Both ends stay, whatever their influence.
    """
    # The layers turn by 0, 0.5, 0.1, 0.3, 0.05 and 0.
    angles = torch.tensor([0.0, 0.0, 0.5, 0.6, 0.9, 0.95, 0.95], dtype=torch.float64)
    calibration = _calibration((angles[:, None] - angles).cos())

    def kept(depth):
        return kept_layers(Init(depth=depth / 6, layers="block-influence"), 6, calibration)

    assert [kept(depth) for depth in range(6, 0, -1)] == [
        (0, 1, 2, 3, 4, 5),
        (0, 1, 2, 3, 5),
        (0, 1, 3, 5),  # layers 4 and 2 are gone, which are not neighbours
        (0, 1, 5),
        (0, 5),
        (5,),
    ]


@pytest.mark.parametrize("how", ["even", "contiguous", "influence", "block-influence"])
def test_layers_ascend_and_hold_both_ends_at_every_depth(how):
    torch.manual_seed(0)
    for layers in range(2, 40):
        for depth in range(2, layers + 1):
            calibration = _calibration(torch.rand(layers + 1, layers + 1, dtype=torch.float64))
            kept = kept_layers(Init(depth=depth / layers, layers=how), layers, calibration)
            assert len(kept) == depth
            assert sorted(set(kept)) == list(kept)
            assert (kept[0], kept[-1]) == (0, layers - 1)


FAMILIES = [
    *(("llama", True), ("llama", False), ("mistral", True), ("qwen2", False), ("qwen3", True)),
    *(("gemma3_text", True), ("gpt_neox", False)),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: f"{family[0]}-{'tied' if family[1] else 'untied'}")
def teacher(request, tmp_path_factory):
    architecture, tied = request.param
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), architecture=architecture, tied=tied)


def test_weights_are_the_teachers(teacher):
    weights = load_file(teacher / "model.safetensors")
    student, kept = build_student(teacher, Init(depth=0.5))
    assert kept == (0, 2, 5)
    expected = {}
    for name, tensor in weights.items():
        if not name.startswith(("model.layers.", "gpt_neox.layers.")):
            expected[name.replace("embed_out", "lm_head")] = tensor
        elif int(name.split(".")[2]) in kept:
            parts = name.split(".")
            expected[".".join([*parts[:2], str(kept.index(int(parts[2]))), *parts[3:]])] = tensor
    actual = dict(student.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert all(parameter.dtype == torch.float32 for parameter in actual.values())


def test_saved_and_loaded_it_says_the_same(teacher, tmp_path):
    student, _ = build_student(teacher, Init(depth=0.5))
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.num_hidden_layers == len(decoder_layers(again)) == 3
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)


def test_generates_with_its_cache_what_it_says_without(teacher):
    student, _ = build_student(teacher, Init(depth=0.5))
    ids = torch.tensor([[5, 17, 99, 42]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 2}
    with torch.no_grad():
        cached = student.generate(ids, use_cache=True, **arguments)
        plain = ids
        while plain.shape[1] < cached.shape[1]:
            following = student(plain, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            plain = torch.cat([plain, following], dim=1)
        assert torch.equal(cached, plain)
        entries = student(cached, use_cache=True).past_key_values
    assert len(entries) == 3
    assert entries.get_seq_length(2) == cached.shape[1]


def test_one_layer(teacher):
    student, kept = build_student(teacher, Init(depth=0.01))
    assert kept == (5,)
    with torch.no_grad():
        assert student(torch.arange(5, 25)[None]).logits.isfinite().all()


def test_from_scratch_is_a_function_of_the_seed_alone(teacher):
    init = Init(source="scratch", depth=0.5)
    state = torch.get_rng_state()
    (one, kept), (same, _), (other, _) = (build_student(teacher, init, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert kept == (0, 2, 4)
    cut, _ = build_student(teacher, Init(depth=0.5))
    assert {name: p.shape for name, p in one.named_parameters()} == {
        name: p.shape for name, p in cut.named_parameters()
    }
    kinds = json.loads((teacher / "config.json").read_text()).get("layer_types")
    # New weights follow no layer of the teacher, so sliding windows lie where a teacher of so few layers has them.
    assert one.config.to_dict() == cut.config.to_dict() | ({"layer_types": kinds[:3]} if kinds else {})
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if parameter.ndim == 2:
            assert not torch.equal(parameter, other.get_parameter(name))
            # The teacher's own weights were drawn with its initializer_range too.
            assert float(parameter.detach().std()) == pytest.approx(0.1, rel=0.1)


def test_a_model_without_a_list_of_layers():
    with pytest.raises(InputError, match="Linear has no list of layers"):
        decoder_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layers", "teacher_layers", "states"),
    [
        # These follow a third, two thirds and all of the teacher's layers.
        (3, 12, (3, 7, 11)),
        (4, 4, (0, 1, 2, 3)),
        (4, 6, (1, 2, 3, 5)),
        (1, 6, (5,)),
        # The student is deeper than the teacher, and no state comes before the first.
        (4, 2, (0, 0, 1, 1)),
    ],
)
def test_a_layer_that_was_not_copied_follows_the_same_depth(layers, teacher_layers, states):
    pairs = layer_map(Alignment(layers="all"), same_depth(layers, teacher_layers), teacher_layers)
    assert pairs == tuple(Pair(layer, state) for layer, state in enumerate(states))

"""Watched attention against transformers' eager attention, and the loss against its definition in float64."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv

from autodistill.distillation.losses import attention as attention_module
from autodistill.distillation.losses.attention import (
    Heads,
    TeacherBlock,
    attention_loss,
    check_attention,
    teacher_layer,
    watch,
)
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.loading import ATTENTION, load_model
from autodistill.strategy.recipe import Attention
from autodistill.testing import save_tiny_teacher

MAPS, RELATIONS = Attention(), Attention(kind="relations", relation_heads=8)
TOKENS = 24


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    """Return a teacher of three layers. Mistral's has a window of 8 tokens."""
    folder = save_tiny_teacher(tmp_path_factory.mktemp(request.param) / "t", architecture=request.param, layers=3)
    if request.param == "mistral":
        config = AutoConfig.from_pretrained(folder)
        config.sliding_window = 8
        config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gemma3_text", "gpt_neox"])
def other(request, tmp_path_factory):
    """Return Gemma 3 with windows of 8 tokens in two of three layers, or GPT-NeoX with one matrix for three parts."""
    folder = save_tiny_teacher(tmp_path_factory.mktemp(request.param) / "t", architecture=request.param, layers=3)
    if request.param == "gemma3_text":
        config = AutoConfig.from_pretrained(folder)
        config.sliding_window, config.layer_types = 8, ["sliding_attention", "full_attention", "sliding_attention"]
        config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 300, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def _eager(folder, ids):
    """Return the attention maps and the inputs of every layer, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    return out.attentions, out.hidden_states


def _matrices(heads):
    """Return attention matrices in float64 by their definition."""
    tokens = heads.left.shape[2]
    visible = torch.ones(tokens, tokens).tril().bool() if heads.visible is None else heads.visible
    # transformers' own rule: key head h // group serves query head h.
    right = repeat_kv(heads.right, heads.left.shape[1] // heads.right.shape[1])
    scores = heads.left.double() @ right.double().transpose(-1, -2) * heads.scale
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1)


@pytest.mark.parametrize("layer", [0, 2])
def test_watched_maps_are_those_of_eager_attention(folder, ids, layer):
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        plain = model(ids).logits
        with watch(model, MAPS, layer) as found:
            watched = model(ids).logits
        model(ids)
    (heads,) = found
    torch.testing.assert_close(_matrices(heads), _eager(folder, ids)[0][layer].double(), atol=2e-6, rtol=0)
    assert torch.equal(watched, plain)
    assert model.config._attn_implementation == ATTENTION


def test_watched_maps_carry_the_gradient(folder, ids):
    """A function of the maps has the same gradient as through eager attention's own output."""
    weights = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))
    gradients = []
    for implementation in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
        if implementation == "sdpa":
            with watch(model, MAPS) as found:
                model(ids)
            maps = _matrices(found[0])
        else:
            maps = model(ids, output_attentions=True).attentions[-1].double()
        (maps * weights).square().sum().backward()
        gradients.append([layer.self_attn.k_proj.weight.grad.clone() for layer in model.model.layers])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_watched_relations_are_the_projections_of_the_normalized_input(folder, ids):
    model = load_model(folder, torch.float32)
    layer = model.model.layers[-1]
    with torch.no_grad(), watch(model, RELATIONS) as found:
        model(ids)
    entering = _eager(folder, ids)[1][2].double()
    size = (entering.square().mean(dim=-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    entering = entering / size * layer.input_layernorm.weight.detach().double()
    projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    for heads, projection in zip(found, projections, strict=True):
        expected = entering @ projection.weight.detach().double().T
        if projection.bias is not None:
            expected = expected + projection.bias.detach().double()
        channels = expected.shape[-1] // 8
        for head in range(8):
            part = expected[..., head * channels : (head + 1) * channels]
            torch.testing.assert_close(heads.left[:, head].double(), part, atol=1e-5, rtol=1e-5)
        assert heads.left is heads.right
        assert heads.scale == pytest.approx(channels**-0.5)
    assert not any(len(projection._forward_hooks) for projection in projections)


def test_a_failed_forward_pass_leaves_no_watcher(folder):
    model = load_model(folder, torch.float32)
    with pytest.raises(RuntimeError), watch(model, MAPS):
        raise RuntimeError
    assert attention_module._watchers == {}
    assert model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize("attention", [MAPS, RELATIONS], ids=["maps", "relations"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_block_of_the_teacher_computes_what_the_teacher_does(folder, ids, layer, attention):
    model = load_model(folder, torch.float32)
    with torch.no_grad(), watch(model, attention, layer) as expected:
        model(ids)
    block = TeacherBlock(load_model(folder, torch.float32), layer)
    assert block.layer == layer
    found = block.heads(_eager(folder, ids)[1][layer], attention)
    for actual, heads in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.left, heads.left, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(_matrices(actual), _matrices(heads), atol=1e-5, rtol=0)
    own = sum(p.numel() for p in model.model.layers[layer].parameters())
    assert sum(p.numel() for p in block._model.parameters()) == own + 64  # the final norm stays


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_maps_and_blocks_of_gemma_and_neox_are_those_of_eager_attention(other, ids, layer):
    model = load_model(other, torch.float32)
    with torch.no_grad(), watch(model, MAPS, layer) as found:
        model(ids)
    maps, states = _eager(other, ids)
    torch.testing.assert_close(_matrices(found[0]), maps[layer].double(), atol=2e-6, rtol=0)
    if layer > 0:
        (heads,) = TeacherBlock(model, layer).heads(states[layer], MAPS)
        torch.testing.assert_close(_matrices(heads), maps[layer].double(), atol=1e-5, rtol=0)


def test_relations_of_fused_projections_are_those_of_its_three_parts(tmp_path, ids):
    """GPT-NeoX's matrix stacks the queries, keys and values of each head."""
    folder = save_tiny_teacher(tmp_path / "t", architecture="gpt_neox", layers=3)
    model = load_model(folder, torch.float32)
    with torch.no_grad(), watch(model, RELATIONS) as found:
        model(ids)
    layer, config = model.base_model.layers[-1], model.config
    with torch.no_grad():
        fused = layer.attention.query_key_value(layer.input_layernorm(_eager(folder, ids)[1][2]))
    parts = fused.unflatten(-1, (config.num_attention_heads, 3, -1)).unbind(-2)
    for heads, part in zip(found, parts, strict=True):
        expected = part.flatten(-2).unflatten(-1, (8, -1)).transpose(1, 2)
        torch.testing.assert_close(heads.left, expected, atol=1e-5, rtol=1e-5)


def _sides(heads, tokens, channels, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(3, heads, tokens, channels, generator=generator).to(dtype) for _ in range(2))
    return left, right


def _divergence(student, teacher, windows):
    """Return KL(teacher || student), token by token over what both see, with each row's softmax taken separately."""
    (left, right, scale), (their_left, their_right, their_scale) = student, teacher
    sequences, heads, tokens, _ = their_left.shape
    total = 0.0
    for sequence in range(sequences):
        for head in range(heads):
            for token in range(tokens):
                seen = slice(max(0, token + 1 - min(windows)), token + 1)
                q = (right[sequence, head, seen] @ left[sequence, head, token] * scale).softmax(0)
                p = (their_right[sequence, head, seen] @ their_left[sequence, head, token] * their_scale).softmax(0)
                total = total + (p * (p / q).log()).sum()
    return total / (sequences * heads * tokens)


def _window(tokens, width):
    place = torch.arange(tokens)
    behind = place[:, None] - place
    return ((behind >= 0) & (behind < width))[None, None]


@pytest.mark.parametrize("windows", [(99, 99), (4, 99), (4, 6)])
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_loss_and_gradient_by_definition(monkeypatch, windows, chunk):
    """The models have different numbers of channels, and the student has one token more than its teacher's outputs."""
    monkeypatch.setattr(attention_module, "_CPU_CHUNK", chunk)
    tokens = 9
    left, right = (side.requires_grad_() for side in _sides(4, tokens + 1, 6, 0))
    their_left, their_right = _sides(4, tokens, 10, 1)
    masks = [None if width == 99 else _window(tokens + 1 - number, width) for number, width in enumerate(windows)]
    loss = attention_loss([Heads(left, right, 0.7, masks[0])], [Heads(their_left, their_right, 0.3, masks[1])])
    loss.backward()
    actual = (left.grad.clone(), right.grad.clone())
    left.grad = right.grad = None
    expected = _divergence((left, right, 0.7), (their_left, their_right, 0.3), windows)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for side, gradient in zip((left, right), actual, strict=True):
        torch.testing.assert_close(gradient, side.grad, rtol=1e-9, atol=1e-14)
        assert not gradient[:, :, tokens].any()


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_padding_does_not_count(monkeypatch, chunk):
    """Two sequences have 7 and 4 tokens. The loss is the mean over their tokens, as if each sequence were alone."""
    monkeypatch.setattr(attention_module, "_CPU_CHUNK", chunk)
    left, right = (side.requires_grad_() for side in _sides(4, 7, 6, 0))
    their_left, their_right = _sides(4, 7, 10, 1)
    lengths = [7, 4, *([0] * (len(left) - 2))]
    counted = torch.arange(7) < torch.tensor(lengths)[:, None]
    loss = attention_loss([Heads(left, right, 0.7)], [Heads(their_left, their_right, 0.3)], counted)
    actual = torch.autograd.grad(loss, (left, right))
    expected = 0.0
    for place, length in enumerate(lengths[:2]):
        part = (slice(place, place + 1), slice(None), slice(length))
        ours, theirs = (left[part], right[part], 0.7), (their_left[part], their_right[part], 0.3)
        expected = expected + length / sum(lengths) * _divergence(ours, theirs, (99, 99))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for gradient, summed in zip(actual, torch.autograd.grad(expected, (left, right)), strict=True):
        torch.testing.assert_close(gradient, summed, rtol=1e-9, atol=1e-14)


def test_relations_of_a_side_with_itself_and_the_mean_over_kinds():
    sides = [_sides(2, 5, channels, seed)[0].requires_grad_() for seed, channels in enumerate((4, 2, 2))]
    theirs = [_sides(2, 5, channels, seed)[0] for seed, channels in enumerate((8, 4, 4), start=3)]
    loss = attention_loss(
        [Heads(side, side, side.shape[-1] ** -0.5) for side in sides],
        [Heads(side, side, side.shape[-1] ** -0.5) for side in theirs],
    )
    actual = torch.autograd.grad(loss, sides)
    expected = sum(
        _divergence((side, side, side.shape[-1] ** -0.5), (their, their, their.shape[-1] ** -0.5), (99, 99))
        for side, their in zip(sides, theirs, strict=True)
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()) / 3, rel=1e-12)
    for gradient, summed in zip(actual, torch.autograd.grad(expected, sides), strict=True):
        torch.testing.assert_close(gradient, summed / 3, rtol=1e-9, atol=1e-14)


def test_a_right_head_serves_its_group():
    left, right = _sides(6, 7, 4, 0)
    their_left, their_right = _sides(6, 7, 4, 1)
    right, their_right = right[:, :3].clone().requires_grad_(), their_right[:, :2]
    loss = attention_loss([Heads(left, right, 0.5)], [Heads(their_left, their_right, 0.5)])
    (actual,) = torch.autograd.grad(loss, right)
    served = (left, right[:, [0, 0, 1, 1, 2, 2]], 0.5), (their_left, their_right[:, [0, 0, 0, 1, 1, 1]], 0.5)
    expected = _divergence(*served, (99, 99))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, right)[0], rtol=1e-9, atol=1e-14)


def test_equal_attention_is_the_minimum():
    left, right = _sides(4, 9, 6, 0, torch.float32)
    left.requires_grad_()
    loss = attention_loss([Heads(left, right, 0.5)], [Heads(left.detach() * 2, right, 0.25)])
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert left.grad.abs().max() < 1e-7


def test_bfloat16_sides_are_worked_on_in_float32():
    """bfloat16 would round such large products by as much as their softmax."""
    left, right = (4 * side for side in _sides(4, 16, 6, 0, torch.bfloat16))
    target = _sides(4, 16, 6, 1, torch.bfloat16)
    left.requires_grad_()
    loss = attention_loss([Heads(left, right, 0.4)], [Heads(*target, 0.4)])
    loss.backward()
    exact = left.detach().double().requires_grad_()
    expected = _divergence((exact, right.double(), 0.4), (target[0].double(), target[1].double(), 0.4), (99, 99))
    expected.backward()
    assert loss.dtype == torch.float32
    assert left.grad.dtype == torch.bfloat16
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(left.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_matrices_are_held_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(attention_module, "_CPU_CHUNK", 2 * 64 * 64)
    left, right = (side.requires_grad_() for side in _sides(16, 64, 2, 0, torch.float32))
    with _Largest() as largest:
        attention_loss([Heads(left, right, 1.0)], [Heads(*_sides(16, 64, 2, 1), 1.0)]).backward()
    assert largest.elements == 2 * 64 * 64  # out of 3 * 16 * 64 * 64


@pytest.mark.parametrize(
    ("depth", "layers", "expected"), [(1.0, 30, 29), (0.88, 24, 20), (0.7, 30, 20), (0.5, 3, 0), (0.01, 12, 0)]
)
def test_teacher_layer(depth, layers, expected):
    assert teacher_layer(Attention(teacher_depth=depth), layers) == expected


def _spec(heads=4, kv_heads=2, head_dim=16, layers=6):
    return spec_from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": 64,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": 128,
            "vocab_size": 300,
            "max_position_embeddings": 512,
        }
    )


@pytest.mark.parametrize(
    ("attention", "student", "teacher", "message"),
    [
        (MAPS, {"heads": 2}, {}, "the student has 2 heads and the teacher 4: use relations"),
        (MAPS, {}, {"layers": 1}, "teacher_depth is 1.0, the first of the teacher's 1 layers"),
        (Attention(teacher_depth=0.2), {}, {}, "raise it so that it reaches the second"),
        (Attention(kind="relations", relation_heads=3), {}, {}, "the student's 64 channels of queries"),
        (Attention(kind="relations", relation_heads=64), {}, {}, "the student's 32 channels of keys and values"),
        (Attention(kind="relations", relation_heads=32), {}, {"head_dim": 12}, "the teacher's 48 channels of queries"),
    ],
)
def test_what_cannot_be_compared_is_refused(attention, student, teacher, message):
    with pytest.raises(InputError, match=message):
        check_attention(attention, _spec(**student), _spec(**teacher))


def test_relations_compare_any_head_counts():
    for spec in (_spec(heads=2, kv_heads=1), _spec(heads=8, kv_heads=8, head_dim=24)):
        check_attention(RELATIONS, spec, _spec())
    check_attention(MAPS, _spec(kv_heads=4, layers=2), _spec())


def test_the_error_of_a_cached_state(workshop):
    """The maps from a float16 state are compared with the teacher's own maps."""
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))[:2]
    model = load_model(workshop.teacher, torch.float32)
    with torch.no_grad(), watch(model, MAPS, 4) as exact:
        model(ids)
    states = workshop.cache.state([0, 1], 3).float() * workshop.cache.state_size([0, 1], 3)
    found = TeacherBlock(load_model(workshop.teacher, torch.float32), 4).heads(states.unflatten(0, (2, -1)), MAPS)
    tokens = ids.shape[1] - 1
    error = (_matrices(found[0]) - _matrices(exact[0].first(tokens))).abs().max()
    assert 0 < error < 2e-3

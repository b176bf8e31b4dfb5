"""A student cut in every direction equals the whole teacher with the removed parts silenced, in float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.build import build_student, init_spec
from autodistill.distillation.teacher.importance import PartImportance, measure_importance
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.families import FAMILIES
from autodistill.models.loading import decoder_layers, load_model
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher

IDS = torch.arange(3, 63).remainder(300)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, tmp_path_factory):
    # Four groups of heads, 128 channels and 192 neurons can each be cut. Tables are tied or untied.
    return save_tiny_teacher(
        tmp_path_factory.mktemp("teacher"),
        architecture=request.param,
        width=128,
        heads=4 if request.param == "gpt_neox" else 8,
        kv_heads=4,
        ffn=192,
        layers=4,
        tied=request.param in ("llama", "gemma3_text"),
    )


@pytest.fixture(scope="module")
def importance(teacher):
    """Return importances in an arbitrary order, so that no cut happens to keep the first parts."""
    torch.manual_seed(1)
    return PartImportance(
        similarity=torch.rand(5, 5, dtype=torch.float64),
        neurons=torch.rand(4, 192, dtype=torch.float64),
        groups=torch.rand(4, 4, dtype=torch.float64),
        channels=torch.rand(128, dtype=torch.float64),
    )


def double(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def family_of(teacher):
    return json.loads((teacher / "config.json").read_text())["model_type"]


def removed(importance, count):
    return importance.argsort(dim=-1)[..., : importance.shape[-1] - count]


def output_of_attention(layer, neox):
    return layer.attention.dense if neox else layer.self_attn.o_proj


def output_of_ffn(layer, neox):
    return layer.mlp.dense_4h_to_h if neox else layer.mlp.down_proj


def silence_neurons(model, importance, neox, widths=(64,) * 4):
    for layer, own, width in zip(model.base_model.layers, importance.neurons, widths, strict=True):
        output_of_ffn(layer, neox).weight.data[:, removed(own, width)] = 0


def silence_groups(model, importance, neox):
    for layer, gone in zip(model.base_model.layers, removed(importance.groups, 2), strict=True):
        weight = output_of_attention(layer, neox).weight.data
        weight.unflatten(1, (4, -1))[:, gone] = 0


class NormOfKept(nn.Module):
    """A norm over only the kept channels, by its definition. The other channels become 0."""

    def __init__(self, norm, gone, kind, eps):
        super().__init__()
        self.norm, self.kind, self.eps = norm, kind, eps
        self.kept = torch.ones(128, dtype=torch.bool)
        self.kept[gone] = False

    def forward(self, x):
        inside = x[..., self.kept]
        weight = self.norm.weight[self.kept]
        if self.kind == "gpt_neox":
            inside = inside - inside.mean(dim=-1, keepdim=True)
        unit = inside / (inside.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        out = torch.zeros_like(x)
        if self.kind == "gpt_neox":
            out[..., self.kept] = unit * weight + self.norm.bias[self.kept]
        else:
            out[..., self.kept] = unit * (1 + weight if self.kind == "gemma3_text" else weight)
        return out


def silence_channels(model, importance, kind):
    gone = removed(importance.channels, 64)
    neox, body = kind == "gpt_neox", model.base_model
    eps = model.config.layer_norm_eps if neox else model.config.rms_norm_eps
    norms = [
        name
        for name, module in body.named_modules()
        if "norm" in name.rpartition(".")[2] and getattr(module, "weight", torch.empty(0)).shape == (128,)
    ]
    for name in norms:
        parent, _, last = name.rpartition(".")
        setattr(body.get_submodule(parent), last, NormOfKept(body.get_submodule(name), gone, kind, eps))


def test_a_student_keeps_as_many_neurons_in_each_layer_as_it_is_told(teacher, importance):
    widths = (192, 64, 100, 32)
    init = Init(depth=1.0, ffn_widths=widths)
    student, _ = build_student(teacher, init, calibration=importance)
    spec = init_spec(init, spec_from_config(json.loads((teacher / "config.json").read_text())))
    assert spec.ffn_widths == widths
    assert spec == spec_from_config(student.config.to_dict())
    whole = double(teacher)
    silence_neurons(whole, importance, family_of(teacher) == "gpt_neox", widths)
    with torch.no_grad():
        expected = whole(IDS).logits
        actual = student.double()(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


def test_a_teacher_whose_layers_differ_is_cut_like_any(teacher, importance, tmp_path):
    widths = (192, 64, 128, 100)
    first, _ = build_student(teacher, Init(depth=1.0, ffn_widths=widths), calibration=importance)
    first.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 32)).astype(np.int32)
    data = TokenSet(tokens=tokens, documents=tokens)
    measured = measure_importance(load_model(tmp_path, torch.float32), data)
    assert [int((own > 0).sum()) for own in measured.neurons] == list(widths)
    for init, expected in (
        (Init(depth=0.5), (192, 100)),
        (Init(depth=0.5, ffn=0.66), (128, 64)),
        (Init(depth=0.5, ffn_widths=(10, 100)), (10, 100)),
        (Init(depth=1.0, ffn_widths=(64,) * 4), ()),
    ):
        student, _ = build_student(tmp_path, init, calibration=measured)
        assert spec_from_config(student.config.to_dict()).ffn_widths == expected
        assert student.config.is_heterogeneous == (expected != ())
        assert student(IDS).logits.isfinite().all()
    own = spec_from_config(json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(InputError, match="keeps 101 FFN neurons of the teacher's layer 3"):
        init_spec(Init(depth=0.5, ffn_widths=(192, 101)), own)
    with pytest.raises(InputError, match=r"layers differ in width, and init\.layers influence would choose"):
        init_spec(Init(depth=0.5, layers="influence"), own)


@pytest.mark.parametrize("part", ["ffn", "heads", "width", "all"])
def test_the_cut_student_is_the_teacher_with_the_rest_silenced(teacher, importance, part):
    kind = family_of(teacher)
    neox = kind == "gpt_neox"
    if neox and part in ("heads", "width"):
        pytest.skip("heads fill the width: they are cut together")
    ffn, heads, width = (0.33 if part in ("ffn", "all") else 1.0), 0.5, 0.5
    fractions = {"ffn": ffn} | ({"heads": heads} if part in ("heads", "all") else {})
    fractions |= {"width": width} if part in ("width", "all") else {}
    student, _ = build_student(teacher, Init(depth=1.0, **fractions), calibration=importance)
    whole = double(teacher)
    if part in ("ffn", "all"):
        silence_neurons(whole, importance, neox)
    if part in ("heads", "all"):
        silence_groups(whole, importance, neox)
    if part in ("width", "all"):
        silence_channels(whole, importance, kind)
    with torch.no_grad():
        expected = whole(IDS).logits
        actual = student.double()(IDS).logits
    # transformers computes norms and rotations in float32, whatever type the weights have.
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


ALL = Init(depth=0.75, layers="influence", ffn=0.33, heads=0.5, width=0.5)


def test_spec_is_exact_and_from_pretrained_loads_it(teacher, importance, tmp_path):
    student, kept = build_student(teacher, ALL, calibration=importance)
    spec = init_spec(ALL, spec_from_config(json.loads((teacher / "config.json").read_text())))
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == {
        name: tuple(parameter.shape) for name, parameter in student.named_parameters()
    }
    assert spec == spec_from_config(student.config.to_dict())
    assert (spec.layers, spec.width, spec.kv_heads, spec.ffn_width) == (3, 64, 2, 64)
    student.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, student(IDS).logits)
    assert len(decoder_layers(again)) == len(kept) == 3


def test_nothing_is_chosen_without_a_calibration(teacher):
    for init in (Init(ffn=0.5), Init(layers="influence")):
        with pytest.raises(ValueError, match="calibration"):
            build_student(teacher, init)


def test_each_layer_keeps_its_kind_of_attention(tmp_path):
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture="gemma3_text", layers=6)
    kinds = json.loads((teacher / "config.json").read_text())["layer_types"]
    student, kept = build_student(teacher, Init(depth=0.67))
    assert kept == (0, 2, 3, 5)
    assert student.config.layer_types == [kinds[layer] for layer in kept]
    for layer, module in zip(kept, decoder_layers(student), strict=True):
        sliding = kinds[layer] == "sliding_attention"
        assert module.self_attn.is_sliding == sliding
        assert module.self_attn.sliding_window == (16 if sliding else None)
    # Beyond its window, a sliding layer sees nothing. Through full attention, the first token has an effect.
    changed = IDS.clone()
    changed[0, 0] = 299
    whole = double(teacher)
    whole.base_model.layers = nn.ModuleList(whole.base_model.layers[layer] for layer in kept)
    whole.config.num_hidden_layers, whole.config.layer_types = 4, student.config.layer_types
    with torch.no_grad():
        for ids in (IDS, changed):
            expected = whole(ids, use_cache=False).logits
            torch.testing.assert_close(student(ids).logits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "data", [(8, 24), pytest.param((20, 24), marks=pytest.mark.slow)], ids=["fewer sequences", "more"]
)
def test_calibration_is_what_the_definitions_say(teacher, data):
    kind = family_of(teacher)
    neox = kind == "gpt_neox"
    tokens = np.random.default_rng(0).integers(0, 300, data).astype(np.int32)
    found = measure_importance(load_model(teacher, torch.float32), TokenSet(tokens=tokens, documents=tokens))
    model = double(teacher)
    seen = {}
    normed = torch.zeros(128, dtype=torch.float64)
    rows = torch.from_numpy(tokens[:16].astype(np.int64))
    count = rows.numel()

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = inputs[0]

        return hook

    def add(module, inputs, output):
        normed.add_(output.abs().sum(dim=(0, 1)) / count)

    for index, layer in enumerate(model.base_model.layers):
        output_of_attention(layer, neox).register_forward_hook(keep(f"heads {index}"))
        output_of_ffn(layer, neox).register_forward_hook(keep(f"neurons {index}"))
    for name, module in model.base_model.named_modules():
        if "norm" in name.rpartition(".")[2] and module.weight.shape == (128,):
            module.register_forward_hook(add)
    states = []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    model.base_model.layers[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        model(rows, use_cache=False)
    for index in range(4):
        heads = seen[f"heads {index}"].reshape(count, 4, -1, 32 if neox else 16)
        expected = heads.square().sum(-1).sqrt().sum(dim=2).mean(dim=0)
        torch.testing.assert_close(found.groups[index], expected, rtol=1e-4, atol=0)
        expected = seen[f"neurons {index}"].abs().mean(dim=(0, 1))
        torch.testing.assert_close(found.neurons[index], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.channels, normed, rtol=1e-4, atol=0)
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            cosine = nn.functional.cosine_similarity(one, other, dim=-1).mean()
            assert found.similarity[i, j] == pytest.approx(float(cosine), abs=1e-5)


def test_the_teachers_file_is_what_a_student_of_everything_holds(teacher, tmp_path):
    student, kept = build_student(teacher, Init(depth=1.0))
    assert kept == (0, 1, 2, 3)
    student.save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(teacher / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

"""A teacher held in 16 bits against the same weights in float32: logits, cache, top-1 and packed values."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.distillation import held as held_module
from autodistill.distillation.cache_making import ensure_cache
from autodistill.distillation.calibration import calibrate
from autodistill.distillation.held import is_held, load_held
from autodistill.distillation.scoring import score
from autodistill.distillation.student import build_student
from autodistill.distillation.teacher import load_model, stored_type
from autodistill.distillation.teacher_cache import CacheSettings, TeacherCache
from autodistill.estimate import spec_from_config
from autodistill.evaluation import deployed_weights
from autodistill.families import FAMILIES
from autodistill.strategy import Deployment, Init
from autodistill.testing import save_tiny_teacher

GRIDS = [
    Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32),
    Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0),
    Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32),
]


def saved(folder, dtype, **changes):
    """A tiny teacher whose files are of a type."""
    save_tiny_teacher(folder, layers=3, **changes)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("half"), torch.bfloat16)


IDS = torch.arange(64).view(2, 32) * 7 % 300


def test_the_type_of_a_folder(workshop, half, tmp_path):
    assert (stored_type(workshop.teacher), stored_type(half)) == ("float32", "bfloat16")
    assert stored_type(saved(tmp_path, torch.float16)) == "float16"


@pytest.mark.parametrize("architecture", list(FAMILIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_those_of_float32_for_every_family(tmp_path, architecture, dtype):
    folder = saved(tmp_path, getattr(torch, dtype), architecture=architecture, tied=architecture != "qwen2")
    model, exact = load_held(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits, expected = model(IDS).logits, exact(IDS).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    kept = {name for name, p in model.named_parameters() if p.dtype == getattr(torch, dtype)}
    assert {name for name in kept if "proj" in name or "dense" in name}
    assert all(p.ndim == 1 or "embed" in name for name, p in model.named_parameters() if name not in kept)


def test_a_product_in_parts_is_the_whole(half, monkeypatch):
    exact = load_model(half, torch.float32)
    monkeypatch.setattr(held_module, "_SHOWN", 1000)
    with torch.no_grad():
        torch.testing.assert_close(load_held(half, "bfloat16")(IDS).logits, exact(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_cache_of_a_teacher_held_in_its_own_type_is_the_same_to_the_last_bit(workshop, half, tmp_path, bf16):
    settings = CacheSettings(top_k=16, draws=(12,), final=True, states=(1,), bf16=bf16)
    whole, held = (_cache(workshop, lambda h=h: load_held(half, h), settings, tmp_path / h) for h in TYPES)
    for name in ("ids", "below_maximum", "log_sum", "final", "state_1"):
        np.testing.assert_array_equal(held._column(name, range(4)), whole._column(name, range(4)))


TYPES = ("float32", "bfloat16")


def _cache(workshop, load, settings, root):
    folder = ensure_cache(
        load,
        teacher_fingerprint="t",
        data_fingerprint="d",
        data=workshop.data,
        vocabulary=300,
        width=64,
        settings=settings,
        root=root,
        limit_bytes=10**8,
    )
    return TeacherCache(folder)


def test_rounded_weights_stay_within_their_bound(workshop, tmp_path):
    """A weight moves by 2^-9 of itself at the most, a log-probability above log 0.001 by 0.1, a row by 1e-4 of KL."""
    settings = CacheSettings(top_k=300, temperatures=(1.0,))
    whole, held = (_cache(workshop, lambda h=h: load_held(workshop.teacher, h), settings, tmp_path / h) for h in TYPES)
    one, other = (cache.top(range(8), 1.0, 300) for cache in (whole, held))
    exact, rounded = (torch.empty(len(one.ids), 300).scatter_(1, t.ids, t.log_p) for t in (one, other))
    likely = exact > np.log(1e-3)
    assert 0 < float((exact - rounded)[likely].abs().max()) < 0.1
    divergence = (exact.double().exp() * (exact - rounded).double()).sum(dim=1)
    assert float(divergence.mean()) < 1e-4
    # What is likeliest is decided in float32: no two of a row tie, and rounding turns near-ties alone.
    model = load_held(workshop.teacher, "bfloat16")
    _, top1 = score(model, workshop.data)
    np.testing.assert_array_equal(top1, other.ids[:, 0].numpy())
    lead = one.log_p[:, 0] - one.log_p[:, 1]
    assert bool((lead[one.ids[:, 0] != other.ids[:, 0]] < 0.2).all())


@pytest.mark.parametrize("deployment", GRIDS, ids=lambda deployment: deployment.name)
def test_a_packed_teacher_is_that_of_float32(workshop, half, deployment):
    held, exact = load_held(half, "bfloat16"), load_model(half, torch.float32)
    spec = spec_from_config(exact.config.to_dict())
    before, _ = score(held, workshop.data)
    for model in (held, exact):
        with deployed_weights(model, spec, deployment):
            scores, top1 = score(model, workshop.data)
        if model is held:
            assert {p.dtype for p in model.parameters() if p.ndim == 2} == {torch.bfloat16}
            kept, kept_top1 = scores, top1
    np.testing.assert_array_equal(kept.nll, scores.nll)
    np.testing.assert_array_equal(kept_top1, top1)
    np.testing.assert_array_equal(score(held, workshop.data)[0].nll, before.nll)


def test_a_scaled_table_is_packed_once(tmp_path, workshop):
    folder = saved(tmp_path, torch.bfloat16, architecture="gemma3_text")
    held, exact = load_held(folder, "bfloat16"), load_model(folder, torch.float32)
    spec = spec_from_config(exact.config.to_dict())
    found = []
    for model in (held, exact):
        with deployed_weights(model, spec, GRIDS[0]):
            found.append(score(model, workshop.data)[0].nll)
    np.testing.assert_array_equal(*found)


def test_calibration_and_students_are_those_of_float32(workshop, half):
    exact, held = load_model(half, torch.float32), load_held(half, "bfloat16")
    one, other = calibrate(exact, workshop.data), calibrate(held, workshop.data)
    for name in ("similarity", "neurons", "groups", "channels"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    init = replace(Init(), ffn=0.5)
    student, _ = build_student(half, init, calibration=one)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    neurons = student.model.layers[0].mlp.down_proj.weight
    assert torch.isin(neurons, exact.model.layers[0].mlp.down_proj.weight).all()


def test_float32_is_left_as_it_is(half):
    model = load_held(half, "float32")
    assert not is_held(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}

"""A teacher held in 16 bits against the same weights in float32: logits, cache, top-1 and packed values."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.importance import measure_importance
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.inference import half_precision as held_module
from autodistill.inference.half_precision import is_held, load_held
from autodistill.inference.scoring import score
from autodistill.models.config import spec_from_config
from autodistill.models.families import FAMILIES
from autodistill.models.loading import load_model
from autodistill.models.stored_tensors import stored_type
from autodistill.quantization import k_quants as super_blocks
from autodistill.quantization.grids import IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher
from tests.thinned import thinned

GRIDS = [
    Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32),
    Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0),
    Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32),
    *(Deployment(runtime="llama.cpp", format=grid.name, bits=4, group_size=32) for grid in (IQ4_NL, MXFP4)),
]
K_QUANTS = [
    Deployment(
        runtime="llama.cpp",
        format=grid.name,
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
    )
    for grid in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
]


def saved(folder, dtype, **changes):
    """Save a tiny teacher with files of a given type."""
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
@pytest.mark.parametrize("dtype", thinned(["bfloat16", "float16"]))
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
    monkeypatch.setattr(held_module, "_WEIGHTS_EXPANDED_AT_ONCE", 1000)
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
    """Rounding moves a weight by at most 2^-9 of its value.

    This moves a log-probability above log 0.001 by at most 0.1, and a row by at most 1e-4 of KL.
    """
    settings = CacheSettings(top_k=300, temperatures=(1.0,))
    whole, held = (_cache(workshop, lambda h=h: load_held(workshop.teacher, h), settings, tmp_path / h) for h in TYPES)
    one, other = (cache.top(range(8), 1.0, 300) for cache in (whole, held))
    exact, rounded = (torch.empty(len(one.ids), 300).scatter_(1, t.ids, t.log_p) for t in (one, other))
    likely = exact > np.log(1e-3)
    assert 0 < float((exact - rounded)[likely].abs().max()) < 0.1
    divergence = (exact.double().exp() * (exact - rounded).double()).sum(dim=1)
    assert float(divergence.mean()) < 1e-4
    # The likeliest token is decided in float32: no two tokens of a row tie, and rounding only swaps near-ties.
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


@pytest.mark.parametrize("deployment", [GRIDS[0], K_QUANTS[2]], ids=lambda deployment: deployment.name)
def test_a_scaled_table_is_packed_once(tmp_path, deployment):
    # So many weights that some would change in Q6_K if they were packed again.
    folder = saved(tmp_path, torch.bfloat16, architecture="gemma3_text", width=1024, ffn=256)
    held, exact = load_held(folder, "bfloat16"), load_model(folder, torch.float32)
    spec = spec_from_config(exact.config.to_dict())
    found = []
    for model in (held, exact):
        with deployed_weights(model, spec, deployment), torch.no_grad():
            found.append(model(IDS).logits)
    assert torch.equal(*found)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Teachers in super-blocks: one with tied embeddings and one without."""
    sizes = {"width": 256, "ffn": 512}
    return {tied: saved(tmp_path_factory.mktemp("wide"), torch.bfloat16, tied=tied, **sizes) for tied in (True, False)}


@pytest.mark.parametrize(
    ("tied", "shown", "deployment"),
    [
        *thinned((True, 2**14, deployment) for deployment in K_QUANTS),
        # An untied head, and weights that are all expanded at once, concern every type alike.
        *(
            pytest.param(False, 2**25, deployment, marks=() if number in (1, 2) else pytest.mark.slow)
            for number, deployment in enumerate(K_QUANTS)
        ),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_scales_of_super_blocks_are_searched_for_once(wide, deployment, tied, shown, monkeypatch):
    """Values equal those of a float32 model to the last bit, before and after a head knows its table's scales."""
    monkeypatch.setattr(held_module, "_WEIGHTS_EXPANDED_AT_ONCE", shown)
    held, exact = load_held(wide[tied], "bfloat16"), load_model(wide[tied], torch.float32)
    spec = spec_from_config(exact.config.to_dict())
    with deployed_weights(exact, spec, deployment), torch.no_grad():
        expected = exact(IDS).logits
        tables = {name: module.weight.data for name, module in exact.named_modules() if hasattr(module, "weight")}
    searched = []
    fitted = super_blocks.fitted
    monkeypatch.setattr(super_blocks, "fitted", lambda groups, *args: searched.append(groups) or fitted(groups, *args))
    with deployed_weights(held, spec, deployment), torch.no_grad():
        for at_once in (IDS[:1], IDS[1:], IDS):
            logits = held(at_once).logits
        assert (
            _numbers(searched)
            == _numbers(
                [m.weight for m in held.modules() if isinstance(m, nn.Linear)]
                # The rows of the table that are read, as long as no head knows its scales.
                + [
                    held.get_input_embeddings().weight[at.flatten()]
                    for at in ((IDS[:1],) if tied else (IDS[:1], IDS[1:], IDS))
                ]
            )
        )
        if shown == 2**25:
            assert torch.equal(logits, expected)
        for name, module in held.named_modules():
            if isinstance(module, nn.Linear):
                ones = torch.eye(module.in_features)
                assert torch.equal(module(ones).T, tables[name])
            elif isinstance(module, nn.Embedding):
                assert torch.equal(module(torch.arange(300)), tables[name])
    # The scales are forgotten with the context, and those that another deployment needs are searched for again.
    searched.clear()
    with torch.no_grad():
        plain = held(IDS).logits
        assert not searched
        assert torch.equal(plain, exact(IDS).logits) or shown != 2**25
        with deployed_weights(held, spec, K_QUANTS[0]):
            held(IDS)
    assert searched


def _numbers(tensors):
    return sum(tensor.numel() for tensor in tensors)


def test_threads_that_read_a_matrix_at_once_search_for_its_scales_once(monkeypatch):
    layer = nn.Sequential(nn.Linear(256, 8, bias=False).bfloat16())
    layer[0].__class__ = held_module._HalfPrecisionLinear
    searched = []
    second = threading.Barrier(2)
    fitted = super_blocks.fitted

    def waiting(groups, *args):
        searched.append(groups)
        with suppress(threading.BrokenBarrierError):
            # A second search would release the first one.
            second.wait(timeout=0.5)
        return fitted(groups, *args)

    monkeypatch.setattr(super_blocks, "fitted", waiting)
    with held_module.held_as_deployed(layer, {"0.weight": Q4_K}), ThreadPoolExecutor(2) as pool:
        one, other = pool.map(layer, [torch.eye(256)] * 2)
    assert len(searched) == 1
    assert torch.equal(one, other)


def test_the_scales_that_are_kept_take_the_memory_of_a_file(wide):
    held = load_held(wide[True], "bfloat16")
    spec = spec_from_config(held.config.to_dict())
    with deployed_weights(held, spec, K_QUANTS[0]), torch.no_grad():
        held(IDS)
        module = held.model.layers[0].mlp.up_proj
        parts = [tensor for part in module.deployed_as._found for tensor in part]
        # Q2_K: a scale and a minimum of one byte each for 16 weights, and two units for 256 weights.
        assert sum(part.nbytes for part in parts) == module.weight.numel() * (2 / 16 + 4 / 256)


def test_calibration_and_students_are_those_of_float32(workshop, half):
    exact, held = load_model(half, torch.float32), load_held(half, "bfloat16")
    one, other = measure_importance(exact, workshop.data), measure_importance(held, workshop.data)
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

"""Floors of training and serving against torch's own count of operations, and against bytes counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autodistill.hardware.catalog import device_classes
from autodistill.hardware.device import Device
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import read_config
from autodistill.profiling.floor import pass_floor, step_floor
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

DEVICE = Device(
    name="a machine",
    aliases=(),
    kind=device_classes()["cpu"],
    memory_bytes=10**9,
    usable_bytes=10**9,
    bandwidth=1e9,
    rates={"fp32": 1e12, "bf16": 4e12},
    sources={},
)
SEQUENCES, LENGTH = 2, 48


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("model"), layers=3, tied=request.param)


def test_operations_of_a_step_are_those_that_torch_counts(folder: Path) -> None:
    spec = spec_from_config(read_config(folder))
    model = load_model(folder, torch.float32)
    ids = torch.arange(SEQUENCES * LENGTH).reshape(SEQUENCES, LENGTH) % spec.vocabulary
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    floor = step_floor(spec, DEVICE, sequences=SEQUENCES, length=LENGTH, bf16=False, trained=1)
    # Torch computes attention to all tokens, half of which are masked, and no gradient for the embedded tokens.
    whole = floor.products * 1e12 + 2 * floor.attention * 1e12
    assert counter.get_total_flops() == pytest.approx(whole, rel=0.02)


def test_a_live_teacher_and_bfloat16_count(folder: Path) -> None:
    spec = spec_from_config(read_config(folder))
    load = {"sequences": SEQUENCES, "length": LENGTH, "trained": 1000}
    plain = step_floor(spec, DEVICE, bf16=False, **load)
    assert step_floor(spec, DEVICE, bf16=False, teacher=spec, **load).teacher == pytest.approx(
        (plain.products + plain.attention) / 3
    )
    assert step_floor(spec, DEVICE, bf16=True, **load).products == pytest.approx(plain.products / 4)
    # Reading weight, gradient and two moments, and writing weight and moments, makes seven numbers of four bytes.
    assert plain.optimizer == pytest.approx(1000 * 28 / 1e9)
    assert plain.total == pytest.approx(plain.products + plain.attention + plain.optimizer)


def test_a_served_token_reads_all_weights_and_a_prompt_computes(folder: Path) -> None:
    spec = spec_from_config(read_config(folder))
    f16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    seconds = pass_floor(spec, f16, DEVICE, tokens=1, behind=10)
    matrices = sum(p.numel() for name, p in load_model(folder, torch.float32).named_parameters() if p.ndim == 2)
    if not spec.tied:
        matrices -= spec.vocabulary * spec.width
    cache = 2 * 10 * spec.layers * 2 * spec.kv_heads * spec.head_dim
    assert seconds == pytest.approx((2 * matrices + cache) / 1e9, rel=1e-6)
    slow = replace(DEVICE, rates={"fp32": 1e8})
    assert pass_floor(spec, f16, slow, tokens=200, behind=100) > 100 * seconds

"""Descriptions of a device, its class, and a runtime's shares of its figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autodistill.hardware.device import Device, DeviceClass
from autodistill.hardware.runtime import Band, Shares

HALF = Band(low=0.4, typical=0.5, high=0.6)
SHARES = Shares(
    decode=HALF,
    decode_measured=HALF,
    prefill=Band(low=0.7, typical=0.8, high=0.9),
    prefill_quantized=HALF,
    dequantize=None,
    attention=None,
    activations=HALF,
    layer_seconds=Band(low=1e-6, typical=2e-6, high=4e-6),
    ahead=False,
    rate="",
    measured_alone=False,
    reference="a test",
)
KIND = DeviceClass(
    name="discrete-gpu",
    runtimes=("llama.cpp", "vllm"),
    share=0.75,
    reserve_bytes=0,
    small_bytes=32,
    small_share=0.5,
    speeds={"llama.cpp": SHARES, "vllm": replace(SHARES, rate="bf16")},
    reference="a test",
    ffn_multiple=128,
    ffn_reference="a test",
)
BOX = Device(
    name="Box",
    aliases=("Crate",),
    kind=KIND,
    memory_bytes=16,
    usable_bytes=8,
    bandwidth=1e9,
    rates={"fp32": 1e12, "fp16": 2e12, "int8": 9e12},
    sources={},
)


def test_its_names_are_its_own_and_then_the_others() -> None:
    assert BOX.names == ("Box", "Crate")


def test_a_rate_is_that_of_the_first_precision_it_has_or_its_fastest_of_more_than_8_bits() -> None:
    assert BOX.rate("bf16", "fp32", "fp16") == 1e12
    assert BOX.rate("bf16") == 2e12
    assert replace(BOX, rates={"int8": 9e12}).rate("bf16") == 9e12


def test_it_serves_with_its_own_runtimes_or_those_of_its_class() -> None:
    assert BOX.lacks("vllm") == ""
    own = replace(BOX, own_runtimes=("llama.cpp",))
    assert own.lacks("vllm") == "Box serves students with llama.cpp, not vllm"


def test_it_is_discrete_by_its_class() -> None:
    assert BOX.discrete
    assert not replace(BOX, kind=replace(KIND, name="board")).discrete


@pytest.mark.parametrize(("memory_bytes", "share"), [(31, 0.5), (32, 0.5), (33, 0.75)])
def test_of_little_memory_another_share_is_usable(memory_bytes: int, share: float) -> None:
    assert KIND.share_of(memory_bytes) == share


def test_shares_are_assumed_with_a_wide_band_on_a_device_unlike_those_they_were_found_on() -> None:
    assert BOX.shares("llama.cpp") is SHARES
    found = BOX.shares("vllm")
    assert found.assumed.endswith("it was measured where processors compute in bf16")
    assert (found.decode.low, found.decode.typical, found.decode.high) == pytest.approx((0.2, 0.5, 0.75))
    assert found.prefill.high == 1  # not above the full rate
    assert (found.dequantize, found.attention) == (None, None)
    assert [found.layer(end) for end in ("low", "typical", "high")] == pytest.approx([8e-6, 2e-6, 0.5e-6])
    with_bf16 = replace(BOX, rates={"bf16": 1e12})
    assert with_bf16.shares("vllm").assumed == ""


def test_shares_found_where_the_bandwidth_was_measured_are_assumed_of_a_stated_one() -> None:
    alone = replace(SHARES, measured_alone=True)
    assert alone.unlike(BOX) == "it was measured where the bandwidth was measured too, and not stated"
    assert alone.unlike(replace(BOX, measured=True)) == ""

"""A roofline by hand, and that it moves the right way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.described import deployment_named, shape, spec_of
from autodistill.devices import devices, find_device
from autodistill.roofline import speed, work
from autodistill.serving_memory import memory

F16, Q4 = deployment_named("gguf-f16"), deployment_named("gguf-q4_0")
SIZES = {"layers": 4, "width": 256, "heads": 8, "kv_heads": 2, "ffn": 512, "vocab": 1000}
LINEARS = 4 * (256 * 256 * 2 + 256 * 64 * 2 + 3 * 256 * 512)
HEAD = 1000 * 256
KNOWN = devices()


def test_a_step_reads_each_weight_once_and_each_key_and_value() -> None:
    spec = shape(SIZES).spec
    one = work(spec, F16, tokens=1, sequences=1, behind=100)
    cache = 2 * 4 * 64 * 2 * 100
    assert one.bytes == 2 * (LINEARS + HEAD) + cache  # the embedding table is not read, norms are left out
    assert one.operations == 2 * (LINEARS + HEAD) + 4 * 4 * 256 * 100
    four = work(spec, F16, tokens=4, sequences=4, behind=100)
    assert four.bytes == one.bytes + 3 * cache
    assert four.operations == 4 * one.operations
    tied = work(shape(SIZES, tied=True).spec, F16, tokens=1, sequences=1, behind=100)
    assert tied == one


def test_k_quants_are_read_by_their_blocks_at_the_rate_of_q4_0() -> None:
    spec = shape(SIZES).spec
    k_quant = deployment_named("gguf-q4_k")
    # 144 bytes of 256 weights of a linear layer, 210 of the head.
    assert work(spec, k_quant, tokens=1, sequences=1, behind=0).bytes == LINEARS // 256 * 144 + HEAD // 256 * 210
    device = find_device("i9-13900k", KNOWN)
    first, theirs, plain = (
        speed(spec, form, device, context=512).time_to_first_token_ms
        for form in (k_quant, Q4, deployment_named("gguf-q5_0"))
    )
    assert first == theirs < plain


WIDE = SIZES | {"width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536}  # of the default teacher: 256 divides FFN alone
FALLEN = 4 * (576 * 576 * 2 + 576 * 192 * 2 + 2 * 576 * 1536)
DOWN = 4 * 576 * 1536


@pytest.mark.parametrize(("name", "beside"), [("gguf-q4_k", "gguf-q5_0"), ("gguf-q5_k", "gguf-q5_1")])
def test_rows_on_the_grid_that_stands_in_for_a_k_quants_are_as_slow_as_that(name: str, beside: str) -> None:
    spec, device = shape(WIDE).spec, find_device("i9-13900k", KNOWN)
    k_quant = deployment_named(name)
    prompt = work(spec, k_quant, tokens=512, sequences=1, behind=256)
    products = 2 * (512 * (FALLEN + DOWN) + 1000 * 576)
    assert (prompt.plain, prompt.operations - prompt.attended) == (2 * 512 * FALLEN, products)
    fast, slow = (device.rate("fp32") * share.typical for share in (device.kind.prefill_quantized, device.kind.prefill))
    layers = 4 * device.kind.layer_seconds
    seconds = (prompt.operations - 2 * 512 * FALLEN) / fast + 2 * 512 * FALLEN / slow + layers
    found, q4, theirs = (speed(spec, form, device, context=512) for form in (k_quant, Q4, deployment_named(beside)))
    assert found.time_to_first_token_ms == pytest.approx(1e3 * seconds)
    assert q4.time_to_first_token_ms < found.time_to_first_token_ms < theirs.time_to_first_token_ms
    # A step waits for what it reads, and then unpacks it: Q5_0 and Q5_1 at 0.6 of the rate.
    step = work(spec, k_quant, tokens=1, sequences=1, behind=512)
    assert device.kind.dequantize is not None
    assert device.kind.attention is not None
    rates = [device.rate("fp32") * share.typical for share in (device.kind.dequantize, device.kind.attention)]
    unpacking = (2 * (DOWN + 1000 * 576) + 2 * FALLEN / 0.6) / rates[0]
    reading = step.bytes / (device.bandwidth * device.kind.decode.typical)
    assert found.decode_ms == pytest.approx(1e3 * (reading + unpacking + step.attended / rates[1] + layers))


@pytest.mark.parametrize("sizes", [SIZES, WIDE])
@pytest.mark.parametrize(
    ("name", "fast"),
    [
        *((f"gguf-{name}", True) for name in ("q4_0", "q8_0", "q6_k", "q3_k", "q2_k")),
        *((name, False) for name in ("gguf-q5_0", "gguf-q5_1", "gguf-q4_1", "gguf-f16", "huggingface")),
    ],
)
def test_of_every_other_format_all_operations_are_at_its_own_rate(name: str, fast: bool, sizes: Any) -> None:
    spec, device, form = shape(sizes).spec, find_device("i9-13900k", KNOWN), deployment_named(name)
    share = device.kind.prefill_quantized if fast else device.kind.prefill
    operations = work(spec, form, tokens=512, sequences=1, behind=256).operations
    for found in (form, replace(form, keep=("attention",)) if form.bits < 16 else form):
        seconds = operations / (device.rate("fp32") * share.typical) + 4 * device.kind.layer_seconds
        assert speed(spec, found, device, context=512).time_to_first_token_ms == 1e3 * seconds


def test_a_window_and_the_type_of_the_cache_make_it_less() -> None:
    plain, windowed = (shape(SIZES | {"window": window}, family="mistral").spec for window in (None, 40))
    served = deployment_named("huggingface", "vllm")
    reads = [work(spec, served, tokens=1, sequences=1, behind=100).bytes for spec in (plain, windowed)]
    assert reads[0] - reads[1] == 2 * 4 * 64 * 2 * 60
    eight = work(plain, F16, tokens=1, sequences=1, behind=96, kv_type="q8_0").bytes
    sixteen = work(plain, F16, tokens=1, sequences=1, behind=96).bytes
    assert sixteen - eight == 2 * 4 * 64 * 96 * (2 - 34 / 32)


def test_in_llama_cpp_a_window_counts_in_the_families_whose_graph_has_one() -> None:
    """Mistral 7B as published: its cache is held whole there, and so read whole."""
    mistral = {
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    }
    spec = spec_of(mistral)
    whole = 32 * 2 * 8 * 128 * 2 * 32768
    reads = [work(spec, Q4, tokens=1, sequences=1, behind=behind).bytes for behind in (0, 32768)]
    assert reads[1] - reads[0] == whole == memory(spec, Q4, context=32768, batch=1).kv_cache_bytes
    gemma = {"sliding_window": 40, "sliding_window_pattern": 2, "num_hidden_layers": 4, "head_dim": 128}
    spec = spec_of(mistral | gemma | {"model_type": "gemma3_text"})
    reads = [work(spec, F16, tokens=1, sequences=1, behind=behind).bytes for behind in (0, 100)]
    assert reads[1] - reads[0] == 2 * 8 * 128 * 2 * (2 * 100 + 2 * 40)


def test_of_a_mixture_the_active_experts_are_read_and_computed() -> None:
    spec = shape(SIZES | {"experts": 8, "active_experts": 2}).spec
    experts = 4 * 3 * 256 * 512
    attention = LINEARS - experts
    one = work(spec, F16, tokens=1, sequences=1, behind=0)
    routers = 4 * 8 * 256
    assert one.bytes == 2 * (attention + HEAD + 2 * experts) + 4 * routers
    assert one.operations == 2 * (attention + HEAD + 2 * experts + routers)
    many = work(spec, F16, tokens=1000, sequences=1, behind=0)
    assert many.bytes == pytest.approx(2 * (attention + HEAD + 8 * experts) + 4 * routers)


def test_seconds_are_bytes_over_the_reached_bandwidth_and_a_cost_of_each_layer() -> None:
    spec, device = shape(SIZES).spec, find_device("4090", KNOWN)
    found = speed(spec, F16, device, context=64)
    reading = work(spec, F16, tokens=1, sequences=1, behind=64).bytes / (1008e9 * 0.75)
    assert found.decode_ms == pytest.approx(1e3 * (reading + 4 * 32e-6))
    assert found.source == "predicted"
    assert (found.prompt, found.bound) == (64, "launches")


@pytest.mark.parametrize(
    ("name", "form", "told"),
    [
        ("4090", "gguf-f16", 61.0),
        ("4090", "gguf-q8_0", 98.1),
        ("agx orin", "gguf-q4_0", 22.5),
        ("i9-13900k", "gguf-q4_0", 18.3),
    ],
)
def test_published_rates_of_7b_lie_within_the_band(name: str, form: str, told: float) -> None:
    spec = shape({"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocab": 32000}).spec
    found = speed(spec, deployment_named(form), find_device(name, KNOWN), context=128)
    assert found.tokens_per_second_low <= told <= found.tokens_per_second_high


@settings(deadline=None, max_examples=60)
@given(
    device=st.sampled_from(KNOWN),
    context=st.integers(1, 4000),
    more=st.integers(1, 4000),
    batch=st.integers(1, 64),
    experts=st.sampled_from([None, 8]),
)
def test_more_context_and_more_bits_are_never_faster(device, context, more, batch, experts) -> None:
    spec = shape(SIZES | {"experts": experts}).spec
    least = speed(spec, Q4, device, context=context, batch=batch)
    assert least.tokens_per_second_low <= least.tokens_per_second <= least.tokens_per_second_high
    assert speed(spec, Q4, device, context=context + more, batch=batch).decode_ms >= least.decode_ms
    # Of many streams a processor may compute faster with weights that it need not unpack.
    packed, plain = (speed(spec, deployment, device, context=context) for deployment in (Q4, F16))
    assert plain.decode_ms >= packed.decode_ms
    assert speed(spec, Q4, device, context=context, batch=batch + 1).decode_ms >= least.decode_ms

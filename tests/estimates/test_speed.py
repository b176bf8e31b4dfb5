"""A roofline by hand, and whether it moves in the right direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.advisor.describe import deployment_named, shape, spec_of
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import limit_seconds, speed, work
from autodistill.hardware.budget import parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import resized
from autodistill.quantization.formats import weights_bytes

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


def test_layers_are_read_and_computed_by_their_own_width_unless_they_are_padded() -> None:
    wide = shape(SIZES).spec
    spec = resized(wide, ffn_widths=(512, 64, 128, 512))
    less = 3 * 256 * (512 - 64 + 512 - 128)
    whole, found = (work(one, F16, tokens=8, sequences=1, behind=10) for one in (wide, spec))
    assert whole.bytes - found.bytes == 2 * less
    assert whole.operations - found.operations == 2 * 8 * less
    assert whole.activations - found.activations == 2 * 8 * less // 256
    padded = deployment_named("huggingface")
    assert work(spec, padded, tokens=1, sequences=1, behind=10) == work(wide, padded, tokens=1, sequences=1, behind=10)
    mixed = replace(Q4, types=(("layers.0.mlp.up_proj", "q8_0"),))
    read = work(spec, mixed, tokens=1, sequences=1, behind=0).bytes
    assert read == work(spec, Q4, tokens=1, sequences=1, behind=0).bytes + 256 * 512 * 16 // 32


def test_k_quants_are_read_by_their_blocks_at_the_rate_of_q4_0() -> None:
    spec = shape(SIZES).spec
    k_quant = deployment_named("gguf-q4_k")
    # 144 bytes for 256 weights of a linear layer, 210 bytes for 256 weights of the head.
    assert work(spec, k_quant, tokens=1, sequences=1, behind=0).bytes == LINEARS // 256 * 144 + HEAD // 256 * 210
    device = find_device("i9-13900k", KNOWN)
    first, theirs, plain = (
        speed(spec, form, device, context=512).time_to_first_token_ms
        for form in (k_quant, Q4, deployment_named("gguf-q5_0"))
    )
    assert first == theirs < plain


def test_a_mixture_of_types_reads_what_each_matrix_is_in_at_the_same_rate() -> None:
    spec, mixture = shape(SIZES).spec, deployment_named("gguf-q4_k_m")
    wide = 2 * (256 * 64 + 256 * 512)  # the values and the FFN's down projections of the third and fourth layer
    read = work(spec, mixture, tokens=1, sequences=1, behind=0).bytes
    assert read == (LINEARS - wide) // 256 * 144 + (wide + HEAD) // 256 * 210
    device = find_device("i9-13900k", KNOWN)
    found = [speed(spec, form, device, context=512).time_to_first_token_ms for form in (mixture, Q4)]
    assert found[0] == found[1]
    # Rows that no super-block divides are in Q5_0, which is slower. Those that take more bits are in Q8_0.
    prompt = work(shape(WIDE).spec, mixture, tokens=512, sequences=1, behind=256)
    assert prompt.plain == 2 * 512 * (FALLEN - 2 * 576 * 192)


WIDE = SIZES | {"width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536}  # the default teacher: 256 divides only the FFN
FALLEN = 4 * (576 * 576 * 2 + 576 * 192 * 2 + 2 * 576 * 1536)
DOWN = 4 * 576 * 1536


@pytest.mark.parametrize(("name", "beside"), [("gguf-q4_k", "gguf-q5_0"), ("gguf-q5_k", "gguf-q5_1")])
def test_rows_on_the_grid_that_stands_in_for_a_k_quants_are_as_slow_as_that(name: str, beside: str) -> None:
    spec, device = shape(WIDE).spec, find_device("i9-13900k", KNOWN)
    k_quant = deployment_named(name)
    prompt = work(spec, k_quant, tokens=512, sequences=1, behind=256)
    products = 2 * (512 * (FALLEN + DOWN) + 1000 * 576)
    assert (prompt.plain, prompt.operations - prompt.attended) == (2 * 512 * FALLEN, products)
    shares = device.shares("llama.cpp")
    fast, slow = (device.rate("fp32") * share.typical for share in (shares.prefill_quantized, shares.prefill))
    layers = 4 * 80e-6
    seconds = (prompt.operations - 2 * 512 * FALLEN) / fast + 2 * 512 * FALLEN / slow + layers
    found, q4, theirs = (speed(spec, form, device, context=512) for form in (k_quant, Q4, deployment_named(beside)))
    assert found.time_to_first_token_ms == pytest.approx(1e3 * seconds)
    assert q4.time_to_first_token_ms < found.time_to_first_token_ms < theirs.time_to_first_token_ms
    # A step waits for what it reads, and then unpacks it: Q5_0 and Q5_1 at 0.6 of the rate.
    step = work(spec, k_quant, tokens=1, sequences=1, behind=512)
    assert shares.dequantize is not None
    assert shares.attention is not None
    rates = [device.rate("fp32") * share.typical for share in (shares.dequantize, shares.attention)]
    unpacking = (2 * (DOWN + 1000 * 576) + 2 * FALLEN / 0.6) / rates[0]
    reading = step.bytes / (device.bandwidth * shares.decode.typical)
    assert found.decode_ms == pytest.approx(1e3 * (reading + unpacking + step.attended / rates[1] + layers))


@pytest.mark.parametrize("sizes", [SIZES, WIDE])
@pytest.mark.parametrize(
    ("name", "fast"),
    [
        *((f"gguf-{name}", True) for name in ("q4_0", "q8_0", "q6_k", "q3_k", "q2_k")),
        *((name, False) for name in ("gguf-q5_0", "gguf-q5_1", "gguf-q4_1", "gguf-iq4_nl", "gguf-mxfp4", "gguf-f16")),
    ],
)
def test_of_every_other_format_all_operations_are_at_its_own_rate(name: str, fast: bool, sizes: Any) -> None:
    spec, device, form = shape(sizes).spec, find_device("i9-13900k", KNOWN), deployment_named(name)
    shares = device.shares("llama.cpp")
    share = shares.prefill_quantized if fast else shares.prefill
    operations = work(spec, form, tokens=512, sequences=1, behind=256).operations
    for found in (form, replace(form, keep=("attention",)) if form.bits < 16 else form):
        seconds = operations / (device.rate("fp32") * share.typical) + 4 * 80e-6
        assert speed(spec, found, device, context=512).time_to_first_token_ms == pytest.approx(1e3 * seconds)


def test_a_window_and_the_type_of_the_cache_make_it_less() -> None:
    plain, windowed = (shape(SIZES | {"window": window}, family="mistral").spec for window in (None, 40))
    served = deployment_named("huggingface", "vllm")
    reads = [work(spec, served, tokens=1, sequences=1, behind=100).bytes for spec in (plain, windowed)]
    assert reads[0] - reads[1] == 2 * 4 * 64 * 2 * 60
    eight = work(plain, F16, tokens=1, sequences=1, behind=96, kv_type="q8_0").bytes
    sixteen = work(plain, F16, tokens=1, sequences=1, behind=96).bytes
    assert sixteen - eight == 2 * 4 * 64 * 96 * (2 - 34 / 32)


def test_in_llama_cpp_a_window_counts_in_the_families_whose_graph_has_one() -> None:
    """Mistral 7B as published: llama.cpp holds its whole cache, and therefore reads all of it."""
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


LLAMA_2_7B = {"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocab": 32000}
TINYLLAMA = {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "ffn": 5632, "vocab": 32000}
# As many weights in layers and as large a table as Qwen3.5-2B, which has other layers.
OF_2B = {"layers": 24, "width": 2048, "heads": 8, "kv_heads": 2, "ffn": 6144, "vocab": 248320, "tied": True}


@pytest.mark.parametrize(
    ("sizes", "form", "device", "prompt", "told"),
    [
        # llama.cpp's tokens per second for the prompt and for what follows it (None: not reported).
        (LLAMA_2_7B, "gguf-q4_0", "pi 5", 109, (8.10, None)),
        (TINYLLAMA, "gguf-q8_0", "pi 5", 128, (35, 9)),
        (TINYLLAMA, "gguf-q8_0", "pi 4", 128, (10, 3)),
        (TINYLLAMA, "gguf-f16", "pi 4", 128, (3, 2)),
        (OF_2B, "gguf-q4_k", "8 gen 2", 2000, (73.9, 15.5)),
        (OF_2B, "gguf-q4_k", "8 gen 2", 2000, (64.5, 13.9)),
    ],
)
def test_published_rates_of_boards_and_phones_lie_within_the_band(
    sizes: dict[str, Any], form: str, device: str, prompt: int, told: tuple[float, float | None]
) -> None:
    found = speed(shape(sizes).spec, deployment_named(form), find_device(device, KNOWN), context=prompt, prompt=prompt)
    read, step = told
    taken = 1e3 * prompt / read
    # The shares of prompts also have a fast end, at most twice as fast as the typical one.
    assert found.time_to_first_token_ms / 2 <= taken <= found.time_to_first_token_ms_high
    assert step is None or found.tokens_per_second_low <= step <= found.tokens_per_second_high


def test_a_phone_is_found_by_its_processor_and_no_faster_one_is_taken_for_it() -> None:
    names = {"8 gen 2": 67.2, "8 gen 3": 76.8, "8 elite": 84.8}
    # Bits of the memory bus times twice its clock.
    assert {name: find_device(name, KNOWN).bandwidth / 1e9 for name in names} == pytest.approx(names)
    with pytest.raises(InputError, match="can be Snapdragon 8 Gen 2, Snapdragon 8 Gen 3, Snapdragon 8 Elite"):
        find_device("snapdragon 8", KNOWN)


MEASURED = replace(find_device("i9-13900k", KNOWN), measured=True, bandwidth=35e9, rates={"fp32": 102e9, "bf16": 440e9})


def test_transformers_on_a_core_has_its_own_shares_and_the_rate_of_bfloat16() -> None:
    """By hand, at the typical shares: what is read, attention at float32's rate, and 320 us per layer."""
    spec, plain = shape(SIZES).spec, deployment_named("huggingface")
    found = speed(spec, plain, MEASURED, context=600)
    step = work(spec, plain, tokens=1, sequences=1, behind=600)
    reading, attending = step.bytes / (0.345 * 35e9), step.attended / (0.026 * 102e9)
    assert found.decode_ms == pytest.approx(1e3 * (reading + attending + 4 * 320e-6))
    prompt = work(spec, plain, tokens=512, sequences=1, behind=256)
    passed = 512 * 4 * 2 * (4 * 256 + 3 * 512)  # bytes of four rows of the width and three of the FFN's, in each layer
    computing = prompt.operations / (0.75 * 440e9) + passed / (0.021 * 35e9)
    assert found.time_to_first_token_ms == pytest.approx(1e3 * (computing + 4 * 320e-6))
    assert found.assumed is None
    # llama.cpp reads the same bytes on the same core in a different time.
    assert speed(spec, F16, MEASURED, context=600).decode_ms < found.decode_ms / 2


def test_a_core_without_bfloat16_s_rate_or_a_measured_bandwidth_is_assumed_and_has_a_wide_band() -> None:
    spec, plain = shape(SIZES).spec, deployment_named("huggingface")
    known = speed(spec, plain, MEASURED, context=600)
    for other in (replace(MEASURED, rates={"fp32": 102e9}), replace(MEASURED, measured=False)):
        found = speed(spec, plain, other, context=600)
        assert "of transformers nothing was measured on such a device" in (found.assumed or "")
        assert found.decode_ms == pytest.approx(known.decode_ms)
        assert found.decode_ms_high > 1.5 * known.decode_ms_high
        assert found.tokens_per_second_high > known.tokens_per_second_high
        assert speed(spec, F16, other, context=600).assumed is None


@pytest.mark.parametrize(
    ("name", "form", "runtime"),
    [
        ("4090", "compressed-tensors-int4-g128", "vllm"),
        ("m1 max", "huggingface", "transformers"),
        ("dgx spark", "huggingface", "vllm"),
    ],
)
def test_a_runtime_that_was_not_measured_on_a_class_is_assumed_as_llama_cpp_with_a_slow_end_twice_as_slow(
    name: str, form: str, runtime: str
) -> None:
    device = find_device(name, KNOWN)
    own, theirs = device.shares(runtime), device.shares("llama.cpp")
    assert f"nothing was measured of {runtime}" in own.assumed
    assert not theirs.assumed
    assert own.decode.low == pytest.approx(theirs.decode.low / 2)
    assert own.decode.typical == theirs.decode.typical
    assert own.decode.high >= theirs.decode.high
    spec = shape(SIZES | {"width": 1024, "ffn": 2816}).spec
    found, known = (speed(spec, form, device, context=512) for form in (deployment_named(form, runtime), F16))
    assert (found.assumed, known.assumed) == (own.assumed, None)
    assert found.tokens_per_second_high / found.tokens_per_second_low > 2


@pytest.mark.parametrize("told", [1000 / 34])
def test_a_published_rate_of_transformers_on_a_gpu_lies_within_the_band(told: float) -> None:
    """Llama-2-7B in FP16 on an A10 takes 34 ms per token (lmdeploy issue 210): reading hides the launches."""
    spec = shape({"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocab": 32000}).spec
    found = speed(spec, deployment_named("huggingface"), find_device("a10", KNOWN), context=128)
    assert found.tokens_per_second_low <= told <= found.tokens_per_second_high
    assert found.decode_ms == pytest.approx(34, rel=0.15)
    # A small model waits for launches.
    small = speed(shape(SIZES).spec, deployment_named("huggingface"), find_device("a10", KNOWN), context=128)
    assert (small.bound, small.decode_ms) == ("launches", pytest.approx(4 * 0.6))


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
    # With many streams, a processor may compute faster with weights that it need not unpack.
    packed, plain = (speed(spec, deployment, device, context=context) for deployment in (Q4, F16))
    assert plain.decode_ms >= packed.decode_ms
    assert speed(spec, Q4, device, context=context, batch=batch + 1).decode_ms >= least.decode_ms


def test_a_file_s_own_bytes_take_the_place_of_what_the_format_reads() -> None:
    """Weights that are read are the same share of a file's bytes as of the format's; 16-bit ones are not a file's."""
    spec = shape(SIZES).spec
    cache = 2 * 4 * 64 * 2 * 100
    whole = weights_bytes(spec.tensors, Q4)
    read = LINEARS // 32 * 18 + HEAD // 32 * 34  # the head is in Q8_0
    for size in (whole // 2, whole, 3 * whole):
        found = work(spec, Q4, tokens=1, sequences=1, behind=100, weights=size)
        assert found.bytes == pytest.approx(read * size / whole + cache, rel=1e-9)
    dense = deployment_named("compressed-tensors-int4-g32", "transformers")
    assert work(spec, dense, tokens=1, sequences=1, behind=0, weights=7).bytes == 2 * (LINEARS + HEAD)


def test_percentiles_above_the_median_are_predicted_by_the_slow_end() -> None:
    spec, device = shape(SIZES).spec, find_device("i9-13900k", KNOWN)

    def seconds(quantity: str, percentile: int) -> float:
        (limit,) = parse_latency(f"{quantity}_p{percentile}=1s")
        return limit_seconds(spec, Q4, device, limit, context=512)

    for quantity in ("tpot", "ttft"):
        times = {percentile: seconds(quantity, percentile) for percentile in (1, 50, 51, 99)}
        assert times[1] == times[50] < times[51] == times[99]

"""How much memory a model takes and how fast it would run, as one document."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autodistill.advisor.describe import deployment_named, shape
from autodistill.advisor.estimate import appraise
from autodistill.cli.hardware_summary import appraisal_text
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.runs.results.memory_correction import Overhead

MODEL = shape({"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000})
Q4 = deployment_named("gguf-q4_0")
KNOWN = devices()


def test_the_document_has_the_parts_and_one_device_s_speed() -> None:
    document = appraise(MODEL, Q4, context=1024, batch=2, devices=[find_device("t4", KNOWN)])
    parts = ("weights_bytes", "kv_cache_bytes", "compute_bytes", "overhead_bytes")
    assert sum(document[name] for name in parts) == document["total_bytes"]
    assert (document["runtime"], document["context"], document["batch"]) == ("llama.cpp", 1024, 2)
    assert document["source"] == "predicted"
    assert document["tokens_per_second"] == document["devices"][0]["tokens_per_second"] > 0
    assert document["time_to_first_token_ms"] > 0


def test_no_model_serves_more_streams_or_reads_more_tokens_than_any_machine_or_model_does() -> None:
    assert appraise(MODEL, Q4, batch=999_999)["batch"] == 999_999
    with pytest.raises(InputError, match="--batch must be at most 999999, not 1000000"):
        appraise(MODEL, Q4, batch=10**6)
    assert appraise(MODEL, Q4, context=2**24)["context"] == 2**24
    with pytest.raises(InputError, match="has a context of 16777216 tokens"):
        appraise(MODEL, Q4, context=2**24 + 1)


def test_another_runtime_is_held_to_its_own_bytes_and_one_that_cannot_serve_the_format_is_refused() -> None:
    sizes = {"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocab": 32000}
    big, device = shape(sizes), find_device("4090", KNOWN)
    packed = deployment_named("compressed-tensors-int4-g64")
    # transformers holds the weights in 16 bits. A token reads 6.6e9 of them, all except the table, at 1008 GB/s.
    read = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096)
    dense = appraise(big, packed, devices=[device], runtime="transformers", context=1)
    assert dense["runtime"] == "transformers"
    assert dense["weights_bytes"] == pytest.approx(read + 2 * 32000 * 4096, rel=1e-3)
    assert dense["devices"][0]["tokens_per_second_high"] < 1008e9 / read
    same = appraise(big, deployment_named("huggingface"), devices=[device], context=1)
    assert dense["tokens_per_second"] == pytest.approx(same["tokens_per_second"], rel=1e-3)
    assert appraise(big, packed, devices=[device], context=1)["tokens_per_second"] > 2 * dense["tokens_per_second"]
    for name, runtime, said in (
        ("gguf-q4_0", "transformers", "the runtime of gguf-q4_0 is 'transformers'; it can be llama.cpp"),
        ("gguf-q4_0", "vllm", "it can be llama.cpp"),
        ("huggingface", "llama.cpp", "it can be transformers, vllm"),
        ("compressed-tensors-int3-g32", "vllm", "it can be transformers"),
        ("huggingface", "mlx", "it can be transformers, vllm"),
    ):
        with pytest.raises(InputError, match=said):
            appraise(big, deployment_named(name), runtime=runtime)


def test_a_model_that_the_container_cannot_hold_fits_nowhere_and_it_is_said() -> None:
    sizes = {"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000, "window": 512}
    windowed, device = shape(sizes), find_device("4090", KNOWN)
    said = "GGUF cannot hold this llama: llama.cpp has no sliding window of 512 tokens"
    for devices_ in ((), (device,)):
        document = appraise(windowed, Q4, devices=devices_)
        assert document["cannot_hold"].startswith(said)
        assert not any(one["fits"] for one in document["devices"])
        assert appraisal_text(document).count(said) == 1
    for other in (deployment_named("huggingface"), deployment_named("compressed-tensors-int4-g64")):
        document = appraise(windowed, other, devices=[device])
        assert (document["cannot_hold"], document["devices"][0]["fits"]) == (None, True)
    # A model that is already stored can be held.
    stored = replace(windowed, weights_bytes=10**6)
    assert appraise(stored, Q4, devices=[device])["devices"][0]["fits"]


def test_onnx_runtime_serves_codes_of_gguf_on_cpus() -> None:
    cpu, gpu = find_device("i5-12400", KNOWN), find_device("4090", KNOWN)
    document = appraise(MODEL, Q4, devices=[cpu, gpu], runtime="onnxruntime")
    assert (document["runtime"], document["deployment"]) == ("onnxruntime", "gguf-q4_0+onnx")
    need = memory(MODEL.spec, Q4, context=2048, batch=1, runtime="onnxruntime")
    on_cpu, on_gpu = document["devices"]
    assert on_cpu["total_bytes"] == need.total_bytes
    assert on_cpu["tokens_per_second"] > 0
    assert "nothing was measured of onnxruntime" in on_cpu["assumed"]
    assert not on_gpu["fits"]
    assert "not onnxruntime" in on_gpu["reason"]
    assert "not onnxruntime." in appraisal_text(document)
    with pytest.raises(InputError, match="it can be vllm, transformers"):
        appraise(MODEL, deployment_named("compressed-tensors-int4-g32"), runtime="onnxruntime")


def test_what_gguf_cannot_hold_leaves_for_onnx_runtime() -> None:
    windowed = shape({"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000, "window": 512})
    assert "GGUF cannot hold" in appraise(windowed, Q4)["cannot_hold"]
    assert appraise(windowed, Q4, runtime="onnxruntime")["cannot_hold"] is None


def test_without_one_device_the_speed_is_left_open_and_all_are_listed() -> None:
    assert appraise(MODEL, Q4)["tokens_per_second"] is None
    document = appraise(MODEL, Q4, devices=KNOWN)
    assert document["tokens_per_second"] is None
    assert [one["device"] for one in document["devices"]] == [device.name for device in KNOWN]
    for one, device in zip(document["devices"], KNOWN, strict=True):
        assert one["fits"] == (one["total_bytes"] <= device.usable_bytes)
        assert device.discrete or one["total_bytes"] == document["total_bytes"]
        assert ("predicted, not measured on a GPU" in one["memory_basis"]) == device.discrete
    assert "What fits a GPU is predicted, not measured on a GPU: " in appraisal_text(document)
    text = appraisal_text(document)
    assert all(device.name in text for device in KNOWN)
    assert "predicted" in text


def test_of_a_gpu_its_own_memory_is_told_and_what_the_process_takes_beside_it() -> None:
    device = find_device("4090", KNOWN)
    folder = deployment_named("huggingface")
    process, on_gpu = appraise(MODEL, folder), appraise(MODEL, folder, devices=[device])
    assert (process["on_gpu"], on_gpu["on_gpu"]) == (False, True)
    assert process["total_bytes"] - on_gpu["total_bytes"] > 350_000_000  # a process that has imported torch
    assert (process["main_memory_bytes"], on_gpu["main_memory_bytes"]) == (0, 427_000_000)
    assert on_gpu["devices"][0]["total_bytes"] == on_gpu["total_bytes"]
    text = appraisal_text(on_gpu)
    assert "Rests on: predicted, not measured on a GPU: " in text
    assert "in addition, in main memory" in text
    assert "not measured on a GPU" not in appraisal_text(process)


@pytest.mark.parametrize("prompt", [0, 2049])
def test_a_prompt_that_is_no_part_of_the_context_is_refused(prompt: int) -> None:
    with pytest.raises(InputError, match="--prompt must be 1 to the context"):
        appraise(MODEL, Q4, prompt=prompt)


def test_the_default_context_is_lowered_to_the_model_s_and_an_asked_one_is_refused() -> None:
    small = replace(MODEL, spec=replace(MODEL.spec, max_context=512))
    assert appraise(MODEL, Q4)["context"] == 2048
    assert appraise(small, Q4)["context"] == 512
    with pytest.raises(InputError, match="has a context of 512 tokens: give --context 512 or less"):
        appraise(small, Q4, context=2048)


def test_the_memory_of_training_is_told_by_parts() -> None:
    assert appraise(MODEL, Q4)["training"] is None
    document = appraise(MODEL, Q4, training=256)
    found, count = document["training"], MODEL.spec.parameters
    for way in ("all_kept", "checkpointing"):
        parts = found[way]
        assert (parts["weights_bytes"], parts["gradients_bytes"], parts["optimizer_bytes"]) == (
            4 * count,
            4 * count,
            8 * count,
        )
        assert parts["logits_bytes"] == 2 * 256 * 1000
        # The bfloat16 copies are the matrices of 4 layers, and the table as the head. With checkpointing, it is one
        # layer at a time.
        layer = sum(math.prod(tensor.shape) for tensor in MODEL.spec.tensors if ".layers.0." in tensor.name) - 2 * 128
        assert parts["shown_bytes"] == 2 * ((4 if way == "all_kept" else 1) * layer + 1000 * 128)
        kept = parts["activations_bytes"] + parts["logits_bytes"] + parts["shown_bytes"]
        held = 12 * count + max(kept, 4 * count) + parts["overhead_bytes"]
        assert parts["total_bytes"] == held
    # Checkpointing keeps the inputs of four layers, and one layer whole.
    whole = found["all_kept"]["activations_bytes"]
    assert found["checkpointing"]["activations_bytes"] == whole // 4 + 4 * 4 * 256 * 128
    text = appraisal_text(document)
    states = [word for bits in (16, 8) for word in (f"{bits}-bit", "states")]
    assert text.splitlines()[-11].split() == ["training", "all", "kept", "checkpointing", *states]
    # Both moments together take two or four bytes a weight. With 8 bits, each also has a float32 scale for 256 weights.
    # The rest is as with checkpointing.
    plain = found["checkpointing"]
    for way, moments in (("sixteen_bit_states", 4 * count), ("eight_bit_states", 2 * count + 8 * count // 256)):
        assert found[way]["optimizer_bytes"] == moments
        assert found[way]["total_bytes"] == plain["total_bytes"] - plain["optimizer_bytes"] + moments
    assert "256 tokens a step of one pass" in text


@pytest.mark.parametrize(
    ("sizes", "tokens", "said"),
    [({}, 0, "--training must be at least 1"), ({"experts": 4}, 64, "cannot be trained here: .* llama, mistral")],
)
def test_what_cannot_be_trained_is_said(sizes: dict[str, int], tokens: int, said: str) -> None:
    model = shape({"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000} | sizes)
    with pytest.raises(InputError, match=said):
        appraise(model, Q4, training=tokens)


PAIRS = {
    ("discrete-gpu", "llama.cpp"): Overhead(correction_bytes=-3_000_000, margin_bytes=5_000_000, pairs=4),
    ("cpu", "llama.cpp"): Overhead(correction_bytes=7_000_000, margin_bytes=1_000_000, pairs=3),
}


def test_measured_students_change_the_memory_of_their_class_and_runtime() -> None:
    plain = appraise(MODEL, Q4)["total_bytes"]
    t4, pi = find_device("t4", KNOWN), find_device("i9-13900k", KNOWN)
    document = appraise(MODEL, Q4, devices=[t4], overheads=PAIRS)
    on_gpu = appraise(MODEL, Q4, devices=[t4])["total_bytes"]
    assert document["total_bytes"] == on_gpu + 2_000_000
    assert document["memory_overhead"] == {"correction_bytes": -3_000_000, "margin_bytes": 5_000_000, "pairs": 4}
    text = appraisal_text(document)
    assert "3.00 MB less overhead than estimated, and a margin of 5.00 MB, by 4 measured students" in text
    # Each of several devices has its own overhead. Without a device, the class must be the only one that was measured.
    several = appraise(MODEL, Q4, devices=[t4, pi], overheads=PAIRS)
    gained = [one["total_bytes"] - own for one, own in zip(several["devices"], (on_gpu, plain), strict=True)]
    assert gained == [2_000_000, 8_000_000]
    assert several["total_bytes"] == appraise(MODEL, Q4, overheads=PAIRS)["total_bytes"] == plain
    alone = {place: one for place, one in PAIRS.items() if place[0] == "cpu"}
    assert appraise(MODEL, Q4, overheads=alone)["total_bytes"] == plain + 8_000_000
    # Pairs of llama.cpp say nothing about another runtime.
    folder = deployment_named("huggingface")
    assert appraise(MODEL, folder, overheads=alone)["total_bytes"] == appraise(MODEL, folder)["total_bytes"]

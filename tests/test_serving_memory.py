"""The memory of serving, against llama.cpp's own log and by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.described import deployment_named, shape, spec_of
from autodistill.errors import InputError
from autodistill.llama_cpp import LlamaServer
from autodistill.serving_memory import BASIS, KV_BYTES, memory

SIZES = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 256, "vocab": 1000}
SMALL = {"layers": 6, "width": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 512, "vocabulary": 512}
Q8 = deployment_named("gguf-q8_0")


@pytest.fixture(scope="module")
def written() -> Any:
    """The benchmark's writer of GGUF files, which knows more graphs than the exporter does."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("memory_estimate")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    "case",
    [
        {"family": "llama", "kv_type": "q8_0", "context": 1024},
        {"family": "llama", "kv_type": "q4_0", "context": 1024, "form": "gguf-q4_0"},
        {"family": "gemma3_text", "context": 2048, "more": {"sliding_window": 256, "sliding_window_pattern": 6}},
        {
            "family": "qwen3_moe",
            "context": 512,
            "more": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        },
        {"family": "gpt_neox", "kv_heads": 4, "tied": False, "context": 512},
    ],
    ids=lambda case: f"{case['family']}-{case.get('kv_type', 'f16')}",
)
def test_buffers_are_what_llama_cpp_allocates(case: dict[str, Any], written: Any, tmp_path: Path) -> None:
    asked = written.Case(**(SMALL | case))
    spec, deployment = spec_of(asked.config()), deployment_named(asked.form)
    written.write(asked, spec, deployment, tmp_path / "model.gguf")
    with LlamaServer(tmp_path / "model.gguf", asked.context, 1, 1, asked.kv_type) as server:
        found = server.buffers()
    guess = memory(spec, deployment, context=asked.context, batch=1, kv_type=asked.kv_type)
    assert guess.weights_bytes == pytest.approx(found.model_bytes, rel=0.01, abs=20_000)
    assert guess.kv_cache_bytes == pytest.approx(found.kv_bytes, rel=0.001, abs=20_000)
    assert guess.total_bytes - guess.overhead_bytes == pytest.approx(found.total_bytes, rel=0.02)


def test_a_cache_in_fewer_bits_is_smaller_by_the_blocks() -> None:
    spec = shape(SIZES).spec
    values = 2 * 4 * 2 * 32 * 1024
    sizes = {kv_type: memory(spec, Q8, context=1024, batch=1, kv_type=kv_type).kv_cache_bytes for kv_type in KV_BYTES}
    assert sizes == {"f16": 2 * values, "q8_0": values * 34 // 32, "q4_0": values * 18 // 32}


def test_a_window_holds_no_more_than_itself_in_transformers() -> None:
    config = {"layers": 4, "window": 100} | {key: value for key, value in SIZES.items() if key != "layers"}
    spec = shape(config, family="mistral").spec
    plain = memory(shape(SIZES).spec, Q8, context=1000, batch=2, runtime="transformers").kv_cache_bytes
    windowed = memory(spec, Q8, context=1000, batch=2, runtime="transformers").kv_cache_bytes
    assert windowed * 10 == plain


def test_all_experts_are_stored_and_the_active_ones_computed() -> None:
    experts = shape(SIZES | {"experts": 8, "active_experts": 2}).spec
    one = shape(SIZES).spec
    many, few = (memory(spec, Q8, context=512, batch=1) for spec in (experts, one))
    matrices = 4 * 3 * 128 * 256 * 34 // 32
    assert many.weights_bytes - few.weights_bytes == 7 * matrices + 4 * 8 * 128 * 4  # and routers in float32
    assert many.compute_bytes - few.compute_bytes == 4 * 512 * 3 * 256  # one more expert at once


def test_a_file_s_own_weights_take_the_place_of_the_format_s() -> None:
    assert memory(shape(SIZES).spec, Q8, context=512, batch=1, weights=12345).weights_bytes == 12345


@pytest.mark.parametrize("runtime", BASIS)
def test_every_runtime_says_what_it_rests_on(runtime: str) -> None:
    estimate = memory(shape(SIZES).spec, Q8, context=512, batch=1, runtime=runtime)
    parts = (estimate.weights_bytes, estimate.kv_cache_bytes, estimate.compute_bytes, estimate.overhead_bytes)
    assert min(parts) > 0
    assert sum(parts) == estimate.total_bytes
    assert ("not measured" in BASIS[runtime]) == (runtime in ("vllm", "onnxruntime"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_type": "q5_0"}, "llama.cpp holds no KV cache in 'q5_0'; it can be f16, q8_0, q4_0"),
        ({"kv_type": "q8_0", "runtime": "vllm"}, "vllm holds no KV cache in 'q8_0'; it can be f16"),
        ({"runtime": "tgi"}, "the runtimes are llama.cpp"),
        ({"context": 0}, "at least 1"),
    ],
)
def test_what_no_runtime_does_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        memory(shape(SIZES).spec, Q8, **({"context": 512, "batch": 1} | options))


@settings(deadline=None, max_examples=50)
@given(
    runtime=st.sampled_from(sorted(BASIS)),
    context=st.integers(1, 4000),
    batch=st.integers(1, 16),
    more=st.integers(1, 300),
    window=st.sampled_from([None, 64]),
)
def test_memory_grows_with_context_and_streams(
    runtime: str, context: int, batch: int, more: int, window: int | None
) -> None:
    spec = shape(SIZES | {"window": window}, family="mistral").spec

    def total(context: int, batch: int) -> int:
        return memory(spec, Q8, context=context, batch=batch, runtime=runtime).total_bytes

    assert total(context, batch) <= total(context + more, batch)
    assert total(context, batch) < total(context, batch + more)


@settings(deadline=None, max_examples=40)
@given(context=st.integers(1, 4000), batch=st.integers(1, 8), tied=st.booleans())
def test_memory_grows_with_the_bits_of_weights_and_cache(context: int, batch: int, tied: bool) -> None:
    spec = shape(SIZES, tied=tied).spec
    forms = ("gguf-q4_0", "gguf-q4_1", "gguf-q5_1", "gguf-q8_0", "gguf-f16")
    by_weights = [memory(spec, deployment_named(form), context=context, batch=batch).total_bytes for form in forms]
    assert by_weights == sorted(set(by_weights))
    kinds = ("q4_0", "q8_0", "f16")
    by_cache = [memory(spec, Q8, context=context, batch=batch, kv_type=kind).total_bytes for kind in kinds]
    assert by_cache == sorted(set(by_cache))

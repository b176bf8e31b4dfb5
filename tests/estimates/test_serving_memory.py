"""The memory of serving, against llama.cpp's own log and sums by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill import plugins
from autodistill.advisor.describe import deployment_named, describe, shape, spec_of
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import BASIS, TRAINING_PROCESS_BYTES, basis_of, memory, onnx_bytes
from autodistill.hardware.runtime import Runtime
from autodistill.models.families import graph_named
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.formats import CACHE_BYTES, get_format
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from benchmarks.common import model_files
from tests.thinned import thinned

SIZES = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 256, "vocab": 1000}
SMALL = {"layers": 6, "width": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 512, "vocabulary": 512}
Q8 = deployment_named("gguf-q8_0")
F16 = deployment_named("huggingface")


@pytest.mark.parametrize(
    "case",
    [
        {"family": "llama", "kv_type": "q8_0", "context": 1024},
        {"family": "llama", "kv_type": "q4_0", "context": 1024, "form": "gguf-q4_0"},
        {"family": "llama", "context": 512, "form": "gguf-q4_k"},
        {"family": "llama", "width": 256, "context": 1024, "form": "gguf-q6_k"},
        {"family": "llama", "width": 256, "context": 512, "tied": False, "form": "gguf-q4_k_m"},
        {"family": "gpt_neox", "kv_heads": 4, "tied": False, "context": 512, "form": "gguf-q5_k_m"},
        {"family": "gemma3_text", "context": 2048, "more": {"sliding_window": 256, "sliding_window_pattern": 6}},
        {
            "family": "qwen3_moe",
            "context": 512,
            "more": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        },
        {"family": "mixtral", "context": 512, "more": {"num_local_experts": 4, "num_experts_per_tok": 2}},
        {"family": "gpt_neox", "kv_heads": 4, "tied": False, "context": 512},
    ],
    ids=lambda case: f"{case['family']}-{case.get('kv_type', 'f16')}",
)
def test_buffers_are_what_llama_cpp_allocates(case: dict[str, Any], tmp_path: Path) -> None:
    asked = model_files.Case(**(SMALL | case))
    spec, deployment = spec_of(asked.config()), deployment_named(asked.form)
    model_files.write_gguf(asked, spec, deployment, tmp_path / "model.gguf")
    with LlamaServer(
        tmp_path / "model.gguf", asked.context, 1, cache_type_k=asked.kv_type, cache_type_v=asked.kv_type
    ) as server:
        found = server.buffers()
    guess = memory(spec, deployment, context=asked.context, batch=1, kv_type=asked.kv_type)
    assert guess.weights_bytes == pytest.approx(found.model_bytes, rel=0.01, abs=20_000)
    assert guess.kv_cache_bytes == pytest.approx(found.kv_bytes, rel=0.001, abs=20_000)
    assert guess.total_bytes - guess.overhead_bytes == pytest.approx(found.total_bytes, rel=0.02)
    file = describe(str(tmp_path / "model.gguf"))
    assert file.weights_bytes == pytest.approx(found.model_bytes, rel=0.01, abs=20_000)
    read = memory(file.spec, deployment, context=asked.context, batch=1, kv_type=asked.kv_type)
    assert read.total_bytes - read.overhead_bytes == pytest.approx(found.total_bytes, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", thinned(["q8_0", "q6_k", "q5_0", "q4_1", "q4_0", "iq4_nl", "mxfp4", "q4_k"]))
def test_a_tied_table_whose_rows_are_interleaved_is_held_twice(kind: str, tied: bool, tmp_path: Path) -> None:
    asked = model_files.Case(**(SMALL | {"family": "llama", "width": 256, "layers": 1, "tied": tied, "context": 256}))
    spec, deployment = spec_of(asked.config()), replace(deployment_named("gguf-q5_0"), types=(("embeddings", kind),))
    model_files.write_gguf(asked, spec, deployment, tmp_path / "model.gguf")
    with LlamaServer(tmp_path / "model.gguf", 256, 1) as server:
        found = server.buffers()
    # What a process takes in addition to its buffers, for a model without the copy.
    plain = memory(spec, deployment_named("gguf-q5_0"), context=256, batch=1).overhead_bytes
    guess = memory(spec, deployment, context=256, batch=1)
    copied = guess.overhead_bytes - plain
    assert guess.weights_bytes + copied == pytest.approx(found.model_bytes, abs=20_000)
    assert (copied > 0) == (tied and kind in ("q4_0", "iq4_nl", "mxfp4", "q4_k"))


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("rank", thinned([64, 256]))
def test_of_latent_attention_llama_cpp_caches_one_vector_a_token_and_layer(
    kv_type: str, routed: bool, rank: int, tmp_path: Path
) -> None:
    """A tiny DeepSeek in llama.cpp.

    Its log shows a cache of latents without values, and a graph that works by heads in the space of the latents.
    """
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128}
    more = model_files.LATENT | {"kv_lora_rank": rank} | (experts | {"first_k_dense_replace": 1} if routed else {})
    sizes = SMALL | {"tied": False, "kv_type": kv_type, "context": 1024, "more": more}
    asked = model_files.Case(family="deepseek_v2", **sizes)
    spec, deployment = spec_of(asked.config()), deployment_named(asked.form)
    model_files.write_gguf(asked, spec, deployment, tmp_path / "model.gguf")
    with LlamaServer(tmp_path / "model.gguf", asked.context, 1, cache_type_k=kv_type, cache_type_v=kv_type) as server:
        found = server.buffers()
        assert server.complete([3, 4, 5, 6], 2, ignore_end=True).tokens  # it also computes with it
    guess = memory(spec, deployment, context=asked.context, batch=1, kv_type=kv_type)
    size, count = CACHE_BYTES[kv_type]
    assert guess.kv_cache_bytes == asked.layers * 1024 * (rank + 32) * size // count
    assert guess.kv_cache_bytes == pytest.approx(found.kv_bytes, rel=0.001, abs=20_000)
    assert guess.weights_bytes == pytest.approx(found.model_bytes, rel=0.01, abs=20_000)
    assert guess.compute_bytes == pytest.approx(found.compute_bytes + found.output_bytes, rel=0.1)
    assert guess.total_bytes - guess.overhead_bytes == pytest.approx(found.total_bytes, rel=0.05)


def test_a_cache_in_fewer_bits_is_smaller_by_the_blocks() -> None:
    spec = shape(SIZES).spec
    values = 2 * 4 * 2 * 32 * 1024
    sizes = {
        kv_type: memory(spec, Q8, context=1024, batch=1, kv_type=kv_type).kv_cache_bytes for kv_type in CACHE_BYTES
    }
    assert sizes == {"f16": 2 * values, "q8_0": values * 34 // 32, "q4_0": values * 18 // 32}


def test_a_window_s_cache_keeps_the_whole_prompt_in_transformers_and_no_more_than_itself_in_vllm() -> None:
    config = {"layers": 4, "window": 100} | {key: value for key, value in SIZES.items() if key != "layers"}
    spec, wide = shape(config, family="mistral").spec, shape(SIZES).spec

    def cache(spec: Any, runtime: str) -> int:
        return memory(spec, Q8, context=8000, batch=2, runtime=runtime).kv_cache_bytes

    assert cache(spec, "transformers") == cache(wide, "transformers")
    assert cache(spec, "vllm") < cache(wide, "vllm")


def test_what_a_window_caches_in_transformers_is_a_view_of_the_whole_prompt() -> None:
    """The estimate of a windowed cache relies on this behaviour of transformers itself."""
    torch = pytest.importorskip("torch")
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer, given = DynamicSlidingWindowLayer(sliding_window=10), torch.zeros(1, 2, 500, 32)
    layer.update(given, given)
    assert layer.keys.shape[-2] < 10
    assert layer.keys.untyped_storage().nbytes() == 500 * 2 * 32 * 4


def test_of_activations_and_cache_a_half_more_is_held_in_transformers() -> None:
    """By hand, for one token in four layers of width 128 with FFNs of 256 and keys and values of 64."""
    spec = shape(SIZES).spec
    parts = [memory(spec, Q8, context=tokens, batch=1, runtime="transformers") for tokens in (1000, 1001)]
    assert parts[1].kv_cache_bytes - parts[0].kv_cache_bytes == 4 * 2 * 64 * 2
    activations = 2 * (4 * 128 + 3 * 256)
    assert parts[1].compute_bytes - parts[0].compute_bytes == activations + (activations + 4 * 2 * 64 * 2) // 2


def test_a_step_of_vllm_has_activations_of_the_tokens_that_it_batches_and_logits_of_its_streams() -> None:
    """By hand, in 16 bits, for 2,048 tokens in a layer of 128 with FFNs of 256; logits once more in float32."""
    parts = memory(shape(SIZES).spec, F16, context=512, batch=3, runtime="vllm")
    assert parts.compute_bytes == 2 * 2048 * (4 * 128 + 3 * 256) + (2 + 4) * 3 * 1000


def test_a_prompt_of_onnx_runtime_has_logits_and_scores_of_all_its_tokens() -> None:
    """By hand, in float32: what is linear in the tokens, scores of four heads, a mask as float32 and booleans."""
    spec = shape(SIZES | {"kv_heads": 4}, tied=True).spec
    half, whole = (memory(spec, F16, context=size, batch=2, runtime="onnxruntime") for size in (256, 512))
    assert whole.kv_cache_bytes == 2 * half.kv_cache_bytes == 2 * 512 * 4 * 4 * 2 * 128
    squared = 4 * 2 * 4 + 5
    row = 4 * 2 * 1000 + 4 * 2 * (4 * 128 + 3 * 256 + 2 * 128)
    assert whole.compute_bytes == 512 * row + 512**2 * squared
    assert half.compute_bytes == 256 * row + 256**2 * squared


def test_a_small_vocabulary_s_cache_is_there_twice_in_onnx_runtime() -> None:
    spec = shape(SIZES | {"vocab": 8, "layers": 64, "kv_heads": 4, "heads": 4, "ffn": 8}).spec
    found = memory(spec, F16, context=32, batch=1, runtime="onnxruntime")
    assert found.compute_bytes == found.kv_cache_bytes


def test_weights_in_onnx_runtime_are_codes_or_float32_and_a_tied_table_is_there_twice() -> None:
    spec = shape(SIZES, tied=True).spec
    linears, table, norms = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256), 1000 * 128, 9 * 128
    held = {
        name: memory(spec, deployment_named(name), context=8, batch=1, runtime="onnxruntime").weights_bytes
        for name in ("huggingface", "gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "gguf-q5_0", "gguf-q5_1")
    }
    assert held["huggingface"] == 4 * (linears + norms) + (2 + 4) * table
    # In addition to codes, each group has its scale as stored and in float32. With 8 bits, also a copy of the scale and
    # the sum of the codes.
    of_8 = table + 2 * table // 32 + table + (6 + 8) * table // 32
    assert held["gguf-q8_0"] == linears + (6 + 8) * linears // 32 + 4 * norms + of_8
    assert held["gguf-q4_0"] == linears // 2 + 6 * linears // 32 + 4 * norms + of_8
    # The offset is held in the same two ways, together with the values from which it is computed.
    assert held["gguf-q4_1"] - held["gguf-q4_0"] == (6 + 4) * linears // 32
    assert held["gguf-q5_0"] == held["gguf-q8_0"]
    assert held["gguf-q5_1"] - held["gguf-q5_0"] == 6 * linears // 32
    untied = memory(shape(SIZES).spec, deployment_named("gguf-q4_0"), context=8, batch=1, runtime="onnxruntime")
    assert untied.weights_bytes == held["gguf-q4_0"]


def test_logits_of_a_head_with_offsets_are_there_twice_in_onnx_runtime() -> None:
    spec = shape(SIZES, tied=True).spec
    plain = deployment_named("gguf-q4_0", "onnxruntime")
    tables = [replace(plain, types=(("embeddings", kind),)) for kind in ("q4_0", "q4_1")]
    once, twice = (memory(spec, one, context=64, batch=2, runtime="onnxruntime").compute_bytes for one in tables)
    assert twice - once == 4 * 2 * 64 * 1000


def test_all_experts_are_stored_and_the_active_ones_computed() -> None:
    experts = shape(SIZES | {"experts": 8, "active_experts": 2}).spec
    one = shape(SIZES).spec
    many, few = (memory(spec, Q8, context=512, batch=1) for spec in (experts, one))
    matrices = 4 * 3 * 128 * 256 * 34 // 32
    assert many.weights_bytes - few.weights_bytes == 7 * matrices + 4 * 8 * 128 * 4  # and routers in float32
    assert many.compute_bytes - few.compute_bytes == 4 * 512 * 3 * 256  # one more expert at once


def test_a_file_s_own_weights_take_the_place_of_the_format_s() -> None:
    assert memory(shape(SIZES).spec, Q8, context=512, batch=1, weights=12345).weights_bytes == 12345


TABLE = 1000 * 128 * 34 // 32  # rows of the vocabulary in Q8_0, in blocks of 32


@pytest.mark.parametrize("tied", [False, True])
def test_on_a_gpu_llama_cpp_keeps_the_table_and_the_process_in_main_memory(tied: bool) -> None:
    """By hand: 512 tokens at once, whose FFN values (256) products copy in and out in 16 bits; two rows of logits."""
    spec = shape(SIZES, tied=tied).spec
    process, on_gpu = (memory(spec, Q8, context=512, batch=2, on_gpu=gpu) for gpu in (False, True))
    assert (process.on_gpu, on_gpu.on_gpu, process.main_memory_bytes) == (False, True, 0)
    assert process.weights_bytes - on_gpu.weights_bytes == (0 if tied else TABLE)
    assert on_gpu.kv_cache_bytes == process.kv_cache_bytes
    assert process.compute_bytes - on_gpu.compute_bytes == 2 * 4 * 1000
    assert process.overhead_bytes == 20 * 2**20 + 1000 * 512  # as measured
    assert on_gpu.overhead_bytes == 32 * 2**20 + 512 * 2 * 2 * 256
    assert on_gpu.main_memory_bytes == process.overhead_bytes + TABLE + 2 * 4 * 1000


def test_on_a_gpu_neither_python_nor_cuda_s_context_counts() -> None:
    spec = shape(SIZES).spec
    for runtime, overhead in (("transformers", 52 * 2**20), ("vllm", 400_000_000 + 32 * 2**20)):
        process, on_gpu = (
            memory(spec, deployment_named("huggingface"), context=512, batch=2, runtime=runtime, on_gpu=gpu)
            for gpu in (False, True)
        )
        assert on_gpu.overhead_bytes == overhead < process.overhead_bytes
        # vLLM's captured graphs, and CUDA's context with its driver, which no GPU was here to measure.
        assert runtime == "transformers" or process.overhead_bytes == 400_000_000 + 600_000_000
        assert on_gpu.weights_bytes == process.weights_bytes
        assert on_gpu.kv_cache_bytes == process.kv_cache_bytes
    # A GPU's heap has no such holes. By hand: what the last layer's FFN holds for 1024 tokens, and two rows of logits.
    held = memory(spec, deployment_named("huggingface"), context=512, batch=2, on_gpu=True).compute_bytes
    assert held == 2 * 1024 * (4 * 128 + 3 * 256) + 2 * 6 * 1000


@pytest.mark.parametrize("runtime", BASIS)
def test_what_is_told_of_a_gpu_says_that_it_was_measured_on_none(runtime: str) -> None:
    estimate = memory(shape(SIZES).spec, Q8, context=512, batch=1, runtime=runtime, on_gpu=True)
    assert min(estimate.weights_bytes, estimate.kv_cache_bytes, estimate.compute_bytes, estimate.overhead_bytes) > 0
    assert basis_of(runtime, on_gpu=True).startswith("predicted, not measured on a GPU: ")
    assert basis_of(runtime, on_gpu=False) == BASIS[runtime]


@pytest.mark.parametrize("runtime", BASIS)
def test_every_runtime_says_what_it_rests_on(runtime: str) -> None:
    estimate = memory(shape(SIZES).spec, Q8, context=512, batch=1, runtime=runtime)
    parts = (estimate.weights_bytes, estimate.kv_cache_bytes, estimate.compute_bytes, estimate.overhead_bytes)
    assert min(parts) > 0
    assert sum(parts) == estimate.total_bytes
    assert ("not measured" in BASIS[runtime]) == (runtime == "vllm")


@pytest.fixture
def foreign() -> Iterator[Runtime]:
    """A runtime that the exporter of a plug-in describes. Each part of its memory follows from another argument."""

    def parts(spec: ModelSpec, deployment: Deployment, weights: int, context: int, batch: int) -> tuple[int, ...]:
        assert deployment is Q8
        return weights + 1, 1000 * context, 10 * batch, spec.layers

    runtime = Runtime(name="own-server", memory=parts, basis="counted by its author", classes=("cpu",))
    plugins.register("exporters", "own", SimpleNamespace(runtimes=(runtime,), formats=()))
    yield runtime
    plugins.forget("exporters", "own")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_memory_of_a_plug_in_s_runtime_is_what_its_exporter_says(foreign: Runtime, on_gpu: bool) -> None:
    found = memory(shape(SIZES).spec, Q8, context=300, batch=7, weights=9_000, runtime=foreign.name, on_gpu=on_gpu)
    parts = (found.weights_bytes, found.kv_cache_bytes, found.compute_bytes, found.overhead_bytes)
    assert parts == (9_001, 300_000, 70, 4)
    assert found.main_memory_bytes == 0
    assert (found.runtime, found.context, found.batch, found.on_gpu) == ("own-server", 300, 7, on_gpu)
    assert basis_of(foreign.name, on_gpu=on_gpu) == "counted by its author"
    with pytest.raises(InputError, match=r"no runtime 'its-server'; the runtimes are llama\.cpp, .*, own-server$"):
        memory(shape(SIZES).spec, Q8, context=300, batch=7, runtime="its-server")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_type": "q5_0"}, "llama.cpp holds no KV cache in 'q5_0'; it can be f16, q8_0, q4_0"),
        ({"kv_type": "q8_0", "spec": shape(SIZES | {"head_dim": 16}).spec}, "by blocks of 32, .* the 16 of this model"),
        ({"kv_type": "q8_0", "runtime": "vllm"}, "vllm holds no KV cache in 'q8_0'; it can be f16"),
        ({"runtime": "tgi"}, "the runtimes are llama.cpp"),
        ({"context": 0}, "at least 1"),
    ],
)
def test_what_no_runtime_does_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        memory(**({"spec": shape(SIZES).spec, "deployment": Q8, "context": 512, "batch": 1} | options))


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


def ffn_of_graph(rows: int, more: int = 0) -> int:
    """Return llama.cpp's graph for 512 of 1024 tokens by hand: `rows` at its peak, five of the width, mask, inputs."""
    return 4 * 512 * (5 * 128 + rows) + 2 * 1024 * 512 + 40 * 512 + more


def test_the_graph_of_llama_cpp_is_what_its_formula_gives_by_hand() -> None:
    """The peak is the FFN's gate, up and product, or queries with copied keys and values, or the logits."""
    logits = 4 * 1000

    def compute(**sizes: int) -> int:
        return memory(shape(SIZES | sizes).spec, Q8, context=1024, batch=1).compute_bytes

    assert compute() == ffn_of_graph(3 * 256, logits)
    assert compute(ffn=64) == ffn_of_graph(128 + 3 * 64, logits)
    assert compute(ffn=64, kv_heads=1) == ffn_of_graph(2 * 128, logits)
    # 1001 tokens are rounded up to 1024 cells, and a pass has no more tokens than there are.
    assert memory(shape(SIZES).spec, Q8, context=1001, batch=1).compute_bytes == ffn_of_graph(3 * 256, logits)
    short = memory(shape(SIZES | {"vocab": 10**6}).spec, Q8, context=8, batch=1)
    assert short.compute_bytes == 4 * 8 * 5 * 128 + 4 * 10**6 + 2 * 256 * 8 + 40 * 8 + 4 * 10**6


def test_rows_that_are_looked_up_for_all_layers_add_to_llama_cpp_s_graph() -> None:
    """Two copies of the rows and one of the width, in addition to the FFN; or three of the rows if these are more."""
    spec, logits = shape(SIZES, tied=True).spec, 4 * 1000
    for by_layer, rows in ((64, 3 * 256 + 2 * 64 + 128), (2048, 3 * 2048)):
        table = TensorSpec(name="model.embed_tokens_per_layer.weight", role=Role.EMBEDDING, shape=(1000, by_layer))
        found = memory(replace(spec, tensors=(*spec.tensors, table)), Q8, context=1024, batch=1)
        assert found.compute_bytes == ffn_of_graph(rows, logits)
        on_gpu = memory(replace(spec, tensors=(*spec.tensors, table)), Q8, context=1024, batch=1, on_gpu=True)
        further = 1000 * by_layer * 34 // 32
        assert found.weights_bytes - on_gpu.weights_bytes == further
        assert on_gpu.main_memory_bytes == 20 * 2**20 + 512 * 1000 + TABLE + further + logits


def test_recurrent_layers_take_their_projections_and_a_state_of_one_layer() -> None:
    """Three of four layers keep 500 numbers each. A layer's graph holds one state for each sequence."""
    plain, logits = shape(SIZES).spec, 2 * 4 * 1000
    for rows, (made, values, gates) in ((2 * 900, (900, 500, 300)), (3 * 800, (900, 800, 300)), (2000, (9, 8, 1000))):
        sizes = {"linear_attn.in_proj_qkv": made, "linear_attn.in_proj_z": values, "self_attn.q_proj": gates}
        tensors = [
            TensorSpec(name=f"model.layers.{layer}.{name}.weight", role=Role.LINEAR, shape=(size, 128))
            for layer, (name, size) in enumerate(sizes.items())
        ]
        kept = [tensor for tensor in plain.tensors if "q_proj" not in tensor.name]
        spec = replace(plain, tensors=(*kept, *tensors), recurrent=3 * 500, kv_widths=(0, 0, 0, 64))
        found = memory(spec, Q8, context=1024, batch=2)
        assert found.compute_bytes == ffn_of_graph(rows, 4 * 2 * 500 + logits)
        assert type(found.compute_bytes) is int
        assert found.kv_cache_bytes == 2 * (2 * 64 * 2 * 1024 + 4 * 3 * 500)


def test_a_layer_with_a_window_has_a_mask_of_booleans_and_a_copy_in_transformers() -> None:
    whole = memory(shape(SIZES).spec, F16, context=64, batch=1, runtime="transformers").compute_bytes
    for window, masks in ((1, 2 * 64**2), (63, 2 * 64**2), (64, 0)):
        spec = shape(SIZES | {"window": window}, family="mistral").spec
        assert spec.windowed
        assert memory(spec, F16, context=64, batch=1, runtime="transformers").compute_bytes == whole + masks


def test_processes_take_what_was_measured_of_them() -> None:
    spec = shape(SIZES).spec
    cases = {
        ("onnxruntime", False): 62_000_000 + 4 * 120_000,
        ("onnxruntime", True): 32 * 2**20,
        ("transformers", False): 427_000_000,
        ("transformers", True): (32 + 20) * 2**20,
        ("vllm", False): 1_000_000_000,
        ("vllm", True): 400_000_000 + 32 * 2**20,
    }
    for (runtime, on_gpu), overhead in cases.items():
        found = memory(spec, F16, context=64, batch=1, runtime=runtime, on_gpu=on_gpu)
        assert found.overhead_bytes == overhead, runtime
        beside = 62_480_000 if runtime == "onnxruntime" else 427_000_000
        assert found.main_memory_bytes == (beside if on_gpu else 0)
    assert TRAINING_PROCESS_BYTES == 540_000_000
    measured = memory(replace(spec, process_bytes=12345), Q8, context=64, batch=1)
    assert measured.overhead_bytes == 12345


@pytest.mark.parametrize(("size", "rest", "said"), [(0, 1, "not 0 and 1"), (1, 0, "not 1 and 0")])
def test_one_token_of_one_sequence_is_the_least(size: int, rest: int, said: str) -> None:
    with pytest.raises(InputError, match=f"context and batch must be at least 1, {said}"):
        memory(shape(SIZES).spec, Q8, context=size, batch=rest)
    assert memory(shape(SIZES).spec, Q8, context=1, batch=1).kv_cache_bytes == 4 * 2 * 64 * 2 * 256


def test_a_graph_with_many_steps_takes_memory_of_the_process_for_each_token() -> None:
    """52,200 bytes were measured for a token of a pass, of which there are at most 512."""
    spec = shape(SIZES).spec
    plain = 20 * 2**20 + 512 * 1000
    steps = replace(spec, architecture="qwen3_5_text")
    assert graph_named(steps.architecture) == "qwen35"
    for context, tokens in ((64, 64), (512, 512), (2048, 512)):
        assert memory(spec, Q8, context=context, batch=1).overhead_bytes == plain
        assert memory(steps, Q8, context=context, batch=1).overhead_bytes == plain + 52_200 * tokens


def test_a_tied_table_is_held_twice_by_its_type_its_rows_and_its_graph() -> None:
    """By hand: rows of a multiple of eight in a type that is interleaved, or any table of Gemma 4."""
    q4 = replace(deployment_named("gguf-q5_0"), types=(("embeddings", "q4_0"),))
    table = 128 // 32 * 18
    for vocabulary, deployment, family, tied, copies in (
        (1000, q4, "llama", True, 1),
        (1004, q4, "llama", True, 0),
        (1000, q4, "llama", False, 0),
        (1000, deployment_named("gguf-q5_0"), "llama", True, 0),
        (1004, q4, "gemma4_text", True, 1),
    ):
        spec = replace(shape(SIZES | {"vocab": vocabulary}, tied=tied).spec, architecture=family)
        found = memory(spec, deployment, context=64, batch=1).overhead_bytes
        assert found - 20 * 2**20 - 512 * vocabulary == copies * vocabulary * table


def test_windows_of_llama_cpp_and_vllm_hold_the_window_and_what_a_pass_adds() -> None:
    """By hand, for 64 keys and as many values in 16 bits. Two of four layers have a window of 100 tokens."""
    row = 2 * 64 * 2
    spec = replace(shape(SIZES).spec, architecture="gemma3_text", window=100, windowed=(0, 2))
    # 100 tokens and 512 of a pass are 612, in whole cells 768. A second mask is as wide as that.
    found, plain = (memory(one, Q8, context=4000, batch=3) for one in (spec, shape(SIZES).spec))
    assert found.kv_cache_bytes == 3 * row * (2 * 4096 + 2 * 768)
    assert found.compute_bytes - plain.compute_bytes == 2 * 768 * 512
    short = memory(spec, Q8, context=300, batch=1)
    assert short.kv_cache_bytes == row * 4 * 512
    # vLLM batches 2,048 tokens beside the window, and its pages are of 16 tokens.
    vllm = memory(spec, F16, context=4001, batch=3, runtime="vllm")
    assert vllm.kv_cache_bytes == 3 * row * (2 * 4016 + 2 * (100 + 2048))
    assert memory(spec, F16, context=1000, batch=3, runtime="vllm").kv_cache_bytes == 3 * row * 4 * 1008


def test_what_stays_of_a_file_on_a_gpu_is_never_less_than_nothing() -> None:
    """The file is told to be smaller than the table that stays in main memory."""
    spec = shape(SIZES).spec
    for weights, left in ((TABLE - 1, 0), (TABLE, 0), (TABLE + 1, 1)):
        assert memory(spec, Q8, context=64, batch=1, weights=weights, on_gpu=True).weights_bytes == left


def test_matrices_of_layers_are_held_once_whatever_their_type() -> None:
    q4 = deployment_named("gguf-q4_0")  # its table is in Q8_0, whose rows are not interleaved
    for tied in (True, False):
        found = memory(shape(SIZES, tied=tied).spec, q4, context=64, batch=1).overhead_bytes
        assert found == 20 * 2**20 + 512 * 1000


def test_copies_on_a_gpu_are_of_the_widest_of_rows_queries_and_ffn() -> None:
    """In 16 bits, inputs and outputs of a product, for all tokens of a pass: 3 * 64 in three short streams."""
    for sizes, widest in (({"ffn": 64}, 128), ({"ffn": 64, "head_dim": 64}, 256), ({}, 256), ({"ffn": 512}, 512)):
        found = memory(shape(SIZES | sizes).spec, Q8, context=64, batch=3, on_gpu=True)
        assert found.overhead_bytes == 32 * 2**20 + 2 * 2 * 192 * widest
    # The graph of as many tokens; each stream has 256 cells, and the mask is of one stream's cells.
    rows = 4 * 192 * (5 * 128 + 3 * 512)
    assert found.compute_bytes == rows + 2 * 256 * 192 + 40 * 192
    assert found.kv_cache_bytes == 4 * 2 * 64 * 2 * 3 * 256


@pytest.mark.parametrize(
    ("kind", "looked_up", "product"),
    [
        # 512 weights of a row: codes, and for each group what lies beside them.
        ("gguf-q6_k", 512 + 4 * 32, 512 + (4 + 8) * 32),  # 8 bits a code, scales in float32
        ("gguf-q5_k", 512 + 2 * 4 * 16, 512 + (2 * 4 + 8) * 16),
        ("gguf-q4_k", 256 + 2 * 4 * 16, 256 + (2 * 4 + 4) * 16),
        ("gguf-q3_k", 256 + 4 * 32, 256 + 4 * 32),
        ("gguf-q4_1", 256 + 2 * 2 * 16, 256 + (2 * 6 + 4) * 16),
        ("gguf-q8_0", 512 + 2 * 16, 512 + (6 + 8) * 16),
        ("gguf-f16", 2 * 512, 4 * 512),
    ],
)
def test_a_tensor_of_onnx_runtime_takes_its_codes_and_what_each_group_has(
    kind: str, looked_up: int, product: int
) -> None:
    storage = get_format(kind).linears[0] if kind != "gguf-f16" else "f16"
    table = TensorSpec(name="embed.weight", role=Role.EMBEDDING, shape=(10, 512))
    matrix = TensorSpec(name="up.weight", role=Role.LINEAR, shape=(10, 512))
    assert onnx_bytes(table, storage, tied=False) == 10 * looked_up
    assert onnx_bytes(table, storage, tied=True) == 10 * (looked_up + product)
    assert onnx_bytes(matrix, storage, tied=False) == onnx_bytes(matrix, storage, tied=True) == 10 * product


def test_weights_in_onnx_runtime_are_as_many_if_they_are_counted_one_by_one() -> None:
    """Types of embeddings that are named make every tensor count by itself, though they are the format's own."""
    plain = deployment_named("gguf-q4_0", "onnxruntime")
    named = replace(plain, types=(("embeddings", "q8_0"),))
    assert (plain.by_name, named.by_name) == (False, True)
    for tied in (True, False):
        spec = shape(SIZES, tied=tied).spec
        each, kinds = (memory(spec, one, context=64, batch=1).weights_bytes for one in (named, plain))
        assert each == kinds

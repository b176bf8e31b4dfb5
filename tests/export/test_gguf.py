"""GGUF files, against the gguf package's reader and quantisers, transformers, and llama.cpp itself."""

from __future__ import annotations

import errno
import json
import resource
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.metadata import Metadata
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autodistill.advisor.describe import deployment_named
from autodistill.errors import InputError, VerificationError
from autodistill.export.gguf import GgufExporter
from autodistill.export.verify import verify
from autodistill.models.families import get_family
from autodistill.models.llama_cpp_graphs import FULL, SLIDING, row_order
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher
from tests.thinned import thinned

DEPLOYMENTS = {
    name: Deployment(runtime="llama.cpp", format=name, bits=bits, group_size=group, symmetric=not name.endswith("_1"))
    for name, bits, group in (
        ("gguf-f16", 16, 0),
        ("gguf-bf16", 16, 0),
        ("gguf-q8_0", 8, 32),
        ("gguf-q5_1", 5, 32),
        ("gguf-q5_0", 5, 32),
        ("gguf-q4_1", 4, 32),
        ("gguf-q4_0", 4, 32),
    )
}
KEEP = ("attention", "embeddings", "layers.1.mlp.down_proj")
F16 = DEPLOYMENTS["gguf-f16"]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def choices(folder: Path, weights: dict[str, torch.Tensor], tokens: list[int]) -> np.ndarray:
    """Return transformers' most likely tokens, with other weights in the model of `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lacking = model.load_state_dict(
        {name.replace("embed_out", "lm_head"): w for name, w in weights.items()}, strict=False
    )
    assert not lacking.unexpected_keys
    assert set(lacking.missing_keys) <= {"lm_head.weight"}
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].argmax(-1).numpy()


def chosen(path: Path, tokens: list[int]) -> np.ndarray:
    """Return llama.cpp's most likely token after each of `tokens`, which its library reads at once."""
    found, _ = LlamaServer(path, len(tokens) + 2, 1, whole_cache=True).read([[*tokens, 0]])
    return found[0]


def served(path: Path, tokens: list[int]) -> np.ndarray:
    """Return what llama.cpp's server writes after each of `tokens`. This takes longer than `chosen`."""
    with LlamaServer(path, len(tokens) + 1, 1) as server:
        return np.array([server.next_token(tokens[: end + 1]) for end in range(len(tokens))])


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        *(("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", True)),
        *(("gemma3_text", True), ("gpt_neox", False)),
        # An untied head is written in the same way for every family.
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in ("llama", "gemma3_text")),
    ],
)
def test_llama_cpp_chooses_the_tokens_of_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, tied=tied)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    weights = {
        name: values.half().float() if values.ndim == 2 else values
        for name, values in load_file(teacher / "model.safetensors").items()
    }
    assert np.mean(served(artifact.path, tokens) == choices(teacher, weights, tokens)) >= 0.97


def test_a_disk_that_fails_in_the_middle_of_a_tensor_says_why(tmp_path: Path) -> None:
    """numpy's own writing hides the reason, so a full disk would look like a fault of the program."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = GgufExporter().export(teacher, F16, tmp_path / "whole").size_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            GgufExporter().export(teacher, F16, tmp_path / "half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert failed.value.errno == errno.EFBIG
    assert not [*(tmp_path / "half").iterdir()]


# Tensors kept in 16 bits stay in 16 bits, whatever type the others have.
CASES = [("llama", name, ()) for name in DEPLOYMENTS if name != "gguf-f16"] + [
    ("llama", "gguf-q4_1", KEEP),
    ("gemma3_text", "gguf-q4_0", ()),
    ("gemma3_text", "gguf-q8_0", KEEP),
    pytest.param("gemma3_text", "gguf-bf16", (), marks=pytest.mark.slow),
    ("gpt_neox", "gguf-q4_0", ("attention", "embeddings", "layers.1.mlp.dense_4h_to_h")),
    pytest.param("gpt_neox", "gguf-q8_0", (), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("architecture", "name", "keep"), CASES)
def test_quantized_files_hold_what_gguf_quants_makes_and_run(
    tmp_path: Path, architecture: str, name: str, keep: tuple[str, ...]
) -> None:
    neox = architecture == "gpt_neox"
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, width=128, layers=2, tied=not neox)
    deployment = replace(DEPLOYMENTS[name], keep=keep)
    artifact = GgufExporter().export(teacher, deployment, tmp_path / "out")
    assert verify(GgufExporter(), artifact, teacher, deployment).tensors > 0
    low = gguf.GGMLQuantizationType[name.removeprefix("gguf-").upper()]
    kept = (".self_attn.", ".attention.", "embed_tokens", "embed_in", keep[-1]) if keep else ()
    expected = {}
    for key, values in load_file(teacher / "model.safetensors").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "embed_" in key and name != "gguf-bf16" else low
        if any(part in f".{key}" for part in kept):
            kind = gguf.GGMLQuantizationType.F16
        quantized = values.ndim == 2
        expected[key] = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind) if quantized else values.numpy()
        if architecture == "gemma3_text" and not quantized:
            expected[key] = (values + 1).numpy() - 1  # as stored in the file
    expected = {key.replace("embed_out", "lm_head"): values for key, values in expected.items()}
    found = dict(GgufExporter().unpack(artifact.path))
    assert set(found) == set(expected)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    stored = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(artifact.path).tensors}
    head = "gpt_neox.embed_in.weight" if neox else "model.embed_tokens.weight"
    if name == "gguf-bf16":
        assert stored["token_embd.weight"] == gguf.quantize(expected[head], low).tobytes()
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    weights = {key: torch.from_numpy(np.array(values)) for key, values in expected.items()}
    # llama.cpp quantises activations too, which can swap near-equal logits of random weights.
    assert np.mean(chosen(artifact.path, tokens) == choices(teacher, weights, tokens)) >= 0.9


def test_metadata_says_what_the_config_says(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=3)
    artifact = GgufExporter().export(teacher, DEPLOYMENTS["gguf-q4_0"], tmp_path / "out")
    assert artifact.path == tmp_path / "out" / "student.gguf"
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["student.gguf"]
    config = json.loads((teacher / "config.json").read_text())
    keys = metadata(artifact.path)
    expected = {
        "general.architecture": "llama",
        "general.file_type": 2,
        "llama.block_count": 3,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: keys.get(key) for key in expected} == expected
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert "llama.attention.key_length" not in keys
    names = [tensor.name for tensor in gguf.GGUFReader(artifact.path).tensors]
    assert "output.weight" not in names  # tied: the table once
    assert len(names) == len(set(names)) == 2 + 3 * 9


def test_general_metadata_is_what_the_gguf_package_makes_of_the_same_folder(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher")
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0, "repetition_penalty": 1.05}
    (teacher / "generation_config.json").write_text(json.dumps(settings))
    path = GgufExporter().export(teacher, F16, tmp_path / "out", teacher="maker/big", license="Apache-2.0").path
    weights = sum(values.numel() for values in load_file(teacher / "model.safetensors").values())
    expected = Metadata.load(None, teacher)
    found = {key: value for key, value in metadata(path).items() if key.startswith("general.")}
    assert found["general.size_label"] == f"{weights / 1e3:.0f}K" == "241K"
    for name in ("temp", "top_k", "top_p", "min_p"):
        assert found[f"general.sampling.{name}"] == pytest.approx(getattr(expected, f"sampling_{name}"))
    assert (found["general.name"], found["general.license"]) == ("Student of maker/big", "apache-2.0")
    origin = {key.removeprefix("general.base_model.0."): value for key, value in found.items() if ".0." in key}
    assert origin == {"name": "big", "organization": "maker", "repo_url": "https://huggingface.co/maker/big"}
    # The sampling settings that llama.cpp uses by default do not change the choices that verification uses.
    plain = GgufExporter().export(save_tiny_teacher(tmp_path / "plain"), F16, tmp_path / "again").path
    tokens = np.random.default_rng(0).integers(3, 300, 40).tolist()
    np.testing.assert_array_equal(served(path, tokens), served(plain, tokens))


@pytest.mark.parametrize("settings", [{}, {"temperature": None, "top_k": 2.5, "top_p": "0.9", "min_p": True}])
def test_sampling_that_nobody_recommends_is_left_to_llama_cpp(tmp_path: Path, settings: dict[str, object]) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1)
    (teacher / "generation_config.json").write_text(json.dumps(settings))
    found = metadata(GgufExporter().export(teacher, F16, tmp_path / "out").path)
    assert not [key for key in found if "sampling" in key or "license" in key or "base_model" in key]
    assert "general.name" not in found


def test_head_dim_that_is_not_the_even_share_is_stated_and_runs(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=2, width=64, heads=4)
    weights = load_file(teacher / "model.safetensors")
    torch.manual_seed(0)
    for layer in range(2):
        for part, shape in (("q", (128, 64)), ("k", (64, 64)), ("v", (64, 64)), ("o", (64, 128))):
            weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = torch.randn(shape) * 0.1
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    edit_config(teacher, head_dim=32)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    keys = metadata(artifact.path)
    assert (keys["llama.attention.key_length"], keys["llama.attention.value_length"]) == (32, 32)
    tokens = np.random.default_rng(0).integers(3, 300, 60).tolist()
    halves = {key: values.half().float() if values.ndim == 2 else values for key, values in weights.items()}
    assert np.mean(chosen(artifact.path, tokens) == choices(teacher, halves, tokens)) >= 0.97


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_scaled_rotary_embeddings_run_as_in_transformers(tmp_path: Path, rope: dict[str, object]) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=2)
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    weights = {
        key: values.half().float() if values.ndim == 2 else values
        for key, values in load_file(teacher / "model.safetensors").items()
    }
    unscaled = choices(teacher, weights, tokens)
    edit_config(teacher, rope_parameters=rope)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    scaled = choices(teacher, weights, tokens)
    assert np.mean(scaled == unscaled) < 0.9  # otherwise the test would show nothing
    assert np.mean(chosen(artifact.path, tokens) == scaled) >= 0.97
    assert set(dict(GgufExporter().unpack(artifact.path))) == set(weights)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture="mistral", layers=1)
    export = GgufExporter().export
    edit_config(teacher, sliding_window=64)
    with pytest.raises(InputError, match="sliding window of 64"):
        export(teacher, F16, tmp_path / "out")
    edit_config(teacher, sliding_window=None, hidden_act="gelu")
    with pytest.raises(InputError, match="silu"):
        export(teacher, F16, tmp_path / "out")
    edit_config(teacher, hidden_act="silu", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(InputError, match="yarn"):
        export(teacher, F16, tmp_path / "out")
    neox = save_tiny_teacher(tmp_path / "neox", architecture="gpt_neox", layers=1, tied=True)
    with pytest.raises(InputError, match="no tied head for gpt_neox"):
        export(neox, F16, tmp_path / "out")
    gemma = save_tiny_teacher(tmp_path / "gemma", architecture="gemma3_text", layers=4)
    edit_config(gemma, layer_types=[FULL, SLIDING, FULL, FULL])
    with pytest.raises(
        InputError, match="every n-th layer of gemma3_text full attention, and of these 4 it is 1, 3, 4"
    ):
        export(gemma, F16, tmp_path / "out")
    edit_config(gemma, query_pre_attn_scalar=64)
    with pytest.raises(InputError, match="by the head dim of 16, not by a query_pre_attn_scalar of 64"):
        export(gemma, F16, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kinds",
    [
        [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        [SLIDING, FULL, SLIDING],
        [SLIDING, SLIDING],
        [FULL, FULL],
    ],
    ids=["third", "second", "none", "all"],
)
def test_sliding_windows_are_where_and_as_wide_as_in_transformers(tmp_path: Path, kinds: list[str]) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture="gemma3_text", layers=len(kinds))
    weights = load_file(teacher / "model.safetensors")
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    rope = {
        FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    }
    found = {}
    for window, other in ((7, kinds), (64, kinds), (7, [FULL, *kinds[:-1]])):
        edit_config(teacher, layer_types=other, sliding_window=window, rope_parameters=rope)
        found[window, other is kinds] = choices(teacher, weights, tokens)
    edit_config(teacher, layer_types=kinds, sliding_window=7)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    expected = found.pop((7, True))
    if SLIDING in kinds:  # otherwise the test would show nothing
        assert all(np.mean(one == expected) < 0.9 for one in found.values())
    assert np.mean(chosen(artifact.path, tokens) == expected) >= 0.97


@pytest.mark.parametrize(
    "changes",
    [
        {"use_parallel_residual": False, "layer_norm_eps": 0.1},
        {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 300},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500, "partial_rotary_factor": 1.0}},
    ],
    ids=["sequential", "old", "scaled"],
)
def test_neox_runs_as_its_config_says(tmp_path: Path, changes: dict[str, object]) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture="gpt_neox", layers=2, tied=False)
    weights = load_file(teacher / "model.safetensors")
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    before = choices(teacher, weights, tokens)
    edit_config(teacher, **changes)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    after = choices(teacher, weights, tokens)
    assert np.mean(before == after) < 0.9  # otherwise the test would show nothing
    assert np.mean(chosen(artifact.path, tokens) == after) >= 0.97


def test_what_is_written_stays_within_the_context_that_a_model_was_made_for(tmp_path: Path) -> None:
    """Beyond the context, llama.cpp's server writes nothing. A short context is not a fault of the file."""
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    deployment = deployment_named("gguf-q8_0")
    path = GgufExporter().export(student, deployment, tmp_path / "out").path
    found = GgufExporter().run(path, np.full((1, 24), 7), 1, student, deployment)
    assert (found.top1.shape, len(found.written)) == ((1, 23), 32 - 8)


def test_rows_are_ordered_as_llama_cpp_wants_them() -> None:
    # Two heads of four rows. Row i is rotated with row i + 2 here, and with its neighbour in llama.cpp.
    rows = np.arange(8).reshape(8, 1)
    paired = row_order("llama", "blk.0.attn_k.weight", 4, 2)
    assert paired is not None
    assert paired.to_graph(rows)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    # Two heads, each with two rows of queries, keys and values.
    fused = row_order("gptneox", "blk.3.attn_qkv.bias", 2, 2)
    assert fused is not None
    assert fused.to_graph(np.arange(12)).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    wide = np.random.default_rng(0).normal(size=(48, 5))
    for order in (paired, fused):
        np.testing.assert_array_equal(order.to_transformers(order.to_graph(wide)), wide)
    assert row_order("qwen2", "blk.0.attn_q.weight", 2, 2) is row_order("llama", "blk.0.attn_v.weight", 2, 2) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    family = get_family(architecture)
    graph = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
    known = gguf.get_tensor_name_map(graph, 2)
    for name, _ in family.tensors({"attention_bias": True}, 2, tied=False):
        found = family.gguf_name(name)
        stored = "embed_out.weight" if architecture == "gpt_neox" and name == "lm_head.weight" else name
        assert found == known.get_name(stored, (".weight", ".bias"))
        assert family.from_gguf_name(found) == name
    assert family.from_gguf_name("blk.0.ssm_a.weight") is family.from_gguf_name("rope_freqs.weight") is None


def test_a_foreign_file_is_not_taken_for_an_export(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_tensor("blk.0.ssm_a", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(VerificationError, match="ssm_a"):
        list(GgufExporter().unpack(tmp_path / "other.gguf"))


K_QUANTS = {
    "gguf-q6_k": (6, 16, True, "Q8_0", 18),
    "gguf-q5_k": (5, 32, False, "Q5_1", 16),
    "gguf-q4_k": (4, 32, False, "Q5_0", 14),
    "gguf-q3_k": (3, 16, True, "Q4_0", 11),
    "gguf-q2_k": (2, 16, False, "Q4_0", 21),
}


def k_quant(name: str, keep: tuple[str, ...] = ()) -> Deployment:
    bits, group_size, symmetric, *_ = K_QUANTS[name]
    scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "keep": keep}
    return Deployment(runtime="llama.cpp", format=name, **scheme)


@pytest.mark.parametrize(
    ("name", "keep", "width", "ffn"),
    # If rows are not whole super-blocks, another type is used instead, in the same way for every K-quant.
    [
        *thinned((name, ("attention",), 256, 512) for name in K_QUANTS),
        ("gguf-q4_k", (), 192, 256),
        ("gguf-q3_k", (), 192, 256),
    ],
)
def test_k_quants_are_in_the_file_where_rows_allow_and_run(
    tmp_path: Path, name: str, keep: tuple[str, ...], width: int, ffn: int
) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", width=width, ffn=ffn, layers=2)
    deployment = k_quant(name, keep)
    artifact = GgufExporter().export(teacher, deployment, tmp_path / "out")
    assert verify(GgufExporter(), artifact, teacher, deployment).tensors == 2 + 2 * 9
    *_, fallback, file_type = K_QUANTS[name]
    assert metadata(artifact.path)["general.file_type"] == file_type
    wide = width % 256 == 0
    weights = {}
    for tensor in gguf.GGUFReader(artifact.path).tensors:
        kind = name.removeprefix("gguf-").upper()
        if tensor.name == "token_embd.weight":
            kind = "Q6_K" if wide else "Q8_0"
        elif tensor.name.endswith("norm.weight"):
            kind = "F32"
        elif keep and "attn" in tensor.name:
            kind = "F16"
        elif not wide and "ffn_down" not in tensor.name:
            kind = fallback
        assert tensor.tensor_type.name == kind, tensor.name
        weights[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    family = get_family("llama")
    found = dict(GgufExporter().unpack(artifact.path))
    for key, values in weights.items():
        order = row_order("llama", key, 4, 2)
        read = order.to_transformers(values) if order else values
        np.testing.assert_array_equal(found[family.from_gguf_name(key)], read, err_msg=key)
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    expected = choices(teacher, {key: torch.from_numpy(np.array(values)) for key, values in found.items()}, tokens)
    # llama.cpp quantises activations too, which swaps near-equal logits of random weights for about a tenth of 120
    # tokens.
    assert np.mean(chosen(artifact.path, tokens) == expected) >= 0.8


@pytest.mark.parametrize(("name", "table", "file_type"), [("gguf-iq4_nl", "mxfp4", 25), ("gguf-mxfp4", "iq4_nl", 38)])
def test_files_on_codebooks_are_read_by_gguf_and_run_with_the_same_tokens(
    tmp_path: Path, name: str, table: str, file_type: int
) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", width=192, layers=2)
    types = (("embeddings", table), ("layers.1.mlp", "q8_0"))
    deployment = Deployment(runtime="llama.cpp", format=name, bits=4, group_size=32, types=types)
    artifact = GgufExporter().export(teacher, deployment, tmp_path / "out")
    verify(GgufExporter(), artifact, teacher, deployment)
    assert metadata(artifact.path)["general.file_type"] == file_type
    family, found = get_family("llama"), dict(GgufExporter().unpack(artifact.path))
    kinds = {}
    for tensor in gguf.GGUFReader(artifact.path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        order = row_order("llama", tensor.name, 4, 2)
        np.testing.assert_array_equal(
            found[family.from_gguf_name(tensor.name)], order.to_transformers(values) if order else values
        )
        kinds[tensor.name] = tensor.tensor_type.name
    assert kinds["token_embd.weight"] == table.upper()
    assert kinds["blk.0.attn_q.weight"] == name.removeprefix("gguf-").upper()
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    weights = {key: torch.from_numpy(np.array(values)) for key, values in found.items()}
    assert np.mean(chosen(artifact.path, tokens) == choices(teacher, weights, tokens)) >= 0.9


@pytest.mark.parametrize("architecture", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma3_text", "gpt_neox"])
def test_k_quants_of_other_families_run(tmp_path: Path, architecture: str) -> None:
    tied = architecture != "gpt_neox"
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, width=256, layers=3, tied=tied)
    deployment = k_quant("gguf-q5_k")
    artifact = GgufExporter().export(teacher, deployment, tmp_path / "out")
    verify(GgufExporter(), artifact, teacher, deployment)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(artifact.path).tensors if len(tensor.shape) > 1}
    assert kinds == {"Q5_K", "Q6_K", "Q5_1"}  # the FFN of 128 falls back
    found = {name: torch.from_numpy(np.array(values)) for name, values in GgufExporter().unpack(artifact.path)}
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    assert np.mean(chosen(artifact.path, tokens) == choices(teacher, found, tokens)) >= 0.8


@pytest.mark.parametrize(
    ("architecture", "tied", "name", "file_type"),
    [
        ("llama", True, "gguf-q4_k_m", 15),
        pytest.param("qwen2", False, "gguf-q4_k_m", 15, marks=pytest.mark.slow),
        pytest.param("gemma3_text", True, "gguf-q5_k_m", 17, marks=pytest.mark.slow),
        ("gpt_neox", False, "gguf-q5_k_m", 17),
    ],
)
def test_mixtures_have_more_bits_where_llama_cpps_have_and_run(
    tmp_path: Path, architecture: str, tied: bool, name: str, file_type: int
) -> None:
    sizes = {"width": 256, "ffn": 256, "layers": 4, "tied": tied}
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, **sizes)
    deployment = deployment_named(name)
    artifact = GgufExporter().export(teacher, deployment, tmp_path / "out")
    verify(GgufExporter(), artifact, teacher, deployment)
    assert metadata(artifact.path)["general.file_type"] == file_type
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(artifact.path).tensors}
    base = name.removeprefix("gguf-").removesuffix("_m").upper()
    # Out of four layers: the third, because every third one is, and the last one.
    values = "attn_qkv" if architecture == "gpt_neox" else "attn_v"
    wide = {f"blk.{layer}.{part}.weight" for layer in (2, 3) for part in (values, "ffn_down")}
    wide.add("token_embd.weight" if tied else "output.weight")
    assert {key for key, kind in types.items() if kind == "Q6_K"} == wide
    assert {kind for key, kind in types.items() if key not in wide} == {base, "F32"}
    found = {key: torch.from_numpy(np.array(values)) for key, values in GgufExporter().unpack(artifact.path)}
    tokens = np.random.default_rng(0).integers(3, 300, 120).tolist()
    assert np.mean(chosen(artifact.path, tokens) == choices(teacher, found, tokens)) >= 0.8


def test_a_model_without_rows_of_whole_super_blocks_is_refused(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1)
    with pytest.raises(InputError, match=r"rows in gguf-q4_k are of whole blocks of 256 weights.*stored as gguf-q5_0"):
        GgufExporter().export(teacher, k_quant("gguf-q4_k"), tmp_path / "out")

"""Models that are described without being loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from autodistill.advisor.describe import deployment_named, describe, shape, spec_of
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.export.gguf import GgufExporter
from autodistill.models.config import spec_from_config
from autodistill.models.gguf_reader import read_gguf
from autodistill.quantization.formats import FORMATS, weights_bytes
from autodistill.quantization.grids import Grid
from autodistill.testing import save_tiny_teacher

SIZES: dict[str, int | None] = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 300}
MIXTURES = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 96, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
}


def config(name: str, **changes: Any) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    }
    return transformers.AutoConfig.for_model(name, **(sizes | MIXTURES[name] | changes)).to_dict()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_the_weights_of_transformers_model(name: str) -> None:
    described = config(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described))
    spec = spec_of(described)
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (spec.experts, spec.active_experts) == (4, 2)


# Bytes of tensors in files that llama.cpp's quantiser (v0.4.0) made from 16-bit files of these sizes.
QUANTISED = {
    ("mixtral", "gguf-q4_k_m"): 9_913_600,
    ("mixtral", "gguf-q5_k_m"): 11_572_480,
    ("qwen3_moe", "gguf-q4_k_m"): 5_598_976,
    ("qwen3_moe", "gguf-q5_k_m"): 6_536_960,
}


@pytest.mark.parametrize(("name", "form"), QUANTISED)
def test_experts_take_more_bits_in_the_layers_that_llama_cpp_gives_them(name: str, form: str) -> None:
    sizes = {"num_hidden_layers": 9, "hidden_size": 256, "head_dim": 64, "vocab_size": 512}
    ffn = {"mixtral": {"intermediate_size": 512}, "qwen3_moe": {"moe_intermediate_size": 256}}[name]
    spec = spec_of(config(name, **sizes, **ffn, tie_word_embeddings=False))
    assert weights_bytes(spec.tensors, deployment_named(form)) == QUANTISED[name, form]


def test_a_mixture_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(InputError, match="num_experts_per_tok, at most as many"):
        spec_of(config("mixtral") | {"num_experts_per_tok": 5})
    with pytest.raises(InputError, match="not all mixtures"):
        spec_of(config("qwen3_moe") | {"mlp_only_layers": [0]})
    with pytest.raises(InputError, match=r"'bloom' cannot be estimated; these can: llama.*mixtral.*qwen3_moe"):
        spec_of({"model_type": "bloom"})


def test_what_caches_by_layer_is_counted_by_layer() -> None:
    sizes = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1}
    own = {"head_dim": 32, "vocab_size": 300, "intermediate_size": 256, "max_position_embeddings": 4096}
    gemma = {"global_head_dim": 64, "sliding_window": 128, "num_kv_shared_layers": 3, "vocab_size_per_layer_input": 300}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    found = spec_of(transformers.Gemma4TextConfig(**sizes, **own, **gemma, layer_types=kinds).to_dict())
    guess = memory(found, deployment_named("gguf-f16"), context=2048, batch=1)
    # Two layers have a window, which llama.cpp enlarges by a pass's tokens, and one has none. The others read these.
    assert guess.kv_cache_bytes == 2 * 2 * (2 * 32 * 768 + 64 * 2048)
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    config = transformers.Qwen3_5TextConfig(
        **sizes | {"num_hidden_layers": 4}, **own, **linear, linear_num_value_heads=4
    )
    guess = memory(spec_of(config.to_dict()), deployment_named("gguf-f16"), context=2048, batch=2)
    # Three layers have states of four heads and the inputs for a convolution of four tokens. One has keys and values.
    assert guess.kv_cache_bytes == 2 * 2 * 2 * 32 * 2048 + 2 * 4 * 3 * (4 * 16 * 16 + 3 * (2 * 2 * 16 + 4 * 16))


def test_a_folder_and_a_gguf_file_are_described_by_their_headers(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "tiny")
    path = GgufExporter().export(folder, deployment_named("gguf-q4_0"), tmp_path / "gguf").path
    (folder / "model.safetensors").unlink()  # no weights are needed
    described, file = describe(str(folder)), describe(str(path))
    assert described.spec == spec_from_config(json.loads((folder / "config.json").read_text()))
    assert described.weights_bytes is None
    assert file.spec.parameters == described.spec.parameters
    # The file's own tensors are counted. After them comes only the padding of each to 32 bytes.
    assert file.weights_bytes is not None
    assert 0 < path.stat().st_size - file.weights_bytes < 40_000


# Each format with a tied or an untied head, in turn. The other half is slow.
@pytest.mark.parametrize(
    ("name", "tied"),
    [
        pytest.param(name, tied, marks=pytest.mark.slow if (number % 2 == 0) == tied else ())
        for number, name in enumerate(name for name in FORMATS if "_k" in name)
        for tied in (True, False)
    ],
)
def test_a_file_of_k_quants_says_its_format_and_is_read(name: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "tiny", width=256, ffn=512, layers=2, tied=tied)
    deployment = deployment_named(name)
    path = GgufExporter().export(folder, deployment, tmp_path / "gguf").path
    described = describe(str(path))
    assert described.format_name == deployment.name == name
    # The estimate counts the same bytes before anything is packed.
    assert described.weights_bytes == weights_bytes(describe(str(folder)).spec.tensors, deployment)
    file, found = read_gguf(path), dict(GgufExporter().unpack(path))
    for tensor in file.tensors:
        stored = file.family.from_gguf_name(tensor.name)
        np.testing.assert_array_equal(file.values(tensor), found[stored])


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("gguf-")])
def test_a_file_says_its_format_where_most_of_its_rows_are_on_another_grid(name: str, tmp_path: Path) -> None:
    """As in the default teacher, 256 only divides the rows of the down projections."""
    folder = save_tiny_teacher(tmp_path / "tiny", width=96, ffn=256, layers=2)
    deployment = deployment_named(name)
    path = GgufExporter().export(folder, deployment, tmp_path / "gguf").path
    most, file = FORMATS[name].linears[0], read_gguf(path)
    if isinstance(most, Grid) and most.fallback:
        assert f"gguf-{file.main_type().lower()}" != name
    assert describe(str(path)).format_name == name


def test_a_mixture_of_types_is_told_by_the_one_of_most_bytes(tmp_path: Path) -> None:
    """This is like llama.cpp's own files: one tensor has a type that none of our formats uses there."""
    folder = save_tiny_teacher(tmp_path / "tiny", width=256, ffn=512, layers=2)
    keep = ("layers.0.self_attn.q_proj",)
    path = GgufExporter().export(folder, replace(deployment_named("gguf-q4_k"), keep=keep), tmp_path / "gguf").path
    file = read_gguf(path)
    assert {tensor.type for tensor in file.tensors if "attn_q" in tensor.name} == {1, 12}  # F16 and Q4_K
    assert describe(str(path)).format_name == f"gguf-{file.main_type().lower()}"


def test_a_file_whose_experts_are_of_another_type_is_told_by_the_one_of_most_bytes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mixture.gguf", "llama")
    for name, size in {"block_count": 1, "embedding_length": 64, "feed_forward_length": 128}.items():
        writer.add_uint32(f"llama.{name}", size)
    for name, size in {
        "context_length": 64,
        "attention.head_count": 4,
        "expert_count": 8,
        "expert_used_count": 2,
    }.items():
        writer.add_uint32(f"llama.{name}", size)
    matrices = {"token_embd": (300, 64)} | {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    experts = {f"blk.0.ffn_{name}_exps": (8, 128, 64) for name in ("gate", "up")} | {
        "blk.0.ffn_down_exps": (8, 64, 128)
    }
    for shapes, kind in ((matrices, "Q8_0"), (experts, "Q4_0")):
        for name, sizes in shapes.items():
            quantized = gguf.quants.quantize(np.zeros(sizes, np.float32), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    described = describe(str(tmp_path / "mixture.gguf"))
    assert (described.spec.experts, described.format_name) == (8, "gguf-q4_0")


def test_a_shape_in_numbers_is_a_config() -> None:
    described = shape(SIZES, tied=True)
    assert described.spec.parameters == 300 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert shape(SIZES | {"experts": 4, "active_experts": 2}).spec.active_experts == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ffn": None, "vocab": None}, "needs --ffn, --vocab as well"),
        ({"heads": 5}, "5 heads do not divide a width of 64"),
        ({"kv_heads": 3}, "3 --kv-heads do not divide 4 --heads"),
        ({"layers": 0}, "--layers must be at least 1, not 0"),
        ({"layers": 10**9}, "which no model has"),
        ({"width": -64}, "--width must be at least 1, not -64"),
        ({"window": -1}, "--window must be at least 1, not -1"),
        ({"kv_heads": 0}, "--kv-heads must be at least 1, not 0"),
        ({"experts": 2, "active_experts": 3}, "3 --active-experts where there are 2 --experts"),
        ({"active_experts": 2}, "2 --active-experts where there are no --experts"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes: dict[str, int | None], said: str) -> None:
    with pytest.raises(InputError, match=said):
        shape(SIZES | changes)


def test_every_format_has_deployments_of_its_names() -> None:
    for name in ("gguf-q4_0", "huggingface", "compressed-tensors-int4-g64", "compressed-tensors-int8-row-asym"):
        assert deployment_named(name).name == name
    assert {deployment_named(name).format for name in FORMATS if name != "compressed-tensors"} <= set(FORMATS)
    with pytest.raises(InputError, match="there is no format 'int4'; did you mean compressed-tensors-int4-g32"):
        deployment_named("int4")


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00\x05")
    with pytest.raises(InputError, match="truncated or damaged"):
        describe(str(path))


def test_a_folder_whose_weights_are_torn_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        describe(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (b"llama.block_count", 10**9, "tensors of 1000000000 layers"),
        (b"llama.block_count", 20, "where the sizes in its header make"),
        (b"llama.feed_forward_length", 10**6, "where the sizes in its header make"),
    ],
)
def test_a_header_that_its_tensors_belie_is_refused(key: bytes, value: int, said: str, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "tiny")
    path = GgufExporter().export(folder, deployment_named("gguf-q4_0"), tmp_path / "gguf").path
    data = bytearray(path.read_bytes())
    place = data.index(key) + len(key) + 4  # after the key and its four-byte value type
    data[place : place + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"is damaged: .*{said}"):
        describe(str(path))


def test_of_a_hub_model_its_config_alone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("mixtral")))
    asked: list[str] = []

    def download(reference: str, name: str, revision: str | None) -> str:
        asked.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, reference, revision: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = describe("somebody/mixture")
    assert (found.name, found.spec.experts, asked) == ("somebody/mixture", 4, ["config.json"])
    assert describe("somebody/mixture@v2").name == "somebody/mixture@v2"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EntryNotFoundError("no"), "has no config.json on the hub"),
        (LocalEntryNotFoundError("no"), "check the connection and the name"),
        (OSError("no"), "check the connection and the name"),
        (ValueError("no"), "check the connection and the name"),
    ],
)
def test_a_hub_that_gives_no_config_is_said(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(reference: str, name: str, revision: str | None, local_files_only: bool = False) -> str:
        raise LocalEntryNotFoundError("no") if local_files_only else error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, reference, revision: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=said):
        describe("somebody/mixture")


def test_of_a_hub_that_cannot_be_reached_what_was_downloaded_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, reference: str, revision: str | None) -> None:
        raise OSError("no route")

    def download(reference: str, name: str, revision: str | None, local_files_only: bool = False) -> str:
        assert local_files_only, "a dead connection is not tried again"
        return str(tmp_path / name)

    (tmp_path / "config.json").write_text(json.dumps(config("mixtral")))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert describe("somebody/mixture").spec.experts == 4


@pytest.mark.parametrize(
    "name", ["compressed-tensors-int4-g32", "compressed-tensors-int8-row", "compressed-tensors-int4-g32-asym"]
)
def test_a_packed_folder_says_its_format(name: str, tmp_path: Path) -> None:
    plain = save_tiny_teacher(tmp_path / "plain")
    assert describe(str(plain)).format_name is None
    packed = CompressedTensorsExporter().export(plain, deployment_named(name), tmp_path / "packed").path
    assert describe(str(packed)).format_name == name


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "float-quantized"},
        {"config_groups": {}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16, "symmetric": True}}}},
        {"config_groups": {"group_0": {"weights": None}}},
    ],
)
def test_a_packing_of_others_is_no_format_of_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "plain")
    found = json.loads((folder / "config.json").read_text())
    stated = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    for told, name in ((stated, "compressed-tensors-int8-row"), (stated | changes, None)):
        (folder / "config.json").write_text(json.dumps(found | {"quantization_config": told}))
        assert describe(str(folder)).format_name == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("q4_0", "did you mean gguf-q4_0"),
        ("GGUF-Q8_0", "did you mean gguf-q8_0"),
        ("int8", "did you mean compressed-tensors-int8-g32"),
        ("Q4_K_M", r"did you mean gguf-q4_k_m\?"),
        ("gguf_q5_k_m", "did you mean gguf-q5_k_m or "),
        ("gguf-q4_k_s", "of llama.cpp's mixtures .* gguf-q4_k_m are written; gguf-q4_k has all linear layers in Q4_K"),
        ("Q3_K_XL", "of types gguf-q5_k_m and gguf-q4_k_m are written; gguf-q3_k has all linear layers in Q3_K"),
        ("Q6_K", "did you mean gguf-q6_k"),
        ("iq4_xs", "I-quants gguf-iq4_nl alone is supported"),
        ("zzz", "there are gguf-f16, gguf-bf16, gguf-q8_0"),
    ],
)
def test_a_format_that_there_is_not_has_a_hint(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        deployment_named(name)

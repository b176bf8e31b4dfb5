"""Verification accepts what was evaluated, and rejects everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autodistill.errors import RuntimeDiffersError, VerificationError
from autodistill.export.base import Expected, Ran
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.export.gguf import GgufExporter
from autodistill.export.huggingface import HuggingFaceExporter
from autodistill.export.proof import simulate
from autodistill.export.verify import Verification, prove, verify
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_tokenizer

CASES = [
    (GgufExporter(), Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)),
    (GgufExporter(), Deployment(runtime="llama.cpp", format="gguf-bf16", bits=16, group_size=0)),
    (GgufExporter(), Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)),
    (GgufExporter(), Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)),
    (
        GgufExporter(),
        Deployment(runtime="llama.cpp", format="gguf-q4_k", bits=4, group_size=32, symmetric=False),
    ),
    (GgufExporter(), Deployment(runtime="llama.cpp", format="gguf-q6_k", bits=6, group_size=16)),
    (CompressedTensorsExporter(), Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)),
    (HuggingFaceExporter(), Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)),
]
IDS = [deployment.name for _, deployment in CASES]
SEQUENCES = np.random.default_rng(0).integers(3, 300, (6, 128)).astype(np.int32)
ANYTHING = Expected(SEQUENCES, SEQUENCES[:, 1:], *[SEQUENCES[:, 1:].astype(np.float32)] * 2)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("student"), layers=2, width=256, ffn=256, seed=1)


def simulated(student: Path, weights: dict[str, np.ndarray], sequences: np.ndarray = SEQUENCES) -> Expected:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()}, strict=False)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    with torch.inference_mode():
        logits = model(tokens).logits[:, :-1]
    chances = logits.softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    best, second = logits.topk(2).values.unbind(-1)
    return Expected(sequences, logits.argmax(-1).numpy(), -chances.log().numpy(), (best - second).numpy())


@pytest.mark.parametrize(("exporter", "deployment"), CASES, ids=IDS)
def test_an_export_is_what_was_evaluated(tmp_path: Path, student: Path, exporter, deployment) -> None:
    artifact = exporter.export(student, deployment, tmp_path)
    stored = load_file(student / "model.safetensors")
    found = verify(exporter, artifact, student, deployment)
    assert (found.tensors, found.weights) == (len(stored), sum(values.numel() for values in stored.values()))


@pytest.mark.parametrize(("exporter", "deployment"), CASES, ids=IDS)
def test_one_flipped_byte_of_a_weight_is_found(tmp_path: Path, student: Path, exporter, deployment) -> None:
    artifact = exporter.export(student, deployment, tmp_path)
    file = artifact.path if artifact.path.is_file() else artifact.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if artifact.path.is_file():
        (tensor,) = (item for item in gguf.GGUFReader(file).tensors if item.name == "blk.1.ffn_up.weight")
        position = int(tensor.data_offset) + 7
    else:
        position = len(data) - 40
    data[position] ^= 0x15
    file.write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.\S+ differs .* in \d+ of \d+, by up to") as failure:
        verify(exporter, artifact, student, deployment)
    if artifact.path.is_file():
        assert "model.layers.1.mlp.up_proj.weight differs" in str(failure.value)


def test_missing_and_surplus_tensors_are_named(tmp_path: Path, student: Path) -> None:
    exporter, deployment = CASES[-1]
    artifact = exporter.export(student, deployment, tmp_path / "out")
    file = artifact.path / "model.safetensors"
    stored = load_file(file)
    save_file({name: values for name, values in stored.items() if name != "model.norm.weight"}, file)
    with pytest.raises(VerificationError, match=r"lacks 1 tensors, model\.norm\.weight"):
        verify(exporter, artifact, student, deployment)
    save_file(stored | {"projector.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}, file)
    with pytest.raises(VerificationError, match=r"too many: projector\.weight"):
        verify(exporter, artifact, student, deployment)
    save_file(stored | {"model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)}, file)
    with pytest.raises(VerificationError, match=r"exported as \[3\], not as \[256\]"):
        verify(exporter, artifact, student, deployment)


def once(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that repeats its first result."""
    found: list[Any] = []

    def kept(*given: Any) -> Any:
        if not found:
            found.append(run(*given))
        return found[0]

    return kept


# tests/export/test_gguf.py lets llama.cpp choose the tokens for every type.
@pytest.mark.parametrize(
    ("exporter", "deployment"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in ("gguf-f16", "gguf-q4_0", "gguf-q6_k") else [])
        for case, name in zip(CASES, IDS, strict=True)
    ],
)
def test_the_runtime_loses_what_torch_loses_with_the_same_weights(
    tmp_path: Path, student: Path, exporter, deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "run", once(exporter.run))  # its one result is compared three times
    artifact = exporter.export(student, deployment, tmp_path)
    expected = simulated(student, dict(exporter.unpack(artifact.path)))
    threads = torch.get_num_threads()
    check = prove(exporter, artifact.path, deployment, expected, 1, student)
    assert torch.get_num_threads() == threads
    assert check.positions == 6 * 127
    assert check.agreement >= 0.9
    # llama.cpp rounds activations to 8 bits where matrices are quantised.
    assert check.excess == pytest.approx(0, abs=1e-3 if deployment.bits == 16 else 0.01)
    assert check.loss == pytest.approx(expected.nll.mean() + check.excess, rel=1e-5)
    assert check.text
    # A few per cent of other tokens, or of loss, are reported. Most tokens, or a fifth of a nat, are plainly broken.
    wrong = expected.top1.copy()
    wrong[:2] += 1
    other = prove(exporter, artifact.path, deployment, expected._replace(top1=wrong), 1, student)
    assert other.agreement == pytest.approx(check.agreement * 2 / 3, abs=0.02)
    weights = Verification(tensors=20, weights=1000)
    with pytest.raises(RuntimeDiffersError, match=r"[0-4]?\d\.\d% of 762 places .* all 20 stored tensors are equal to"):
        prove(exporter, artifact.path, deployment, expected._replace(top1=expected.top1 + 1), 1, student, weights)
    with pytest.raises(RuntimeDiffersError, match=r"loses \+0\.2\d* nats a token more"):
        prove(exporter, artifact.path, deployment, expected._replace(nll=expected.nll - 0.22), 1, student)


@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_the_cache_that_is_served_is_what_the_runtime_reads_with(tmp_path: Path, student: Path, cache: str) -> None:
    exporter, plain = CASES[0]
    path = exporter.export(student, plain, tmp_path).path
    expected = simulate(student, plain, SEQUENCES[:2], 1)
    deployment = replace(plain, cache_type_k=cache, cache_type_v=cache)
    rounded = prove(exporter, path, deployment, expected, 1, student)
    assert rounded.excess is not None
    assert rounded.excess != prove(exporter, path, plain, expected, 1, student).excess


def test_a_runtime_without_probabilities_is_judged_by_its_tokens(tmp_path: Path, student: Path, monkeypatch) -> None:
    """The server of llama.cpp chooses one token after another; it is asked where the library has an unknown layout."""
    exporter, deployment = CASES[0]
    path = exporter.export(student, deployment, tmp_path).path

    def unknown(*_: object) -> None:
        raise VerificationError("llama.cpp's library has settings of another layout")

    monkeypatch.setattr(LlamaServer, "read", unknown)
    expected = simulate(student, deployment, SEQUENCES[:2, :24], 1)
    check = prove(exporter, path, deployment, expected, 1, student)
    assert (check.loss, check.excess) == (None, None)
    assert check.agreement >= 0.95
    with pytest.raises(RuntimeDiffersError, match="of 46 places"):
        prove(exporter, path, deployment, expected._replace(top1=expected.top1 + 1), 1, student)


def test_a_runtime_that_cuts_text_otherwise_is_found(tmp_path: Path, student: Path) -> None:
    exporter, deployment = CASES[0]
    artifact = exporter.export(student, deployment, tmp_path / "out")
    expected = simulated(student, dict(exporter.unpack(artifact.path)))
    assert prove(exporter, artifact.path, deployment, expected, 1, student).same_cut == 1
    other = shutil.copytree(student, tmp_path / "other")
    description = json.loads((other / "tokenizer.json").read_text())
    description["model"]["merges"] = description["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(VerificationError, match=r"only [4-9]\d\.\d% are the same: behind .* it has .* instead of"):
        prove(exporter, artifact.path, deployment, expected, 1, other)


@pytest.mark.parametrize("sequences", [SEQUENCES[:, 1:], SEQUENCES[:0]], ids=["shorter", "none"])
def test_choices_of_other_sequences_are_refused(tmp_path: Path, sequences: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr(GgufExporter, "run", lambda *_: Ran(SEQUENCES[:, 1:], None, ""))
    with pytest.raises(ValueError, match="choices of"):
        prove(*CASES[0][:1], tmp_path, CASES[0][1], ANYTHING._replace(sequences=sequences), 1, tmp_path)


def test_a_folder_that_does_not_load_says_so(tmp_path: Path, student: Path) -> None:
    exporter, deployment = CASES[-1]
    artifact = exporter.export(student, deployment, tmp_path / "out")
    broken = shutil.copytree(artifact.path, tmp_path / "broken")
    stored = load_file(broken / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="missing_keys"):
        prove(exporter, broken, deployment, ANYTHING, 1, student)
    (broken / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match="could not load"):
        prove(exporter, broken, deployment, ANYTHING, 1, student)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_sequences_that_begin_with_bos_are_read_as_they_are(tmp_path: Path, architecture: str) -> None:
    """llama.cpp begins texts with BOS if the file says so, but adds no second one to tokens."""
    folder = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, layers=3)
    tiny_tokenizer(begins=True).save_pretrained(folder)
    exporter, deployment = CASES[0]
    artifact = exporter.export(folder, deployment, tmp_path / "out")
    sequences = np.insert(SEQUENCES[:, 1:], 0, tiny_tokenizer().bos_token_id, axis=1)
    expected = simulated(folder, dict(exporter.unpack(artifact.path)), sequences)
    assert prove(exporter, artifact.path, deployment, expected, 1, folder).agreement >= 0.97
    with LlamaServer(artifact.path, 64, 1) as server:
        assert list(server.tokenize("two apples")) == tiny_tokenizer(begins=True)("two apples")["input_ids"]

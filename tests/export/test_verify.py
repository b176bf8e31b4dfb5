"""Verification accepts what was evaluated, and rejects everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autodistill.errors import RuntimeDiffersError, VerificationError
from autodistill.export.base import Artifact
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.export.gguf import GgufExporter
from autodistill.export.huggingface import HuggingFaceExporter
from autodistill.export.proof import simulate
from autodistill.export.verify import Verification, falls_short, prove, verify, verify_runtime
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_tokenizer
from tests.thinned import thinned

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
ANYTHING = (SEQUENCES, SEQUENCES.astype(np.float32))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("student"), layers=2, width=256, ffn=256, seed=1)


def simulated(
    student: Path, weights: dict[str, np.ndarray], sequences: np.ndarray = SEQUENCES
) -> tuple[np.ndarray, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()}, strict=False)
    with torch.inference_mode():
        logits = model(torch.from_numpy(sequences.astype(np.int64))).logits
        best, second = logits.topk(2).values.unbind(-1)
        return logits.argmax(-1).numpy(), (best - second).numpy()


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


@pytest.mark.parametrize(("case", "most"), thinned([(0, 1e-4), (1, 1e-3), (2, 0.01)]), ids=IDS[:3])
def test_llama_cpps_probabilities_are_compared(tmp_path: Path, student: Path, case: int, most: float) -> None:
    """Activations are rounded where matrices are quantised, so a divergence proves nothing there."""
    exporter, deployment = CASES[case]
    path = exporter.export(student, deployment, tmp_path).path
    expected = simulate(student, deployment, SEQUENCES[:2], 1)
    check = prove(exporter, path, deployment, expected, 1, student)
    assert check.divergence is not None
    assert 0 < check.divergence < most
    assert check.same_written is not None
    assert check.same_written > 0
    tokens, log_probs = expected.likeliest
    # The same tokens are likeliest, but by less.
    flatter = expected._replace(likeliest=(tokens, 0.5 * log_probs - np.log(2)))
    if deployment.bits < 16:
        assert prove(exporter, path, deployment, flatter, 1, student).divergence > 0.01
    else:
        weights = Verification(tensors=20, weights=1000)
        with pytest.raises(
            RuntimeDiffersError, match=r"0\.01 is the most; all 20 stored tensors are equal to what was"
        ):
            prove(exporter, path, deployment, flatter, 1, student, weights)


# tests/export/test_gguf.py lets llama.cpp choose the tokens for every type.
@pytest.mark.parametrize(
    ("exporter", "deployment"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in ("gguf-f16", "gguf-q4_0", "gguf-q6_k") else [])
        for case, name in zip(CASES, IDS, strict=True)
    ],
)
def test_the_runtime_chooses_the_simulations_tokens(
    tmp_path: Path, student: Path, exporter, deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "run", once(exporter.run))  # its one result is compared three times
    artifact = exporter.export(student, deployment, tmp_path)
    top1, leads = simulated(student, dict(exporter.unpack(artifact.path)))
    threads = torch.get_num_threads()
    check = verify_runtime(exporter, artifact, deployment, (top1, leads), SEQUENCES, 1, student)
    assert check.positions == pytest.approx(0.8 * 6 * 128, abs=1)
    assert check.agreement >= 0.97
    assert check.raw_agreement <= check.agreement
    assert check.text
    assert torch.get_num_threads() == threads
    # The figure is a share of the clear positions. Wrong tokens at a sixteenth of all positions, 8% of the clear ones,
    # fail.
    wrong = top1.copy()
    wrong[leads > np.quantile(leads, 15 / 16)] += 1
    with pytest.raises(VerificationError, match=r"(89|9[0-4])\.\d% of 61[45] clear positions"):
        verify_runtime(exporter, artifact, deployment, (wrong, leads), SEQUENCES, 1, student)
    # Wrong tokens at the narrowest sixteenth, which are near-ties, must not fail.
    wrong = top1.copy()
    wrong[leads < np.quantile(leads, 1 / 16)] += 1
    assert (
        verify_runtime(exporter, artifact, deployment, (wrong, leads), SEQUENCES, 1, student).agreement
        == check.agreement
    )


def test_a_runtime_that_cuts_text_otherwise_is_found(tmp_path: Path, student: Path) -> None:
    exporter, deployment = CASES[0]
    artifact = exporter.export(student, deployment, tmp_path / "out")
    expected = simulated(student, dict(exporter.unpack(artifact.path)))
    assert verify_runtime(exporter, artifact, deployment, expected, SEQUENCES, 1, student).same_cut == 1
    other = shutil.copytree(student, tmp_path / "other")
    description = json.loads((other / "tokenizer.json").read_text())
    description["model"]["merges"] = description["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(VerificationError, match=r"only [4-9]\d\.\d% are the same: behind .* it has .* instead of"):
        verify_runtime(exporter, artifact, deployment, expected, SEQUENCES, 1, other)


def test_few_positions_are_verified_on_what_there_is(tmp_path: Path, student: Path) -> None:
    """One misread near-tie of 20 is 5%, which shows nothing. A runtime that computes something else is still found."""
    exporter, deployment = CASES[0]
    artifact = exporter.export(student, deployment, tmp_path)
    few = SEQUENCES[:1, :25]
    top1, leads = simulated(student, dict(exporter.unpack(artifact.path)), few)
    check = verify_runtime(exporter, artifact, deployment, (top1, leads), few, 1, student)
    assert (check.positions, check.agreement) == (20, 1)
    assert check.interval == (pytest.approx(0.025 ** (1 / 20)), 1)
    clearest = np.argsort(-leads[0])
    wrong = top1.copy()
    wrong[0, clearest[:3]] += 1
    check = verify_runtime(exporter, artifact, deployment, (wrong, leads), few, 1, student)
    assert (check.agreement, check.interval) == (
        0.85,
        (pytest.approx(0.6211, abs=1e-4), pytest.approx(0.9679, abs=1e-4)),
    )
    wrong[0, clearest[3]] += 1
    with pytest.raises(VerificationError, match=r"80\.0% of 20 clear positions"):
        verify_runtime(exporter, artifact, deployment, (wrong, leads), few, 1, student)


def test_of_many_positions_the_share_itself_is_required() -> None:
    assert falls_short(484, 500, 0.97)
    assert not falls_short(485, 500, 0.97)
    # With fewer positions, a result that a true 97% has less than once in 200 times: 16 of 20 (0.27%), not 17 (2.1%).
    assert falls_short(16, 20, 0.97)
    assert not falls_short(17, 20, 0.97)
    # A runtime that is never right is found from two positions on.
    assert [falls_short(0, count, 0.97) for count in (1, 2, 6)] == [False, True, True]


def test_choices_of_other_sequences_are_refused(tmp_path: Path) -> None:
    artifact = Artifact(path=tmp_path, size_bytes=0)
    with pytest.raises(ValueError, match="choices of"):
        verify_runtime(*CASES[0][:1], artifact, CASES[0][1], ANYTHING, SEQUENCES[:, 1:], 1, tmp_path)
    with pytest.raises(ValueError, match="choices of"):
        verify_runtime(
            *CASES[0][:1], artifact, CASES[0][1], (SEQUENCES[:0], ANYTHING[1][:0]), SEQUENCES[:0], 1, tmp_path
        )


def test_a_folder_that_does_not_load_says_so(tmp_path: Path, student: Path) -> None:
    exporter, deployment = CASES[-1]
    artifact = exporter.export(student, deployment, tmp_path / "out")
    broken = shutil.copytree(artifact.path, tmp_path / "broken")
    stored = load_file(broken / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="missing_keys"):
        verify_runtime(exporter, Artifact(path=broken, size_bytes=0), deployment, ANYTHING, SEQUENCES, 1, student)
    (broken / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match="could not load"):
        verify_runtime(exporter, Artifact(path=broken, size_bytes=0), deployment, ANYTHING, SEQUENCES, 1, student)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_sequences_that_begin_with_bos_are_read_as_they_are(tmp_path: Path, architecture: str) -> None:
    """llama.cpp begins texts with BOS if the file says so, but adds no second one to tokens."""
    folder = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, layers=3)
    tiny_tokenizer(begins=True).save_pretrained(folder)
    exporter, deployment = CASES[0]
    artifact = exporter.export(folder, deployment, tmp_path / "out")
    sequences = np.insert(SEQUENCES[:, 1:], 0, tiny_tokenizer().bos_token_id, axis=1)
    expected = simulated(folder, dict(exporter.unpack(artifact.path)), sequences)
    check = verify_runtime(exporter, artifact, deployment, expected, sequences, 1, folder)
    assert check.agreement >= 0.97
    with LlamaServer(artifact.path, 64, 1) as server:
        assert list(server.tokenize("two apples")) == tiny_tokenizer(begins=True)("two apples")["input_ids"]

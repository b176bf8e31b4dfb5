"""Other 4-bit tools: an error about a missing one says what installs it, and sizes are the bytes that tools store."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from autodistill.testing import save_tiny_teacher
from benchmarks.engine import export_rivals
from benchmarks.engine.export_quality import beside, verdicts
from benchmarks.engine.export_rivals import ARMS


def test_what_is_not_installed_is_named_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_rivals.importlib.util, "find_spec", lambda name: None)
    assert [export_rivals.missing(arm) for arm in ARMS.values()] == [
        f"not installed: {one}"
        for one in ("onnxruntime-genai", "auto-round", "auto-round", "olive-ai", "nvidia-modelopt")
    ]
    monkeypatch.setattr(export_rivals.importlib.util, "find_spec", lambda name: name)
    assert not any(map(export_rivals.missing, ARMS.values()))


def test_bytes_are_codes_scales_and_what_stays_in_16_bits(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", layers=1)
    stored = load_file(folder / "model.safetensors")
    matrices = {name: one for name, one in stored.items() if "_proj" in name}
    others = sum(one.size for name, one in stored.items() if name not in matrices)
    weights = sum(one.size for one in matrices.values())
    plain = export_rivals._in_blocks(folder, matrices, zeros=False)
    assert plain == weights * 4.5 / 8 + 2 * others
    assert export_rivals._in_blocks(folder, matrices, zeros=True) - plain == weights / 32 / 2


def test_the_size_of_blocks_is_set_wherever_a_config_has_it() -> None:
    config = {"quant_cfg": [{"cfg": {"num_bits": 4, "block_sizes": {-1: 128}}}, {"enable": False}], "algorithm": "max"}
    export_rivals._in_blocks_of(config, 32)
    assert config["quant_cfg"][0]["cfg"]["block_sizes"][-1] == 32  # type: ignore[index]


def test_a_rival_is_compared_on_its_own_seeds() -> None:
    forms = {
        "ours: large": {"bytes": 20, "kl": {0: 0.001, 1: 0.001}},
        "ours: small": {"bytes": 10, "kl": {0: 0.1, 1: 0.5}},
        "ours: one seed": {"bytes": 10, "kl": {1: 0.001}},
        "rival of one seed": {"bytes": 10, "kl": {0: 0.2}},
        "rival of two": {"bytes": 10, "kl": {0: 0.2, 1: 0.2}},
        "rival by chance": {"bytes": 10, "kl": {0: 0.1, 1: 0.7}},
        "rival in a byte": {"bytes": 1, "kl": {0: 0.2}},
    }
    assert [*verdicts(forms)] == [
        "- rival of one seed loses 0.2 nats; ours: small, no larger, 0.1, which is 0.1000 less (one seed): kept",
        "- rival of two loses 0.2 nats; ours: small, no larger, 0.3, which is -0.1000 ± 0.2000 less (2 seeds): missed",
        "- rival by chance loses 0.4 nats; ours: small, no larger, 0.3, which is 0.1000 ± 0.1000 less (2 seeds): "
        "not clear",
        "- rival in a byte: nothing of ours that was judged with its seeds is as small",
    ]


def test_files_of_two_runtimes_are_compared_by_next_tokens_and_bytes() -> None:
    ran = {
        "run: gguf-q4_0 in llama.cpp": {"bytes": 1000, "text": {0: 0.30, 1: 0.40}},
        "run: gguf-q4_0 in ONNX Runtime": {"bytes": 900, "text": {0: 0.30, 1: 0.402}},
        "run: gguf-q8_0 in llama.cpp": {"bytes": 1000, "text": {0: 0.30}},
        "run: gguf-q8_0 in ONNX Runtime": {"bytes": 1100, "text": {0: 0.29}},
    }
    assert [*beside(ran)] == [
        "- gguf-q4_0: ONNX Runtime finds 0.0010 ± 0.0010 more of the next tokens than llama.cpp (2 seeds): kept; its "
        "file has 0.900 of the bytes: kept",
        "- gguf-q8_0: ONNX Runtime finds -0.0100 more of the next tokens than llama.cpp (one seed): missed; its "
        "file has 1.100 of the bytes: missed",
    ]
    assert not [*beside({"run: gguf-q4_0 in llama.cpp": ran["run: gguf-q4_0 in llama.cpp"]})]

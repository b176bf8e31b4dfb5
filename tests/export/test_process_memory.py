from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.estimates.serving_memory import memory
from autodistill.export import process_memory
from autodistill.export.process_memory import measured_process_bytes
from autodistill.export.tokenizer_check import write_sample_model
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing.models import save_tiny_teacher

STORED = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)


def test_a_process_takes_what_it_was_measured_to_take(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", layers=2)
    spec = spec_from_config(read_config(folder))
    found = measured_process_bytes(folder, spec.vocabulary, tmp_path)
    write_sample_model(tmp_path / "sample.gguf", folder, spec.vocabulary)
    with LlamaServer(tmp_path / "sample.gguf", 256, 1) as server:
        server.begin([[0] * 200])
        taken = server.peak_bytes() - server.buffers().total_bytes
    assert found == pytest.approx(taken, abs=1.5e6)


def test_it_is_measured_once_and_again_where_what_was_kept_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measured = save_tiny_teacher(tmp_path / "teacher", layers=2), iter([25_000_000, 26_000_000, 27_000_000])
    monkeypatch.setattr(process_memory, "_measured", lambda *given: next(measured))
    assert [measured_process_bytes(folder, 288, tmp_path / "cache") for _ in range(2)] == [25_000_000] * 2
    (kept,) = (tmp_path / "cache" / "devices").glob("process-*.json")
    for damaged in ("{", '{"bytes": 7}', '{"bytes": "many"}', "{}", '{"bytes": 1e15}'):
        kept.write_text(damaged, encoding="utf-8")
        assert process_memory._kept(kept) == 0
    assert [measured_process_bytes(folder, 288, tmp_path / "cache") for _ in range(2)] == [26_000_000] * 2
    # Another tokenizer or table is measured separately.
    assert measured_process_bytes(folder, 300, tmp_path / "cache") == 27_000_000


def test_an_estimate_takes_the_measured_process_for_the_predicted_one(tmp_path: Path) -> None:
    spec = spec_from_config(read_config(save_tiny_teacher(tmp_path / "teacher", layers=2)))
    predicted = memory(spec, STORED, context=256, batch=1)
    measured = memory(replace(spec, process_bytes=30_000_000), STORED, context=256, batch=1)
    assert measured.overhead_bytes == 30_000_000
    assert measured.total_bytes - predicted.total_bytes == 30_000_000 - predicted.overhead_bytes


def test_what_cannot_be_measured_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", layers=2)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert measured_process_bytes(folder, 288, tmp_path) == 0
    monkeypatch.setattr(process_memory.importlib.util, "find_spec", lambda name: None)
    assert measured_process_bytes(folder, 288, tmp_path) == 0

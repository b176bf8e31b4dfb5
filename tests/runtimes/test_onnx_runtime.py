"""A student that ONNX Runtime serves: exported, timed, and its memory measured in a separate process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.advisor.measure import MeasureRequest, measure
from autodistill.errors import InputError, VerificationError
from autodistill.evaluation.base import Subject
from autodistill.export.base import load_exporter
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.runtimes.timing import installed
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

SERVED = Deployment(runtime="onnxruntime", format="gguf-q4_0", bits=4, group_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student of a million weights."""
    root = tmp_path_factory.mktemp("served")
    student = save_tiny_teacher(root / "student", layers=2, width=256, heads=4, kv_heads=2, ffn=512, seed=1)
    return load_exporter(SERVED.container).export(student, SERVED, root / "onnx").path


def test_a_deployment_is_written_in_the_container_that_its_runtime_reads() -> None:
    in_llama = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    assert (SERVED.container, SERVED.name) == ("onnx", "gguf-q4_0+onnx")
    assert (in_llama.container, in_llama.name) == ("gguf", "gguf-q4_0")
    assert SERVED.scheme == in_llama.scheme  # the same codes, which are evaluated once
    assert Deployment.from_json(SERVED.to_json()) == SERVED
    assert replace(SERVED, types=(("embeddings", "q5_0"),)).name == "gguf-q4_0+embeddings-q5_0+onnx"
    with pytest.raises(InputError, match="cache_type_k in onnxruntime"):
        Deployment(runtime="onnxruntime", format="gguf-q4_0", bits=4, group_size=32, cache_type_k="q8_0")


@pytest.mark.slow
def test_it_is_measured_and_its_memory_was_predicted(folder: Path, tmp_path: Path) -> None:
    assert installed("onnxruntime")
    few = {"context": 64, "prompt": 32, "decoded": 4, "rounds": 1, "threads": 1, "streams": (1, 2)}
    found = measure(MeasureRequest(student=folder, runs=tmp_path, runtime="onnxruntime", busy=True, **few))
    measured = found["measured"]
    assert measured["deployment"] == SERVED.to_json()
    assert measured["tokens_per_second"] > 0
    assert measured["ttft_ms"] > 0
    assert [one["streams"] for one in measured["loads"]] == [1, 2]
    assert measured["size_bytes"] == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert found["predicted"]["memory_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.15)


def test_memory_is_measured_by_the_peak_of_its_process(folder: Path) -> None:
    from autodistill.evaluators.memory import Memory

    spec = spec_from_config(read_config(folder))
    budget = Budget(memory_bytes=10**9, context=64, batch=1)
    subject = Subject(spec=spec, deployment=SERVED, budget=budget, artifact=folder, artifact_bytes=1, threads=1)
    (found,) = Memory().evaluate(subject)
    assert (found.source, found.detail["runtime"]) == ("measured", "onnxruntime")
    assert found.value == pytest.approx(found.detail["predicted_bytes"], rel=0.15)


def test_what_it_does_not_serve_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is served by onnxruntime, not by vllm: leave --runtime out"):
        measure(MeasureRequest(student=folder, runs=tmp_path, runtime="vllm"))
    plain = save_tiny_teacher(tmp_path / "plain")
    with pytest.raises(InputError, match="is served by transformers, not by onnxruntime"):
        measure(MeasureRequest(student=plain, runs=tmp_path, runtime="onnxruntime"))
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in folder.iterdir():
        (torn / file.name).write_bytes(b"no graph" if file.name == "model.onnx" else file.read_bytes())
    with pytest.raises(VerificationError, match="onnxruntime could not load torn"):
        measure(MeasureRequest(student=torn, runs=tmp_path, busy=True, rounds=1, prompt=8, decoded=2))

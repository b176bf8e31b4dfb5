from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from autodistill.errors import VerificationError
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Subject
from autodistill.evaluators import memory as evaluator
from autodistill.evaluators.memory import Memory
from autodistill.hardware.budget import DeviceBudget
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import detect, machine_name
from autodistill.runtimes.llama_cpp import Buffers, LlamaServer
from autodistill.strategy.deployment import Deployment


def test_predicts_before_the_export_and_where_the_runtime_states_nothing(subject: Subject, student: Path) -> None:
    vllm = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
    for changes in ({}, {"artifact": student, "deployment": vllm}):
        (measurement,) = Memory().evaluate(replace(subject, **changes))
        assert measurement.source == "predicted"
        assert measurement.detail["context"] == 512
        assert measurement.detail["batch"] == 2
        parts = [measurement.detail[f"{part}_bytes"] for part in ("weights", "kv_cache", "compute", "overhead")]
        assert measurement.value == sum(parts)


def test_measures_the_file_in_llama_cpp(subject: Subject, artifact: Path) -> None:
    (predicted,) = Memory().evaluate(subject)
    (measured,) = Memory().evaluate(replace(subject, artifact=artifact))
    assert measured.source == "measured"
    with LlamaServer(artifact, 512, 1, 2) as server:
        buffers = server.buffers()
        resident = psutil.Process(server._child.pid).memory_info().rss
        interpreter = server._child.ready["interpreter_bytes"]
    # The memory of a bare interpreter. llama.cpp's library alone takes more.
    assert 5 * 10**6 < interpreter < 25 * 10**6
    assert measured.value - measured.detail["overhead_bytes"] == buffers.total_bytes
    # Resident memory of a separate process minus its interpreter, except for what the prompt touched.
    assert measured.value + interpreter == pytest.approx(resident, rel=0.1)
    assert predicted.value - predicted.detail["overhead_bytes"] == pytest.approx(buffers.total_bytes, rel=0.05)


@pytest.mark.slow  # tests/advisor/test_measure.py measures a folder in its process
def test_measures_a_folder_as_the_peak_of_its_process(subject: Subject, student: Path) -> None:
    plain = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
    loaded = replace(subject, deployment=plain, artifact=student)
    (measured,) = Memory().evaluate(loaded)
    assert measured.source == "measured"
    parts = [measured.detail[f"{part}_bytes"] for part in ("weights", "kv_cache", "compute", "overhead")]
    assert measured.detail["machine"] == machine_name(detect(), accelerated=False)
    assert measured.value == sum(parts) > 10**8  # torch and transformers alone take more


GPU_LOG = Buffers(model_bytes=9_000_000, kv_bytes=5_000_000, compute_bytes=3_000_000, output_bytes=0)


class _OnGpu:
    """llama.cpp on a GPU: the log states its buffers there, and its process is as large as any with CUDA."""

    accelerated = True

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, prompts: Any) -> None: ...

    def peak_bytes(self) -> int:
        return 900_000_000

    def buffers(self, *, on_gpu: bool | None = None) -> Buffers:
        return GPU_LOG if on_gpu else replace(GPU_LOG, model_bytes=12_000_000, output_bytes=1_000)


def test_of_a_gpu_the_process_s_memory_is_no_part_of_what_llama_cpp_takes(
    subject: Subject, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "LlamaServer", _OnGpu)
    monkeypatch.setattr(evaluator, "machine_name", lambda *_, **__: "Tesla T4")
    (measured,) = Memory().evaluate(replace(subject, artifact=artifact))
    guess = memory(subject.spec, subject.deployment, context=512, batch=2, on_gpu=True)
    assert (measured.source, measured.detail["device_class"]) == ("measured", "discrete-gpu")
    # No log shows what libraries hold on the GPU. It stays predicted, and is not memory of the process.
    assert measured.value == GPU_LOG.total_bytes + guess.overhead_bytes
    assert measured.detail["main_memory_bytes"] == 900_000_000
    assert measured.detail["predicted_bytes"] == guess.total_bytes


def test_a_process_here_does_not_stand_for_the_gpu_that_a_budget_is_of(subject: Subject, artifact: Path) -> None:
    device = find_device("4090", devices())
    budget = DeviceBudget(memory_bytes=10**9, context=512, batch=2, device=device)
    (found,) = Memory().evaluate(replace(subject, artifact=artifact, budget=budget))
    guess = memory(subject.spec, subject.deployment, context=512, batch=2, on_gpu=True)
    assert (found.source, found.value) == ("predicted", guess.total_bytes)
    assert "not measured on a GPU" in found.detail["basis"]


def test_a_file_that_llama_cpp_cannot_load_is_an_error(subject: Subject, tmp_path: Path) -> None:
    broken = tmp_path / "student.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(VerificationError, match="could not load"):
        Memory().evaluate(replace(subject, artifact=broken))

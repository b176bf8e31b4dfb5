from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from autodistill.evaluators.memory import Memory

from autodistill.contracts import Subject
from autodistill.errors import VerificationError
from autodistill.hardware import detect, machine_name
from autodistill.llama_cpp import LlamaServer
from autodistill.strategy import Deployment


def test_predicts_before_the_export_and_where_the_runtime_states_nothing(subject: Subject, student: Path) -> None:
    vllm = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
    for changes in ({}, {"artefact": student, "deployment": vllm}):
        (measurement,) = Memory().evaluate(replace(subject, **changes))
        assert measurement.source == "predicted"
        assert measurement.detail["context"] == 512
        assert measurement.detail["batch"] == 2
        parts = [measurement.detail[f"{part}_bytes"] for part in ("weights", "kv_cache", "compute", "overhead")]
        assert measurement.value == sum(parts)


def test_measures_the_file_in_llama_cpp(subject: Subject, artefact: Path) -> None:
    (predicted,) = Memory().evaluate(subject)
    (measured,) = Memory().evaluate(replace(subject, artefact=artefact))
    assert measured.source == "measured"
    with LlamaServer(artefact, 512, 1, 2) as server:
        buffers = server.buffers()
        resident = psutil.Process(server._child.pid).memory_info().rss
        interpreter = server._child.ready["interpreter_bytes"]
    # A bare interpreter's: llama.cpp's library alone takes more.
    assert 5 * 10**6 < interpreter < 25 * 10**6
    assert measured.value - measured.detail["overhead_bytes"] == buffers.total_bytes
    # What a process of its own has resident beside its interpreter, give or take what the prompt touched.
    assert measured.value + interpreter == pytest.approx(resident, rel=0.1)
    assert predicted.value - predicted.detail["overhead_bytes"] == pytest.approx(buffers.total_bytes, rel=0.05)


def test_measures_a_folder_as_the_peak_of_its_process(subject: Subject, student: Path) -> None:
    plain = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
    loaded = replace(subject, deployment=plain, artefact=student)
    (measured,) = Memory().evaluate(loaded)
    assert measured.source == "measured"
    parts = [measured.detail[f"{part}_bytes"] for part in ("weights", "kv_cache", "compute", "overhead")]
    assert measured.detail["machine"] == machine_name(detect(), accelerated=False)
    assert measured.value == sum(parts) > 10**8  # torch and transformers alone take more


def test_a_file_that_llama_cpp_cannot_load_is_an_error(subject: Subject, tmp_path: Path) -> None:
    broken = tmp_path / "student.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(VerificationError, match="could not load"):
        Memory().evaluate(replace(subject, artefact=broken))

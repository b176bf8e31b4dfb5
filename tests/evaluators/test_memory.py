from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from autodistill.evaluators.memory import Memory

from autodistill.contracts import Subject
from autodistill.errors import VerificationError
from autodistill.llama_cpp import LlamaServer


def test_predicts_before_the_export(subject: Subject, student: Path) -> None:
    for artefact in (None, student):
        (measurement,) = Memory().evaluate(replace(subject, artefact=artefact))
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
    overhead = predicted.detail["overhead_bytes"]
    assert measured.value == buffers.total_bytes + overhead
    assert predicted.value - overhead == pytest.approx(buffers.total_bytes, rel=0.05)


def test_a_file_that_llama_cpp_cannot_load_is_an_error(subject: Subject, tmp_path: Path) -> None:
    broken = tmp_path / "student.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(VerificationError, match="could not load"):
        Memory().evaluate(replace(subject, artefact=broken))

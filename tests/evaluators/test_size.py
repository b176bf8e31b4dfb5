from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf

from autodistill.evaluation.base import Subject
from autodistill.evaluators.size import Size


def test_predicts_the_bytes_that_gguf_counts_in_the_file(subject: Subject, artifact: Path) -> None:
    (measurement,) = Size().evaluate(subject)
    assert measurement.source == "predicted"
    assert measurement.value == sum(tensor.n_bytes for tensor in gguf.GGUFReader(artifact).tensors)


def test_what_the_exporter_wrote_is_what_is_measured(subject: Subject, artifact: Path) -> None:
    (measurement,) = Size().evaluate(replace(subject, artifact=artifact, artifact_bytes=artifact.stat().st_size))
    assert (measurement.source, measurement.value) == ("measured", len(artifact.read_bytes()))

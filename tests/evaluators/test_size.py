from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from autodistill.evaluators.size import Size

from autodistill.evaluation.base import Subject


def test_predicts_the_bytes_that_gguf_counts_in_the_file(subject: Subject, artifact: Path) -> None:
    (measurement,) = Size().evaluate(subject)
    assert measurement.source == "predicted"
    assert measurement.value == sum(tensor.n_bytes for tensor in gguf.GGUFReader(artifact).tensors)


def test_counts_the_file(subject: Subject, artifact: Path) -> None:
    (measurement,) = Size().evaluate(replace(subject, artifact=artifact))
    assert (measurement.source, measurement.value) == ("measured", len(artifact.read_bytes()))


def test_counts_the_weights_of_a_folder_alone(subject: Subject, student: Path) -> None:
    (measurement,) = Size().evaluate(replace(subject, artifact=student))
    assert measurement.value == len((student / "model.safetensors").read_bytes())


def test_a_folder_without_weights_has_no_size(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        Size().evaluate(replace(subject, artifact=tmp_path))

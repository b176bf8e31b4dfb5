"""A calibration is made once for a teacher and data, and again if its file is damaged."""

import pytest
import torch

from autodistill.distillation.teacher.importance import SEQUENCES, PartImportance, ensure_importance
from autodistill.models.loading import load_model


def test_it_is_made_once_for_each_teacher_and_data(workshop, tmp_path):
    made = []

    def load():
        made.append(1)
        return load_model(workshop.teacher, torch.float32)

    def ensure(teacher="t", data="d"):
        return ensure_importance(
            load, teacher_fingerprint=teacher, data_fingerprint=data, data=workshop.data, root=tmp_path
        )

    path = ensure()
    first = PartImportance.load(path)
    assert first.similarity.shape == (7, 7)
    assert first.similarity.diagonal()[1:].tolist() == pytest.approx([1.0] * 6)  # the padding token's embedding is 0
    assert ensure() == path
    assert len(made) == 1
    assert len({ensure("other"), ensure(data="other"), path}) == 3
    assert len(made) == 3
    damaged = path.read_bytes()[:100]
    path.unlink()  # a mapped file must not shrink
    path.write_bytes(damaged)
    assert ensure() == path
    assert len(made) == 4
    assert torch.equal(PartImportance.load(path).neurons, first.neurons)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".safetensors"] * 3


def test_only_the_first_sequences_count(workshop, tmp_path):
    tokens = workshop.data.tokens
    more = type(workshop.data)(
        tokens=tokens[[*range(8), *range(8), *range(8)]], documents=workshop.data.documents[[*range(8)] * 3]
    )
    assert len(more.tokens) > SEQUENCES

    def calibration(data, name):
        arguments = {"teacher_fingerprint": "t", "data_fingerprint": name, "data": data, "root": tmp_path}
        return PartImportance.load(ensure_importance(lambda: load_model(workshop.teacher, torch.float32), **arguments))

    head, whole = calibration(more.head(SEQUENCES * 32), "head"), calibration(more, "whole")
    assert torch.equal(head.channels, whole.channels)
    assert torch.equal(head.similarity, whole.similarity)

"""A model's config and tokenizer, read without its weights, are the same as with them."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest

from autodistill.distillation.teacher.resolve import materialize, resolve_teacher, text_files
from autodistill.export.gguf import GgufExporter
from autodistill.models.model_folder import read_config, tokenizer_fingerprint
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher


def test_of_a_gguf_file_they_are_those_it_is_converted_with(tmp_path: Path) -> None:
    f16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    made = GgufExporter().export(save_tiny_teacher(tmp_path / "teacher"), f16, tmp_path / "out").path
    ref = resolve_teacher(str(made))
    whole = materialize(ref, tmp_path / "cache").folder
    with text_files(ref) as folder:
        assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(whole)
        assert read_config(folder) == read_config(whole)
        assert not list(folder.glob("*.safetensors"))
    assert not folder.exists()


def test_of_a_hub_model_no_weights_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    teacher = save_tiny_teacher(tmp_path / "teacher")
    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda ref, allow_patterns, **_: asked.extend(allow_patterns) or str(teacher),
    )
    with text_files(replace(resolve_teacher(str(teacher)), kind="hub", path=None)) as folder:
        assert folder == teacher
    files = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
    assert all(any(fnmatch(name, pattern) for pattern in asked) for name in files)
    weights = ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin")
    assert not any(fnmatch(name, pattern) for name in weights for pattern in asked)
    with text_files(resolve_teacher(str(teacher))) as folder:
        assert folder == teacher

"""The 16-bit folder, as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from autodistill.export.huggingface import HuggingFaceExporter
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

PLAIN = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_students_rounded_to_bfloat16(tmp_path: Path, tied: bool) -> None:
    student = save_tiny_teacher(tmp_path / "student", tied=tied)
    artifact = HuggingFaceExporter().export(student, PLAIN, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert model.dtype == torch.bfloat16
    expected = load_file(student / "model.safetensors")
    assert ("lm_head.weight" in expected) is not tied
    for name, values in expected.items():
        assert torch.equal(model.state_dict()[name], values.bfloat16()), name
    found = dict(HuggingFaceExporter().unpack(artifact.path))
    assert set(found) == set(expected)
    for name, values in found.items():
        assert torch.equal(torch.from_numpy(values), expected[name].bfloat16().float()), name
    assert artifact.size_bytes == (artifact.path / "model.safetensors").stat().st_size


def test_config_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(student)
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    out = HuggingFaceExporter().export(student, PLAIN, tmp_path / "out").path
    assert not hasattr(AutoConfig.from_pretrained(out), "quantization_config")
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("The miller carries").input_ids == tokenizer("The miller carries").input_ids
    assert loaded.chat_template == "{{ messages }}"
    assert (out / "generation_config.json").read_text() == (student / "generation_config.json").read_text()


def test_all_chat_templates_come_along(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(student)
    for _ in range(2):  # into the same folder again
        out = HuggingFaceExporter().export(student, PLAIN, tmp_path / "out").path
        assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_shards_are_read(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    found = dict(
        HuggingFaceExporter().unpack(HuggingFaceExporter().export(tmp_path / "sharded", PLAIN, tmp_path / "out").path)
    )
    whole = load_file(student / "model.safetensors")
    assert set(found) == set(whole)
    assert all(torch.equal(torch.from_numpy(found[name]), whole[name].bfloat16().float()) for name in whole)

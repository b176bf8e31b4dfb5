"""The tiny models and texts are what they claim to be, and the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autodistill.testing import save_tiny_teacher, tiny_text, tiny_tokenizer


def test_the_text_is_the_same_for_the_same_arguments(tmp_path: Path) -> None:
    texts = [
        {path.name: path.read_text() for path in tiny_text(tmp_path / name, 5, 8, seed).iterdir()}
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0].values())) == 5


def test_the_tokenizer_writes_any_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(280)
    assert len(tokenizer) == 280
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    text = "The fox — Füchse 狐 \n\t 42"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tiny_tokenizer(280, begins=True)(text)["input_ids"] == [0, *tokenizer(text)["input_ids"]]
    with pytest.raises(ValueError, match="cannot have 100 entries"):
        tiny_tokenizer(100)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("mistral", True), ("qwen2", True), ("qwen3", True)]
)
def test_a_teacher_is_a_float32_folder_of_its_seed(tmp_path: Path, architecture: str, tied: bool) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = (
        save_tiny_teacher(tmp_path / name, architecture=architecture, tied=tied, layers=2, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    weights = [load_file(folder / "model.safetensors") for folder in (first, second, other)]
    assert ("lm_head.weight" in weights[0]) is not tied
    assert all(tensor.dtype == torch.float32 for tensor in weights[0].values())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not any(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    assert AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32).config.model_type == architecture

"""Models in memory are saved once, and are the same teachers as the folders that transformers saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from autodistill.distillation.teacher.loaded import teacher_reference
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import InputError
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-llama")


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_it_is_the_teacher_that_the_folder_is(folder: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    reference = teacher_reference(model, tokenizer, tmp_path)
    found = materialize(resolve_teacher(reference), tmp_path)
    assert found.name == "tiny-llama"
    saved, original = (load_file(path / "model.safetensors") for path in (found.folder, folder))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    again = AutoTokenizer.from_pretrained(found.folder)
    assert again("The miller paints.").input_ids == tokenizer("The miller paints.").input_ids


def test_the_same_content_is_saved_once(folder: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    first = Path(teacher_reference(model, tokenizer, tmp_path))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert Path(teacher_reference(model, tokenizer, tmp_path)) == first
    assert Path(teacher_reference(AutoModelForCausalLM.from_pretrained(folder), tokenizer, tmp_path)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert Path(teacher_reference(model, tokenizer, tmp_path)) != first


def test_half_precision_stays_so(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    reference = Path(teacher_reference(model.to(torch.bfloat16), tokenizer, tmp_path))
    assert {tensor.dtype for tensor in load_file(reference / "model.safetensors").values()} == {torch.bfloat16}
    resolve_teacher(str(reference))


def test_a_reference_stays_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    assert teacher_reference("smollm2", None, tmp_path) == "smollm2"
    with pytest.raises(InputError, match="the teacher smollm2 has a tokenizer of its own: leave tokenizer out"):
        teacher_reference("smollm2", tokenizer, tmp_path)


def _adapted(model: Any) -> Any:
    model._hf_peft_config_loaded = True
    return model


def _quantized(model: Any) -> Any:
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def _wrapped(model: Any) -> Any:
    return type("PeftModelForCausalLM", (), {"__module__": "peft.peft_model"})()


def _classifier(model: Any) -> Any:
    return LlamaForSequenceClassification(model.config)


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapters": (_adapted, "has adapters"),
    "wrapped": (_wrapped, "give what model.merge_and_unload"),
    "quantised": (_quantized, "weights are quantised"),
    "meta": (lambda model: model.to("meta"), "offloaded or on the meta device"),
    "float64": (lambda model: model.double(), "of type torch.float64: load it in 16 or 32 bits"),
    "another task": (_classifier, "is a LlamaForSequenceClassification"),
    "another family": (lambda _: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)), "is a GPT2LMHeadModel"),
    "no model": (lambda _: torch.nn.Linear(2, 2), "is of type Linear: give a reference, or"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_teacher_is_refused(fault: str, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        teacher_reference(make(model), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_needed(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a loaded teacher has no tokenizer: give it"):
        teacher_reference(model, None, tmp_path)
    with pytest.raises(InputError, match="tokenizer is of type SimpleNamespace"):
        teacher_reference(model, SimpleNamespace(), tmp_path)  # type: ignore[arg-type]

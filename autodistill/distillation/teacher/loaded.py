"""Accepts a loaded `transformers` model as a teacher: saves it once, and then uses it like any folder."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.models.families import TRAINED
from autodistill.utils.checksums import saved_once
from autodistill.utils.hashing import content_hash, file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def teacher_reference(
    teacher: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, cache: Path
) -> str:
    """Return a teacher's reference. A loaded model is saved in the cache, once for the same content.

    Args:
        teacher: A reference, which is returned as it is, or a causal language model of transformers with all its
            weights, on any device, in 16 or 32 bits.
        tokenizer: The loaded model's tokenizer. None for a reference, which has its own.
        cache: Folder of everything that later searches may use again.

    Raises:
        InputError: A loaded model has no tokenizer, or a reference has one; the teacher is another object; or the model
            has another family or task, adapters, quantised weights, or weights that are offloaded or on the meta
            device.
    """
    if isinstance(teacher, str | Path):
        if tokenizer is not None:
            raise InputError(f"the teacher {teacher} has a tokenizer of its own: leave tokenizer out")
        return str(teacher)
    model = _checked(teacher)
    text = _checked_tokenizer(tokenizer)
    stated = Path(str(model.config.name_or_path or "")).name
    name = stated if _NAME.fullmatch(stated) else str(model.config.model_type)

    def save(path: Path) -> None:
        """Save the model and its tokenizer in a folder."""
        from autodistill.models.loading import save_model

        try:
            save_model(model, path)
            text.save_pretrained(path)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"transformers cannot save the teacher ({str(error).splitlines()[0]})") from error

    return str(saved_once(cache, content_hash([name, _fingerprint(model, text)], digits=16), name, save))


def _checked(model: Any) -> PreTrainedModel:
    import torch
    from transformers import PreTrainedModel

    # Checked before the class, because peft wraps a model in its own class.
    if type(model).__module__.partition(".")[0] == "peft" or getattr(model, "_hf_peft_config_loaded", False):
        raise InputError("the teacher has adapters (PEFT): give what model.merge_and_unload() returns")
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"the teacher is of type {type(model).__name__}: give a reference, or a causal language model of "
            "transformers"
        )
    if model.config.model_type not in TRAINED or not type(model).__name__.endswith("ForCausalLM"):
        raise InputError(
            f"the teacher is a {type(model).__name__}: give a causal language model of {', '.join(TRAINED)}"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise InputError("the teacher's weights are quantised: load it in 16 or 32 bits, or give its GGUF file")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise InputError(
            "weights of the teacher are offloaded or on the meta device: load all of it on one device, without a "
            "device_map that offloads, or give its folder"
        )
    odd = [tensor.dtype for tensor in model.parameters() if tensor.dtype not in _dtypes(torch)]
    if odd:
        raise InputError(f"weights of the teacher are of type {odd[0]}: load it in 16 or 32 bits")
    return model


def _dtypes(torch: Any) -> tuple[Any, ...]:
    return (torch.float32, torch.bfloat16, torch.float16)


def _checked_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerBase

    if tokenizer is None:
        raise InputError("a loaded teacher has no tokenizer: give it as tokenizer=AutoTokenizer.from_pretrained(...)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer is of type {type(tokenizer).__name__}: give a tokenizer of transformers")
    return tokenizer


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return hashes of everything that decides the saved files: config, weights, and the tokenizer's own files."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    configs = [one.to_dict() for one in (model.config, model.generation_config) if one is not None]
    for config in configs:
        for name in ("architectures", "dtype", "transformers_version"):
            config.pop(name, None)  # saving a model sets these
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [
            json.dumps(configs, sort_keys=True, default=str),
            digest.hexdigest(),
            [[path.name, file_hash(path)] for path in files],
        ]

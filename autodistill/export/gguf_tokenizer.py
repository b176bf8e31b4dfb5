"""Turns a byte-level BPE tokenizer of transformers into the metadata that llama.cpp reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from autodistill.errors import InputError
from autodistill.export.student_files import read_json

INHERITED = "gguf_tokenizer.json"
"""A file beside the tokenizer of a teacher that was a GGUF file: that file's scalar `tokenizer.ggml.*` keys, without
the prefix, like {"pre": "smollm"}."""

_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_logger = logging.getLogger(__name__)


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Writes tokens, types, merges, special ids and chat template.

    What a GGUF teacher said of its own tokenizer holds before what is worked out here.

    Args:
        writer: Receives the metadata.
        folder: Holds tokenizer.json and the files beside it.
        vocabulary: Rows of the embedding table; those beyond the tokenizer's are named as unused.

    Raises:
        InputError: There is no tokenizer.json, or the tokenizer is no byte-level BPE.
    """
    from transformers import AutoTokenizer

    description = read_json(folder / "tokenizer.json")
    model = description.get("model") or {}
    if model.get("type") != "BPE" or not any(part["type"] == "ByteLevel" for part in _parts(description["decoder"])):
        raise InputError(
            f"GGUF export knows byte-level BPE tokenizers, and {folder / 'tokenizer.json'} is another kind: "
            "export to huggingface or compressed-tensors instead"
        )
    names, kinds = _tokens(description, vocabulary)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    scalars = _scalars(tokenizer, description)
    if (folder / INHERITED).is_file():
        scalars |= read_json(folder / INHERITED)
    for key, value in scalars.items():
        _add_scalar(writer, f"tokenizer.ggml.{key}", value)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(description: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    names = {index: f"[PAD{index}]" for index in range(vocabulary)}
    kinds = dict.fromkeys(names, TokenType.UNUSED)
    for name, index in description["model"]["vocab"].items():
        names[index], kinds[index] = name, TokenType.NORMAL
    for token in description.get("added_tokens") or []:
        names[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if len(names) > vocabulary:
        raise InputError(f"the tokenizer has {len(names)} tokens, but the model's vocabulary is {vocabulary}")
    return [names[index] for index in range(vocabulary)], [int(kinds[index]) for index in range(vocabulary)]


def _scalars(tokenizer: Any, description: dict[str, Any]) -> dict[str, Any]:
    ids = {f"{key}_token_id": getattr(tokenizer, name) for key, name in _IDS.items()}
    begins = tokenizer("a")["input_ids"][:1]
    return {
        "model": "gpt2",
        "pre": guess_pre_tokenizer(description.get("pre_tokenizer")),
        "add_space_prefix": False,
        "add_bos_token": begins == [tokenizer.bos_token_id],
        **{key: value for key, value in ids.items() if value is not None},
    }


def guess_pre_tokenizer(description: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way that tokenizer.json's `pre_tokenizer` cuts text before the merges.

    llama.cpp knows these ways by name alone; one that it does not know becomes "default", with a warning.
    """
    parts = _parts(description)
    kinds = {part["type"] for part in parts}
    patterns = json.dumps([part.get("pattern") for part in parts], ensure_ascii=False)
    if "Digits" in kinds:
        return "smollm"
    if "Split" not in kinds:
        return "gpt-2"
    if r"\\p{N}{1,3}" in patterns:
        return "llama-bpe"
    if r"|\\p{N}|" in patterns:
        return "qwen2"
    _logger.warning(
        "llama.cpp may cut text into tokens otherwise than this tokenizer does: its pattern %s is not known", patterns
    )
    return "default"


def _parts(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of the tokenizer, or the steps of a sequence of them."""
    if description is None:
        return []
    steps: list[dict[str, Any]] = description.get("pretokenizers") or description.get("decoders") or [description]
    return steps


def _add_scalar(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))

"""Turns a BPE tokenizer of transformers into the metadata that llama.cpp reads.

Byte-level BPE is GPT-2's kind: text is cut by a pattern, and bytes are merged in the order of a list. SentencePiece's
kind, as Gemma's, merges characters of whole texts, spaces being "▁"; llama.cpp has no list for it, but joins whatever
two neighbours make a token, the token of the highest score first. That is the same where every pair that makes a token
stands in the list, those of one token after each other, which is checked.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from autodistill.errors import InputError
from autodistill.export.student_files import read_json
from autodistill.tokenising import beginning

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
        InputError: There is no tokenizer.json, or llama.cpp would cut text otherwise than it.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    description = read_json(path)
    model = description.get("model") or {}
    kinds = {part["type"] for part in _parts(description.get("decoder"))}
    byte_level = "ByteLevel" in kinds
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        raise InputError(
            f"GGUF export knows byte-level BPE tokenizers and SentencePiece's kind with bytes, and {path} is another "
            "kind: export to huggingface or compressed-tensors instead"
        )
    names, types = _tokens(description, vocabulary)
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    missing = _other_normalizer(description) if byte_level else _no_sentencepiece(description, merges)
    if missing:
        raise InputError(
            f"llama.cpp would cut text into other tokens than {path} does: {missing}; export to huggingface or "
            "compressed-tensors instead"
        )
    if byte_level:
        own = {"model": "gpt2", "pre": guess_pre_tokenizer(description.get("pre_tokenizer"))}
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        own = {"model": "llama", "pre": "default"}
        names, types, scores = _as_sentencepiece(names, types, merges)
        writer.add_token_scores(scores)
    writer.add_token_list(names)
    writer.add_token_types(types)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    scalars = own | _scalars(tokenizer)
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


def _other_normalizer(description: dict[str, Any]) -> str:
    """What is changed in texts before they are cut that llama.cpp does not do, or nothing.

    Composing characters (NFC) passes: texts are mostly composed, and llama.cpp's own files of such models leave it out.
    """
    others = [part["type"] for part in _parts(description.get("normalizer")) if part["type"] != "NFC"]
    return f"its normalizer {others[0]} is not known there" if others else ""


_Pair = tuple[str, ...]
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "\u2581"


def _no_sentencepiece(description: dict[str, Any], merges: list[_Pair]) -> str:
    """Why llama.cpp's way to merge by scores is another than this tokenizer's, or nothing."""
    model = description["model"]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if _parts(description.get("normalizer")) != [space]:
        return f"its normalizer does more, or less, than to write spaces as {_SPACE}"
    before = _parts(description.get("pre_tokenizer"))
    if any(part["type"] != "Split" or part["pattern"] != {"String": " "} for part in before):
        return "its pre_tokenizer cuts text into words"
    if model.get("ignore_merges") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its model has words, prefixes or suffixes of its own"
    vocab = model["vocab"]
    lacking = [name for name in _BYTES if name not in vocab]
    if lacking:
        return f"its vocabulary lacks {lacking[0]}, one of 256 bytes"
    known, ranks = set(merges), dict[str, int]()
    last = ""
    for rank, pair in enumerate(merges):
        token = "".join(pair)
        if token != last and token in ranks:
            return f"its merges that make {token!r} do not follow each other"
        ranks.setdefault(token, rank)
        last = token
    for token in vocab:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                return f"its merges lack {pair[0]!r} and {pair[1]!r}, which make the token {token!r}"
    return ""


def _as_sentencepiece(
    names: list[str], kinds: list[int], merges: list[_Pair]
) -> tuple[list[str], list[int], list[float]]:
    """Names, kinds with bytes marked, and scores: the earlier a merge, the higher that of what it makes."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    # A token with a score of its own for each place in the list of merged tokens: float32 tells 2^24 of them apart.
    order = {token: place for place, token in enumerate(ranks)}
    marked = list(kinds)
    for index, name in enumerate(names):
        if name in _BYTES:
            marked[index] = int(TokenType.BYTE)
        elif kinds[index] == TokenType.USER_DEFINED and _SPACE in name:
            # It would be looked for in the text before spaces are written so, and printed as it is.
            marked[index] = int(TokenType.NORMAL)
    return names, marked, [-float(order.get(name, 0)) for name in names]


def _scalars(tokenizer: Any) -> dict[str, Any]:
    ids = {f"{key}_token_id": getattr(tokenizer, name) for key, name in _IDS.items()}
    return {
        "add_space_prefix": False,
        "add_bos_token": beginning(tokenizer) is not None,
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
    for name in ("pretokenizers", "decoders", "normalizers"):
        if name in description:
            steps: list[dict[str, Any]] = description[name]
            return steps
    return [description]


def _add_scalar(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))

"""Compares llama.cpp's tokens with those of transformers' tokenizer, on sample texts or on the validation text."""

from __future__ import annotations

import importlib.util
import re
import struct
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from autodistill.data.tokenization import load_tokenizer, tokenized
from autodistill.errors import InputError, VerificationError
from autodistill.export.gguf_tokenizer import Spaces, add_tokenizer, is_certain, refusal, spaces
from autodistill.runtimes.llama_cpp import LlamaServer

_WIDTH = 32
SAMPLE_CONTEXT = 256
_TEXTS = (
    "The miller's two mills don't stop; they'LL grind 12345 sacks by 3.14 p.m. (or so)!",
    " a space before,  two within,   three\tand a tab \n\n\nlines\r\n  of text  \n",
    "HelloWorld camelCase XMLHttpRequest snake_case x=y+1; // http://a.b/c?d=e#f",
    "Zürich, naïve café, Привет мир, 你好世界, こんにちは 🤖👍 end",
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well two tokenizers agree on texts.

    Attributes:
        same: Number of tokens that both have in the same order.
        tokens: Number of tokens in all.
        first: The first difference, in words; empty if there is none.
    """

    same: int
    tokens: int
    first: str

    @property
    def share(self) -> float:
        """The share of tokens that both have; 1 if there are none."""
        return self.same / self.tokens if self.tokens else 1.0


def cannot_cut(folder: Path, vocabulary: int) -> str:
    """Return why a GGUF file cannot hold the tokenizer of a folder, or "" if llama.cpp tokenises texts as it does.

    The tokenizer is written into a file as an export would write it. If its description does not decide how llama.cpp
    splits text, llama.cpp tokenises sample texts with a model of a few megabytes.

    Args:
        folder: Holds the tokenizer's files.
        vocabulary: Rows of the model's embedding table.
    """
    try:
        reason = refusal(folder) or _cannot_write(folder, vocabulary)
        if not reason and not is_certain(folder):
            reason = _cut_otherwise(folder)
    except (InputError, VerificationError) as error:
        return str(error)
    return f"{reason}; export to huggingface or compressed-tensors instead" if reason else ""


def agreement(tokenizer: Any, server: LlamaServer, texts: Iterable[str]) -> Agreement:
    """Return how well a tokenizer and llama.cpp agree, apart from tokens that begin a text.

    Texts are first composed (NFC), which some tokenizers do and llama.cpp does not.

    Args:
        tokenizer: transformers' tokenizer.
        server: A server with a file that has that tokenizer.
        texts: At least one text that is not empty.
    """
    same = total = 0
    first = ""
    for text in (unicodedata.normalize("NFC", text) for text in texts):
        mine = tokenized(tokenizer, text)["input_ids"]
        expected, found = (_without(tokenizer.bos_token_id, tokens) for tokens in (mine, server.tokenize(text)))
        total += max(len(expected), len(found))
        if found == expected:
            same += len(found)
            continue
        blocks = SequenceMatcher(None, expected, found, autojunk=False).get_matching_blocks()
        same += sum(block.size for block in blocks)
        first = first or _difference(tokenizer, expected, found)
    return Agreement(same=same, tokens=total, first=first)


def comparable(text: str, tokenizer: Any, put: Spaces) -> str:
    """Return a text without the parts in which llama.cpp is known to put other spaces (`Spaces.caveat`)."""
    if put.put == "first" and not put.written:
        return f"{tokenizer.eos_token or tokenizer.bos_token or ''}{text}"
    special = "|".join(map(re.escape, tokenizer.all_special_tokens))
    if put.put == "first":
        return re.sub(special, "", text).lstrip(" ") if special else text.lstrip(" ")
    if put.put == "spaceless" and put.written:
        return re.sub(f"({special}) +", r"\1", text).lstrip(" ") if special else text.lstrip(" ")
    return text


def _without(begin: int | None, tokens: Sequence[int]) -> list[int]:
    start = next((place for place, token in enumerate(tokens) if token != begin), len(tokens))
    return list(tokens[start:])


def _difference(tokenizer: Any, expected: Sequence[int], found: Sequence[int]) -> str:
    place = next(
        (place for place, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other),
        min(len(expected), len(found)),
    )
    before, mine, theirs = (
        tokenizer.convert_ids_to_tokens(list(tokens))
        for tokens in (expected[max(0, place - 2) : place], expected[place : place + 4], found[place : place + 4])
    )
    return f"behind {before} it has {theirs} instead of {mine}"


def _cannot_write(folder: Path, vocabulary: int) -> str:
    """Return why the tokenizer's metadata cannot be written, or ""."""
    with tempfile.TemporaryDirectory() as place:
        writer = GGUFWriter(Path(place) / "tokenizer.gguf", "llama")
        try:
            add_tokenizer(writer, folder, vocabulary)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        except (ValueError, TypeError, struct.error) as error:
            return f"GGUF cannot hold the tokenizer in {folder}: {error}"
        finally:
            writer.close()
    return ""


def _cut_otherwise(folder: Path) -> str:
    """Return what llama.cpp tokenises differently in the sample texts, or ""."""
    if importlib.util.find_spec("xllamacpp") is None:
        return (
            f"whether llama.cpp cuts texts as the tokenizer in {folder} does is only known to xllamacpp, which is not "
            "installed (pip install xllamacpp)"
        )
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tokenizer.gguf"
        write_sample_model(path, folder, max(tokenizer.get_vocab().values()) + 1)
        put = spaces(folder)
        texts = [comparable(text, tokenizer, put) for text in _samples(tokenizer)]
        with LlamaServer(path, SAMPLE_CONTEXT, 1) as server:
            found = agreement(tokenizer, server, texts)
    where = f"llama.cpp would cut text into other tokens than the tokenizer in {folder} does"
    return f"{where}: {found.first}" if found.first else ""


def _samples(tokenizer: Any) -> list[str]:
    """Return sample texts, alone and separated by special tokens, as in chat templates."""
    special = dict.fromkeys(filter(None, (tokenizer.eos_token, tokenizer.bos_token)))
    return [*_TEXTS, *(f"one{token}two {token} three\n{token}\nfour" for token in special)]


def write_sample_model(path: Path, folder: Path, vocabulary: int) -> None:
    """Write a one-layer model of zeros with the tokenizer of a folder."""
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_context_length(SAMPLE_CONTEXT)
        writer.add_embedding_length(_WIDTH)
        writer.add_block_count(1)
        writer.add_feed_forward_length(_WIDTH)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        add_tokenizer(writer, folder, vocabulary)
        writer.add_tensor("token_embd.weight", np.zeros((vocabulary, _WIDTH), np.float16))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((_WIDTH, _WIDTH), np.float16))
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
            writer.add_tensor(f"{name}.weight", np.zeros(_WIDTH, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()

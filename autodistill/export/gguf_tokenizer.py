"""Conversion of a transformers BPE tokenizer to llama.cpp's metadata, or the reason why it is impossible.

Byte-level BPE is GPT-2's kind. Text is split in one of the ways that llama.cpp knows by name, and bytes are merged in
the order of a list. SentencePiece's kind, like Gemma's, merges characters of whole texts, with spaces written as "▁".
llama.cpp has no list of merges for it. It joins any two neighbours that make a token, the token with the highest score
first. The result is the same if the list has every pair that makes a token, and the pairs of one token follow each
other. This is checked.

The reference is the tokenizer that transformers makes from a folder. For some classes, transformers builds its own kind
from the tokens and merges, whatever else tokenizer.json says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from autodistill.data.tokenization import beginning, chat_template_of, load_tokenizer
from autodistill.errors import InputError
from autodistill.export.student_reader import read_json
from autodistill.models.pretokenizers import PRETOKENIZERS, Pretokenizer, pretokenizers_like

INHERITED = "gguf_tokenizer.json"
"""A file next to the tokenizer of a teacher that was a GGUF file. It has that file's scalar `tokenizer.ggml.*` keys
without the prefix, like {"pre": "smollm"}."""

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""llama.cpp stops at each of these tokens. Chat templates are given the text of the first one."""
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Write tokens, types, merges, special ids and chat template of a tokenizer that `refusal` accepts.

    Keys inherited from a GGUF teacher take precedence over those derived here. If there are several chat templates, the
    one that training uses is written. End tokens are the tokenizer's and those of the generation config.

    Args:
        writer: Receives the metadata.
        folder: Holds the tokenizer's files.
        vocabulary: Rows of the embedding table. Rows beyond the tokenizer's tokens are named as unused.

    Raises:
        InputError: The tokenizer cannot be read, or has more tokens than the table has rows; or an end token is not one
            of its special tokens, or there are more than three.
    """
    tokenizer, description = _read(folder)
    names, types = _tokens(description, vocabulary)
    merges = _merges(description)
    if _is_byte_level(description):
        cut = _cut(description)
        own: dict[str, Any] = {"model": "gpt2", "pre": cut.names[0] if cut else "default", "add_space_prefix": False}
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        own = {"model": "llama", "pre": "default", "add_space_prefix": spaces(folder).written}
        names, types, scores = _as_sentencepiece(names, types, merges)
        writer.add_token_scores(scores)
    writer.add_token_list(names)
    writer.add_token_types(types)
    values = own | _scalars(tokenizer) | _inherited(folder)
    for key, value in (values | _more_ends(folder, values, names, types)).items():
        _add_scalar(writer, f"tokenizer.ggml.{key}", value)
    template = chat_template_of(tokenizer)
    if template is not None:
        writer.add_chat_template(template)


def refusal(folder: Path) -> str:
    """Return why GGUF cannot hold a folder's tokenizer, as far as its description shows, or "".

    Raises:
        InputError: The tokenizer cannot be read.
    """
    _, description = _read(folder)
    model = description.get("model") or {}
    byte_level = _is_byte_level(description)
    if model.get("type") != "BPE" or not (byte_level or model.get("byte_fallback")):
        return (
            "GGUF export knows byte-level BPE tokenizers and SentencePiece's kind with bytes, and that in "
            f"{folder} is another kind"
        )
    if byte_level and not model.get("merges"):
        return f"GGUF cannot hold the tokenizer in {folder}: it has no merges, which llama.cpp needs"
    missing = _no_byte_level(description, _inherited(folder)) if byte_level else _no_sentencepiece(description)
    return (
        f"llama.cpp would cut text into other tokens than the tokenizer in {folder} does: {missing}" if missing else ""
    )


def is_certain(folder: Path) -> bool:
    """Return whether llama.cpp certainly tokenises as the tokenizer does, if `refusal` accepts it.

    Otherwise, only running llama.cpp can show it. This is so if llama.cpp must put spaces before texts. It is also so
    if a GGUF teacher's file names a way to split text that is not known to match the tokenizer that transformers made
    from it.
    """
    _, description = _read(folder)
    inherited = _inherited(folder)
    if not _is_byte_level(description):
        return spaces(folder) == Spaces(put="never", written=False)
    cut = _cut(description)
    return cut is not None and inherited.get("pre", cut.names[0]) in cut.names


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """The places where the tokenizer and llama.cpp put a space before text.

    Attributes:
        put: Where the tokenizer puts a space: "never"; "each" (before each piece of a text; special tokens separate
            pieces); "spaceless" (before each piece that does not begin with a space); "first" (the same, but only
            before the first piece).
        written: Whether the file tells llama.cpp to put a space before each piece, or before none. llama.cpp knows only
            these two.
    """

    put: str
    written: bool

    @property
    def caveat(self) -> str:
        """What llama.cpp does differently, in words for the user, or ""."""
        if self.put == "first" and not self.written:
            return (
                "in GGUF a text that begins with a word instead of a special token, as chats do, is cut without the "
                "space that the tokenizer puts before it"
            )
        if self.put in ("first", "spaceless") and self.written:
            where = "behind special tokens, and before text that begins with one" if self.put == "first" else ""
            return (
                f"in GGUF a space is put {where or 'before text that begins with one'}, which the tokenizer does not "
                "do: so do llama.cpp's own files of such models"
            )
        return ""


def spaces(folder: Path) -> Spaces:
    """Return where a folder's tokenizer, and llama.cpp, put spaces before texts.

    llama.cpp puts a space before all pieces of a text or before none. Suppose that the tokenizer puts one only before
    the first piece. Then "none" is right for chats, whose templates begin with a special token, and "all" is right for
    texts without special tokens.

    Raises:
        InputError: The tokenizer cannot be read.
    """
    tokenizer, description = _read(folder)
    if _is_byte_level(description):
        return Spaces(put="never", written=False)
    schemes = [part.get("prepend_scheme", "always") for part in _metaspaces(description)]
    put = {"always": "spaceless", "first": "first"}.get(schemes[0] if schemes else "", "never")
    if _PREPEND_SPACE in _parts(description.get("normalizer")):
        put = "each"
    written = put in ("each", "spaceless") or (put == "first" and not tokenizer.chat_template)
    return Spaces(put=put, written=bool(_inherited(folder).get("add_space_prefix", written)))


def _read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer that transformers makes from a folder, and its description as in tokenizer.json.

    The added tokens are those of the file. Some classes add a token of their own, for which a model has no row.
    """
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(folder)
    try:
        description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"the tokenizer in {folder} cannot be read ({error}): save it there as tokenizer.json"
        ) from error
    if path.is_file():
        description["added_tokens"] = read_json(path).get("added_tokens")
    return tokenizer, description


def _inherited(folder: Path) -> dict[str, Any]:
    path = folder / INHERITED
    return read_json(path) if path.is_file() else {}


def _is_byte_level(description: Mapping[str, Any]) -> bool:
    return "ByteLevel" in {part["type"] for part in _parts(description.get("decoder"))}


def _merges(description: Mapping[str, Any]) -> list[_Pair]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in description["model"]["merges"])
    return [(first, second) for first, second in pairs]


def _tokens(description: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
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


def _no_byte_level(description: Mapping[str, Any], inherited: Mapping[str, Any]) -> str:
    """Return why llama.cpp's byte-level BPE differs from this tokenizer, or "".

    Composing characters (NFC) is accepted: texts are mostly composed, and llama.cpp's own files of such models leave it
    out.
    """
    others = [part["type"] for part in _parts(description.get("normalizer")) if part["type"] != "NFC"]
    if others:
        return f"its normalizer {others[0]} is not known there"
    cut = _cut(description)
    if cut is None:
        # llama.cpp knows the name that a GGUF teacher's file gives, and can be asked.
        known = ", ".join(cut.names[0] for cut in PRETOKENIZERS)
        return "" if "pre" in inherited else f"its pre_tokenizer is none of those that are known there ({known})"
    if cut.joins_digits and (joined := _joined_digits(description)):
        return f"the digits of the token {joined!r} would be joined"
    if cut.whole_words != bool(description["model"].get("ignore_merges")):
        unmade = _unmade(description)
        if unmade is not None:
            return f"its merges do not make the token {unmade!r} of that word, on which ignore_merges decides"
    return ""


def _joined_digits(description: Mapping[str, Any]) -> str:
    """Return a token in which a digit follows another one, or ""."""
    from tokenizers.decoders import ByteLevel

    decoder = ByteLevel()
    texts = (decoder.decode([name]) for name in description["model"]["vocab"])
    return next((text for text in texts if any(one.isnumeric() and two.isnumeric() for one, two in pairwise(text))), "")


def _cut(description: Mapping[str, Any]) -> Pretokenizer | None:
    """Return the tokenizer's way to split text if llama.cpp knows it, preferably with the same rule for whole words."""
    found = pretokenizers_like(_parts(description.get("pre_tokenizer")))
    whole_words = bool(description["model"].get("ignore_merges"))
    return next((cut for cut in found if cut.whole_words == whole_words), found[0] if found else None)


def _unmade(description: Mapping[str, Any]) -> str | None:
    """Return a token that is a whole word but is not made by merges of that word, or None."""
    from tokenizers.models import BPE

    added = {token["content"] for token in description.get("added_tokens") or ()}
    vocab = description["model"]["vocab"]
    model = BPE(vocab=vocab, merges=_merges(description))
    words = (name for name in vocab if name not in added)
    return next((name for name in words if [token.value for token in model.tokenize(name)] != [name]), None)


_Pair = tuple[str, str]
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "\u2581"
_REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND_SPACE = {"type": "Prepend", "prepend": _SPACE}


def _metaspaces(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for part in _parts(description.get("pre_tokenizer")) if part["type"] == "Metaspace"]


def _no_sentencepiece(description: Mapping[str, Any]) -> str:
    """Return why llama.cpp's merging by scores differs from this tokenizer, or ""."""
    model, merges = description["model"], _merges(description)
    before, metaspaces = _parts(description.get("pre_tokenizer")), _metaspaces(description)
    if any(part.get("split", True) or part["replacement"] != _SPACE for part in metaspaces):
        return "its pre_tokenizer cuts text into words"
    normalizer = _parts(description.get("normalizer"))
    if normalizer not in ([_REPLACE_SPACES], [_PREPEND_SPACE, _REPLACE_SPACES]) and not (metaspaces and not normalizer):
        return f"its normalizer does more, or less, than to write spaces as {_SPACE}"
    cutting = [part for part in before if part["type"] != "Metaspace"]
    if any(part["type"] != "Split" or part["pattern"] != {"String": " "} for part in cutting):
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
    # Special tokens are found in texts before anything is merged, so they need no merges.
    added = {token["content"]: token["special"] for token in description.get("added_tokens") or ()}
    for token in vocab:
        # For all others, llama.cpp also joins single characters that are not tokens.
        alone = 0 if token in added else 1
        for cut in range(1, 0 if added.get(token) else len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in known and all(part in vocab or len(part) <= alone for part in pair):
                return f"its merges lack {pair[0]!r} and {pair[1]!r}, which make the token {token!r}"
    return ""


def _as_sentencepiece(
    names: list[str], kinds: list[int], merges: list[_Pair]
) -> tuple[list[str], list[int], list[float]]:
    """Return names, types (bytes marked), and scores: tokens of earlier merges get higher scores."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    # Each merged token has a score of its own, by its place in the list; float32 distinguishes 2^24 places.
    order = {token: place for place, token in enumerate(ranks)}
    marked = list(kinds)
    for index, name in enumerate(names):
        if name in _BYTES:
            marked[index] = int(TokenType.BYTE)
        elif kinds[index] == TokenType.USER_DEFINED and _SPACE in name:
            # llama.cpp would search for it in the text before spaces are replaced, and would print it unchanged.
            marked[index] = int(TokenType.NORMAL)
    return names, marked, [-float(order.get(name, 0)) for name in names]


def _scalars(tokenizer: Any) -> dict[str, Any]:
    ids = {f"{key}_token_id": getattr(tokenizer, name) for key, name in _IDS.items()}
    return {
        "add_bos_token": beginning(tokenizer) is not None,
        **{key: value for key, value in ids.items() if value is not None},
    }


def _more_ends(folder: Path, values: Mapping[str, Any], names: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Return the end tokens of the generation config that `values` lacks, each under a key that is free."""
    path = folder / "generation_config.json"
    ends: Any = (read_json(path) if path.is_file() else {}).get("eos_token_id")
    known, free = [values[key] for key in _ENDS if key in values], [key for key in _ENDS if key not in values]
    more = [one for one in dict.fromkeys(ends if isinstance(ends, list) else [ends]) if one not in (None, *known)]
    for one in more:
        if type(one) is not int or not 0 <= one < len(names):
            raise InputError(f"{path} has the end token {one!r}, which is none of the model's {len(names)} tokens")
        if kinds[one] in (TokenType.NORMAL, TokenType.BYTE):
            raise InputError(f"{path} has the end token {one}, but this token is text: {names[one]!r}")
    if len(more) > len(free):
        raise InputError(f"{path} has {len(known) + len(more)} end tokens, and a GGUF file holds {len(_ENDS)}")
    return dict(zip(free, more, strict=False))


def _parts(description: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a sequence, or a single step as a list."""
    if description is None:
        return []
    for name in ("pretokenizers", "decoders", "normalizers"):
        if name in description:
            steps: list[dict[str, Any]] = description[name]
            return steps
    return [dict(description)]


def _add_scalar(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))

"""How byte-level tokenizers split text before the merges: llama.cpp's names for it, and the steps in tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_ALL = r"|\s+"  # end of patterns that match every character
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_BEFORE, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIX}|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True, kw_only=True)
class Pretokenizer:
    """A way to split text before the merges.

    Attributes:
        names: llama.cpp's names; the first is the one to write.
        steps: Steps of tokenizer.json, including the byte-level one.
        whole_words: Whether a word that is a token is used as it is, whatever the merges make of it (`ignore_merges`).
    """

    names: tuple[str, ...]
    steps: tuple[Mapping[str, Any], ...]
    whole_words: bool = False

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """This way to split text as an entry of tokenizer.json."""
        return {"type": "Sequence", "pretokenizers": [dict(step) for step in self.steps]}


PRETOKENIZERS = (
    Pretokenizer(names=("gpt-2", "phi-2", "mpt", "olmo"), steps=(_split(_GPT2), _BYTES)),
    Pretokenizer(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell"), steps=(_DIGITS, _split(_GPT2), _BYTES)
    ),
    Pretokenizer(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3"), steps=(_split(_LLAMA3), _BYTES), whole_words=True
    ),
    Pretokenizer(names=("dbrx", "smaug-bpe"), steps=(_split(_LLAMA3), _BYTES)),
    Pretokenizer(names=("qwen2", "deepseek-r1-qwen", "megrez"), steps=(_split(_QWEN2), _BYTES)),
    Pretokenizer(names=("qwen35",), steps=(_split(_QWEN35), _BYTES)),
    Pretokenizer(names=("tekken",), steps=(_split(_TEKKEN), _BYTES), whole_words=True),
    Pretokenizer(names=("gpt-4o", "llama4"), steps=(_split(_GPT4O), _BYTES)),
    Pretokenizer(
        names=("deepseek-coder",),
        steps=(
            *map(_split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")),
            _DIGITS,
            _BYTES,
        ),
    ),
)
"""Patterns as in models' own tokenizer.json, and names as in llama.cpp's `llama-vocab.cpp`. A test compares the two.
For tekken and gpt-4o, llama.cpp distinguishes case only in ASCII, and knows no combining marks."""


def pretokenizer_named(name: object) -> Pretokenizer | None:
    """Return the way to split text that llama.cpp knows by a name, or None if the table lacks it."""
    return next((cut for cut in PRETOKENIZERS if name in cut.names), None)


def pretokenizers_like(steps: Sequence[Mapping[str, Any]]) -> tuple[Pretokenizer, ...]:
    """Return the entries of the table that do the same as a `pre_tokenizer` of tokenizer.json."""
    wanted = _essence(steps)
    return tuple(cut for cut in PRETOKENIZERS if _essence(cut.steps) == wanted)


def _essence(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps without those that change no token, in one canonical form."""
    found: list[dict[str, Any]] = []
    for step in steps:
        own = {key: value for key, value in step.items() if key != "trim_offsets"}
        if own["type"] == "ByteLevel" and own.pop("use_regex", True):
            found.append(_split(_GPT2))
        pattern = str(own.get("pattern", {}).get("Regex", ""))
        if (own.get("behavior"), own.get("invert")) == ("Removed", True) and pattern.endswith(_ALL):
            # This removes what the pattern does not match, but the pattern matches everything.
            own |= {"behavior": "Isolated", "invert": False}
        found.append(own)
    return found

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
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED = (  # letters that have cases, as DeepSeek's tokenizer.json lists them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True, kw_only=True)
class Pretokenizer:
    """A way to split text before the merges.

    Attributes:
        names: llama.cpp's names; the first is the one to write.
        steps: Steps of tokenizer.json, including the byte-level one.
        whole_words: Whether a word that is a token is used as it is, whatever the merges make of it (`ignore_merges`).
        joins_digits: Whether llama.cpp keeps digits together that the steps separate. The result is the same if no
            token has two.
    """

    names: tuple[str, ...]
    steps: tuple[Mapping[str, Any], ...]
    whole_words: bool = False
    joins_digits: bool = False

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
            *map(_split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)),
            _DIGITS,
            _BYTES,
        ),
    ),
    Pretokenizer(
        names=("deepseek-llm",),
        steps=(*map(_split, ("[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_MARKS}]+", r"\s+$", _CJK)), _DIGITS, _BYTES),
        joins_digits=True,
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

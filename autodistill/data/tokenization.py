"""Tokenization of long texts in parts with the same result as in one piece, and the token that begins texts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.hardware.machine import memory_bytes
from autodistill.units import format_bytes
from autodistill.utils.timeouts import CallTimeoutError, call_with_timeout

AT_ONCE = 1_000_000
"""Characters tokenised at once."""
_BYTES = 100  # that a tokenizer takes of memory for each character of them: 400 a token
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
_TRIED = 8  # line ends at which a long text may be cut, before it is left whole
_SLOWEST = 20_000  # characters a second of a processor: slower is no tokenizer, but a pattern that blows up
_SECONDS = 10.0  # of a processor for any texts beside
_AROUND = 2_000  # characters on each side of a cut that are tokenised to see whether it changes a token


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without remote code and without network.

    Raises:
        InputError: Its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for special in (False, True):  # tokens that begin and end a text may be such as it does not have
            tokenizer("a b", add_special_tokens=special)
    except BaseException as error:
        what = f"the tokenizer in {folder} cannot be read"
        raise _failed(error, what, "get its files again, tokenizer.json among them") from error
    return tokenizer


def chat_template_of(tokenizer: Any) -> str | None:
    """Return the template for conversations: the only one, or the default of several.

    Returns:
        None where it has none, or several by name of which none is the default.
    """
    found = tokenizer.chat_template
    chosen = found.get("default") if isinstance(found, dict) else found
    return chosen if chosen and isinstance(chosen, str) else None


def tokenized(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """Return a tokenizer's output for texts, without tokens that begin or end a text.

    Raises:
        InputError: It fails on a text, as one without a token for what it does not know, or does not come to an end.
    """
    characters = len(texts) if isinstance(texts, str) else sum(map(len, texts))
    seconds = _SECONDS + characters / _SLOWEST
    try:
        # Not verbose: the model never sees a text longer than a sequence.
        return call_with_timeout(
            lambda: tokenizer(texts, add_special_tokens=False, verbose=False, **options),
            seconds,
            "tokenizer",
            clock=time.process_time,
        )
    except CallTimeoutError:
        raise InputError(
            f"the tokenizer takes more than {seconds:.0f} s for {characters:,} characters, as one does whose pattern "
            "(pre_tokenizer or normalizer of tokenizer.json) tries without end: get its files again"
        ) from None
    except BaseException as error:
        raise _failed(error, "the tokenizer fails on these texts", "get its files again") from error


def _failed(error: BaseException, what: str, remedy: str) -> BaseException:
    """Return an `InputError` for an error that a tokenizer raised; other errors are returned unchanged.

    transformers looks up what may not be there, tokenizers raises Exception itself, and its panics are no Exception.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    said = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{what} ({said}): {remedy}")


def check_ids(largest: int, vocabulary: int, name: str) -> None:
    """Refuse tokens without a row in a model's embedding table; unused tokens of a tokenizer do not matter.

    Args:
        largest: Id of what is to be read.
        vocabulary: Rows of the table.
        name: Of the model.

    Raises:
        InputError: It lies beyond.
    """
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer of {name} makes the token {largest} of these texts, and its embedding table has "
            f"{vocabulary:,} rows: get tokenizer and weights of one model"
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that splits texts in the same way once it is loaded.

    transformers leaves out `legacy`, on which its tokenizers of Llama's kind decide where texts begin with a space.
    """
    tokenizer.save_pretrained(folder)
    legacy = getattr(tokenizer, "legacy", None)
    if legacy is not None:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(
            json.dumps({**settings, "legacy": legacy}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def beginning(tokenizer: Any) -> int | None:
    """Return the token with which a tokenizer begins every text, or None.

    Models that learnt it so (Gemma, Llama 3) read badly without, and what serves them adds it to every text.
    """
    begin = tokenizer.bos_token_id
    return None if begin is None or tokenizer("a")["input_ids"][:1] != [begin] else int(begin)


def groups(sizes: Sequence[int], at_once: int = AT_ONCE) -> Iterator[slice]:
    """Yield slices of consecutive texts with `at_once` characters together; a longer text is alone.

    Args:
        sizes: Characters of each.
        at_once: The most of a group.
    """
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > at_once:
            yield slice(start, place)
            start, total = place, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def encode(tokenizer: Any, texts: Sequence[str], at_once: int = AT_ONCE) -> list[npt.NDArray[np.int32]]:
    """Return the token ids of each text, int32 [tokens], without tokens that begin or end a text.

    A longer text is cut at ends of lines, as far as this changes no token.

    Args:
        tokenizer: Of transformers.
        texts: None of which is cut below `at_once` characters.
        at_once: About the characters tokenised at once.

    Raises:
        InputError: A text that cannot be cut, and that memory does not hold as a whole while it is tokenised.
    """
    pieces = [(place, part) for place, text in enumerate(texts) for part in _parts(tokenizer, text, at_once)]
    found: list[list[npt.NDArray[np.int32]]] = [[] for _ in texts]
    for group in groups([part.stop - part.start for _, part in pieces], at_once):
        chosen = pieces[group]
        rows = _ids(tokenizer, [texts[place][part] for place, part in chosen])
        for (place, _), row in zip(chosen, rows, strict=True):
            found[place].append(np.array(row, dtype=np.int32))
    return [np.concatenate(parts) for parts in found]


def _parts(tokenizer: Any, text: str, at_once: int) -> Iterator[slice]:
    """Yield where a text is cut: each part but the last ends at the first good line end behind `at_once` characters."""
    start = 0
    while len(text) - start > at_once:
        ends = (match.end() for match in islice(_LINE_END.finditer(text, start + at_once), _TRIED))
        cut = next((end for end in ends if _changes_nothing(tokenizer, text, end)), None)
        if cut is None:
            break
        yield slice(start, cut)
        start = cut
    needed = (len(text) - start) * _BYTES
    if len(text) - start > at_once and needed > memory_bytes():
        raise InputError(
            f"a text of {len(text) - start:,} characters takes {format_bytes(needed)} of memory to tokenise, of "
            f"{format_bytes(memory_bytes())}, and with this tokenizer it cannot be done in parts: divide the text into "
            "several documents"
        )
    yield slice(start, len(text))


def _changes_nothing(tokenizer: Any, text: str, cut: int) -> bool:
    """Return whether a text has the same tokens in two parts as in one.

    What is further away is not looked at: a tokenizer cuts words first, or joins what lies side by side.
    """
    before, after = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
    whole, first, second = _ids(tokenizer, [before + after, before, after])
    return whole == first + second


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenized(tokenizer, texts, return_attention_mask=False)["input_ids"]
    return found

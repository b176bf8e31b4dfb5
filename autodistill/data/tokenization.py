"""Tokenization of long texts in parts, with the same result as in one piece, and the token that begins texts."""

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
"""Number of characters that are tokenised at once."""
_BYTES = 100  # bytes of memory that a tokenizer takes for each character (400 for each token)
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
_TRIED = 8  # line ends that are tried as a cut of a long text, before it is left whole
_SLOWEST = 20_000  # characters per second of processor time; slower means a pattern whose time explodes
_SECONDS = 10.0  # seconds of processor time in addition, for texts of any length
_AROUND = 2_000  # characters on each side of a cut that are tokenised to see whether the cut changes a token


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without remote code and without network.

    Raises:
        InputError: Its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for special in (False, True):  # its files may name begin and end tokens that it does not have
            tokenizer("a b", add_special_tokens=special)
    except BaseException as error:
        what = f"the tokenizer in {folder} cannot be read"
        raise _failed(error, what, "get its files again, tokenizer.json among them") from error
    return tokenizer


def chat_template_of(tokenizer: Any) -> str | None:
    """Return the template for conversations: the only one, or the default of several.

    Returns:
        The template, or None if there is none, or if there are several without a default.
    """
    found = tokenizer.chat_template
    chosen = found.get("default") if isinstance(found, dict) else found
    return chosen if chosen and isinstance(chosen, str) else None


def tokenized(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """Return a tokenizer's output for texts, without tokens that begin or end a text.

    Raises:
        InputError: The tokenizer fails on a text, for example without a token for unknown text, or does not end in
            time.
    """
    characters = len(texts) if isinstance(texts, str) else sum(map(len, texts))
    seconds = _SECONDS + characters / _SLOWEST
    try:
        # `verbose=False` hides warnings about long texts: the model never reads more than a sequence.
        return call_with_timeout(
            lambda: tokenizer(texts, add_special_tokens=False, verbose=False, **options),
            seconds,
            "tokenizer",
            clock=time.process_time,
        )
    except CallTimeoutError:
        raise InputError(
            f"the tokenizer takes more than {seconds:.0f} s for {characters:,} characters; perhaps its pattern "
            "(pre_tokenizer or normalizer of tokenizer.json) tries without end: get its files again"
        ) from None
    except BaseException as error:
        raise _failed(error, "the tokenizer fails on these texts", "get its files again") from error


def _failed(error: BaseException, what: str, remedy: str) -> BaseException:
    """Return an `InputError` for an error that a tokenizer raised; other errors are returned unchanged.

    All kinds of `Exception` count: transformers looks up missing entries, and tokenizers raises `Exception` itself.
    Panics of tokenizers count too, although they are not an `Exception`.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    said = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{what} ({said}): {remedy}")


def check_ids(largest: int, vocabulary: int, name: str) -> None:
    """Refuse tokens without a row in a model's embedding table; unused tokens of a tokenizer do not matter.

    Args:
        largest: Largest id among the tokens of the texts.
        vocabulary: Number of rows of the table.
        name: Name of the model.

    Raises:
        InputError: The id has no row.
    """
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer of {name} makes the token {largest} from these texts, but its embedding table has "
            f"{vocabulary:,} rows: get tokenizer and weights of one model"
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer so that it splits texts in the same way when it is loaded.

    transformers does not save `legacy`. In its Llama tokenizers this setting decides where a space is added before a
    text.
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

    Models that were trained with it (Gemma, Llama 3) predict badly without it, and runtimes add it to every text.
    """
    begin = tokenizer.bos_token_id
    return None if begin is None or tokenizer("a")["input_ids"][:1] != [begin] else int(begin)


def groups(sizes: Sequence[int], at_once: int = AT_ONCE) -> Iterator[slice]:
    """Yield slices of consecutive texts with at most `at_once` characters together; a longer text is alone.

    Args:
        sizes: Number of characters of each text.
        at_once: The most characters of a group.
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

    Texts with more than `at_once` characters are cut at ends of lines, if this changes no token.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The texts.
        at_once: Number of characters that are tokenised at once, approximately.

    Raises:
        InputError: A text cannot be cut, and memory is too small to tokenise it as a whole.
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
    """Yield the parts of a text. Each but the last ends at the first usable line end after `at_once` characters."""
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

    Only text near the cut is checked, since a tokenizer first splits text into words, or joins neighbouring pieces.
    """
    before, after = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
    whole, first, second = _ids(tokenizer, [before + after, before, after])
    return whole == first + second


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenized(tokenizer, texts, return_attention_mask=False)["input_ids"]
    return found

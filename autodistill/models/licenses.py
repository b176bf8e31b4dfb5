"""The licence of a model or data set, as one line of text, from whatever its files say."""

from __future__ import annotations

_LONGEST = 200  # characters: identifiers and names are short, and what is longer is a licence's text


def stated(license: object) -> str | None:
    """Return the licence in one line, or None if no readable licence is given.

    Model cards have an identifier or a list of these; GGUF files may have a value of any kind under its key.

    Args:
        license: As it was read.
    """
    if isinstance(license, list | tuple):
        return ", ".join(filter(None, map(stated, license))) or None
    if not isinstance(license, str):
        return None
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in license).split())
    return line[:_LONGEST] or None

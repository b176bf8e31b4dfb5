"""Comparison of device names: their words, the words that people leave out, and the words that systems add."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from autodistill.errors import InputError
from autodistill.units import parse_bytes

# Words of a name that people leave out.
_FILLERS = {
    *("nvidia", "geforce", "rtx", "gtx", "tesla", "amd", "instinct", "apple", "jetson", "intel", "core", "qualcomm"),
    *("xeon", "platinum", "gpu", "model", "channels"),
}
# Words that make another product of a name. A user who leaves them out does not mean that product.
_PRODUCTS = {"ti", "super", "xt", "xtx", "max", "pro", "ultra", "ada", "laptop", "nvl", "pcie"}
# What a system adds to a product's name: a board's revision, a processor's maker.
_SYSTEM_WORDS = re.compile(
    r"\((?:r|tm)\)|\bmodel b\b|\brev [\d.]+|\b(?:engineering reference )?developer kit\b|\b\d+(?:st|nd|rd|th) gen\b"
    r"|\b\d+-core processor\b|(?:\bcpu *)?@ *[\d.]+ *ghz|\bw/ radeon.*",
    re.IGNORECASE,
)
_BUILT_CORES = re.compile(r"\b(\d+)-core\b", re.IGNORECASE)
_MODE = re.compile(r"\d+W(?:[-_](?:AI|CPU))?|MAXN")  # power mode of a Jetson, as nvpmodel reports it
# A word that is an amount of memory as `split` writes it, with or without its unit.
_AMOUNT = re.compile(r"(\d{1,6})((?:gb)?)")
# Such a number alone is an amount of memory without its unit: the numbers of models have three digits or more.
_SHORT = re.compile(r"\d{1,2}")
_SIZE = re.compile(r"\d+(?:\.\d+)?[gm]b")  # as `size_in_name` makes it, and `split` writes it
_WHOLE = 0.05  # share of a size that may be missing when a device's name rounds it
_SOCKET = re.compile(r"sxm\d")


@lru_cache(maxsize=4096)  # each lookup reads all known names
def split(text: str) -> tuple[str, ...]:
    """Return the words of a name in lower case and one spelling: "RTX4060Ti 16 GiB" gives rtx, 4060, ti, 16gb."""
    plain = re.sub(r"[^a-z0-9+.]+", " ", text.lower())
    plain = re.sub(r"\brpi(?=\d|\b)", "pi", plain)
    # "16 gb", "16g" and "16gib" become one word. Letters are separated from a model number that follows them.
    plain = re.sub(r"(\d) *(?:gib|gb|g)\b", r"\1gb", plain)
    plain = re.sub(r"\b(rtx|gtx|pi|m)(?= ?\d)", lambda found: found[1] + ("" if found[1] == "m" else " "), plain)
    return tuple(re.sub(r"(?<=\d)(ti|super|xtx|xt)(?=\d|\b)", r" \1 ", plain).split())


@lru_cache(maxsize=4096)
def joined(text: str) -> str:
    """Return a name without blanks and hyphens, the same for all its spellings."""
    return "".join(split(text))


@lru_cache(maxsize=4096)
def bare(text: str) -> str:
    """Return the same as `joined`, without the words that people leave out."""
    return "".join(word for word in split(text) if word not in _FILLERS)


def asks_for_a_kind(text: str, classes: Iterable[str]) -> bool:
    """Return whether a text names a class of devices, or just a GPU, and no particular device."""
    return joined(text) in ("gpu", *map(joined, classes))


def distance(text: str, name: str, gigabytes: range, *, bare_amounts: bool) -> tuple[int, int] | None:
    """Return how far a name is from what a user wrote, or None if the name lacks one of the words.

    Args:
        text: What the user wrote.
        name: Name of a device.
        gigabytes: Amounts that a user may give for this device's memory, although its name does not contain them.
        bare_amounts: Whether a number without a unit, next to a word of the name, is an amount of memory.

    Returns:
        The number of optional words (those that people leave out) that the text has and the name lacks, then the number
        of other words that the text leaves out.
    """
    asked, words = _significant_words(text), _significant_words(name)
    said, has = set(split(text)) & _FILLERS, set(split(name)) & _FILLERS
    wanted = _wanted(asked, words, gigabytes, bare_amounts=bare_amounts)
    # A maker's name alone asks for all of its devices. With other words, it asks for those among them that have it.
    if wanted <= words or asked <= has:
        return len(said - has), len(words - wanted)
    return None


def _wanted(asked: frozenset[str], words: frozenset[str], gigabytes: range, *, bare_amounts: bool) -> set[str]:
    """Return the words of the text, without amounts of memory that the device has but its name does not contain.

    Args:
        asked, words: Words of the user's text, and of the name.
        gigabytes, bare_amounts: As for `distance`.
    """
    shared = asked & words
    wanted = set(shared)
    for word in asked - words:
        if word == "sxm" and (sockets := set(filter(_SOCKET.fullmatch, words))):
            # People leave a socket's generation out. A system states it, and another generation is another device.
            wanted |= sockets
            continue
        amount = _AMOUNT.fullmatch(word)
        if amount is None or not (amount[2] or (bare_amounts and shared)) or int(amount[1]) not in gigabytes:
            wanted.add(word)
        else:
            wanted |= {f"{amount[1]}gb"} & words
    return wanted


def is_another_product(text: str, name: str) -> bool:
    """Return whether a name has an extra word that makes it another product, such as "Ti"."""
    return bool((_significant_words(name) - _significant_words(text)) & _PRODUCTS)


@lru_cache(maxsize=4096)
def _significant_words(text: str) -> frozenset[str]:
    """Return the words without those that people leave out, unless no others remain."""
    words = split(text)
    return frozenset(word for word in words if word not in _FILLERS) or frozenset(words)


def is_amount(text: str) -> bool:
    """Return whether a text has only amounts of memory with units, or one number too short for a model's name."""
    try:
        parse_bytes(text)
    except InputError:
        words = split(text)
        amounts = bool(words) and all((amount := _AMOUNT.fullmatch(word)) and amount[2] for word in words)
        return amounts or _SHORT.fullmatch("".join(words)) is not None
    return True


def size_in_name(memory_bytes: int, thousand: int) -> str:
    """Return an amount of memory as device names write it: "16GB" for 16 GiB and 16 GB, "512MB" for half a GiB.

    A driver reports a little less than is built in, so 24564 MiB are "24GB" too.

    Args:
        memory_bytes: The amount.
        thousand: 1024 if it was given in units like GiB, else 1000.
    """
    unit = "GB" if memory_bytes >= thousand**3 else "MB"
    count = memory_bytes / thousand ** (3 if unit == "GB" else 2)
    near = round(count)
    return f"{near if near and abs(count - near) <= _WHOLE * near else round(count, 2):g}{unit}"


def has_size(name: str) -> bool:
    """Return whether a name contains a memory size."""
    return any(map(_SIZE.fullmatch, split(name)))


def product_words(name: str) -> frozenset[str]:
    """Return the words of a name without the memory size."""
    return frozenset(word for word in split(name) if not _SIZE.fullmatch(word))


def searched_words(text: str) -> set[str]:
    """Return the words by which names are searched; a socket also without its generation."""
    words = set(split(text))
    return words | ({"sxm"} if any(map(_SOCKET.fullmatch, words)) else set())


def without_system_words(name: str, mode: str = "") -> str:
    """Return a system's name for its board, processor or GPU without the words it adds to the product's name.

    Args:
        name: The name that the system reports, like "Raspberry Pi 5 Model B Rev 1.0".
        mode: Power mode of a Jetson, as nvpmodel reports it. It is added after the name.
    """
    return " ".join((_SYSTEM_WORDS.sub(" ", name), *_MODE.findall(mode)))


def built_cores(name: str) -> int | None:
    """Return the number of cores that a processor was built with, if the system's name states it."""
    found = _BUILT_CORES.search(name)
    return int(found[1]) if found else None


def name_and_cores(machine: str) -> tuple[str, int | None]:
    """Return a machine's name, and the number of cores that follows it, as in "Apple M2, 8 cores"."""
    found = re.fullmatch(r"(.*), (\d+) cores", machine)
    return (found[1], int(found[2])) if found else (machine, None)


def class_words(machine: str) -> set[str]:
    """Return the words of a machine's name that determine its class. The generation of a socket does not matter.

    Args:
        machine: As for `name_and_cores`.
    """
    words = split(without_system_words(name_and_cores(machine)[0]))
    return {"sxm" if _SOCKET.fullmatch(word) else word for word in words} - {"gpu"}

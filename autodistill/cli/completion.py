"""Shell completion of the names of runs, devices, spaces, strategies and formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from autodistill.errors import InputError

# Typer passes the context and the word by the names of the function's arguments.
Names: TypeAlias = Callable[[Any, str], list[str]]


def _beginning(found: Callable[[dict[str, Any]], Iterable[str]]) -> Names:
    """Make a completion function that keeps the found names that begin with the typed word.

    `found` gets the command's other options.
    """

    def names(ctx: Any, incomplete: str) -> list[str]:
        """Return the names that begin with what was typed so far."""
        try:
            return sorted(name for name in found(ctx.params) if name.lower().startswith(incomplete.lower()))
        except Exception:
            # A shell cannot show an error during completion. The command itself will report it.
            return []

    return names


@_beginning
def runs(given: dict[str, Any]) -> Iterable[str]:
    """Return the runs of the given folder."""
    from autodistill.runs.run_folder import known_runs

    return known_runs(Path(given["runs"]))


@_beginning
def devices(given: dict[str, Any]) -> Iterable[str]:
    """Return the names of devices, including the user's own.

    Hyphens replace spaces, which would need quotes. A number in a name, like 4090, is added if it identifies a device.
    """
    from autodistill.hardware.catalog import devices as read
    from autodistill.hardware.lookup import find_device

    def is_enough(word: str) -> bool:
        """Return whether this word alone identifies a device."""
        try:
            return bool(find_device(word, known))
        except InputError:
            return False

    known = read(*map(Path, given.get("devices") or ()))
    names = [name for device in known for name in device.names]
    # Looking up a device treats a hyphen like a space.
    hyphened = (name if " " not in name else name.lower().replace(" ", "-") for name in names)
    numbers = {word for name in names for word in name.split() if word.isdigit() and len(word) > 2}
    return {"local", *hyphened, *filter(is_enough, numbers)}


@_beginning
def spaces(given: dict[str, Any]) -> Iterable[str]:
    """Return the packaged spaces."""
    from autodistill.strategy.named import packaged_files

    return packaged_files("spaces")


@_beginning
def strategies(given: dict[str, Any]) -> Iterable[str]:
    """Return the packaged strategies."""
    from autodistill.strategy.named import packaged_files

    return packaged_files("strategies")


@_beginning
def formats(given: dict[str, Any]) -> Iterable[str]:
    """Return the formats of weights."""
    from autodistill.quantization.formats import all_formats

    return all_formats()

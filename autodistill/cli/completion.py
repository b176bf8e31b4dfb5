"""What a shell may end a word of a command line in: runs, devices, spaces, strategies and formats that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from autodistill.errors import InputError

# Typer gives a function the context and the word by the names of its arguments.
Names: TypeAlias = Callable[[Any, str], list[str]]


def _beginning(found: Callable[[dict[str, Any]], Iterable[str]]) -> Names:
    """Of the names found under a command's other options those that begin like the word."""

    def names(ctx: Any, incomplete: str) -> list[str]:
        """Return the names that begin with what was typed so far."""
        try:
            return sorted(name for name in found(ctx.params) if name.lower().startswith(incomplete.lower()))
        except Exception:
            # A shell that asks has no place for a complaint, which the command itself will make.
            return []

    return names


@_beginning
def runs(given: dict[str, Any]) -> Iterable[str]:
    """Runs of the folder that is given."""
    from autodistill.runs.run_folder import known_runs

    return known_runs(Path(given["runs"]))


@_beginning
def devices(given: dict[str, Any]) -> Iterable[str]:
    """Devices, one's own too, without the spaces that would have to be quoted, and numbers where they are enough."""
    from autodistill.hardware.catalog import devices as read
    from autodistill.hardware.lookup import find_device

    def is_enough(word: str) -> bool:
        """Return whether a device is found by this word alone."""
        try:
            return bool(find_device(word, known))
        except InputError:
            return False

    known = read(*map(Path, given.get("devices") or ()))
    names = [name for device in known for name in device.names]
    # A look-up takes a hyphen for a space.
    hyphened = (name if " " not in name else name.lower().replace(" ", "-") for name in names)
    numbers = {word for name in names for word in name.split() if word.isdigit() and len(word) > 2}
    return {"local", *hyphened, *filter(is_enough, numbers)}


@_beginning
def spaces(given: dict[str, Any]) -> Iterable[str]:
    """Packaged spaces."""
    from autodistill.strategy.named import packaged_files

    return packaged_files("spaces")


@_beginning
def strategies(given: dict[str, Any]) -> Iterable[str]:
    """Packaged strategies."""
    from autodistill.strategy.named import packaged_files

    return packaged_files("strategies")


@_beginning
def formats(given: dict[str, Any]) -> Iterable[str]:
    """Formats of weights."""
    from autodistill.quantization.formats import all_formats

    return all_formats()

"""`devices`: list the known devices, and this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from autodistill.errors import InputError
from autodistill.hardware.device import LOCAL, Device
from autodistill.options import Cache, Devices, Option, cache_folder


def devices(
    name: Annotated[
        str | Sequence[str] | None,
        Option(
            help="Show only devices of this name, like 4090 or apple m3.",
            metavar="NAME",
            typed=list[str],
            argument=True,
            complete="devices",
        ),
    ] = None,
    *,
    devices: Devices = None,
    local: Annotated[bool, Option(help="Include this machine; it is measured the first time.")] = False,
    again: Annotated[bool, Option(help="With --local: measure this machine again.")] = False,
    cache: Cache = None,
) -> tuple[Device, ...]:
    """List the known devices with their memory, bandwidth and computing rates.

    Raises:
        InputError: There is no device of this name, or a file cannot be read.
    """
    from autodistill.hardware.local import known_devices
    from autodistill.hardware.lookup import matching

    text = name if isinstance(name, str) else " ".join(name or ())
    here = local or text.strip().lower() == LOCAL
    if again and not here:
        raise InputError("--again measures this machine again: give it with --local")
    known = known_devices([Path(file) for file in devices or ()], cache_folder(cache) if here else None, again=again)
    if not text:
        return known
    if text.strip().lower() == LOCAL:
        return known[:1]
    return (*known[:1], *matching(text, known[1:])) if here else matching(text, known)

"""What a person reads of devices."""

from __future__ import annotations

from collections.abc import Sequence

from autodistill.devices import PRECISIONS, Device
from autodistill.summary import table
from autodistill.units import format_bytes


def devices_table(known: Sequence[Device]) -> str:
    """Devices as a table: memory, usable memory, bandwidth, dense rates; measured ones are marked."""
    head = ("device", "class", "memory", "usable", "bandwidth", *PRECISIONS)
    lines = [
        (
            device.name + (" (measured)" if device.measured else ""),
            device.kind.name,
            format_bytes(device.memory_bytes),
            format_bytes(device.usable_bytes),
            f"{format_bytes(device.bandwidth)}/s",
            *(f"{device.rates[name] / 1e12:,.4g}" if name in device.rates else "-" for name in PRECISIONS),
        )
        for device in known
    ]
    note = "Rates are dense, in tera operations a second; --format json has the source of each figure."
    return f"{table([head, *lines], left=2)}\n{note}"

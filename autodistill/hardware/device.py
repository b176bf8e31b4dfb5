"""Devices that can serve a student: their class, their figures, and the runtimes that they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autodistill.hardware.runtime import Runtime, Shares, further_runtime, further_runtimes

LOCAL = "local"
"""The name that users give this machine when a device is asked for."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
DISCRETE = "discrete-gpu"
"""The class of GPUs that have memory of their own."""
ONE_CHIP = ("unified", "board", "phone")
"""Classes whose memory and GPU belong to the whole machine."""


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """The properties that devices of one kind share.

    Attributes:
        name: "discrete-gpu", "unified", "board", "phone" or "cpu".
        runtimes: The runtimes that serve a student on it.
        share, reserve_bytes: The usable memory is this share of all memory, minus the reserve.
        small_bytes, small_share: Another share for at most this much memory; 0 if there is none.
        speeds: What each runtime reaches, by its name; assumed if it was not measured on this class.
        reference: The source of the usable memory.
        ffn_multiple: FFNs are computed at full speed if their neurons are a multiple of this; at least the 64 that all
            students use.
        ffn_reference: The source of `ffn_multiple`.
    """

    name: str
    runtimes: tuple[str, ...]
    share: float
    reserve_bytes: int
    small_bytes: int
    small_share: float
    speeds: Mapping[str, Shares]
    reference: str
    ffn_multiple: int
    ffn_reference: str

    def share_of(self, memory_bytes: int) -> float:
        """Return the usable share of an amount of memory."""
        return self.small_share if memory_bytes <= self.small_bytes else self.share


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        name: The name that its maker or its driver gives it.
        aliases: Other names.
        kind: Its class.
        memory_bytes, usable_bytes: All of its memory, and the part that a model can use.
        bandwidth: Bytes per second.
        rates: Dense operations per second by precision (some of `PRECISIONS`); a multiply-add counts as two.
        sources: The source of each figure: "memory", "usable", "bandwidth" and "rates".
        measured: Whether bandwidth and rates were measured on the device, instead of stated by its maker.
        own_runtimes: The runtimes that serve a student on it, if they are not those of its class.
    """

    name: str
    aliases: tuple[str, ...]
    kind: DeviceClass
    memory_bytes: int
    usable_bytes: int
    bandwidth: float
    rates: Mapping[str, float]
    sources: Mapping[str, str]
    measured: bool = False
    own_runtimes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the device: its main name first, then its aliases."""
        return (self.name, *self.aliases)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that can serve a student on it."""
        return self.own_runtimes or self.kind.runtimes

    @property
    def discrete(self) -> bool:
        """Whether it has memory of its own, separate from the machine's."""
        return self.kind.name == DISCRETE

    def lacks(self, runtime: str) -> str:
        """Return why the device cannot serve with this runtime, or "" if it can."""
        if runtime in self.runtimes:
            return ""
        brought = {} if runtime in self.kind.speeds else further_runtimes()
        if runtime in brought and self.kind.name in brought[runtime].classes:
            return ""
        return f"{self.name} serves students with {' or '.join(self.runtimes)}, not {runtime}"

    def shares(self, runtime: str) -> Shares:
        """Return what a runtime reaches on this device: assumed, with a wide band, if nothing similar was measured."""
        found = self.kind.speeds.get(runtime) or self._shares_of(further_runtime(runtime))
        why = "" if found.assumed else found.unlike(self)
        return found.assumed_since(f"of {runtime} nothing was measured on such a device: {why}") if why else found

    def _shares_of(self, runtime: Runtime) -> Shares:
        """Return the shares of a runtime that a plug-in's exporter describes."""
        if self.kind.name in runtime.speeds:
            return runtime.speeds[self.kind.name]
        why = f"nothing was measured of {runtime.name} on a device of class {self.kind.name}"
        return self.kind.speeds[runtime.like].assumed_since(why)

    def rate(self, *precisions: str) -> float:
        """Return operations per second in the first of these precisions it has, else the fastest above 8 bits."""
        for precision in precisions:
            if precision in self.rates:
                return self.rates[precision]
        wide = [rate for precision, rate in self.rates.items() if precision not in ("int8", "fp8")]
        return max(wide or self.rates.values())

    def to_json(self) -> dict[str, Any]:
        """Return the device as plain data."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "class": self.kind.name,
            "runtimes": list(self.runtimes),
            "memory_bytes": self.memory_bytes,
            "usable_bytes": self.usable_bytes,
            "bandwidth_bytes_per_second": self.bandwidth,
            "operations_per_second": dict(self.rates),
            "sources": dict(self.sources),
            "measured": self.measured,
        }

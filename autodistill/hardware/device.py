"""What a device is that a student may be served on: its class, its figures, and which engines it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autodistill.hardware.runtime import Runtime, Shares, further_runtime, further_runtimes

LOCAL = "local"
"""What a person calls this machine where a device is asked for."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
DISCRETE = "discrete-gpu"
"""The class of GPUs that have memory of their own."""
ONE_CHIP = ("unified", "board", "phone")
"""Classes whose memory, and whose GPU, are those of the whole machine."""


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """What devices of a kind have in common.

    Attributes:
        name: "discrete-gpu", "unified", "board", "phone" or "cpu".
        runtimes: The engines that serve a student there.
        share, reserve_bytes: What is usable of the memory: the share of it, less the reserve.
        small_bytes, small_share: Up to so much memory the share is another one; 0 where it is the same.
        speeds: What each engine reaches, by name; assumed where nothing was measured of it on this one.
        reference: Where the usable memory comes from.
    """

    name: str
    runtimes: tuple[str, ...]
    share: float
    reserve_bytes: int
    small_bytes: int
    small_share: float
    speeds: Mapping[str, Shares]
    reference: str

    def share_of(self, memory_bytes: int) -> float:
        """The share of so much memory that is usable."""
        return self.small_share if memory_bytes <= self.small_bytes else self.share


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        name: As its maker or its driver calls it.
        aliases: Other names.
        kind: Its class.
        memory_bytes, usable_bytes: All of its memory, and what is left for a model.
        bandwidth: Bytes a second.
        rates: Dense operations a second, a multiply-add being two, by precision: some of `PRECISIONS`.
        sources: Where each figure comes from: of "memory", "usable", "bandwidth" and "rates".
        measured: Whether bandwidth and rates were measured on it and not stated by its maker.
        own_runtimes: The engines that serve a student on it, where they are not those of its class.
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
        """All that it is called: its name first, then the others."""
        return (self.name, *self.aliases)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The engines that serve a student on it."""
        return self.own_runtimes or self.kind.runtimes

    @property
    def discrete(self) -> bool:
        """Whether it has memory of its own, beside the machine's."""
        return self.kind.name == DISCRETE

    def lacks(self, runtime: str) -> str:
        """Why a student of this engine is none for the device, or nothing where it has the engine."""
        if runtime in self.runtimes:
            return ""
        brought = {} if runtime in self.kind.speeds else further_runtimes()
        if runtime in brought and self.kind.name in brought[runtime].classes:
            return ""
        return f"{self.name} serves students with {' or '.join(self.runtimes)}, not {runtime}"

    def shares(self, runtime: str) -> Shares:
        """What a runtime reaches here: assumed, with a wide band, where it was measured on nothing like this device."""
        found = self.kind.speeds.get(runtime) or self._shares_of(further_runtime(runtime))
        why = "" if found.assumed else found.unlike(self)
        return found.assumed_since(f"of {runtime} nothing was measured on such a device: {why}") if why else found

    def _shares_of(self, runtime: Runtime) -> Shares:
        """The shares of an engine that a plug-in's exporter brings."""
        if self.kind.name in runtime.speeds:
            return runtime.speeds[self.kind.name]
        why = f"nothing was measured of {runtime.name} on a device of class {self.kind.name}"
        return self.kind.speeds[runtime.like].assumed_since(why)

    def rate(self, *precisions: str) -> float:
        """Operations a second in the first of these precisions that it has, else in the fastest that is no 8 bits."""
        for precision in precisions:
            if precision in self.rates:
                return self.rates[precision]
        wide = [rate for precision, rate in self.rates.items() if precision not in ("int8", "fp8")]
        return max(wide or self.rates.values())

    def to_json(self) -> dict[str, Any]:
        """The device as plain data."""
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

"""Devices that can serve a student: their class, their figures, and the share of these that runtimes reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

LOCAL = "local"
"""What a person calls this machine where a device is asked for."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
DISCRETE = "discrete-gpu"
"""The class of GPUs that have memory of their own."""
ONE_CHIP = ("unified", "board", "phone")
"""Classes whose memory, and whose GPU, are those of the whole machine."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A low, typical and high value."""

    low: float
    typical: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The shares of a device's bandwidth and rates that a runtime reaches, and the extra cost of its layers.

    Attributes:
        decode: Share of the stated bandwidth that decoding reaches.
        decode_measured: Share of a bandwidth that was measured on the device itself.
        prefill: Share of the matrix rate that reading a prompt reaches.
        prefill_quantized: The same in llama.cpp, for weights whose rows it interleaves for integer products.
        dequantize: Share of the matrix rate at which a decoding step multiplies by weights on a grid, in addition to
            reading them; None if reading hides this cost.
        attention: Share of the matrix rate at which a decoding step computes attention; None if this cost is hidden.
        activations: Share of the bandwidth at which a prompt's activations pass between its products; None if this cost
            is hidden.
        layer_seconds: Cost of a layer in a pass beside reading its bytes; the smallest value is the fast end.
        ahead: Whether layers are launched while earlier ones run, so that launching counts only if it takes longer.
        rate: The precision whose matrix rate `prefill` refers to, if it is not that of the class; else "".
        measured_alone: Whether the shares hold only for a measured bandwidth; nothing is known for a stated one.
        reference: The source of these figures.
        assumed: Why the shares are assumed, with a wide band; "" if they were measured.
    """

    decode: Band
    decode_measured: Band
    prefill: Band
    prefill_quantized: Band
    dequantize: Band | None
    attention: Band | None
    activations: Band | None
    layer_seconds: Band
    ahead: bool
    rate: str
    measured_alone: bool
    reference: str
    assumed: str = ""

    def layer(self, end: str) -> float:
        """Return the seconds of a layer at one end of the band: slow ("low"), typical, or fast ("high")."""
        cost = self.layer_seconds
        return {"low": cost.high, "typical": cost.typical, "high": cost.low}[end]

    def assumed_since(self, why: str) -> Shares:
        """Return the shares as assumed: the slow end is twice as slow, the fast end a quarter faster."""
        return _assumed(self, why)

    def unlike(self, device: Device) -> str:
        """Return how a device differs from those on which the shares were measured, or ""."""
        if self.rate and self.rate not in device.rates:
            return f"it was measured where processors compute in {self.rate}"
        if self.measured_alone and not device.measured:
            return "it was measured where the bandwidth was measured too, and not stated"
        return ""


@cache
def _assumed(shares: Shares, why: str) -> Shares:
    def wide(share: Band) -> Band:
        # No more than all of it, unless that was reached.
        return replace(share, low=0.5 * share.low, high=max(share.high, min(1.0, 1.25 * share.high)))

    fields = ("decode", "decode_measured", "prefill", "prefill_quantized", "dequantize", "attention", "activations")
    known: dict[str, Any] = {name: wide(share) for name in fields if (share := getattr(shares, name)) is not None}
    cost = shares.layer_seconds
    return replace(
        shares,
        layer_seconds=replace(cost, low=0.5 * cost.low, high=2 * cost.high),
        assumed=why,
        **known,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """The properties that devices of one kind share.

    Attributes:
        name: "discrete-gpu", "unified", "board", "phone" or "cpu".
        runtimes: The runtimes that serve a student on it.
        share, reserve_bytes: The usable memory: this share of it, less the reserve.
        small_bytes, small_share: Another share for at most this much memory; 0 if there is none.
        speeds: What each runtime reaches, by name; assumed if it was not measured on this class.
        reference: The source of the usable memory.
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
        measured: Whether bandwidth and rates were measured on it, and not stated by its maker.
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
        """Whether it has its own memory, beside the machine's."""
        return self.kind.name == DISCRETE

    def lacks(self, runtime: str) -> str:
        """Return why the device cannot serve with this runtime, or "" if it can."""
        if runtime in self.runtimes:
            return ""
        return f"{self.name} serves students with {' or '.join(self.runtimes)}, not {runtime}"

    def shares(self, runtime: str) -> Shares:
        """Return what a runtime reaches on this device: assumed, with a wide band, if nothing similar was measured."""
        found = self.kind.speeds[runtime]
        why = "" if found.assumed else found.unlike(self)
        return found.assumed_since(f"of {runtime} nothing was measured on such a device: {why}") if why else found

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

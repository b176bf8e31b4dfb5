"""The share of a device's figures that a runtime reaches, and the description of a plug-in's own runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from autodistill import plugins
from autodistill.errors import InputError
from autodistill.models.spec import ModelSpec
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class Band:
    """A low, typical and high value."""

    low: float
    typical: float
    high: float


class Figures(Protocol):
    """A device's rates by precision, and whether its bandwidth was measured."""

    @property
    def rates(self) -> Mapping[str, float]:
        """Operations a second, by precision."""

    @property
    def measured(self) -> bool:
        """Whether the bandwidth was measured."""


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
        layer_seconds: Cost of a layer in a pass in addition to reading its bytes; the smallest value is the fast end.
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

    def unlike(self, device: Figures) -> str:
        """Return how a device differs from those on which the shares were measured, or ""."""
        if self.rate and self.rate not in device.rates:
            return f"it was measured where processors compute in {self.rate}"
        if self.measured_alone and not device.measured:
            return "it was measured where the bandwidth was measured too, and not stated"
        return ""


@cache
def _assumed(shares: Shares, why: str) -> Shares:
    def wide(share: Band) -> Band:
        # At most all of the figure, unless more was reached.
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
class Runtime:
    """A runtime that serves the files of a plug-in's exporter and is not built into this project.

    Attributes:
        name: Its name in the `runtimes` of formats.
        memory: Function of the model's shape, the deployment, the bytes of the packed weights, context and batch. It
            returns the bytes of weights, of the KV cache, of computing, and of the rest of the process.
        basis: What these figures are based on, in words.
        classes: Classes of devices on which it runs: "discrete-gpu", "unified", "board", "phone", "cpu".
        speeds: What it reaches on a class of devices, by class, if that was measured.
        like: The runtime known here whose shares are assumed, with a wide band, if nothing was measured.
        server: Opens an artifact to time and measure it, given its path, context, threads and number of sequences;
            returns a `serving.timing.Server`. None if nothing here can run it: its memory is then always predicted.
    """

    name: str
    memory: Callable[[ModelSpec, Deployment, int, int, int], tuple[int, int, int, int]]
    basis: str
    classes: tuple[str, ...]
    speeds: Mapping[str, Shares] = field(default_factory=dict)
    like: str = "transformers"
    server: Callable[[Path, int, int, int], Any] | None = None


def further_runtimes() -> dict[str, Runtime]:
    """Return the runtimes that the exporters of plug-ins describe, by name."""
    return {
        one.name: one
        for container in plugins.foreign_names("exporters")
        for one in plugins.load("exporters", container).runtimes
    }


def further_runtime(name: str) -> Runtime:
    """Return the runtime of this name that a plug-in's exporter describes.

    Raises:
        InputError: No exporter describes it.
    """
    found = further_runtimes()
    if name not in found:
        raise InputError(f"there is no runtime {name!r} that an exporter of a plug-in describes")
    return found[name]

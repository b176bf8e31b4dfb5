"""What an engine reaches of a device, and what an exporter says of an engine that this project does not know."""

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
class Range:
    """A low, typical and high value."""

    low: float
    typical: float
    high: float


class Figures(Protocol):
    """What is known of a device: its rates by precision, and whether its bandwidth was measured."""

    @property
    def rates(self) -> Mapping[str, float]: ...
    @property
    def measured(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a runtime reaches of a device's bandwidth and rates, and what its layers cost beside that.

    Attributes:
        decode: Share of the stated bandwidth that decoding reaches.
        decode_measured: The same of a bandwidth that was measured on the device itself.
        prefill: Share of the matrix rate that reading a prompt reaches.
        prefill_quantized: The same in llama.cpp with weights whose rows it interleaves for products of integers.
        dequantize: Share of the matrix rate at which a decoding step multiplies by weights on a grid, which comes on
            top of reading them; None where it is hidden behind that.
        attention: Share of the matrix rate at which a decoding step attends; None where that is hidden too.
        activations: Share of the bandwidth at which a prompt's activations pass between its products; None where
            that is hidden.
        layer_seconds: What a layer of a pass costs beside reading its bytes; the least of it is the fast end.
        ahead: Whether layers are launched while earlier ones run, so that only what launching takes longer counts.
        rate: The precision whose matrix rate `prefill` is a share of, where it is not the class's own; "" for that.
        measured_alone: Whether it was found on a device whose bandwidth was measured, so that of a stated one
            nothing is known.
        reference: Where these come from.
        assumed: Why they are assumed and not measured, and the band wide; "" where they were measured.
    """

    decode: Range
    decode_measured: Range
    prefill: Range
    prefill_quantized: Range
    dequantize: Range | None
    attention: Range | None
    activations: Range | None
    layer_seconds: Range
    ahead: bool
    rate: str
    measured_alone: bool
    reference: str
    assumed: str = ""

    def layer(self, end: str) -> float:
        """Seconds of a layer at the slow end ("low"), the typical one or the fast one ("high") of the band."""
        cost = self.layer_seconds
        return {"low": cost.high, "typical": cost.typical, "high": cost.low}[end]

    def assumed_since(self, why: str) -> Shares:
        """The same where nothing like it was measured: the slow end twice as slow, the fast one faster by a quarter."""
        return _assumed(self, why)

    def unlike(self, device: Figures) -> str:
        """In what a device differs from those that the shares were found on, or nothing."""
        if self.rate and self.rate not in device.rates:
            return f"it was measured where processors compute in {self.rate}"
        if self.measured_alone and not device.measured:
            return "it was measured where the bandwidth was measured too, and not stated"
        return ""


@cache
def _assumed(shares: Shares, why: str) -> Shares:
    def wide(share: Range) -> Range:
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
class Runtime:
    """An engine that serves what a plug-in's exporter writes, and that is not one of this project's own.

    Attributes:
        name: As its formats' `runtimes` have it.
        memory: From shape, deployment, bytes of the packed weights, context and batch to the bytes of weights, of keys
            and values, of computing, and of what the process takes beyond, as its process holds them.
        basis: What these figures rest on, in words.
        classes: Classes of devices that it runs on: "discrete-gpu", "unified", "board", "phone", "cpu".
        speeds: What it reaches of a device, by class, where that was measured.
        like: The engine known here whose shares stand in for its own elsewhere, with a wide band.
        server: Opens an artifact for timing and measuring, from its path, context, threads and number of sequences, as
            `serving.timing.Server`; None where nothing here can run it: its memory then stays predicted.
    """

    name: str
    memory: Callable[[ModelSpec, Deployment, int, int, int], tuple[int, int, int, int]]
    basis: str
    classes: tuple[str, ...]
    speeds: Mapping[str, Shares] = field(default_factory=dict)
    like: str = "transformers"
    server: Callable[[Path, int, int, int], Any] | None = None


def further_runtimes() -> dict[str, Runtime]:
    """The engines that plug-ins' exporters bring, by name."""
    return {
        one.name: one
        for container in plugins.others("exporters")
        for one in plugins.load("exporters", container).runtimes
    }


def further_runtime(name: str) -> Runtime:
    """One of them.

    Raises:
        InputError: No exporter brings it.
    """
    found = further_runtimes()
    if name not in found:
        raise InputError(f"there is no runtime {name!r} that an exporter of a plug-in brings")
    return found[name]

"""The devices that a student may be served on: described in YAML, and looked up by a person's spelling."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.plain_yaml import read_yaml
from autodistill.units import parse_bytes

BUILT_IN = Path(__file__).with_name("hardware.yaml")
USER_FILE = Path("~/.config/autodistill/devices.yaml")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
LOCAL = "local"
"""What a person calls this machine where a device is asked for."""
_FIGURES = ("memory", "usable", "bandwidth", "rates")
_FIELDS = ("aliases", "class", "runtimes", *_FIGURES, "source", "sources")
_RUNTIMES = ("llama.cpp", "vllm", "transformers")
_SOURCE_FIELDS = ({"text"}, {"text", "read"}, {"text", "read", "unread"})
_NAME = re.compile(r"[\w(][\w .+()/-]{0,79}", re.ASCII)
# Beyond these an entry is a slip of the unit: a tenth of the slowest memory known, and some times the fastest parts.
_BANDWIDTHS = (1e8, 1e14)
_MOST_MEMORY = 10**14
_TERA_RATES = (1e-4, 1e5)
# Words of a name that a person leaves out.
_FILLERS = {
    *("nvidia", "geforce", "rtx", "gtx", "tesla", "amd", "instinct", "apple", "jetson", "intel", "core", "qualcomm"),
    *("xeon", "platinum", "gpu", "model", "channels"),
}


DISCRETE = "discrete-gpu"
"""The class of GPUs that have memory of their own."""
ONE_CHIP = ("unified", "board", "phone")
"""Classes whose memory, and whose GPU, are those of the whole machine."""

# What a system adds to a product's name: the revision of a board, the make of a processor.
_SYSTEM_WORDS = re.compile(
    r"\((?:r|tm)\)|\bmodel b\b|\brev [\d.]+|\b(?:engineering reference )?developer kit\b|\b\d+(?:st|nd|rd|th) gen\b"
    r"|\b\d+-core processor\b|(?:\bcpu *)?@ *[\d.]+ *ghz|\bw/ radeon.*",
    re.IGNORECASE,
)
_BUILT_CORES = re.compile(r"\b(\d+)-core\b", re.IGNORECASE)
_MODE = re.compile(r"\d+W(?:[-_](?:AI|CPU))?|MAXN")  # of a Jetson, as nvpmodel has it
# A system reports less than is built in, and more than a maker's GB where those are of 2^30 bytes.
_REPORTED_MEMORY = (0.75, 1.1)
# A word that is an amount of memory as `_split` writes it, its unit left out or not.
_AMOUNT = re.compile(r"(\d{1,6})((?:gb)?)")
# Alone it is an amount of memory whose unit was left out: the numbers of models have three digits or more.
_SHORT = re.compile(r"\d{1,2}")
_SIZE = re.compile(r"\d+(?:\.\d+)?[gm]b")  # as `_size` makes it, and `_split` writes it
_WHOLE = 0.05  # of a size is left out of a device's name
_SOCKET = re.compile(r"sxm\d")
# As alike as a slip of a key leaves a short name; at 0.5 "4O90" is near to "A40".
_NEAR = 0.6
# Words that make another product of a name, which nobody means who leaves them out.
_PRODUCTS = {"ti", "super", "xt", "xtx", "max", "pro", "ultra", "ada", "laptop", "nvl", "pcie"}


@dataclass(frozen=True, kw_only=True)
class Range:
    """A low, typical and high value."""

    low: float
    typical: float
    high: float


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

    def unlike(self, device: Device) -> str:
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
        return f"{self.name} serves students with {' or '.join(self.runtimes)}, not {runtime}"

    def shares(self, runtime: str) -> Shares:
        """What a runtime reaches here: assumed, with a wide band, where it was measured on nothing like this device."""
        found = self.kind.speeds[runtime]
        why = "" if found.assumed else found.unlike(self)
        return found.assumed_since(f"of {runtime} nothing was measured on such a device: {why}") if why else found

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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        """Reads what `to_json` wrote."""
        same = ("name", "memory_bytes", "usable_bytes", "sources", "measured")
        return cls(
            aliases=tuple(data["aliases"]),
            kind=(kind := device_classes()[data["class"]]),
            own_runtimes=_differing(tuple(data.get("runtimes", ())), kind),
            bandwidth=data["bandwidth_bytes_per_second"],
            rates=data["operations_per_second"],
            **{name: data[name] for name in same},
        )


def devices(*files: Path) -> tuple[Device, ...]:
    """The devices of a person's own files, then the built-in ones; one of these gives way to an own one of its name.

    Args:
        files: Further files of the same form; `~/.config/autodistill/devices.yaml` is read as well where it exists.

    Raises:
        InputError: As `read_devices`, or a name that a device of another such file has.
    """
    own = Path(os.path.expanduser(USER_FILE))
    wanted = [*([own] if own.is_file() else []), *files]
    found: list[Device] = []
    for path in wanted:
        taken = {_joined(name): name for device in found for name in _names(device)}
        for device in read_devices(path):
            twin = next((taken[key] for name in _names(device) if (key := _joined(name)) in taken), "")
            if twin:
                raise InputError(f"{path} describes {device.name!r}, but there is {twin!r} already: take another name")
            found.append(device)
    return _before(found, listed())


def _before(own: Sequence[Device], others: Iterable[Device]) -> tuple[Device, ...]:
    """Some devices, then others; one of these that has the name of an own one gives way, and leaves it its aliases."""
    owners = {_joined(name): place for place, device in enumerate(own) for name in _names(device)}
    aliases = [list(device.aliases) for device in own]
    left = []
    for device in others:
        free = [alias for alias in device.aliases if _joined(alias) not in owners]
        if (place := owners.get(_joined(device.name))) is not None:
            aliases[place].extend(free)
        else:
            left.append(device if len(free) == len(device.aliases) else replace(device, aliases=tuple(free)))
    return (*(replace(device, aliases=tuple(found)) for device, found in zip(own, aliases, strict=True)), *left)


def _names(device: Device) -> tuple[str, ...]:
    return (device.name, *device.aliases)


@cache
def listed() -> tuple[Device, ...]:
    """The built-in devices."""
    return read_devices(BUILT_IN)


@cache
def device_classes() -> Mapping[str, DeviceClass]:
    """The classes by name."""
    return _classes(read_yaml(BUILT_IN)["classes"])


def read_devices(path: Path) -> tuple[Device, ...]:
    """Reads a file of devices, of the form of the built-in `hardware.yaml`.

    Its `devices` map names to `class`, `memory` ("24GiB"), `bandwidth` (of a second, "1008GB") and `rates` (tera
    operations a second by precision), and optionally `aliases`, `runtimes`, `usable`, `source` and `sources`. Where
    `memory` lists several amounts, each is a device named with its size, and the first is also called without it. The
    file's own `sources` map short names to texts, or to `text`, `read` (the document, by its address, that the figures
    were held against) and `unread` (what of them it does not have).

    Raises:
        InputError: Not such a file, or an impossible device; the message names it.
    """
    data = read_yaml(path)
    if not isinstance(data, Mapping) or not isinstance(data.get("devices"), Mapping):
        raise InputError(f"{path} describes no devices: it must have a mapping `devices` of names to figures")
    texts = _texts(data.get("sources") or {}, path)
    classes = _classes(data["classes"]) if path == BUILT_IN else device_classes()
    found = tuple(
        _device(name, entry, classes, texts, path)
        for named, described in data["devices"].items()
        for name, entry in _sizes(named, described, path)
    )
    names = [key for device in found for key in {_joined(name) for name in _names(device)}]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path} gives the name {twice!r} to two devices: take another one")
    return found


def _classes(data: Mapping[str, Mapping[str, Any]]) -> Mapping[str, DeviceClass]:
    speeds = {name: {runtime: _shares(own) for runtime, own in entry["speeds"].items()} for name, entry in data.items()}
    return {
        name: DeviceClass(
            name=name,
            runtimes=tuple(entry["runtimes"]),
            share=float(Fraction(entry["share"])),
            small_bytes=parse_bytes(entry["small"]) if "small" in entry else 0,
            small_share=float(Fraction(entry.get("small_share", 0))),
            reserve_bytes=0 if entry["reserve"] == "0B" else parse_bytes(entry["reserve"]),
            speeds={runtime: _speed_of(runtime, name, speeds) for runtime in _RUNTIMES},
            reference=entry["reference"],
        )
        for name, entry in data.items()
    }


def _shares(entry: Mapping[str, Any]) -> Shares:
    def ranged(values: list[float], unit: float = 1.0) -> Range:
        low, typical, high = (unit * value for value in values)
        return Range(low=low, typical=typical, high=high)

    def perhaps(name: str) -> Range | None:
        return ranged(entry[name]) if name in entry else None

    layer = entry["layer_us"]
    measured, stated = perhaps("decode_measured"), perhaps("decode")
    decode = stated or measured
    assert decode is not None, "a runtime's speed needs decode or decode_measured"
    prefill = ranged(entry["prefill"])
    return Shares(
        decode=decode,
        decode_measured=measured or decode,
        prefill=prefill,
        prefill_quantized=perhaps("prefill_quantized") or prefill,
        dequantize=perhaps("dequantize"),
        attention=perhaps("attention"),
        activations=perhaps("activations"),
        layer_seconds=ranged(layer if isinstance(layer, list) else [layer] * 3, 1e-6),
        ahead=bool(entry.get("ahead", False)),
        rate=str(entry.get("rate", "")),
        measured_alone=stated is None,
        reference=entry["reference"],
        assumed=str(entry.get("assumed", "")),
    )


def _speed_of(runtime: str, kind: str, speeds: Mapping[str, Mapping[str, Shares]]) -> Shares:
    """What a runtime reaches on a class; where nothing was measured, what llama.cpp does, with a wide band.

    transformers launches each operation of a layer from Python, which takes the host about as long whatever computes.
    """
    if runtime in speeds[kind]:
        return speeds[kind][runtime]
    base = speeds[kind]["llama.cpp"]
    plain = replace(base, prefill_quantized=base.prefill, dequantize=None)
    if runtime == "transformers":
        plain = replace(plain, layer_seconds=speeds["cpu"][runtime].layer_seconds, ahead=base.attention is None)
    return plain.assumed_since(f"nothing was measured of {runtime} on a device of class {kind}")


def _texts(data: Any, path: Path) -> dict[str, str]:
    if not isinstance(data, Mapping):
        raise InputError(f"{path.name}: sources must map short names to texts")
    found = {}
    for name, value in data.items():
        parts = {"text": value} if isinstance(value, str) else value
        known = isinstance(name, str) and isinstance(parts, Mapping) and set(parts) in _SOURCE_FIELDS
        if not known or not all(isinstance(part, str) and part for part in parts.values()):
            problem = f"the source {name!r} is {value!r}"
            raise InputError(f"{path.name}: {problem}: write a text, or a text and where it was read")
        unread = f"; unread: {parts['unread']}" if "unread" in parts else ""
        found[name] = parts["text"] + (f" (read: {parts['read']}{unread})" if "read" in parts else "")
    return found


def _sizes(name: Any, entry: Any, path: Path) -> list[tuple[Any, Any]]:
    """The devices of an entry, each with one amount of memory, by name."""
    amounts = entry.get("memory") if isinstance(entry, Mapping) else None
    if not isinstance(amounts, list) or not isinstance(name, str):
        return [(name, entry)]
    where = f"{path.name}: the device {name!r}"
    if not amounts or "usable" in entry:
        problem = "lists no memory" if not amounts else "has one usable amount of several memories"
        raise InputError(f"{where} {problem}: list what it is sold with, and let usable follow from its class")
    called = (name, *_aliases(entry.get("aliases", []), where))
    found = []
    for amount in amounts:
        size = _size(amount, f"{where} has the memory")
        names = [f"{one} {size}" for one in called]
        bare = called if amount == amounts[0] else ()
        found.append((names[0], {**entry, "memory": amount, "aliases": [*names[1:], *bare]}))
    return found


def _size(amount: Any, what: str) -> str:
    """An amount of memory as it stands in a device's name: "16GB" of 16 GiB and of 16 GB, "512MB" of half a GiB.

    What a driver reports is a little less than is built in, so that 24564 MiB are "24GB" too.
    """
    memory_bytes, thousand = _amount(amount, what), 1024 if "i" in amount.lower() else 1000
    unit = "GB" if memory_bytes >= thousand**3 else "MB"
    count = memory_bytes / thousand ** (3 if unit == "GB" else 2)
    near = round(count)
    return f"{near if near and abs(count - near) <= _WHOLE * near else round(count, 2):g}{unit}"


def _device(name: Any, entry: Any, classes: Mapping[str, DeviceClass], texts: Mapping[str, str], path: Path) -> Device:
    where = f"{path.name}: the device {name!r}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{where} needs a name of up to 80 letters, digits, blanks and .+()/-")
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} must map {', '.join(_FIELDS)} to values")
    unknown = [str(key) for key in entry if key not in _FIELDS]
    missing = [key for key in ("class", "memory", "bandwidth", "rates") if key not in entry]
    if unknown or missing:
        problem = f"has no field {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise InputError(f"{where} {problem}; its fields are {', '.join(_FIELDS)}")
    kind = classes.get(entry["class"]) if isinstance(entry["class"], str) else None
    if kind is None:
        raise InputError(f"{where} is of class {entry['class']!r}; the classes are {', '.join(classes)}")
    memory = _amount(entry["memory"], f"{where} has the memory")
    if memory > _MOST_MEMORY:
        raise InputError(f"{where} has a memory of {entry['memory']}, which no device has: check it")
    least = max(0, int(memory * kind.share_of(memory)) - kind.reserve_bytes)
    usable = _amount(entry["usable"], f"{where} has the usable memory") if "usable" in entry else least
    if not 0 < usable <= memory:
        raise InputError(f"{where} has {usable} usable of {memory} bytes of memory: give usable as a part of it")
    bandwidth = _amount(entry["bandwidth"], f"{where} has the bandwidth")
    if not _BANDWIDTHS[0] <= bandwidth <= _BANDWIDTHS[1]:
        raise InputError(f"{where} has a bandwidth of {entry['bandwidth']} a second, which no memory has: check it")
    aliases = _aliases(entry.get("aliases", []), where)
    if taken := [one for one in (name, *aliases) if _joined(one) in (LOCAL, "gpu", *map(_joined, classes))]:
        raise InputError(f"{where} is called {taken[0]!r}, which asks for something else: take another name")
    if taken := [one for one in (name, *aliases) if _is_memory(one)]:
        raise InputError(f"{where} is called {taken[0]!r}, which is read as an amount of memory: take another name")
    return Device(
        name=name,
        aliases=aliases,
        kind=kind,
        memory_bytes=memory,
        usable_bytes=usable,
        bandwidth=float(bandwidth),
        rates=_rates(entry["rates"], where),
        sources=_sources(entry, texts, kind, memory, where),
        own_runtimes=_differing(_runtimes(entry.get("runtimes", list(kind.runtimes)), where), kind),
    )


def _runtimes(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(name in _RUNTIMES for name in value):
        raise InputError(f"{where} has runtimes {value!r}: list some of {', '.join(_RUNTIMES)}")
    return tuple(value)


def _differing(runtimes: tuple[str, ...], kind: DeviceClass) -> tuple[str, ...]:
    return () if runtimes == kind.runtimes else runtimes


def _amount(value: Any, what: str) -> int:
    if not isinstance(value, str):
        raise InputError(f"{what} {value!r}: write a number and a unit, like 24GiB")
    try:
        return parse_bytes(value)
    except InputError as error:
        raise InputError(f"{what} {value!r}: {error}") from None


def _aliases(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in value):
        raise InputError(f"{where} has aliases {value!r}: give a list of names")
    return tuple(value)


def _rates(value: Any, where: str) -> dict[str, float]:
    known = isinstance(value, Mapping) and value and all(key in PRECISIONS for key in value)
    if not known:
        raise InputError(
            f"{where} has rates {value!r}: map some of {', '.join(PRECISIONS)} to tera operations a second"
        )
    for precision, rate in value.items():
        # Compared before anything is computed: a whole number may be larger than any float.
        if type(rate) not in (int, float) or not _TERA_RATES[0] <= rate <= _TERA_RATES[1]:
            raise InputError(f"{where} has {precision}: {rate!r}: give tera operations a second, like 65")
    return {precision: 1e12 * rate for precision, rate in value.items()}


def _sources(
    entry: Mapping[str, Any], texts: Mapping[str, str], kind: DeviceClass, memory: int, where: str
) -> dict[str, str]:
    own = entry.get("sources", {})
    if not isinstance(own, Mapping) or not all(key in _FIGURES for key in own):
        raise InputError(f"{where} has sources {own!r}: map some of {', '.join(_FIGURES)} to texts")
    general = entry.get("source", "stated by its description")
    given = {figure: own.get(figure, general) for figure in _FIGURES}
    if not all(isinstance(text, str) for text in given.values()):
        raise InputError(f"{where} has a source that is no text: write where its figures come from")
    named = {figure: str(texts.get(text, text)) for figure, text in given.items()}
    if "usable" not in entry:
        named["usable"] = (
            f"{kind.share_of(memory):.0%} of the memory less {kind.reserve_bytes} bytes, as of {kind.name}"
        )
    return named


def find_device(text: str, known: Iterable[Device]) -> Device:
    """Looks a device up by a person's spelling: "4090", "rtx 4060 ti 16gb", "A100-80GB".

    Case, blanks, hyphens and makers' names do not matter, and words may be left out where one device alone has the
    others, but for those that make another product, as "Ti" does. The amount of memory may be said although a name does
    not hold it, with or without its unit.

    Raises:
        InputError: An amount of memory alone, with its unit or as a number of one or two digits; or no device or
            several are called so, where the message lists the near ones.
    """
    known = tuple(known)
    asked = _words(text)
    if not asked:
        raise InputError(f"{text!r} names no device: autodistill devices lists them")
    if _joined(text) in _kinds_of_devices():
        raise InputError(
            f"{text!r} is a kind of devices and no device: name one that autodistill devices lists, or local for this "
            "machine"
        )
    if _is_memory(text):
        raise InputError(
            f"{text!r} is an amount of memory and no device: give it as --budget, or name a device that autodistill "
            "devices lists"
        )
    named = [(device, name) for device in known for name in _names(device)]
    for form in (_joined, _bare):
        same = [device for device, name in named if form(name) == form(text)]
        if same and form(text):
            return same[0]
    having, others = _having(text, named, bare_amounts=False)
    if not having:
        # A number is another model's before it is an amount of memory: "Pi 4" is no Pi 5 with 4 GB.
        having, others = _having(text, named, bare_amounts=True)
    if having:
        nearest = min(having.values())
        closest = [device for device in known if having.get(device.name) == nearest]
        if len(closest) == 1:
            return closest[0]
        raise InputError(f"{text!r} can be {', '.join(device.name for device in closest)}: name one of them")
    names = {_joined(name): device.name for device, name in named} | {_bare(name): dev.name for dev, name in named}
    near = difflib.get_close_matches(_bare(text) or _joined(text), names, n=5, cutoff=_NEAR)
    shown = ", ".join(list(dict.fromkeys([*others, *(names[key] for key in near)]))[:5])
    hint = f"near to it are {shown}" if shown else "autodistill devices lists them"
    raise InputError(f"there is no device {text!r}; {hint}")


def _having(
    text: str, named: Iterable[tuple[Device, str]], *, bare_amounts: bool
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """How far the devices are that have all that is asked for, by name, and which are another product of that name."""
    having: dict[str, tuple[int, int]] = {}
    others = []
    asked, makers = _words(text), set(_split(text)) & _FILLERS
    for device, name in named:
        words, all_words = _words(name), set(_split(name))
        wanted = _wanted(asked, words, device, bare_amounts=bare_amounts)
        # A maker's name alone asks for all of its devices, and beside other words for those of them that have it.
        if wanted <= words or asked <= all_words & _FILLERS:
            if (words - asked) & _PRODUCTS:
                others.append(device.name)
                continue
            far = (len(makers - all_words), len(words - wanted))
            having[device.name] = min(having.get(device.name, far), far)
    return having, others


def _wanted(asked: set[str], words: set[str], device: Device, *, bare_amounts: bool) -> set[str]:
    """The words that are asked of a name, without the amounts of memory that the device has though it does not say so.

    Args:
        asked, words: Of what a person says, and of the name.
        device: That is called so.
        bare_amounts: Whether a number without a unit is an amount of memory, beside a word of the name.
    """
    shared = asked & words
    wanted = set(shared)
    for word in asked - words:
        if word == "sxm" and (sockets := set(filter(_SOCKET.fullmatch, words))):
            # A person leaves the generation of a socket out; a system says it, and another one is another device.
            wanted |= sockets
            continue
        amount = _AMOUNT.fullmatch(word)
        if amount is None or not (amount[2] or (bare_amounts and shared)) or not _has_memory(device, int(amount[1])):
            wanted.add(word)
        else:
            wanted |= {f"{amount[1]}gb"} & words
    return wanted


def _is_memory(text: str) -> bool:
    """Whether all that is said are amounts of memory, with their units, or one number too short for a model's."""
    try:
        parse_bytes(text)
    except InputError:
        words = _split(text)
        amounts = bool(words) and all((amount := _AMOUNT.fullmatch(word)) and amount[2] for word in words)
        return amounts or _SHORT.fullmatch("".join(words)) is not None
    return True


def _has_memory(device: Device, amount: int) -> bool:
    """Whether a person may say that the device has so many GB: as many GB or GiB, rounded, or what lies between."""
    return round(device.memory_bytes / 2**30) <= amount <= round(device.memory_bytes / 10**9)


def matching(text: str, known: Iterable[Device]) -> tuple[Device, ...]:
    """The devices whose name, aliases or class have all the words that are asked for: "4090", "raspberry", "apple m3".

    Raises:
        InputError: None has; the message lists the near ones.
    """
    known, asked = tuple(known), set(_split(text))
    found = tuple(
        device
        for device in known
        if asked and asked <= _with_socket(_split(" ".join((*_names(device), device.kind.name))))
    )
    return found or (find_device(text, known),)


def device_of_system(
    name: str,
    known: Iterable[Device],
    *,
    memory_bytes: int | None = None,
    cores: int | None = None,
    mode: str = "",
) -> Device | None:
    """The device that a machine is, by what its system says; None where that is no known one, or may be several.

    Args:
        name: Of its board, processor or GPU, like "Raspberry Pi 5 Model B Rev 1.0".
        known: Devices.
        memory_bytes: That the system has, which tells boards of one name apart.
        cores: That the system has: fewer than the processor's name says are a share of it, and another device.
        mode: Power mode of a Jetson, as nvpmodel has it.
    """
    built = _BUILT_CORES.search(name)
    if built and cores is not None and cores < int(built[1]):
        return None
    fitting = list(known) if memory_bytes is None else _of_memory(memory_bytes, known)
    try:
        return find_device(" ".join((_SYSTEM_WORDS.sub(" ", name), *_MODE.findall(mode))), fitting)
    except InputError:
        return None


def _of_memory(memory_bytes: int, known: Iterable[Device]) -> list[Device]:
    """The devices that a system with so much memory may be: of a machine that is sold with several, the nearest."""
    low, high = _REPORTED_MEMORY
    found = []
    nearest: dict[frozenset[str], tuple[float, Device]] = {}
    for device in known:
        share = memory_bytes / device.memory_bytes
        if device.kind.name not in ONE_CHIP:
            found.append(device)
        elif low <= share <= high:
            product = _product(device)
            far = abs(share - 1)
            if product not in nearest or far < nearest[product][0]:
                nearest[product] = (far, device)
    return [*found, *(device for _, device in nearest.values())]


def _product(device: Device) -> frozenset[str]:
    """The words of its name, but for the size of its memory."""
    return frozenset(word for word in _split(device.name) if not _SIZE.fullmatch(word))


def is_machine(device: Device, machine: str, *, memory_bytes: int | None = None, cores: int | None = None) -> bool:
    """Whether figures that a machine gave under its own name are the device's.

    Where its memory is not known, those of a machine that is sold with several are of each that is as fast.

    Args:
        device: A known one, or this machine.
        machine: The device's name, or the machine's own as `hardware.machine_name` makes it: of a GPU its driver's, of
            a processor its system's and its cores, like "Raspberry Pi 5 Model B Rev 1.0, 4 cores".
        memory_bytes, cores: That the machine has, where they are known and its name does not tell the cores.
    """
    if machine == device.name:
        return True
    name, told = _own_name(machine)
    cores = told or cores
    found = device_of_system(name, _before((device,), listed()), memory_bytes=memory_bytes, cores=cores)
    sized = memory_bytes is not None or any(map(_SIZE.fullmatch, _split(name)))
    if found is None or (found.name != device.name and (sized or not _same_but_size(found, device))):
        return False
    # Of a processor whose name does not tell its cores, a share of it cannot be told from the whole.
    return found.kind.name != "cpu" or _BUILT_CORES.search(name) is not None


def _same_but_size(one: Device, other: Device) -> bool:
    """Whether two are one machine with more and less memory, at one speed."""
    same = one.kind.name == other.kind.name and (one.bandwidth, one.rates) == (other.bandwidth, other.rates)
    return same and one.kind.name in ONE_CHIP and _product(one) == _product(other)


def class_of_machine(machine: str, plain: str) -> str:
    """The class of devices that a machine belongs to by its own name, or else a plain one.

    Args:
        machine: As `is_machine` takes it, "Apple GPU" included.
        plain: Where no known device, or devices of several classes, are called so.
    """
    said = _split(_SYSTEM_WORDS.sub(" ", _own_name(machine)[0]))
    # Devices of one name are of one class, whatever the generation of their socket.
    words = {"sxm" if _SOCKET.fullmatch(word) else word for word in said} - {"gpu"}
    kinds = {
        device.kind.name
        for device in listed()
        for name in _names(device)
        if words and words <= _with_socket(_split(name))
    }
    return kinds.pop() if len(kinds) == 1 else plain


def _own_name(machine: str) -> tuple[str, int | None]:
    """A machine's name, and its cores where they stand behind it."""
    found = re.fullmatch(r"(.*), (\d+) cores", machine)
    return (found[1], int(found[2])) if found else (machine, None)


def _with_socket(words: Iterable[str]) -> set[str]:
    """Words of names, and of a socket also that without its generation."""
    words = set(words)
    return words | ({"sxm"} if any(map(_SOCKET.fullmatch, words)) else set())


def _split(text: str) -> list[str]:
    plain = re.sub(r"[^a-z0-9+.]+", " ", text.lower())
    plain = re.sub(r"\brpi(?=\d|\b)", "pi", plain)
    # "16 gb", "16g" and "16gib" are one word, and letters part from the number that follows them where it is a model's.
    plain = re.sub(r"(\d) *(?:gib|gb|g)\b", r"\1gb", plain)
    plain = re.sub(r"\b(rtx|gtx|pi|m)(?= ?\d)", lambda found: found[1] + ("" if found[1] == "m" else " "), plain)
    return re.sub(r"(?<=\d)(ti|super|xtx|xt)(?=\d|\b)", r" \1 ", plain).split()


def _words(text: str) -> set[str]:
    words = _split(text)
    return {word for word in words if word not in _FILLERS} or set(words)


@cache
def _kinds_of_devices() -> tuple[str, ...]:
    """What asks for no device in particular, joined: the names of the classes, and "gpu"."""
    return (*map(_joined, device_classes()), "gpu")


def _joined(text: str) -> str:
    return "".join(_split(text))


def _bare(text: str) -> str:
    return "".join(word for word in _split(text) if word not in _FILLERS)

"""Files that describe devices: the built-in `hardware.yaml` and users' own files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.hardware.device import LOCAL, PRECISIONS, Device, DeviceClass
from autodistill.hardware.names import asks_for_a_kind, is_amount, joined, size_in_name
from autodistill.hardware.runtime import Band, Shares
from autodistill.units import parse_bytes
from autodistill.utils.yaml_files import read_yaml

BUILT_IN = Path(__file__).with_name("hardware.yaml")
USER_FILE = Path("~/.config/autodistill/devices.yaml")
_FIGURES = ("memory", "usable", "bandwidth", "rates")
_FIELDS = ("aliases", "class", "runtimes", *_FIGURES, "source", "sources")
_RUNTIMES = ("llama.cpp", "vllm", "transformers", "onnxruntime")
_SOURCE_FIELDS = ({"text"}, {"text", "read"}, {"text", "read", "unread"})
_NAME = re.compile(r"[\w(][\w .+()/-]{0,79}", re.ASCII)
# Outside these bounds an entry has a wrong unit: from a tenth of the slowest known memory to several times the fastest.
_BANDWIDTHS = (1e8, 1e14)
_MOST_MEMORY = 10**14
_TERA_RATES = (1e-4, 1e5)


def devices(*files: Path) -> tuple[Device, ...]:
    """Return the devices of a user's files, then the built-in ones, except those with the same name.

    Args:
        files: Further files of the same form. `~/.config/autodistill/devices.yaml` is read as well if it exists.

    Raises:
        InputError: As `read_devices`, or two such files use the same name.
    """
    own = Path(os.path.expanduser(USER_FILE))
    wanted = [*([own] if own.is_file() else []), *files]
    found: list[Device] = []
    for path in wanted:
        taken = {joined(name): name for device in found for name in device.names}
        for device in read_devices(path):
            twin = next((taken[key] for name in device.names if (key := joined(name)) in taken), "")
            if twin:
                raise InputError(f"{path} describes {device.name!r}, but there is {twin!r} already: take another name")
            found.append(device)
    return own_first(found, listed())


def own_first(own: Sequence[Device], others: Iterable[Device]) -> tuple[Device, ...]:
    """Return own devices, then the others. A device with the name of an own one is dropped and leaves its aliases."""
    owners = {joined(name): place for place, device in enumerate(own) for name in device.names}
    aliases = [list(device.aliases) for device in own]
    left = []
    for device in others:
        free = [alias for alias in device.aliases if joined(alias) not in owners]
        if (place := owners.get(joined(device.name))) is not None:
            aliases[place].extend(free)
        else:
            left.append(device if len(free) == len(device.aliases) else replace(device, aliases=tuple(free)))
    return (*(replace(device, aliases=tuple(found)) for device, found in zip(own, aliases, strict=True)), *left)


@cache
def listed() -> tuple[Device, ...]:
    """Return the built-in devices."""
    return read_devices(BUILT_IN)


@cache
def device_classes() -> Mapping[str, DeviceClass]:
    """Return the device classes by name."""
    return _classes(read_yaml(BUILT_IN)["classes"])


def device_from_json(data: Mapping[str, Any]) -> Device:
    """Read what `Device.to_json` wrote."""
    same = ("name", "memory_bytes", "usable_bytes", "sources", "measured")
    kind = device_classes()[data["class"]]
    return Device(
        aliases=tuple(data["aliases"]),
        kind=kind,
        own_runtimes=_differing(tuple(data.get("runtimes", ())), kind),
        bandwidth=data["bandwidth_bytes_per_second"],
        rates=data["operations_per_second"],
        **{name: data[name] for name in same},
    )


def read_devices(path: Path) -> tuple[Device, ...]:
    """Read a file of devices, in the format of the built-in `hardware.yaml`.

    Its `devices` map names to `class`, `memory` ("24GiB"), `bandwidth` (a second, "1008GB") and `rates` (tera
    operations a second by precision), and optionally `aliases`, `runtimes`, `usable`, `source` and `sources`. If
    `memory` lists several amounts, each is a device with its size in the name; the first can also be called without the
    size. The file's own `sources` map short names to texts, or to `text`, `read` (the address of the document against
    which the figures were checked) and `unread` (the figures that the document does not contain).

    Raises:
        InputError: The file is not of this form, or describes an impossible device; the message names it.
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
    names = [key for device in found for key in {joined(name) for name in device.names}]
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
            ffn_multiple=int(entry["ffn_multiple"]),
            ffn_reference=entry["ffn_reference"],
        )
        for name, entry in data.items()
    }


def _shares(entry: Mapping[str, Any]) -> Shares:
    def ranged(values: list[float], unit: float = 1.0) -> Band:
        low, typical, high = (unit * value for value in values)
        return Band(low=low, typical=typical, high=high)

    def perhaps(name: str) -> Band | None:
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
    """Return the shares that a runtime reaches on a class; if not measured, llama.cpp's with a wide band.

    transformers launches each operation of a layer from Python. The host takes about equally long for that, whatever
    device computes.
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
    """Return the devices of an entry, by name. Each has one amount of memory."""
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
        memory_bytes = _amount(amount, f"{where} has the memory")
        size = size_in_name(memory_bytes, 1024 if "i" in amount.lower() else 1000)
        names = [f"{one} {size}" for one in called]
        bare = called if amount == amounts[0] else ()
        found.append((names[0], {**entry, "memory": amount, "aliases": [*names[1:], *bare]}))
    return found


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
    called = (name, *aliases)
    if taken := [one for one in called if joined(one) == LOCAL or asks_for_a_kind(one, classes)]:
        raise InputError(f"{where} is called {taken[0]!r}, which asks for something else: take another name")
    if taken := [one for one in called if is_amount(one)]:
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
        # Compared before any computation: a whole number may be larger than any float.
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

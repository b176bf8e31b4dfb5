"""Lookup of a device by a user's spelling, or by the name that the operating system reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from autodistill.errors import InputError
from autodistill.hardware.catalog import device_classes, listed, own_first
from autodistill.hardware.device import ONE_CHIP, Device
from autodistill.hardware.names import (
    asks_for_a_kind,
    bare,
    built_cores,
    class_words,
    distance,
    has_size,
    is_amount,
    is_another_product,
    joined,
    name_and_cores,
    product_words,
    searched_words,
    split,
    without_system_words,
)

# A short name with one wrong letter still reaches this similarity; at 0.5, "4O90" is near to "A40".
_NEAR = 0.6
# A system reports less memory than is built in. It reports more than the stated GB if these are units of 2^30 bytes.
_REPORTED_MEMORY = (0.75, 1.1)


def find_device(text: str, known: Iterable[Device]) -> Device:
    """Look up a device by a user's spelling: "4090", "rtx 4060 ti 16gb", "A100-80GB".

    Case, blanks, hyphens and makers' names do not matter. Words may be left out if only one device has all the others.
    Words that make another product, such as "Ti", may not be left out. The amount of memory may be given even if the
    name does not contain it, with or without its unit.

    Raises:
        InputError: The text is only an amount of memory, with its unit or as a number of one or two digits. Or no
            device or several have this name; the message then lists the near ones.
    """
    refusal = _refusal(text)
    if refusal:
        raise InputError(refusal)
    known = tuple(known)
    closest, others = _closest(text, known)
    if len(closest) == 1:
        return closest[0]
    if closest:
        raise InputError(f"{text!r} can be {', '.join(device.name for device in closest)}: name one of them")
    names = {form(name): device.name for form in (joined, bare) for device in known for name in device.names}
    near = difflib.get_close_matches(bare(text) or joined(text), names, n=5, cutoff=_NEAR)
    shown = ", ".join(list(dict.fromkeys([*others, *(names[key] for key in near)]))[:5])
    hint = f"near to it are {shown}" if shown else "autodistill devices lists them"
    raise InputError(f"there is no device {text!r}; {hint}")


def _refusal(text: str) -> str:
    """Return why a text cannot be the name of a device, or an empty text."""
    if not split(text):
        return f"{text!r} names no device: autodistill devices lists them"
    if asks_for_a_kind(text, device_classes()):
        return (
            f"{text!r} is a kind of device, not a device: name one that autodistill devices lists, or local for this "
            "machine"
        )
    if is_amount(text):
        return (
            f"{text!r} is an amount of memory, not a device: give it as --budget, or name a device that autodistill "
            "devices lists"
        )
    return ""


def _closest(text: str, known: Sequence[Device]) -> tuple[list[Device], list[str]]:
    """Return the devices that a text can be the name of, and the names of those that are another product."""
    named = [(device, name) for device in known for name in device.names]
    for form in (joined, bare):
        same = [device for device, name in named if form(name) == form(text)]
        if same and form(text):
            return same[:1], []
    having, others = _candidates(text, named, bare_amounts=False)
    if not having:
        # A number may belong to another model's name before it is an amount of memory: "Pi 4" is not a Pi 5 with 4 GB.
        having, others = _candidates(text, named, bare_amounts=True)
    if not having:
        return [], others
    nearest = min(having.values())
    return [device for device in known if having.get(device.name) == nearest], others


def _candidates(
    text: str, named: Iterable[tuple[Device, str]], *, bare_amounts: bool
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return the distances of devices that have all words of `text`, and the ones that are another product."""
    having: dict[str, tuple[int, int]] = {}
    others = []
    for device, name in named:
        far = distance(text, name, _gigabytes(device), bare_amounts=bare_amounts)
        if far is None:
            continue
        if is_another_product(text, name):
            others.append(device.name)
        else:
            having[device.name] = min(having.get(device.name, far), far)
    return having, others


def _gigabytes(device: Device) -> range:
    """Return the numbers that a user may write for the device's memory: its GiB or GB, rounded, or any in between."""
    return range(round(device.memory_bytes / 2**30), round(device.memory_bytes / 10**9) + 1)


def matching(text: str, known: Iterable[Device]) -> tuple[Device, ...]:
    """Return the devices whose names or class contain all given words: "4090", "raspberry", "apple m3".

    Raises:
        InputError: No device has all of them; the message lists the near ones.
    """
    known, asked = tuple(known), set(split(text))
    found = tuple(
        device for device in known if asked and asked <= searched_words(" ".join((*device.names, device.kind.name)))
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
    """Return the device that a machine is, by what its system reports, or None if it is unknown or ambiguous.

    Args:
        name: Name of its board, processor or GPU, like "Raspberry Pi 5 Model B Rev 1.0".
        known: Known devices.
        memory_bytes: Memory of the system, which distinguishes boards of one name.
        cores: Cores of the system. If they are fewer than the processor's name says, the system has a share of it and
            is another device.
        mode: Power mode of a Jetson, as nvpmodel reports it.
    """
    built = built_cores(name)
    if built is not None and cores is not None and cores < built:
        return None
    fitting = list(known) if memory_bytes is None else _of_memory(memory_bytes, known)
    text = without_system_words(name, mode)
    closest = [] if _refusal(text) else _closest(text, fitting)[0]
    return closest[0] if len(closest) == 1 else None


def _of_memory(memory_bytes: int, known: Iterable[Device]) -> list[Device]:
    """Return the devices that a system with this memory may be; for a product of several sizes, only the nearest."""
    low, high = _REPORTED_MEMORY
    found = []
    nearest: dict[frozenset[str], tuple[float, Device]] = {}
    for device in known:
        share = memory_bytes / device.memory_bytes
        if device.kind.name not in ONE_CHIP:
            found.append(device)
        elif low <= share <= high:
            words = product_words(device.name)
            far = abs(share - 1)
            if words not in nearest or far < nearest[words][0]:
                nearest[words] = (far, device)
    return [*found, *(device for _, device in nearest.values())]


def is_machine(device: Device, machine: str, *, memory_bytes: int | None = None, cores: int | None = None) -> bool:
    """Return whether measurements that a machine stored under its own name belong to the device.

    If the memory of a machine is unknown and it is sold with several sizes, they belong to each size that is equally
    fast.

    Args:
        device: A known device, or this machine.
        machine: The device's name, or the machine's own as `machine_name` returns it. For a GPU it is the driver's
            name; for a processor, the system's name and its cores, like "Raspberry Pi 5 Model B Rev 1.0, 4 cores".
        memory_bytes, cores: The machine's memory and cores, if they are known and its name does not state the cores.
    """
    if machine == device.name:
        return True
    name, told = name_and_cores(machine)
    cores = told or cores
    found = device_of_system(name, own_first((device,), listed()), memory_bytes=memory_bytes, cores=cores)
    sized = memory_bytes is not None or has_size(name)
    if found is None or (found.name != device.name and (sized or not _same_but_size(found, device))):
        return False
    # If a processor's name does not state its cores, a share of it looks like the whole.
    return found.kind.name != "cpu" or built_cores(name) is not None


def _same_but_size(one: Device, other: Device) -> bool:
    """Return whether two devices differ only in the size of their memory."""
    same = one.kind.name == other.kind.name and (one.bandwidth, one.rates) == (other.bandwidth, other.rates)
    return same and one.kind.name in ONE_CHIP and product_words(one.name) == product_words(other.name)


def class_of_machine(machine: str, plain: str) -> str:
    """Return the device class of a machine by its own name, or a default class.

    Args:
        machine: As for `is_machine`, or "Apple GPU".
        plain: The default, if no known device has this name, or if devices of several classes have it.
    """
    words = class_words(machine)
    kinds = {
        device.kind.name for device in listed() for name in device.names if words and words <= searched_words(name)
    }
    return kinds.pop() if len(kinds) == 1 else plain

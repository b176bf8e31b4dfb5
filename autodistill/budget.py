"""The limits of a student on a device: memory, and latency where it is limited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from autodistill.device_files import device_from_json
from autodistill.devices import Device
from autodistill.errors import InputError
from autodistill.strategy import Deployment
from autodistill.units import Budget, LatencyLimit, format_bytes


@dataclass(frozen=True, kw_only=True)
class DeviceBudget(Budget):
    """A budget on a device, whose limits of latency are held to it.

    A limit at several streams wants the memory of as many: `batch` is raised to the most that one has.

    Attributes:
        device: What serves the student.
        latency: Hard limits beside that of memory; none where the tuple is empty.
    """

    device: Device
    latency: tuple[LatencyLimit, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "batch", max([self.batch, *(limit.streams for limit in self.latency)]))

    def describe(self) -> str:
        """All limits in words."""
        limits = (limit.describe() for limit in self.latency)
        return ", ".join([f"{super().describe()}, on {self.device.name}", *limits])

    def to_json(self) -> dict[str, Any]:
        """The budget as plain data."""
        limits = [asdict(limit) for limit in self.latency]
        return super().to_json() | {"device": self.device.to_json(), "latency": limits}


def on_gpu(budget: Budget) -> bool:
    """Whether its memory is that of a discrete GPU, and not that of a process."""
    return isinstance(budget, DeviceBudget) and budget.device.discrete


def served(deployments: Iterable[Deployment], budget: Budget) -> tuple[Deployment, ...]:
    """Those deployments whose runtime the budget's device has; all where it names no device."""
    if not isinstance(budget, DeviceBudget):
        return tuple(deployments)
    return tuple(one for one in deployments if not budget.device.lacks(one.runtime))


def memory_on(device: Device, asked: int | None) -> int:
    """Bytes that a student may take on a device: what is asked for, or else what is usable of its memory.

    Raises:
        InputError: The device has less than is asked for.
    """
    if asked is not None and asked > device.memory_bytes:
        raise InputError(
            f"a budget of {format_bytes(asked)} is more than the {format_bytes(device.memory_bytes)} that "
            f"{device.name} has, of which {format_bytes(device.usable_bytes)} are usable: lower --budget"
        )
    return device.usable_bytes if asked is None else asked


def completed(budget: Budget, before: Budget, *, memory: bool, batch: bool, device: bool) -> Budget:
    """A budget with what nobody asked for as a run stored it.

    Args:
        budget: As it is asked for now; its context is another's business.
        before: As the run stored it.
        memory, batch, device: Whether nobody asked for these.
    """
    kept = ({"memory_bytes": before.memory_bytes} if memory and device else {}) | (
        {"batch": before.batch} if batch else {}
    )
    budget = replace(budget, **kept)
    if not isinstance(before, DeviceBudget):
        return budget
    asked = budget if isinstance(budget, DeviceBudget) else None
    return DeviceBudget(
        memory_bytes=budget.memory_bytes,
        context=budget.context,
        batch=budget.batch,
        device=asked.device if asked and not device else before.device,
        latency=(asked.latency if asked else ()) or before.latency,
    )


def with_device_of(budget: Budget, before: Budget, *, by_default: bool = False) -> Budget:
    """A budget on a stored one's device, with the figures that it had, where it is on the same.

    A device is another as soon as it is measured again, and what a run has predicted must compare with what it will.

    Args:
        budget: As it is asked for now.
        before: As the run stored it.
        by_default: Whether nobody asked for the device, so that it is as before whatever its name.
    """
    if not (isinstance(budget, DeviceBudget) and isinstance(before, DeviceBudget)):
        return budget
    if not by_default and budget.device.name != before.device.name:
        return budget
    taken = budget.memory_bytes == budget.device.usable_bytes
    memory = before.device.usable_bytes if taken else budget.memory_bytes
    return replace(budget, device=before.device, memory_bytes=memory)


def limits_as(budget: Budget, before: Budget) -> Budget:
    """A budget as far as it can differ from one that names no device: such a one limits memory alone.

    Runs that were stored before there were limits of latency name none, whatever device they took the memory of.
    """
    if isinstance(before, DeviceBudget) or not isinstance(budget, DeviceBudget) or budget.latency:
        return budget
    return Budget(memory_bytes=budget.memory_bytes, context=budget.context, batch=budget.batch)


def read_budget(data: Mapping[str, Any]) -> Budget:
    """Reads what `to_json` of either budget wrote; a field that was not there then limits nothing.

    Raises:
        InputError: Not that.
    """
    try:
        plain = {name: data[name] for name in ("memory_bytes", "context", "batch") if name in data}
        if data.get("device") is None:
            return Budget(**plain)
        limits = tuple(LatencyLimit(**limit) for limit in data["latency"])
        return DeviceBudget(**plain, device=device_from_json(data["device"]), latency=limits)
    except (KeyError, TypeError) as error:
        raise InputError(f"this is no budget as a run stores it ({error}): {dict(data)}") from None

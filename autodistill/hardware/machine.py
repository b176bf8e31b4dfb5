"""The machine of this process: the cores, memory and GPUs that the process may use."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_NO_LIMIT = 2**62  # version 1 of control groups writes a number beyond any memory if there is no limit


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: The name that its driver reports.
        memory_bytes: All of its memory. Apple's GPU shares the machine's memory; its figure is what Metal allows a
            process.
        free_bytes: Memory that was free when it was checked, or None if that is unknown.
    """

    name: str
    memory_bytes: int
    free_bytes: int | None = field(default=None, compare=False)

    @property
    def usable_bytes(self) -> int:
        """GPU memory that may be used, as far as is known."""
        return self.memory_bytes if self.free_bytes is None else min(self.memory_bytes, self.free_bytes)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The resources that a process may use.

    Attributes:
        cpus: Cores, within the affinity and a container's quota.
        memory_bytes: Main memory, within the limits of the process's control groups, such as a container's.
        gpus: CUDA or ROCm devices that this process sees, or Apple's single one.
        bf16: Whether the training device computes in bfloat16 natively: the first CUDA or ROCm device, else the CPU.
        tf32: Whether that device multiplies float32 in TF32.
        free_bytes: The part of `memory_bytes` that was free when it was checked, or None if that is unknown.
    """

    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    bf16: bool = False
    tf32: bool = False
    free_bytes: int | None = field(default=None, compare=False)

    @property
    def usable_bytes(self) -> int:
        """Main memory that may be used, as far as is known."""
        return self.memory_bytes if self.free_bytes is None else min(self.memory_bytes, self.free_bytes)

    @property
    def accelerator(self) -> bool:
        """Whether there is a GPU."""
        return bool(self.gpus)


def detect() -> Machine:
    """Detect the resources of this machine; imports torch to find GPUs."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return Machine(
        cpus=_cpus(_CGROUP),
        memory_bytes=memory_bytes(),
        gpus=_gpus(),
        bf16=computes_bf16(kind),
        tf32=computes_tf32(kind),
        free_bytes=_free(_CGROUP),
    )


def memory_bytes() -> int:
    """Return the main memory that this process may use, within the limits of its control groups."""
    return _memory(_CGROUP)


def free_memory_bytes() -> int:
    """Return the main memory that is free now, within the limits of this process's control groups."""
    return _free(_CGROUP)


def cores() -> int:
    """Return the cores that this process may use, within the affinity and a container's quota."""
    return _cpus(_CGROUP)


def detect_for_training() -> Machine:
    """Detect as `detect` does, without Apple's GPU: it has no float64, so models run on the CPU there."""
    import torch

    machine = detect()
    return machine if torch.cuda.is_available() else replace(machine, gpus=())


def computes_bf16(kind: str) -> bool:
    """Return whether "cuda", "mps" or "cpu" computes in bfloat16 natively on this machine.

    A GPU older than Ampere, or a CPU without such instructions, only emulates it. That takes longer than float32.
    """
    import torch

    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Not every build has oneDNN: builds for Apple's processors do not.
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return kind == "mps" or (supported is not None and bool(supported()))


def computes_tf32(kind: str) -> bool:
    """Return whether "cuda", "mps" or "cpu" multiplies float32 in TF32 here. NVIDIA's GPUs do, from Ampere on."""
    import torch

    return kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def _cpus(cgroup: Path) -> int:
    # macOS and Windows do not report an affinity.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def _groups(cgroup: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from its own up to the root, in either version.

    Each may have a limit, and all limits apply. In a container the root's folder is often the process's own.
    """
    for line in _read(_OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        root = cgroup / controller if controllers else cgroup
        if ".." in path or (controllers and controller not in controllers.split(",")):
            continue
        group = root / path.strip("/")
        while group != root:
            yield group
            group = group.parent
    yield cgroup
    yield cgroup / controller


def _quota(cgroup: Path) -> float | None:
    """Return the cores that the control groups grant. Quota and period are one file in version 2, two in version 1."""
    granted = []
    for group in _groups(cgroup, "cpu"):
        words = _read(group / "cpu.max").split()
        if not words:
            words = [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (int(word) if word.lstrip("-").isdigit() else -1 for word in (*words, "", "")[:2])
        if quota > 0 and period > 0:
            granted.append(quota / period)
    return min(granted, default=None)


def _limits(cgroup: Path) -> Iterator[tuple[Path, int]]:
    """Yield the control groups that limit memory, and the bytes that each allows.

    A group above `memory.high` is slowed until it nearly stops, so that is a limit too.
    """
    for group in _groups(cgroup, "memory"):
        words = (_read(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes"))
        found = [int(word) for word in words if word.isdigit() and int(word) < _NO_LIMIT]
        if found:
            yield group, min(found)


def _memory(cgroup: Path) -> int:
    return min(int(psutil.virtual_memory().total), *(limit for _, limit in _limits(cgroup)), _NO_LIMIT)


def _free(cgroup: Path) -> int:
    """Return the free main memory: the least of the machine's and of each limited control group's."""
    left = (limit - _taken(group) for group, limit in _limits(cgroup))
    return max(0, min(int(psutil.virtual_memory().available), *left, _NO_LIMIT))


def _taken(group: Path) -> int:
    """Return the memory of a control group's processes, without file pages that were not read recently."""
    used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
    words = _read(group / "memory.stat").split()
    kept = dict(zip(words[::2], words[1::2], strict=False))
    idle = kept.get("total_inactive_file") or kept.get("inactive_file") or "0"
    return max(0, int(used or 0) - int(idle))


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def machine_name(machine: Machine, *, accelerated: bool | None = None) -> str:
    """Return the name under which measurements are stored: the first GPU, or the processor and its cores.

    Args:
        machine: As `detect` returns it.
        accelerated: Whether the GPU did the work. By default it did, if there is one.
    """
    gpu = machine.accelerator if accelerated is None else accelerated
    return machine.gpus[0].name if gpu and machine.gpus else f"{cpu_name()}, {machine.cpus} cores"


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if torch.cuda.is_available():
        devices = enumerate(torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        return tuple(
            Gpu(name=device.name, memory_bytes=device.total_memory, free_bytes=_free_of_gpu(index, device.total_memory))
            for index, device in devices
        )
    if torch.backends.mps.is_available():
        return (Gpu(name="Apple GPU", memory_bytes=int(torch.mps.recommended_max_memory())),)
    return ()


def _free_of_gpu(index: int, total: int) -> int | None:
    """Return the free memory of a GPU, or None if the optional library of its driver is not installed.

    The first GPU is asked directly, which creates a context on it: this process computes there anyway.
    """
    import torch

    if index == 0:
        return int(torch.cuda.mem_get_info(0)[0])
    try:
        return max(0, total - int(torch.cuda.device_memory_used(index)))
    except (ImportError, RuntimeError, OSError):
        return None

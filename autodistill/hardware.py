"""The machine this runs on: its cores, memory and GPUs, as far as this process may use them."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: As its driver gives it.
        memory_bytes: All of its memory; of Apple's, which shares the machine's, what Metal lets a process have of it.
    """

    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a process may use.

    Attributes:
        cpus: Cores, after affinity and a container's quota.
        memory_bytes: Main memory, after a container's limit.
        gpus: CUDA or ROCm devices that this process sees, or Apple's one.
        bf16: Whether what trains here, the first CUDA or ROCm device or else the CPU, computes in bfloat16 itself.
    """

    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    bf16: bool = False

    @property
    def accelerator(self) -> bool:
        """Whether there is a GPU."""
        return bool(self.gpus)


def detect() -> Machine:
    """Looks at this machine; imports torch to see its GPUs."""
    import torch

    bf16 = computes_bf16("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(cpus=_cpus(_CGROUP), memory_bytes=memory_bytes(), gpus=_gpus(), bf16=bf16)


def memory_bytes() -> int:
    """Main memory that this process may use, after a container's limit."""
    return _memory(_CGROUP)


def detect_for_training() -> Machine:
    """As `detect`, without Apple's GPU, which has no float64: there, models run on the CPU."""
    import torch

    machine = detect()
    return machine if torch.cuda.is_available() else replace(machine, gpus=())


def computes_bf16(kind: str) -> bool:
    """Whether "cuda", "mps" or "cpu" here computes in bfloat16 itself.

    A GPU older than Ampere, or a CPU without instructions for it, only emulates it, which takes longer than float32.
    """
    import torch

    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "mps" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpus(cgroup: Path) -> int:
    # macOS and Windows have no affinity to ask for.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores that the control group grants: `cpu.max` of version 2 holds quota and period, version 1 has a file each."""
    words = _read(cgroup / "cpu.max").split()
    if not words:
        words = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = (int(word) if word.lstrip("-").isdigit() else -1 for word in (*words, "", "")[:2])
    return quota / period if quota > 0 and period > 0 else None


def _memory(cgroup: Path) -> int:
    total = int(psutil.virtual_memory().total)
    limit = _read(cgroup / "memory.max") or _read(cgroup / "memory" / "memory.limit_in_bytes")
    # Version 1 writes a number beyond any memory where there is no limit, version 2 the word "max".
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def cpu_name() -> str:
    """The processor as its system names it."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def machine_name(machine: Machine, *, accelerated: bool | None = None) -> str:
    """What figures measured here are said to be of: the first GPU, or the processor and its cores.

    Args:
        machine: As `detect` finds it.
        accelerated: Whether the GPU did the work; where there is one it did, by default.
    """
    gpu = machine.accelerator if accelerated is None else accelerated
    return machine.gpus[0].name if gpu and machine.gpus else f"{cpu_name()}, {machine.cpus} cores"


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if torch.cuda.is_available():
        devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        return tuple(Gpu(name=device.name, memory_bytes=device.total_memory) for device in devices)
    if torch.backends.mps.is_available():
        return (Gpu(name="Apple GPU", memory_bytes=int(torch.mps.recommended_max_memory())),)
    return ()

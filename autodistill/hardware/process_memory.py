"""The operating system's view of process memory: the peak of a process, and the kills for lack of memory."""

from __future__ import annotations

from pathlib import Path

import psutil


def peak_memory(pid: int) -> int:
    """Return the peak resident memory so far, in bytes; outside Linux, the present resident memory."""
    status = Path(f"/proc/{pid}/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def forget_peak(pid: int) -> None:
    """Reset the peak to the present resident memory, if the system can do so."""
    clear = Path(f"/proc/{pid}/clear_refs")
    if clear.is_file():
        clear.write_text("5", encoding="ascii")


def killed_for_memory() -> int:
    """Return how many processes the kernel has killed for lack of memory since its start; 0 if it does not count."""
    counts = Path("/proc/vmstat")
    if counts.is_file():
        for line in counts.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0

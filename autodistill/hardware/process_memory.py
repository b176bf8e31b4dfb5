"""What a system says of processes' memory: the most that one had at a time, and how many were ended for want of it."""

from __future__ import annotations

from pathlib import Path

import psutil


def peak_memory(pid: int) -> int:
    """Bytes of the largest resident set so far; where the system keeps none (outside of Linux), of the present one."""
    status = Path(f"/proc/{pid}/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def forget_peak(pid: int) -> None:
    """Lets the peak begin anew at what is resident now, where the system can."""
    clear = Path(f"/proc/{pid}/clear_refs")
    if clear.is_file():
        clear.write_text("5", encoding="ascii")


def killed_for_memory() -> int:
    """Processes that the kernel has ended for want of memory since it started; 0 where it does not count them."""
    counts = Path("/proc/vmstat")
    if counts.is_file():
        for line in counts.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0

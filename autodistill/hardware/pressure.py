"""A pressure test of memory: a child process allocates up to a plan and reports what fits, without harm to others.

The child takes memory in steps and writes to all of it, because the system provides a page only when it is written. It
ends before it takes memory that others need: when less than a reserve is free, or when swapping begins. It is also the
first process that the system would end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autodistill.errors import AutoDistillError, InputError
from autodistill.hardware.machine import detect_for_training, free_memory_bytes
from autodistill.units import format_bytes
from autodistill.utils.plain_dataclass import ToJson

_STEP_BYTES = 64 * 2**20
_LEAST_RESERVE, _RESERVED_SHARE = 512 * 10**6, 0.1
_SECONDS = 300.0
_WHOLE = "all of the plan fits"


@dataclass(frozen=True, kw_only=True)
class Pressure(ToJson):
    """The result of a pressure test.

    Attributes:
        device: "cpu" or "cuda".
        planned_bytes: Bytes of the plan.
        held_bytes: Bytes that the child held at its end: the increase of its resident memory, or what torch's allocator
            holds on the GPU.
        fits: Whether all of the plan was held at once.
        because: Why the test ended.
        free_bytes, reserve_bytes: What was free before, and what is left to others whatever the plan is.
        seconds: Duration of the test.
        summary: torch's summary of a GPU's memory, or "" on a CPU.
    """

    device: str
    planned_bytes: int
    held_bytes: int
    fits: bool
    because: str
    free_bytes: int
    reserve_bytes: int
    seconds: float
    summary: str = ""

    def describe(self) -> str:
        """Return the result in words."""
        where = "GPU memory" if self.device == "cuda" else "memory"
        verdict = "fits" if self.fits else "does not fit"
        plan, held, free = map(format_bytes, (self.planned_bytes, self.held_bytes, self.free_bytes))
        return (
            f"Pressure test: the plan of {plan} {verdict}. Of {free} of {where} that was free, {held} was held, "
            f"and it ended since {self.because}."
        )


def stress(planned: int, *, device: str | None = None, reserve: int | None = None) -> Pressure:
    """Allocate up to a plan in a child process, and return what fits.

    Args:
        planned: Bytes of the plan.
        device: "cpu" or "cuda"; by default a GPU if this machine has one.
        reserve: Bytes that are left to others; by default a tenth of the memory, and at least 512 MB.

    Raises:
        InputError: There is no such device, or less than the reserve is free.
        AutoDistillError: The child failed.
    """
    machine = detect_for_training()
    device = device or ("cuda" if machine.gpus else "cpu")
    if device == "cuda" and not machine.gpus:
        raise InputError("there is no CUDA device here: leave the pressure test to a machine that has one")
    whole = machine.gpus[0].memory_bytes if device == "cuda" else machine.memory_bytes
    free = machine.gpus[0].usable_bytes if device == "cuda" else machine.usable_bytes
    reserve = max(_LEAST_RESERVE, int(_RESERVED_SHARE * whole)) if reserve is None else reserve
    if free <= reserve:
        raise InputError(
            f"{format_bytes(free)} of memory is free, and a pressure test leaves {format_bytes(reserve)} to others: "
            "end other programs that use the memory"
        )
    command = [sys.executable, "-m", "autodistill.hardware.pressure", str(planned), str(reserve), device]
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise AutoDistillError(
            f"the pressure test was ended after {_SECONDS:.0f} s: the machine is too busy for it, so try again later"
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise AutoDistillError(
            f"the pressure test failed ({why[0]}): end other programs that use the memory and try again"
        )
    last = json.loads(lines[-1])
    if done.returncode != 0:
        # The system ended the child: what it had reported until then is what fits.
        last |= {"fits": False, "because": "the system ended the test for its memory"}
    return Pressure(
        device=device,
        planned_bytes=planned,
        held_bytes=int(last["held"]),
        fits=bool(last["fits"]),
        because=str(last["because"]),
        free_bytes=free,
        reserve_bytes=reserve,
        seconds=time.monotonic() - began,
        summary=str(last.get("summary", "")),
    )


def fill(
    planned: int,
    reserve: int,
    *,
    take: Callable[[int], None],
    free: Callable[[], int],
    swapped: Callable[[], int],
    on_step: Callable[[int], None] = lambda held: None,
    step: int = _STEP_BYTES,
) -> tuple[int, str]:
    """Take memory in steps up to a plan, and end before others lack memory.

    Args:
        planned: Bytes of the plan.
        reserve: Bytes that stay free.
        take: Takes that many bytes and keeps them. It raises MemoryError, or torch's RuntimeError, if there are none.
        free: Returns the bytes that are free now.
        swapped: Returns the bytes that the machine has swapped out now.
        on_step: Called with the bytes that are held after each step.
        step: Bytes that are taken at once.

    Returns:
        The bytes that were taken, and why no more were taken.
    """
    held, before = 0, swapped()
    while held < planned:
        size = min(step, planned - held)
        if free() - size < reserve:
            return held, f"no more than {format_bytes(reserve)} would be left to others"
        try:
            take(size)
        except (MemoryError, RuntimeError):
            return held, "the allocator gave no more"
        held += size
        on_step(held)
        if swapped() > before + size:
            return held, "the machine began to swap"
    return held, _WHOLE


def _child(planned: int, reserve: int, device: str) -> None:
    """Fill memory, and print the held bytes as lines of JSON. The last line is the result."""
    with suppress(OSError):
        # If the limits fail, the system ends this process before any other.
        Path("/proc/self/oom_score_adj").write_text("1000")
    summary = ""
    if device == "cuda":
        import torch

        kept: list[Any] = []
        held, because = fill(
            planned,
            reserve,
            take=lambda size: kept.append(torch.zeros(size, dtype=torch.uint8, device="cuda")),
            free=lambda: int(torch.cuda.mem_get_info()[0]),
            swapped=lambda: 0,
            on_step=lambda held: _say(held, "it was going on"),
        )
        held, summary = torch.cuda.memory_allocated(), torch.cuda.memory_summary(abbreviated=True)
    else:
        import numpy as np

        blocks: list[Any] = []
        process = psutil.Process()
        start = process.memory_info().rss
        held, because = fill(
            planned,
            reserve,
            # A page exists only after it is written.
            take=lambda size: blocks.append(np.ones(size, np.uint8)),
            free=free_memory_bytes,
            swapped=lambda: int(psutil.swap_memory().used),
            on_step=lambda held: _say(held, "it was going on"),
        )
        held = process.memory_info().rss - start
    _say(held, because, fits=because == _WHOLE, summary=summary)


def _say(held: int, because: str, *, fits: bool = False, summary: str = "") -> None:
    print(json.dumps({"held": held, "because": because, "fits": fits, "summary": summary}), flush=True)


if __name__ == "__main__":
    _child(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

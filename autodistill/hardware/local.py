"""This machine as a device: its bandwidth and matrix rates are measured once, and stored if the machine was quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.hardware.background_load import Watch
from autodistill.hardware.catalog import device_classes, devices
from autodistill.hardware.device import LOCAL, Device
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import Machine, computes_bf16, detect, machine_name
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json, write_json

_doubtful: dict[Path, dict[str, Any]] = {}
"""Measurements of this process on a busy machine, by the path under which they would be stored."""

_METHOD = 2  # version of the measuring method; raise it with each change of the method
_BYTES = 256 * 2**20  # read at once: more than any cache holds
_SECONDS = 0.6  # for which one quantity is measured
_SQUARE = {"cpu": 1024, "cuda": 8192, "mps": 4096}


def local_device(cache: Path, machine: Machine | None = None, *, again: bool = False) -> Device:
    """Return this machine as a device: its first GPU if it has one, else its CPU.

    Bandwidth is the best result of several sums of a matrix of 256 MiB, or of its products with a vector. The rate is
    that of products of square matrices. Both use all cores. If other work shares the cores, both figures are too low.
    In that case stderr says so, and the figures are not stored.

    Args:
        cache: Folder in which the measurement is stored for the next time.
        machine: The machine as `detect` returns it.
        again: Whether to measure even if a measurement is stored.
    """
    machine = machine or detect()
    kind, name, memory = _identity(machine)
    key = {"method": _METHOD, "name": name, "cpus": machine.cpus, "kind": kind}
    path = cache / "devices" / f"{content_hash(key)}.json"
    # One search measures at a time: two at the same time would both get figures that are too low.
    with exclusive(path):
        figures = (None if again else _kept(path) or _doubtful.get(path)) or _fresh(kind, machine.cpus, path)
    found = device_classes()[{"cpu": "cpu", "cuda": "discrete-gpu", "mps": "unified"}[kind]]
    usable = max(memory // 2, int(memory * found.share) - found.reserve_bytes)
    reference = f"the memory, less what is kept for {found.reference}"
    if kind == "mps":
        # The class's share estimates this amount; here Metal itself reports it.
        usable, reference = machine.gpus[0].memory_bytes, "reported by Metal as the working set of a process"
    text = f"measured on this machine with {machine.cpus} cores, load average {figures['load']:.1f}"
    text += "".join(f"; {doubt}" for doubt in figures.get("doubts", ()))
    return Device(
        name=name,
        aliases=(LOCAL,),
        kind=found,
        memory_bytes=memory,
        usable_bytes=usable,
        bandwidth=figures["bandwidth"],
        rates=figures["rates"],
        sources={"memory": "reported by the system", "usable": reference, "bandwidth": text, "rates": text},
        measured=True,
    )


def known_devices(files: Sequence[Path] = (), local: Path | None = None, *, again: bool = False) -> tuple[Device, ...]:
    """Return the described devices, preceded by this machine if a cache is given to store its measurement.

    Args:
        files: A user's own files.
        local: The cache.
        again: As for `local_device`.

    Raises:
        InputError: As `devices`.
    """
    return (*([local_device(local, again=again)] if local else []), *devices(*files))


def choose_device(text: str, cache: Path, files: Sequence[Path] = ()) -> Device:
    """Return the device that a user names; "local" is this machine.

    Raises:
        InputError: As `find_device`.
    """
    if text.strip().lower() == LOCAL:
        return local_device(cache)
    return find_device(text, devices(*files))


def _identity(machine: Machine) -> tuple[str, str, int]:
    if not machine.gpus:
        return "cpu", machine_name(machine), machine.memory_bytes
    import torch

    if torch.cuda.is_available():
        return "cuda", machine_name(machine), machine.gpus[0].memory_bytes
    return "mps", machine_name(machine), machine.memory_bytes


def _kept(path: Path) -> dict[str, Any] | None:
    """Return an earlier measurement, or None if there is none or its file is damaged."""
    if not path.is_file():
        return None
    try:
        data = read_json(path)
        bandwidth, load = float(data["bandwidth"]), float(data["load"])
        rates = {str(key): float(rate) for key, rate in data["rates"].items()}
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return None
    whole = bandwidth > 0 and rates and min(rates.values()) > 0
    return {"bandwidth": bandwidth, "rates": rates, "load": load} if whole else None


def _fresh(kind: str, cpus: int, path: Path) -> dict[str, Any]:
    """Measure now. On a busy machine, warn and keep the figures for this process only."""
    figures = _measured(kind, cpus)
    doubts = figures.pop("doubts", ())
    if not doubts:
        _doubtful.pop(path, None)
        write_json(path, figures)
        return figures
    print(
        f"warning: this machine was busy while it was measured ({'; '.join(doubts)}), so its figures may be too low "
        "and are not kept: autodistill devices --local --again measures it when it is quiet",
        file=sys.stderr,
        flush=True,
    )
    _doubtful[path] = figures | {"doubts": doubts}
    return _doubtful[path]


def _measured(kind: str, cpus: int) -> dict[str, Any]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    try:
        with Watch(cpus) as watch:
            figures = {"bandwidth": _bandwidth(kind), "rates": _rates(kind)}
    finally:
        torch.set_num_threads(before)
    # A GPU's figures do not depend on the load of its machine's cores.
    doubts = watch.noise.doubts if kind == "cpu" else ()
    return {**figures, "load": watch.noise.load_average, "doubts": doubts}


def _bandwidth(kind: str) -> float:
    """Measure the best rate of reading a matrix, in bytes per second."""
    import torch

    dtype = torch.float32 if kind == "cpu" else torch.float16
    columns = 4096
    matrix = torch.ones(_BYTES // dtype.itemsize // columns, columns, dtype=dtype, device=kind)
    vector = torch.ones(columns, dtype=dtype, device=kind)
    # Which of the two comes nearer to the memory's bandwidth depends on torch's kernel for it.
    return _BYTES / min(_best(work, kind) for work in (lambda: torch.mv(matrix, vector), lambda: matrix.sum()))


def _rates(kind: str) -> dict[str, float]:
    """Measure products of square matrices, in operations per second, in precisions that are not emulated."""
    import torch

    size = _SQUARE[kind]
    names = {"fp32": torch.float32}
    names |= {"bf16": torch.bfloat16} if computes_bf16(kind) else {}
    names |= {} if kind == "cpu" else {"fp16": torch.float16}
    rates = {}
    for name, dtype in names.items():
        left, right = (torch.ones(size, size, dtype=dtype, device=kind) for _ in range(2))
        rates[name] = 2 * size**3 / _best(partial(torch.mm, left, right), kind)
    return rates


def _best(work: Callable[[], Any], kind: str) -> float:
    """Return the seconds of the fastest run."""
    import torch

    def wait() -> None:
        if kind != "cpu":
            getattr(torch, kind).synchronize()

    work()
    wait()
    best, ends = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < ends:
        begun = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - begun)
    return best

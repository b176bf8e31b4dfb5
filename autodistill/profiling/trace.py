"""A trace of steps by torch's profiler: a Chrome trace on disk, the time of each kind of operation, and counts."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing, unwritable

PRODUCTS, ATTENTION, OPTIMIZER, LOSS = "matrix products", "attention", "optimiser", "softmax and loss"
COPIES, INDEXING, ELEMENTWISE = "copies and casts", "indexing", "elementwise and norms"
LAUNCHING = "Python and launching"

# A part of an operation's name, and its kind. The first match counts.
_KINDS = (
    ("scaled_dot_product", ATTENTION),
    ("flash_attention", ATTENTION),
    ("efficient_attention", ATTENTION),
    ("adam", OPTIMIZER),
    ("logsumexp", LOSS),
    ("softmax", LOSS),
    ("topk", LOSS),
    ("nll_loss", LOSS),
    ("mm", PRODUCTS),
    ("aten::mv", PRODUCTS),
    ("aten::linear", PRODUCTS),
    ("mkldnn", PRODUCTS),
    ("copy", COPIES),
    ("aten::to", COPIES),
    ("aten::clone", COPIES),
    ("aten::cat", COPIES),
    ("aten::contiguous", COPIES),
    ("index", INDEXING),
    ("embedding", INDEXING),
    ("gather", INDEXING),
    ("scatter", INDEXING),
    ("nonzero", INDEXING),
    ("masked", INDEXING),
)
# Operations that return a value of the device to this process, which would have to wait for a GPU.
_READ_BACK = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"),
    "aten::repeat_interleave",
)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of a trace, over all of its steps.

    Attributes:
        operations: Calls of torch operations.
        read_back: Those that return a value to this process, which waits for it if a GPU computes.
        launches: Kernels that were started on a GPU.
        transfers, transferred_bytes: Copies between a GPU's memory and main memory, and their bytes.
        synchronizations: Calls that wait for a GPU.
    """

    operations: int = 0
    read_back: int = 0
    launches: int = 0
    transfers: int = 0
    transferred_bytes: int = 0
    synchronizations: int = 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The trace of some steps, and what was measured in it.

    Attributes:
        path: The Chrome trace, which chrome://tracing and Perfetto can show.
        steps: Number of traced steps.
        seconds: Time of a step without the profiler.
        traced_seconds: Time of a step with the profiler.
        kinds: Seconds of a traced step by kind of operation; for a GPU, those of its kernels. They add up to
            `traced_seconds`. Time that belongs to no operation is counted as "Python and launching".
        counts: Counts over all traced steps.
    """

    path: Path
    steps: int
    seconds: float
    traced_seconds: float
    kinds: Mapping[str, float]
    counts: Counts


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder to which no trace can be written. Create it if it is missing.

    Raises:
        InputError: The folder cannot be created or written.
    """
    try:
        make_folder(folder.absolute())
        probe = folder / ".autodistill-writes"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(folder, error) from error


def record(step: Callable[[], Any], path: Path, *, steps: int, device: str, name: str) -> Trace:
    """Run some steps to time them, and again to trace them, after one step for warming up; then write the trace.

    On a CUDA device each step is also an NVTX range, which Nsight Systems shows.

    Args:
        step: Runs one step.
        path: Path of the Chrome trace.
        steps: Number of steps that are timed, and that are traced.
        device: Device on which they compute.
        name: Name of a step in the trace.

    Raises:
        InputError: The trace cannot be written.
    """
    kind = torch.device(device).type
    step()
    _wait(kind)
    began = time.perf_counter()
    for _ in range(steps):
        with _nvtx(kind, name):
            step()
    _wait(kind)
    seconds = (time.perf_counter() - began) / steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            with record_function(name), _nvtx(kind, name):
                step()
        _wait(kind)
        traced = (time.perf_counter() - began) / steps
    try:
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
    except OSError as error:
        raise unwritable(path.parent, error) from error
    spent = _by_kind(profiler.events(), on_gpu=kind == "cuda")
    kinds = {one: total / steps for one, total in spent.items()}
    kinds[LAUNCHING] = max(0.0, traced - sum(kinds.values()))
    return Trace(
        path=path,
        steps=steps,
        seconds=seconds,
        traced_seconds=traced,
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
        counts=counted(json.loads(path.read_text(encoding="utf-8"))),
    )


def kind_of(operation: str) -> str:
    """Return the kind of an operation by its name, such as "aten::mm"."""
    return next((kind for part, kind in _KINDS if part in operation), ELEMENTWISE)


def counted(trace: Mapping[str, Any]) -> Counts:
    """Count operations, kernels, transfers and waits in a Chrome trace of torch's profiler."""
    found: Counter[str] = Counter()
    for event in trace.get("traceEvents", ()):
        category, name = str(event.get("cat", "")), str(event.get("name", ""))
        if event.get("ph") != "X":
            continue
        if category == "cpu_op":
            found["operations"] += 1
            found["read_back"] += name in _READ_BACK
        elif category in ("cuda_runtime", "cuda_driver"):
            found["launches"] += "LaunchKernel" in name
            found["synchronizations"] += "Synchronize" in name
        elif category == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name):
            found["transfers"] += 1
            found["transferred_bytes"] += int(event.get("args", {}).get("bytes", 0))
    return Counts(**found)


def _by_kind(events: Any, *, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of operations by kind: on a GPU those of kernels, otherwise those of the busiest thread."""
    found: Counter[str] = Counter()
    operations = [one for one in events if one.name.startswith("aten::")]
    threads = Counter[int]()
    for one in operations:
        threads[one.thread] += one.self_cpu_time_total
    main = max(threads, key=lambda thread: threads[thread], default=0)
    for one in operations:
        if on_gpu:
            found[kind_of(one.name)] += one.self_device_time_total / 1e6
        elif one.thread == main:
            found[kind_of(one.name)] += one.self_cpu_time_total / 1e6
    return dict(found)


@contextmanager
def _nvtx(kind: str, name: str) -> Iterator[None]:
    with torch.cuda.nvtx.range(name) if kind == "cuda" else nullcontext():
        yield


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def write_spans(spans: list[tuple[str, float, float]], path: Path) -> None:
    """Write named spans as a Chrome trace, for a runtime that torch's profiler cannot see.

    Args:
        spans: Names, with start and end of each in seconds of the same clock.
        path: Path of the file.

    Raises:
        InputError: The file cannot be written.
    """
    first = min(began for _, began, _ in spans)
    place = {"cat": "runtime", "ph": "X", "pid": 1, "tid": 1}
    times = ((name, 1e6 * (began - first), 1e6 * (ended - began)) for name, began, ended in spans)
    events = [{"name": name, "ts": start, "dur": length} | place for name, start, length in times]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")

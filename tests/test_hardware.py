from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from autodistill import hardware
from autodistill.hardware import Gpu, Machine, _cpus, _memory, detect, detect_for_training


def test_detects_this_machine() -> None:
    machine = detect()
    assert 1 <= machine.cpus <= (os.cpu_count() or 1)
    assert 0 < machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.accelerator == bool(machine.gpus)


def test_nothing_is_trained_on_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_gpus", lambda: (Gpu(name="Apple GPU", memory_bytes=8),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert detect().accelerator
    assert not detect_for_training().accelerator
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(hardware, "computes_bf16", lambda kind: kind == "cuda")
    assert detect_for_training() == detect()


@pytest.mark.parametrize("bf16", [True, False])
def test_bfloat16_is_of_what_trains(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """The CPU beside Apple's GPU, and beside no GPU; the GPU wherever CUDA has one."""
    monkeypatch.setattr(hardware, "computes_bf16", lambda kind: bf16 if kind == "cpu" else not bf16)
    for gpus, cuda, expected in (((), False, bf16), ((Gpu(name="A", memory_bytes=8),), True, not bf16)):
        monkeypatch.setattr(hardware, "_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        assert detect().bf16 is expected
    monkeypatch.setattr(hardware, "_gpus", lambda: (Gpu(name="Apple GPU", memory_bytes=8),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert detect_for_training().bf16 is bf16


def test_affinity_limits_the_cores() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert detect().cpus == 1
    finally:
        os.sched_setaffinity(0, before)


def test_an_accelerator_is_a_gpu() -> None:
    assert not Machine(cpus=4, memory_bytes=8).accelerator
    assert Machine(cpus=4, memory_bytes=8, gpus=(Gpu(name="A", memory_bytes=9),)).accelerator


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_container_s_quota_limits_the_cores(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert _cpus(_write(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "1048576\n"}, 2**20),
        ({"memory/memory.limit_in_bytes": "2097152\n"}, 2**21),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_a_container_s_limit_bounds_the_memory(files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    assert _memory(_write(tmp_path, files)) == (limit or psutil.virtual_memory().total)


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder

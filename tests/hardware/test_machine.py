from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from autodistill.hardware import machine as hardware
from autodistill.hardware.machine import Gpu, Machine, _cpus, _free, _memory, computes_bf16, detect, detect_for_training

# A process in nested groups: version 2, and version 1 with several controllers in one hierarchy.
OWN = "5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/a/b\n"


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
    for able in ("computes_bf16", "computes_tf32"):
        monkeypatch.setattr(hardware, able, lambda kind: kind == "cuda")
    assert detect_for_training() == detect()


@pytest.mark.parametrize("bf16", [True, False])
def test_precisions_are_of_what_trains(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """The CPU counts next to Apple's GPU and without a GPU. The GPU counts wherever CUDA has one."""
    for able in ("computes_bf16", "computes_tf32"):
        monkeypatch.setattr(hardware, able, lambda kind: bf16 if kind == "cpu" else not bf16)
    for gpus, cuda, expected in (((), False, bf16), ((Gpu(name="A", memory_bytes=8),), True, not bf16)):
        monkeypatch.setattr(hardware, "_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        assert (detect().bf16, detect().tf32) == (expected, expected)
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
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n", "cpu.max": "max 100000\n"}, 3),
        ({"cpu/a/b/cpu.cfs_quota_us": "400000\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_a_container_s_quota_limits_the_cores(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(hardware, "_OWN_GROUPS", _write(tmp_path / "own", {"cgroup": OWN}) / "cgroup")
    assert _cpus(_write(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "1048576\n"}, 2**20),
        ({"memory/memory.limit_in_bytes": "2097152\n"}, 2**21),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        # In nested groups every limit holds: a service's own, and those of the slices that contain it.
        ({"a/b/memory.max": "3145728\n"}, 3 * 2**20),
        ({"a/b/memory.max": "3145728\n", "a/memory.max": "2097152\n", "memory.max": "max\n"}, 2**21),
        ({"a/b/memory.max": "max\n", "a/memory.high": "1048576\n", "a/memory.max": "2097152\n"}, 2**20),
        ({"a/c/memory.max": "1048576\n"}, None),  # another group's
        (
            {"memory/a/memory.limit_in_bytes": "2097152\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"},
            2**21,
        ),
    ],
)
def test_a_container_s_limit_bounds_the_memory(
    files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_OWN_GROUPS", _write(tmp_path / "own", {"cgroup": OWN}) / "cgroup")
    assert _memory(_write(tmp_path, files)) == (limit or psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"memory.max": "max\n", "memory.current": "9\n"}, None),
        ({"memory.max": "1000\n", "memory.current": "700\n"}, 300),
        # The page cache of files is freed when memory is needed.
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 400\ninactive_file 200\n"}, 500),
        ({"a/b/memory.max": "1000\n", "a/b/memory.current": "100\n", "a/memory.max": "2000\n"}, 900),
        ({"a/b/memory.max": "1000\n", "a/memory.max": "2000\n", "a/memory.current": "1900\n"}, 100),
        ({"memory.max": "1000\n", "memory.current": "1200\n"}, 0),
        (
            {
                "memory/a/b/memory.limit_in_bytes": "1000\n",
                "memory/a/b/memory.usage_in_bytes": "800\n",
                "memory/a/b/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
            },
            500,
        ),
    ],
)
def test_what_is_free_is_what_others_leave(
    files: dict[str, str], free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_OWN_GROUPS", _write(tmp_path / "own", {"cgroup": OWN}) / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**12, available=10**6))
    assert _free(_write(tmp_path, files)) == (10**6 if free is None else free)


@pytest.mark.parametrize("own", ["", "0::/../../other\n", "4:memory:/gone\n0::/gone/too\n"])
def test_groups_that_cannot_be_seen_limit_nothing(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_OWN_GROUPS", _write(tmp_path / "own", {"cgroup": own}) / "cgroup")
    assert _memory(_write(tmp_path / "fs", {"memory.max": "1048576\n"})) == 2**20
    assert _memory(tmp_path / "nothing") == psutil.virtual_memory().total


def test_what_is_usable_is_free_and_no_more_than_there_is() -> None:
    assert Machine(cpus=1, memory_bytes=8).usable_bytes == 8
    assert Machine(cpus=1, memory_bytes=8, free_bytes=5).usable_bytes == 5
    assert Gpu(name="A", memory_bytes=8).usable_bytes == 8
    assert Gpu(name="A", memory_bytes=8, free_bytes=9).usable_bytes == 8
    # Two observations of a machine are equal.
    assert Machine(cpus=1, memory_bytes=8, free_bytes=5) == Machine(cpus=1, memory_bytes=8, free_bytes=6)


def test_a_build_without_onednn_computes_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for Apple's processors, where the operation that would report it does not exist."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert computes_bf16("cpu") is False
    assert computes_bf16("mps") is True
    assert detect().cpus >= 1


def test_free_memory_of_gpus_is_asked_of_the_first_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(index: int) -> int:
        if index == 2:
            raise ModuleNotFoundError("pynvml")
        return 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=f"G{index}", total_memory=100)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60, 100) if index == 0 else pytest.fail("asked"))
    monkeypatch.setattr(torch.cuda, "device_memory_used", used)
    assert [gpu.free_bytes for gpu in hardware._gpus()] == [60, 70, None]


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return folder
